"""Costs that a search can be given a budget in: one interface.

A cost is a sum over layers of `layer_cost(layer, bits)`, plus what the pinned layers take. "bits" counts the searchable
layers only, so uniform 2 bits cost exactly 2.0; "bitops" counts every layer.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from .strategy import LayerBits, Strategy


@dataclass(frozen=True)
class Cost:
    """`total(strategy)` in `unit`s; `layer(layer_bits, strategy)` is one layer's part of it."""

    unit: str
    total: Callable[[Strategy], float]
    layer: Callable[[LayerBits, Strategy], float]
    tolerance: Callable[[float], float]

    def of_layer(self, strategy: Strategy, name: str, bits: int) -> float:
        """What layer `name` of `strategy` would cost at `bits`."""
        return self.layer(replace(strategy[name], weight_bits=bits), strategy)


def _searchable_weights(strategy: Strategy) -> int:
    return sum(strategy[name].num_weights for name in strategy.searchable)


COSTS: dict[str, Cost] = {
    "bits": Cost(
        unit="average bits",
        total=lambda strategy: strategy.average_bits(),
        layer=lambda layer, strategy: layer.num_weights * layer.weight_bits / _searchable_weights(strategy),
        tolerance=lambda budget: 0.05,
    ),
    "bitops": Cost(
        unit="BitOPs",
        total=lambda strategy: float(strategy.bitops()),
        layer=lambda layer, strategy: float(layer.macs * layer.weight_bits * layer.activation_bits),
        tolerance=lambda budget: 0.01 * budget,
    ),
}


def get_cost(name: str) -> Cost:
    """The cost called `name`; `ValueError` with the choices when there is none."""
    if name not in COSTS:
        raise ValueError(f"Unknown cost {name!r}: expected one of {', '.join(COSTS)}.")
    return COSTS[name]


def bitops_unit(largest: float) -> tuple[float, str]:
    """Divisor and name of the unit in which `largest` BitOPs is a handy number."""
    return next(((d, f"{p}BitOPs") for d, p in ((1e12, "T"), (1e9, "G"), (1e6, "M")) if largest >= d), (1e3, "kBitOPs"))


def bitops_text(bitops: float) -> str:
    divisor, unit = bitops_unit(bitops)
    return f"{bitops / divisor:,.1f} {unit}"
