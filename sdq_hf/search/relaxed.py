"""Rivals that train relaxed bitwidths by gradient descent, one search a budget.

Their weights are mixtures of quantized weights, where SDQ's are one of the two at random.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor

from ..layers import QuantizedLayer, quantized_layers
from ..strategy import Strategy
from .assignment import least_sum
from .errors import scale_at, weight_at
from .sdq import Training
from .stochastic_weights import searching
from .task import Batch, SearchState, Task, distillation_loss

# A layer's parameter and the number of its rungs -> rung -> share, of the rungs in the mixture.
Shares = Callable[[Tensor, int], dict[int, Tensor]]


@dataclass(frozen=True)
class Relaxation:
    """How bitwidths are relaxed, by one parameter for each layer, and how these are trained.

    start: number of rungs -> parameter. price: parameter, rung -> what it costs to end at that rung; the least sum within
    the budget is taken. bounded: whether parameters are kept between 0 and the highest rung. The others: as in `fracbits`.
    """

    start: Callable[[int], Tensor]
    shares: Shares
    price: Callable[[Tensor, int], float]
    bounded: bool
    batches: int
    lr: float
    cost_weight: float


def fracbits(task: Task, batches: int = 400, lr: float = 0.05, cost_weight: float = 1.0) -> list[Strategy]:
    """FracBits (Yang and Jin 2021): linear interpolation between the two bitwidths next to a fractional one.

    `w_q = (1 - f) Q_floor(w) + f Q_ceil(w)` for a layer at lambda = floor + f on its ladder; the loss is the KL divergence
    from the float network plus `cost_weight |cost(lambda) / budget - 1|`. Afterwards bits are the nearest whole ones to
    lambda within the budget (least sum of squared distances; our interpretation of their rounding).

    Args:
        batches: of each budget's search. lr: of lambda, by SGD with momentum 0.9, falling to 0 along a cosine.
    """

    def distance(place: Tensor, rung: int) -> float:
        return (place.item() - rung) ** 2

    def top(rungs: int) -> Tensor:
        return torch.tensor(rungs - 1.0)

    return _relaxed(task, Relaxation(top, fracbits_shares, distance, True, batches, lr, cost_weight))


def edmips(task: Task, batches: int = 400, lr: float = 0.2, cost_weight: float = 1.0) -> list[Strategy]:
    """EdMIPS (Cai and Vasconcelos 2020): a softmax over one branch for each bitwidth.

    `w_q = sum_k pi_k Q_k(w)`, pi = softmax(alpha); the loss is the KL divergence from the float network plus
    `cost_weight |E[cost] / budget - 1|` (the paper weighs the cost itself; this form meets a budget). Afterwards bits are
    the most probable ones within the budget (largest product of probabilities; our interpretation).

    Args: as in `fracbits`; `lr` is that of alpha.
    """

    def surprise(alpha: Tensor, rung: int) -> float:
        return -torch.log_softmax(alpha.double(), dim=0)[rung].item()

    return _relaxed(task, Relaxation(torch.zeros, edmips_shares, surprise, False, batches, lr, cost_weight))


def fracbits_shares(place: Tensor, rungs: int) -> dict[int, Tensor]:
    """Shares of the two rungs next to a fractional place (0-d) on a ladder of `rungs` bitwidths, 0 to rungs - 1.

    At a whole place one share is 0, and has a gradient all the same.
    """
    below = min(math.floor(place.item()), max(rungs - 2, 0))
    upper = place - below
    return {below: 1 - upper, below + 1: upper} if rungs > 1 else {0: 1 - upper}


def edmips_shares(alpha: Tensor, rungs: int) -> dict[int, Tensor]:
    return dict(enumerate(torch.softmax(alpha, dim=0)))


class Mixture:
    """Weights of the layers of a unit as mixtures of their quantized weights; `parameter` is trained.

    Scales are fitted when it is made. `shares(parameter, number of rungs)` gives rung -> share of those in the mixture.
    """

    def __init__(self, layers: list[QuantizedLayer], rungs: list[int], parameter: Tensor, shares: Shares):
        self.layers, self.rungs, self._shares = layers, rungs, shares
        self.parameter = parameter.to(layers[0].weight.device).requires_grad_()
        self.scales = [[scale_at(layer, bits) for bits in rungs] for layer in layers]

    def attach(self) -> None:
        """Let the layers compute with the mixtures."""
        for layer, scales in zip(self.layers, self.scales, strict=True):
            layer.weight_source = partial(self.weight, layer, scales)

    def shares(self) -> Tensor:
        """Of each rung (float32 [rungs]); their sum is 1."""
        found = self._shares(self.parameter, len(self.rungs))
        zero = torch.zeros_like(self.parameter).sum()
        return torch.stack([found.get(rung, zero) for rung in range(len(self.rungs))])

    def average_bits(self) -> float:
        return sum(share * bits for share, bits in zip(self.shares().tolist(), self.rungs, strict=True))

    def weight(self, layer: QuantizedLayer, scales: list[Tensor], weight: Tensor) -> Tensor:
        found = self._shares(self.parameter, len(self.rungs)).items()
        parts = [share * weight_at(layer, self.rungs[rung], scales[rung]) for rung, share in found]
        return torch.stack(parts).sum(dim=0)


def _relaxed(task: Task, relaxation: Relaxation) -> list[Strategy]:
    """A search for each budget, one after the other on the batches of the data."""
    task.calibrate()
    teacher, data = task.float_network(), task.batches()
    layers, strategies = quantized_layers(task.model.timm_model), []
    for budget in task.descent.budgets:
        mixtures = {}
        for name, unit in task.descent.units.items():
            rungs = task.descent.rungs(name)
            members = [layers[layer] for layer in unit.layers]
            mixtures[name] = Mixture(members, rungs, relaxation.start(len(rungs)), relaxation.shares)
        try:
            with searching(task.model, task.weight_lr > 0, task.copied(teacher), task.batch_norm) as parameters:
                for mixture in mixtures.values():
                    mixture.attach()
                _train(task, relaxation, mixtures, Training(task, parameters), teacher, data, budget)
        finally:
            for name in task.descent.layers:
                layers[name].weight_source = None
        damages = {
            name: {bits: relaxation.price(mixture.parameter.detach(), rung) for rung, bits in enumerate(mixture.rungs)}
            for name, mixture in mixtures.items()
        }
        strategies.append(task.descent.strategy(least_sum(task.descent, budget, damages)))
    return strategies


def _train(
    task: Task,
    relaxation: Relaxation,
    mixtures: dict[str, Mixture],
    training: Training,
    teacher: torch.nn.Module,
    data: Iterator[Batch],
    budget: float,
) -> None:
    """Train the parameters of `mixtures`, and by `training` the weights."""
    model, descent, accelerator = task.model, task.descent, task.accelerator
    own = [mixture.parameter for mixture in mixtures.values()]
    optimizer = torch.optim.SGD(own, lr=relaxation.lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, relaxation.batches)
    costs = {
        name: torch.tensor([descent.table[name][bits] for bits in mixture.rungs], device=model.device)
        for name, mixture in mixtures.items()
    }
    strategy = model.strategy
    sizes = {name: sum(strategy[layer].num_weights for layer in unit.layers) for name, unit in descent.units.items()}
    for _ in range(relaxation.batches):
        images = next(data)["pixel_values"].to(model.device)
        loss = distillation_loss(model, teacher, images, accelerator)
        cost = descent.base + torch.stack([(m.shares() * costs[name]).sum() for name, m in mixtures.items()]).sum()
        penalty = relaxation.cost_weight * (cost / budget - 1).abs()
        ((loss + penalty) * training.scale).backward()
        for parameter in own:
            assert parameter.grad is not None
            parameter.grad = cast(Tensor, accelerator.reduce(parameter.grad / training.scale, reduction="mean"))
        if training.step(loss, all(p.grad.isfinite().all() for p in own if p.grad is not None)):
            optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if relaxation.bounded:
            with torch.no_grad():
                for mixture in mixtures.values():
                    mixture.parameter.clamp_(0, len(mixture.rungs) - 1)
        task.log.batches += 1
        task.log.backward_images += len(images)
        if task.on_step is not None:
            mean = sum(m.average_bits() * sizes[name] for name, m in mixtures.items()) / sum(sizes.values())
            task.on_step(SearchState(task.log.batches, cost.item(), mean, loss.item(), len(images), None, dict))
