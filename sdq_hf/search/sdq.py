"""`search`: one descent, one strategy per budget (phase 1 of SDQ)."""

import copy
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, cast

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from ..costs import get_cost
from ..modeling_sdq import SDQForImageClassification
from ..strategy import Strategy
from ..training.optim import OptimizerArguments, create_optimizer
from .descent import BudgetError, Descent
from .errors import quantization_errors
from .stochastic_weights import StochasticWeights, searching
from .updates import Paper, TwoSided

logger = logging.getLogger(__name__)

METHODS = ("two_sided", "paper", "greedy")
Batch = Mapping[str, Tensor]


@dataclass
class SearchLog:
    """What a search did, as plain numbers.

    start: layer -> bits at the start, start_cost: what they cost.
    moves: one entry per step-down: batch, layer, from, to, damage (loss), error (its standard error), cost (after it).
    estimates: every `every` batches: batch, cost, and layer -> [bits, damage or beta, standard error].
    """

    cost: str = "bits"
    method: str = "two_sided"
    every: int = 10
    start: dict[str, int] = field(default_factory=dict)
    start_cost: float = 0.0
    moves: list[dict[str, Any]] = field(default_factory=list)
    estimates: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass(frozen=True)
class SearchState:
    """How far a running search is: passed to `on_step` after each batch."""

    batch: int
    cost: float
    average_bits: float
    loss: float
    images: int
    moved: str | None
    state_dict: Callable[[], dict[str, Any]]


def search(
    model: SDQForImageClassification,
    data: Iterable[Batch] | None,
    budgets: Sequence[float],
    cost: str = "bits",
    method: str = "two_sided",
    *,
    teacher: nn.Module | None = None,
    seed: int = 0,
    start_bits: int | None = None,
    floors: Mapping[str, int] | None = None,
    weight_lr: float = 3e-4,
    max_batches: int = 100_000,
    log: SearchLog | None = None,
    accelerator: Accelerator | None = None,
    on_step: Callable[[SearchState], None] | None = None,
    resume_from: Mapping[str, Any] | None = None,
    **options: Any,
) -> list[Strategy]:
    """Learn a strategy for each budget, in one descent.

    The model is left as it was, weights, scales, clips and strategy: pass a strategy of the result to
    `model.set_strategy`, and recalibrate batch norm (`model.recalibrate_batch_norm`) before it is evaluated.

    Args:
        model: with its pretrained float weights. Activation steps that are not fitted yet are fitted to the first batches.
        data: batches `{"pixel_values": [B, C, H, W]}`, iterated again and again (`set_epoch` is called when there).
            "greedy" needs none.
        budgets: average bits of the searchable layers (cost "bits"), or BitOPs of the whole network for one image
            (cost "bitops"). The strategy found costs at most the budget, and less by no more than 0.05 bits or 1 %.
        method: "two_sided" (default; our extension), "paper", or the training-free control "greedy".
        teacher: gives the logits to stay close to; default: the model itself in float.
        seed: of the draws. They depend on it and on the batch's number alone, so all ranks of a distributed run agree.
        start_bits: rung where all layers start; default 6, or the lowest that is above every budget.
        floors: pattern of layer names -> fewest bits.
        weight_lr: learning rate (AdamW) at which the weights follow the search, as in the paper's first phase, so that
            damage is measured in a network that has adapted to its bits; 0 keeps them frozen.
        max_batches: gives up after so many, with a `BudgetError` that says how far it came.
        log: is filled with estimates and moves. on_step: is called after each batch.
        accelerator: of a distributed or mixed-precision run; gradients to the DBPs are averaged over its ranks.
        resume_from: a `SearchState.state_dict()` of an interrupted search with the same arguments.
            Plain numbers that JSON can hold, but for the mapping of tensors under "tensors".
        options: of the method; see `sdq_hf.search.updates.TwoSided` and `Paper`.

    Returns strategies in the order of `budgets`. Raises `BudgetError` (a `ValueError`) for a budget out of reach, before
    any work is done.
    """
    if method not in METHODS:
        near = get_close_matches(method, METHODS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"Unknown search method {method!r}: expected one of {', '.join(METHODS)}.{hint}")
    descent = Descent(model.strategy, get_cost(cost), budgets, model.config.candidates, start_bits, floors)
    log = SearchLog() if log is None else log
    log.cost, log.method = cost, method
    log.start, log.start_cost = dict(descent.start), descent.total(descent.start)
    if method == "greedy":
        _no_options(method, options)
        return _greedy(model, descent, log)
    if data is None:
        raise ValueError(f"The method {method!r} needs data; only 'greedy' does without.")
    update: TwoSided | Paper
    if method == "paper":
        errors = quantization_errors(model, descent.names, descent.candidates)
        update = Paper(descent, seed, errors, **options)
    else:
        update = TwoSided(descent, seed, **options)
    return _descend(
        model,
        data,
        descent,
        update,
        teacher,
        weight_lr,
        max_batches,
        log,
        accelerator or Accelerator(),
        on_step,
        resume_from,
    )


def _no_options(method: str, options: Mapping[str, Any]) -> None:
    if options:
        raise TypeError(f"The method {method!r} takes no options, got {', '.join(options)}.")


def _greedy(model: SDQForImageClassification, descent: Descent, log: SearchLog) -> list[Strategy]:
    """The control without training: each step takes the layer whose quantization error grows least per saved cost."""
    errors = quantization_errors(model, descent.names, descent.candidates)

    def growth(name: str) -> float:
        lower = descent.next_bits(name)
        assert lower is not None
        return errors[name][lower] - errors[name][descent.bits[name]]

    while not descent.done:
        name = min(descent.movable, key=lambda name: growth(name) / descent.saved(name))
        _move(descent, log, len(log.moves), name, growth(name), 0.0)
    return descent.strategies()


def _move(descent: Descent, log: SearchLog, batch: int, name: str, damage: float, error: float) -> None:
    before = descent.bits[name]
    descent.step_down(name, damage)
    log.moves.append(
        {
            "batch": batch,
            "layer": name,
            "from": before,
            "to": descent.bits[name],
            "damage": damage,
            "error": error,
            "cost": descent.total(),
        }
    )


def _descend(
    model: SDQForImageClassification,
    data: Iterable[Batch],
    descent: Descent,
    update: TwoSided | Paper,
    teacher: nn.Module | None,
    weight_lr: float,
    max_batches: int,
    log: SearchLog,
    accelerator: Accelerator,
    on_step: Callable[[SearchState], None] | None,
    resume_from: Mapping[str, Any] | None,
) -> list[Strategy]:
    step = 0
    if resume_from is not None:
        step = resume_from["batch"]
        descent.load_state_dict(resume_from["descent"])
        update.load_state_dict(resume_from["update"])
        log.moves, log.estimates = list(resume_from["moves"]), list(resume_from["estimates"])
    elif not model.is_calibrated():
        # On a copy: changing the bits of a model fits its scales anew.
        probe = copy.deepcopy(model)
        probe.set_strategy(model.strategy.with_bits(descent.start))
        probe.calibrate(data)
        pairs = zip(model.quantized_layers().values(), probe.quantized_layers().values(), strict=True)
        for layer, fitted in pairs:
            if layer.input_quantizer is not None and fitted.input_quantizer is not None:
                layer.input_quantizer.load_state_dict(fitted.input_quantizer.state_dict())
    teacher = _float_copy(model) if teacher is None else teacher
    weights = StochasticWeights(model, trained=weight_lr > 0)
    # Gradients of half precision underflow unless the loss is scaled; what comes out is scaled back.
    scale = 1024.0 if accelerator.mixed_precision == "fp16" else 1.0
    try:
        with searching(model, trained=weight_lr > 0) as parameters:
            training = _Training(model, parameters, weight_lr, accelerator, scale)
            tensors: Mapping[str, Tensor] = {}
            if resume_from is not None:
                tensors = resume_from.get("tensors", {})
                training.load(tensors)
            for name in descent.names:
                weights.set(name, descent.bits[name], descent.next_bits(name), tensors.get(f"scales.{name}"))

            def state_dict() -> dict[str, Any]:
                state = {
                    "batch": step,
                    "descent": descent.state_dict(),
                    "update": update.state_dict(),
                    "moves": log.moves,
                    "estimates": log.estimates,
                }
                if weight_lr > 0:
                    scales = {f"scales.{name}": value for name, value in weights.scales().items()}
                    state["tensors"] = {**training.tensors(), **scales}
                return state

            batches = endless(data, start=step)
            while not descent.done:
                if step >= max_batches:
                    raise BudgetError(
                        f"The search reached {descent.total():.4g} {descent.cost.unit} in {max_batches} batches, and its "
                        f"budget of {min(descent.budgets):g} was not met. Raise max_batches, or cost_weight or lr of "
                        "the paper's method."
                    )
                images = next(batches)["pixel_values"].to(model.device)
                drawn = update.draw(step)
                weights.choose(drawn)
                loss = _distillation_loss(model, teacher, images, accelerator)
                (loss * scale).backward()
                names, gradients = weights.gradients()
                gradients = cast(Tensor, accelerator.reduce(gradients / scale, reduction="mean"))
                values = dict.fromkeys(descent.names, 0.0) | dict(zip(names, gradients.tolist(), strict=True))
                # Half precision can overflow: such a batch tells nothing.
                if training.step() and math.isfinite(sum(values.values())):
                    update.observe(values, drawn)
                move = update.next_move()
                if move is not None:
                    _move(descent, log, step, move.layer, move.damage, move.error)
                    weights.set(move.layer, descent.bits[move.layer], descent.next_bits(move.layer))
                    update.reset(move.layer)
                if step % log.every == 0:
                    log.estimates.append(
                        {
                            "batch": step,
                            "cost": descent.total(),
                            "layers": {n: [descent.bits[n], *v] for n, v in update.estimates().items()},
                        }
                    )
                step += 1
                if on_step is not None:
                    moved = None if move is None else move.layer
                    average = descent.average_bits()
                    on_step(SearchState(step, descent.total(), average, loss.item(), len(images), moved, state_dict))
    finally:
        weights.clear()
    return descent.strategies()


class _Training:
    """Weights that follow the search, by AdamW on its loss; nothing where there are no `parameters` to train."""

    def __init__(
        self,
        model: SDQForImageClassification,
        parameters: list[nn.Parameter],
        lr: float,
        accelerator: Accelerator,
        scale: float,
    ):
        self.model, self.parameters, self.accelerator, self.scale = model, parameters, accelerator, scale
        self.optimizer = create_optimizer(model, OptimizerArguments(lr=lr, weight_decay=0.0)) if parameters else None

    def step(self) -> bool:
        """Update the weights; False, and nothing is changed, where a gradient is not finite."""
        if self.optimizer is None:
            return True
        used = [parameter for parameter in self.parameters if parameter.grad is not None]
        flat = torch.cat([cast(Tensor, parameter.grad).reshape(-1) for parameter in used]) / self.scale
        flat = cast(Tensor, self.accelerator.reduce(flat, reduction="mean"))
        if self.scale != 1 and not flat.isfinite().all():
            self.optimizer.zero_grad()
            return False
        for parameter, grad in zip(used, flat.split([p.numel() for p in used]), strict=True):
            parameter.grad = grad.view(parameter.shape)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return True

    def tensors(self) -> dict[str, Tensor]:
        """Copies of the model's and the optimizer's tensors."""
        assert self.optimizer is not None
        found = {f"model.{key}": value for key, value in self.model.state_dict().items()}
        for index, values in self.optimizer.state_dict()["state"].items():
            found |= {f"optimizer.{index}.{key}": value for key, value in values.items()}
        return {key: value.detach().clone().contiguous() for key, value in found.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        if self.optimizer is None:
            return
        groups: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}}
        for key, value in tensors.items():
            kind, _, rest = key.partition(".")
            if kind in groups:
                groups[kind][rest] = value
        if not groups["model"]:
            raise ValueError("The saved search trained no weights (weight_lr was 0): resume it with weight_lr=0.")
        self.model.load_state_dict(groups["model"])
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in groups["optimizer"].items():
            index, _, field_name = key.partition(".")
            state.setdefault(int(index), {})[field_name] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})


def _float_copy(model: SDQForImageClassification) -> nn.Module:
    """The float network as it is now, which the search stays close to."""
    twin = copy.deepcopy(model).eval().requires_grad_(False)
    for layer in twin.quantized_layers().values():
        layer.enabled = False
    return twin


def _distillation_loss(
    model: SDQForImageClassification, teacher: nn.Module, images: Tensor, accelerator: Accelerator
) -> Tensor:
    """KL divergence from the teacher's outputs, mean over the batch; its gradient is that of METHOD 4's KD."""
    with accelerator.autocast():
        with torch.no_grad():
            target = _logits(teacher(images))
        logits = _logits(model(pixel_values=images))
    return F.kl_div(
        F.log_softmax(logits.float(), -1), F.log_softmax(target.float(), -1), reduction="batchmean", log_target=True
    )


def _logits(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


def endless(data: Iterable[Batch], start: int = 0) -> Iterator[Batch]:
    """The batches of `data` again and again, from batch number `start` on; each pass is an epoch of its own.

    `set_epoch` is called where the loader has it, so a resumed run sees the order that it would have seen.
    """
    number, epoch = 0, 0
    while True:
        if hasattr(data, "set_epoch"):
            data.set_epoch(epoch)
        elif hasattr(getattr(data, "sampler", None), "set_epoch"):
            data.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        before = number
        for batch in data:
            if number >= start:
                yield batch
            number += 1
        if number == before:
            raise ValueError("The data has no batch: is the split empty, or smaller than one batch?")
        epoch += 1
