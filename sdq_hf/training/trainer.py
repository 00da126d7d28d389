"""Quantization-aware training with transformers' `Trainer`: what it needs beside the model."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..layers import quantizer_parameters
from ..modeling_sdq import SDQForImageClassification
from ..quantizers.positive import floors, set_floors
from ..writing import save_tensors

logger = logging.getLogger(__name__)
REAL_WEIGHTS = "real_weights.safetensors"
_FLOOR = "floor of "


class QATCallback(TrainerCallback):
    """Makes a training with `Trainer` that is resumed equal the uninterrupted one, to the last bit.

    That is so where loading an image draws no random number, or the checkpoint is of the end of an epoch: Trainer's loader
    is a batch ahead when a checkpoint is written, so augmentations draw otherwise from there on.

    Trainer's checkpoints are models: they hold quantized weights. This writes the real weights beside them, with the least
    values of the scales, and takes both back when a training goes on from a checkpoint in `output_dir`. Without it the
    training would go on from the checkpoint's quantized weights: from the same function, but not on the same path.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model: SDQForImageClassification = kwargs["model"]
        _warn_of_decay(model, kwargs.get("optimizer"))
        path = _checkpoint(args, state) / REAL_WEIGHTS
        if not state.global_step:
            return
        weights = load_file(path) if path.exists() else {}
        least = {name: weights.pop(name).tolist() for name in list(weights) if name.startswith(_FLOOR)}
        if not _fit(weights, model):
            logger.warning(
                f"{path} is missing or of another training: this one goes on from the checkpoint's quantized weights, the "
                "same function, but not on the path of the training that was stopped."
            )
            return
        layers = model.quantized_layers()
        with torch.no_grad():
            for name, weight in weights.items():
                layers[name].weight.copy_(weight)
        set_floors(model, {name.removeprefix(_FLOOR): value for name, value in least.items()})

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            layers = kwargs["model"].quantized_layers()
            weights = {name: layer.weight for name, layer in layers.items()}
            for name, least in floors(kwargs["model"]).items():
                if least is not None:
                    weights[_FLOOR + name] = torch.tensor(least, dtype=torch.float64)
            save_tensors(weights, _checkpoint(args, state) / REAL_WEIGHTS)


def _warn_of_decay(model: SDQForImageClassification, optimizer: torch.optim.Optimizer | None) -> None:
    learned = {id(parameter) for _, parameter in quantizer_parameters(model)}
    groups = optimizer.param_groups if optimizer is not None else []
    if any(group.get("weight_decay") and learned.intersection(map(id, group["params"])) for group in groups):
        logger.warning(
            "The optimizer shrinks the learned scales and steps by weight decay. Pass Trainer optimizers=(sdq_hf.training."
            "optim.create_optimizer(model, OptimizerArguments(lr=..., weight_decay=...)), None), which leaves them out."
        )


def _fit(weights: Mapping[str, Tensor], model: SDQForImageClassification) -> bool:
    """Whether `weights` are those of all layers of `model`, and quantized to what it computes with."""
    layers = model.quantized_layers()
    return weights.keys() == layers.keys() and all(
        torch.equal(
            layer.weight_quantizer.codes(weights[name].to(layer.weight)), layer.weight_quantizer.codes(layer.weight)
        )
        for name, layer in layers.items()
    )


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
