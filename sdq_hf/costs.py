"""Costs that a search can be given a budget in: one interface, for those that are built in and for a user's own table.

A cost is a sum over layers. "bits" counts the searchable layers only, so uniform 2 bits cost exactly 2.0; all others count
every layer.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from .strategy import FLOAT_BITS, LayerBits, Strategy, short, unknown_layer

# Per multiply-accumulate, measured by synthesis; the file says how.
LUT_TABLE = Path(__file__).with_name("cost_tables") / "lut.json"


@dataclass(frozen=True)
class Cost:
    """`sum_l layer(name, layer_bits) / per(strategy) + fixed`, in `unit`s. `layer` is given layers with one bitwidth.

    A budget b of it allows a sum of at most `limit(b)`; `limit` is its own inverse (b itself, or 1 / b for "compression").
    A strategy that is found spends at least `limit(b) - tolerance(limit(b))`.
    """

    name: str
    unit: str
    layer: Callable[[str, LayerBits], float]
    per: Callable[[Strategy], float] = lambda strategy: 1.0
    fixed: float = 0.0
    tolerance: Callable[[float], float] = lambda limit: 0.01 * limit
    limit: Callable[[float], float] = lambda budget: budget

    def total(self, strategy: Strategy) -> float:
        """The sum; `ValueError` that names the layer where a table lacks one."""
        return sum(self._of(name, layer) for name, layer in strategy.items()) / self.per(strategy) + self.fixed

    def of_layer(
        self, strategy: Strategy, name: str, bits: int | None = None, activation_bits: int | None = None
    ) -> float:
        """What layer `name` of `strategy` costs, or would cost at other bits."""
        layer = strategy[name]
        layer = layer if bits is None else replace(layer, weight_bits=bits)
        layer = layer if activation_bits is None else replace(layer, activation_bits=activation_bits)
        return self._of(name, layer) / self.per(strategy)

    def _of(self, name: str, layer: LayerBits) -> float:
        """One layer's part of the sum; the mean over its channels, where each has bits of its own."""
        bits = layer.weight_bits
        if isinstance(bits, int):
            return self.layer(name, layer)
        return sum(
            count * self.layer(name, replace(layer, weight_bits=width)) for width, count in Counter(bits).items()
        ) / len(bits)

    def of_uniform(self, strategy: Strategy, bits: float) -> float:
        """The budget that uniform `bits`, 1 to 8, use up; between whole numbers on the line that joins them."""
        if not 1 <= bits <= 8:
            raise ValueError(f"Uniform {bits:g} bits are out of reach: 1 to 8.")
        below = int(bits)
        low, high = (self.total(strategy.with_bits(b)) for b in (below, below + (bits > below)))
        return self.limit(low + (bits - below) * (high - low))


def _searchable_weights(strategy: Strategy) -> int:
    return sum(strategy[name].num_weights for name in strategy.searchable) or 1


def _weights(strategy: Strategy) -> int:
    return sum(layer.num_weights for layer in strategy.values())


COSTS: dict[str, Cost] = {
    cost.name: cost
    for cost in (
        Cost(
            "bits",
            "average bits",
            lambda name, x: 0 if x.pinned else x.total_bits,
            per=_searchable_weights,
            tolerance=lambda limit: 0.05,
        ),
        Cost("bytes", "bytes of packed weights", lambda name, x: x.num_bytes),
        Cost(
            "compression",
            "x compression of the weights",
            lambda name, x: x.total_bits,
            per=lambda strategy: FLOAT_BITS * _weights(strategy),
            limit=lambda budget: 1 / budget,
        ),
        Cost("bitops", "BitOPs", lambda name, x: x.bitops),
    )
}


def get_cost(cost: "str | Path | Mapping[str, Any] | Cost") -> Cost:
    """A cost by its name ("bits", "bytes", "compression", "bitops", "lut"), from a table, or as it is.

    A table is a JSON file, or what such a file holds: `name`, `unit`, if one likes `about` (where it comes from), and one of

    - `layers`: layer name -> weight bits -> what the layer costs; `fixed`: what the rest of the network costs (default 0),
    - `per_mac`: activation bits -> weight bits -> what a multiply-accumulate costs.

    `ValueError` with the choices for an unknown name, and with the field for a table that is wrong.
    """
    if isinstance(cost, Cost):
        return cost
    if isinstance(cost, Mapping):
        return _from_table(cost, "The cost table")
    if cost in COSTS:
        return COSTS[str(cost)]
    path = LUT_TABLE if cost == "lut" else Path(cost)
    if path.suffix != ".json":
        near = get_close_matches(str(cost), known := [*COSTS, "lut"], n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"Unknown cost {str(cost)!r}: expected {', '.join(known)}, or the name of a JSON file with a table.{hint}"
        )
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"The cost table {path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise ValueError(f"The cost table {path} is not JSON: {error}.") from None
    return _from_table(data, f"The cost table {path}")


def _from_table(data: Any, where: str) -> Cost:
    fields = {"name", "unit", "about", "layers", "fixed", "per_mac"}
    if not isinstance(data, Mapping) or not {"name", "unit"} <= set(data) <= fields:
        raise ValueError(f"{where} must be a mapping with the fields {', '.join(sorted(fields))}, got {short(data)}.")
    if ("layers" in data) == ("per_mac" in data):
        raise ValueError(f"{where} must have either 'layers' or 'per_mac'.")
    if not isinstance(data["name"], str) or not data["name"].replace("_", "").isalnum() or data["name"] in COSTS:
        raise ValueError(
            f"{where}: name must be letters, digits and _, and not one of {', '.join(COSTS)}, got {short(data['name'])}."
        )
    fixed = _number(data.get("fixed", 0.0), f"{where}: fixed")
    if "per_mac" in data:
        costs = {int(a): row for a, row in _rows(data["per_mac"], f"{where}: per_mac", whole=True).items()}

        def per_mac(name: str, layer: LayerBits) -> float:
            if layer.activation_bits not in costs or layer.weight_bits not in costs[layer.activation_bits]:
                raise ValueError(
                    f"{where} has no cost of {layer.weight_bits}-bit weights and {layer.activation_bits}-bit inputs, as "
                    f"layer {name!r} has: its rows are for {', '.join(map(str, costs))}-bit inputs."
                )
            return layer.macs * costs[layer.activation_bits][layer.weight_bits]

        return Cost(data["name"], str(data["unit"]), per_mac, fixed=fixed)
    rows = _rows(data["layers"], f"{where}: layers", whole=False)

    def of_layer(name: str, layer: LayerBits) -> float:
        if name not in rows and layer.pinned:
            return 0.0
        if name not in rows:
            raise ValueError(f"{where} lacks the layer {name!r}. {unknown_layer(name, list(rows))}")
        if layer.weight_bits not in rows[name]:
            raise ValueError(
                f"{where}: layer {name!r} has no cost at {layer.weight_bits} bits, only at {list(rows[name])}."
            )
        return rows[name][layer.weight_bits]

    return Cost(data["name"], str(data["unit"]), of_layer, fixed=fixed)


def _rows(data: Any, where: str, whole: bool) -> dict[str, dict[int, float]]:
    """Row -> bits -> cost; `whole`: the names of rows are bits too."""
    if not isinstance(data, Mapping) or not data:
        raise ValueError(f"{where} must be a mapping with an entry for each row, got {short(data)}.")
    rows = {}
    for row, costs in data.items():
        if whole and not str(row).isdigit():
            raise ValueError(f"{where} must be named by activation bits, got {short(row)}.")
        if not isinstance(costs, Mapping) or not all(str(bits).isdigit() for bits in costs):
            raise ValueError(f"{where}[{row!r}] must map weight bits to costs, got {short(costs)}.")
        rows[row] = {int(bits): _number(cost, f"{where}[{row!r}][{bits!r}]") for bits, cost in costs.items()}
    return rows


def _number(value: Any, where: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < float("inf"):
        raise ValueError(f"{where} must be a number of at least 0, got {short(value)}.")
    return value


def bitops_unit(largest: float) -> tuple[float, str]:
    """Divisor and name of the unit in which `largest` BitOPs is a handy number."""
    return next(((d, f"{p}BitOPs") for d, p in ((1e12, "T"), (1e9, "G"), (1e6, "M")) if largest >= d), (1e3, "kBitOPs"))


def bitops_text(bitops: float) -> str:
    divisor, unit = bitops_unit(bitops)
    return f"{bitops / divisor:,.1f} {unit}"
