"""timm's optimizers and schedulers, with learned scales in a parameter group of their own."""

from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

import timm.optim
import torch
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn

from ..layers import quantizer_parameters
from .ranges import BELOW_ONE, FRACTION, NOT_NEGATIVE, POSITIVE

# Those of timm that need no metric and no further options.
SCHEDULERS = ("cosine", "tanh", "step", "poly")


@dataclass
class OptimizerArguments:
    """Options of one training; names as in timm."""

    epochs: float = field(
        default=30.0,
        metadata={
            "help": "Passes over the training images; fractions are possible; 0: calibration only.",
            "range": NOT_NEGATIVE,
        },
    )
    max_steps: int | None = field(
        default=None,
        metadata={
            "help": "Updates of a fine-tune, in place of epochs that are not 0; needed where data are streamed.",
            "range": POSITIVE,
        },
    )
    eval_steps: int = field(
        default=1000, metadata={"help": "Updates between validations where data are streamed.", "range": POSITIVE}
    )
    opt: str = field(default="adamw", metadata={"help": "timm optimizer, e.g. adamw, sgd (Nesterov), lamb."})
    lr: float = field(default=1e-3, metadata={"help": "Learning rate at the peak.", "range": POSITIVE})
    weight_decay: float = field(
        default=1e-4, metadata={"help": "Of conv and linear weights only.", "range": NOT_NEGATIVE}
    )
    momentum: float = field(
        default=0.9, metadata={"help": "Momentum, for optimizers that have it.", "range": BELOW_ONE}
    )
    sched: str = field(default="cosine", metadata={"help": f"timm scheduler: {', '.join(SCHEDULERS)}."})
    warmup_epochs: int = field(
        default=1, metadata={"help": "Epochs in which the learning rate rises linearly.", "range": NOT_NEGATIVE}
    )
    min_lr: float = field(default=0.0, metadata={"help": "Learning rate at the end.", "range": NOT_NEGATIVE})
    clip_grad: float = field(
        default=0.0, metadata={"help": "Largest gradient norm; 0: no clipping.", "range": NOT_NEGATIVE}
    )
    freeze_bn: float = field(
        default=1.0,
        metadata={
            "help": "Part of the training, 0 to 1, after which batch norm keeps its statistics; 1: never.",
            "range": FRACTION,
        },
    )
    scale_lr: float = field(
        default=1.0, metadata={"help": "Learning rate of scales and steps, relative to lr.", "range": NOT_NEGATIVE}
    )


def parameter_groups(model: nn.Module, lr: float, weight_decay: float, scale_lr: float) -> list[dict[str, Any]]:
    """Groups for an optimizer: weights; norms and biases (no decay); scales and steps (own rate, no decay).

    The middle group follows timm's rule: every parameter with at most one dimension.
    """
    learned = dict(quantizer_parameters(model))
    decay: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name not in learned:
            (plain if parameter.ndim <= 1 else decay).append(parameter)
    groups = [
        {"params": decay, "weight_decay": weight_decay, "lr": lr},
        {"params": plain, "weight_decay": 0.0, "lr": lr},
        {"params": list(learned.values()), "weight_decay": 0.0, "lr": lr * scale_lr},
    ]
    return [group for group in groups if group["params"]]


def check_names(options: OptimizerArguments) -> None:
    """`ValueError` with near names for an optimizer or a scheduler that is unknown."""
    for kind, name, known in (
        ("optimizer", options.opt, timm.optim.list_optimizers()),
        ("scheduler", options.sched, SCHEDULERS),
    ):
        if name not in known:
            near = get_close_matches(name, known, n=3) or list(known)[:3]
            raise ValueError(f"Unknown {kind} {name!r}; near names: {', '.join(near)}.")


def create_optimizer(model: nn.Module, options: OptimizerArguments) -> torch.optim.Optimizer:
    """timm's optimizer `options.opt`; `ValueError` for a name that timm does not know."""
    check_names(options)
    groups = parameter_groups(model, options.lr, options.weight_decay, options.scale_lr)
    return timm.optim.create_optimizer_v2(
        groups, opt=options.opt, lr=options.lr, weight_decay=options.weight_decay, momentum=options.momentum
    )


def create_scheduler(
    optimizer: torch.optim.Optimizer, options: OptimizerArguments, updates_per_epoch: int
) -> Scheduler:
    """timm's scheduler; `step_update(n)` before optimizer update n. The warm-up takes at most a fifth of the training."""
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=options.sched,
        num_epochs=options.epochs,  # type: ignore[arg-type]
        min_lr=options.min_lr,
        warmup_lr=0.0,
        warmup_epochs=min(options.warmup_epochs, options.epochs / 5),  # type: ignore[arg-type]
        step_on_epochs=False,
        updates_per_epoch=updates_per_epoch,
    )
    return scheduler
