"""Rules that need no data: controls for the searches that learn."""

from collections.abc import Callable, Mapping

import torch

from ..strategy import Strategy
from .descent import ERROR_GROWTH
from .errors import quantization_errors
from .task import Task


def uniform(task: Task) -> list[Strategy]:
    """The largest bitwidth for all layers that fits each budget; layers with a higher floor stay there."""
    descent, strategies = task.descent, []
    for budget in descent.budgets:
        fitting = {}
        for bits in descent.candidates:
            candidate = {name: max(bits, descent.floor[name]) for name in descent.names}
            if descent.total(candidate) <= budget * (1 + 1e-9):
                fitting = candidate
        strategies.append(descent.strategy(fitting))
    return strategies


def random(task: Task) -> list[Strategy]:
    """Layers step down in random order."""
    generator = torch.Generator().manual_seed(task.seed)

    def price(name: str) -> float:
        return torch.rand((), generator=generator).item()

    return _walk_down(task, price, price)


def size(task: Task) -> list[Strategy]:
    """Bits by the size of a layer alone: `b_l = c - log2(cost_l) / 2`, in steps.

    That is what minimises `sum_l 4^-b_l`, the error of rounding when all layers are alike, within a budget (reverse
    water-filling of rate-distortion theory). A plain reading of the paper's search comes down to such a rule (METHOD 8).
    """
    return _least_growth(
        task, {name: {b: ERROR_GROWTH**-b for b in task.descent.candidates} for name in task.descent.names}
    )


def greedy(task: Task) -> list[Strategy]:
    """Each step takes the layer whose relative quantization error grows least per saved cost."""
    return _least_growth(task, quantization_errors(task.model, task.descent))


def _least_growth(task: Task, errors: Mapping[str, Mapping[int, float]]) -> list[Strategy]:
    """Step down the layer whose error (layer -> bitwidth -> error) grows least per saved cost."""
    descent = task.descent

    def growth(name: str) -> float:
        lower = descent.next_bits(name)
        assert lower is not None
        return errors[name][lower] - errors[name][descent.bits[name]]

    return _walk_down(task, lambda name: growth(name) / descent.saved(name), growth)


def _walk_down(task: Task, price: Callable[[str], float], damage: Callable[[str], float]) -> list[Strategy]:
    """Step down the layer with the lowest `price` until the budgets are met."""
    while not task.descent.done:
        name = min(task.descent.movable, key=price)
        task.move(len(task.log.moves), name, damage(name))
    return task.descent.strategies()
