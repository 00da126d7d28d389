"""What every search method is given, and what it leaves behind."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn

from ..modeling_sdq import SDQForImageClassification, pixels_of
from ..quantizers.activation import activation_range, best_step_and_sign
from ..strategy import Strategy
from ..training.evaluation import logits_of
from ..training.loaders import Batch, endless
from ..training.losses import kl_divergence
from .descent import Descent


@dataclass
class SearchLog:
    """What a search did, as plain numbers.

    start: layer -> bits at the start, start_cost: what they cost, start_average_bits. "Layer" stands for whatever shares one
    bitwidth: `layer1.0` is a block, `conv1[3]` an output channel.
    moves: one entry per step-down: batch, layer, from, to, damage (loss), error (its standard error), cost and average_bits
    (after it).
    estimates: every `every` batches: batch, cost, and layer -> [bits, damage or beta, standard error].
    batches: batches that were looked at. forward_images, backward_images: images that went through the network without and
    with a backward pass; what the search costs.
    """

    cost: str = "bits"
    unit: str = "average bits"
    method: str = "two_sided"
    every: int = 10
    start: dict[str, int] = field(default_factory=dict)
    start_cost: float = 0.0
    start_average_bits: float = 0.0
    moves: list[dict[str, Any]] = field(default_factory=list)
    estimates: list[dict[str, Any]] = field(default_factory=list)
    batches: int = 0
    forward_images: int = 0
    backward_images: int = 0

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


@dataclass
class Task:
    """One search: the arguments of `sdq_hf.search.search`, checked, and the way down from `start_bits` to the budgets."""

    model: SDQForImageClassification
    descent: Descent
    data: Iterable[Batch | Tensor] | None
    teacher: nn.Module | None
    seed: int
    weight_lr: float
    max_batches: int
    log: SearchLog
    accelerator: Accelerator
    on_step: Callable[[SearchState], None] | None
    resume_from: Mapping[str, Any] | None
    batch_norm: str = "batch"

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """The batches of `data` again and again, from batch number `start` on, with their images alone.

        Raises `ValueError` where there is no data, for a batch without images, and for an iterator that is used up.
        """
        if self.data is None:
            raise ValueError(f"The method {self.log.method!r} needs data.")
        batches: Iterator[Any]
        if isinstance(self.data, Iterator):
            batches = chain(islice(self.data, start, None), _used_up())
        else:
            batches = endless(cast(Any, self.data), start)
        return ({"pixel_values": pixels_of(batch)} for batch in batches)

    def calibrate(self) -> None:
        """Fit the activation steps to the data at the starting bits, unless they are fitted; all ranks take the first's."""
        model = self.model
        if model.is_calibrated():
            return
        # Inputs whose bits are searched come in drawn at others; the model's own quantizers get steps for the bits they have.
        own = {name: model.strategy[name].activation_bits for name in self.descent.inputs}
        probe = self._probe(self._start().with_activation_bits(own))
        probe.calibrate(self.batches())
        pairs = zip(model.quantized_layers().values(), probe.quantized_layers().values(), strict=True)
        for layer, fitted in pairs:
            if layer.input_quantizer is not None and fitted.input_quantizer is not None:
                layer.input_quantizer.load_state_dict(broadcast(dict(fitted.input_quantizer.state_dict())))

    def _start(self) -> Strategy:
        return self.descent.strategy(self.descent.start)

    def _probe(self, strategy: Strategy) -> SDQForImageClassification:
        """A copy of the model at the bits of `strategy`: changing the bits of a model fits its scales anew."""
        probe = copy.deepcopy(self.model)
        probe.set_strategy(strategy)
        return probe

    @torch.no_grad()
    def input_steps(self) -> dict[str, Tensor]:
        """Layer -> sign (0 or 1), step and relative squared error of its inputs at each candidate (float32 [3, candidates]).

        Of the layers whose inputs are searched, fitted to the first batches at the starting bits; all ranks take the first's.
        """
        if not self.descent.inputs:
            return {}
        probe, found = self._probe(self._start()), dict[str, Tensor]()

        def seen(name: str) -> Callable[[nn.Module, Any], None]:
            def look(module: nn.Module, inputs: Any) -> None:
                x, power_of_two = inputs[0].float(), self.model.config.scales == "power_of_two"
                columns = []
                for bits in self.descent.candidates:
                    step, signed = best_step_and_sign(x, bits, power_of_two)
                    rounded = torch.round(x / step).clamp_(*activation_range(bits, signed)).mul_(step)
                    error = (rounded - x).square().sum() / x.square().sum().clamp_min(1e-30)
                    columns.append(torch.stack([torch.full_like(step, float(signed)), step, error]))
                found[name] = torch.stack(columns, dim=1)

            return look

        layers = probe.quantized_layers()
        for name in self.descent.inputs:
            quantizer = layers[name].input_quantizer
            assert quantizer is not None
            quantizer.register_forward_pre_hook(seen(name))
        probe.calibrate(self.batches())
        return {name: cast(Tensor, broadcast(steps)) for name, steps in found.items()}

    def float_network(self) -> nn.Module:
        """The network whose outputs the search stays close to: the teacher, or the model itself as it is now, in float."""
        return float_copy(self.model) if self.teacher is None else self.teacher

    def copied(self, network: nn.Module) -> Mapping[str, Tensor] | None:
        """The model's own state, if it is what `network`, from `float_network`, has; a teacher has another."""
        return network.state_dict() if self.teacher is None else None

    def move(self, batch: int, name: str, damage: float, error: float = 0.0) -> None:
        """Step a layer down, and log it."""
        before = self.descent.bits[name]
        self.descent.step_down(name, damage)
        self.log.moves.append(
            {
                "batch": batch,
                "layer": name,
                "from": before,
                "to": self.descent.bits[name],
                "damage": damage,
                "error": error,
                "cost": self.descent.total(),
                "average_bits": self.descent.average_bits(),
            }
        )


def _used_up() -> Iterator[Batch]:
    """Stands behind the batches of an iterator, which cannot be gone through again."""
    raise ValueError(
        "The batches are used up: data is an iterator, which gives each of them once. Pass a DataLoader or a list, which the "
        "search can go through again and again."
    )
    yield


def float_copy(model: SDQForImageClassification) -> SDQForImageClassification:
    """The float network that `model` is now: a frozen copy in eval mode."""
    twin = copy.deepcopy(model).eval().requires_grad_(False)
    for layer in twin.quantized_layers().values():
        layer.enabled = False
    return twin


def distillation_loss(
    model: SDQForImageClassification, teacher: nn.Module, images: Tensor, accelerator: Accelerator
) -> Tensor:
    """KL divergence from the teacher's outputs, mean over the batch; its gradient is that of METHOD 4's KD."""
    with accelerator.autocast():
        with torch.no_grad():
            target = logits_of(teacher(images))
        logits = logits_of(model(pixel_values=images))
    return kl_divergence(logits, target).mean()
