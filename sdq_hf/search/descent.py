"""The way down: bitwidths that only fall, one layer at a time, and the strategies left behind at each budget."""

import fnmatch
import logging
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, cast

from ..costs import Cost
from ..strategy import Strategy, bits_text
from .units import Unit, layer_units

logger = logging.getLogger(__name__)

# Of the squared error of rounding, with each bit less; what a layer loses by its next step is taken to grow as much.
ERROR_GROWTH = 4.0

# Of a step that nothing is known of: next to nothing, but the more of them the more.
_LEAST_DAMAGE = 1e-9

# A unit's bits, by name: a layer's, where each layer has its own. Only what is searched is in it.
Bits = dict[str, int]


class BudgetError(ValueError):
    """A budget that no strategy can meet; the message has the range that can be reached."""


class Descent:
    """Bits on their way down the ladder of candidates, and the strategy found for each budget.

    Args:
        strategy: where the layers, their sizes and the pinned layers come from.
        cost: what budgets are given in.
        budgets: in `cost.unit`; one strategy is found for each. Kept as limits of the cost's sum.
        candidates: the ladder, e.g. `[1, 2, 3, 4, 5, 6, 7, 8]` or `[2, 4, 8]`.
        start_bits: the rung where all layers start; default: 6, above which a step costs nothing measurable (METHOD 9),
            or the lowest rung above it that lies above every budget.
        floors: pattern of layer names -> fewest bits. The last pattern that matches decides.
        units: what shares one bitwidth, by name; default: each layer has its own. "Layer" stands for unit below.

    A layer's ladder has the candidates from its floor up, without those that cost no less than more bits would: in a cost
    table, 3 bits may take what 4 take.

    Raises `BudgetError` for a budget out of reach, `ValueError` for a floor that matches no layer.
    """

    def __init__(
        self,
        strategy: Strategy,
        cost: Cost,
        budgets: Sequence[float],
        candidates: Sequence[int],
        start_bits: int | None = None,
        floors: Mapping[str, int] | None = None,
        units: Mapping[str, Unit] | None = None,
    ):
        self.cost = cost
        for budget in budgets:
            if not budget > 0:
                raise BudgetError(f"A budget must be above 0 {cost.unit}, got {budget:g}.")
        self.budgets = [cost.limit(budget) for budget in budgets]
        self.candidates = sorted(candidates)
        self.units = dict(layer_units(strategy) if units is None else units)
        self.names = list(self.units)
        # Layers that are searched.
        self.layers = list(dict.fromkeys(layer for unit in self.units.values() for layer in unit.layers))
        # A layer's inputs, where their bits are searched too: what they cost depends on the bits of its weights.
        self.inputs = {unit.layers[0]: name for name, unit in self.units.items() if unit.inputs}
        prices = {
            layer: {bits: cost.of_layer(strategy, layer, bits) for bits in self.candidates} for layer in self.layers
        }
        self._prices = {
            layer: {
                (bits, inputs): cost.of_layer(strategy, layer, bits, inputs)
                for bits in self.candidates
                for inputs in self.candidates
            }
            for layer in self.inputs
        }
        # What is counted together: the channels of a layer, a layer's weights and its inputs, or a unit by itself.
        self._groups: dict[str, list[str]] = {}
        self.table: dict[str, dict[int, float]] = {}
        self._weights: dict[str, float] = {}
        for name, unit in self.units.items():
            self._groups.setdefault(unit.layers[0], []).append(name)
            if unit.inputs:
                top = self.candidates[-1]
                self.table[name] = {bits: self._prices[unit.layers[0]][top, bits] for bits in self.candidates}
                self._weights[name] = 0.0
                continue
            channels = 1 if unit.channel is None else len(cast(tuple[int, ...], strategy[unit.layers[0]].weight_bits))
            self.table[name] = {
                bits: sum(prices[layer][bits] for layer in unit.layers) / channels for bits in self.candidates
            }
            self._weights[name] = sum(strategy[layer].num_weights for layer in unit.layers) / channels
        floor = self._floors(floors or {})
        self.ladder = {
            name: self._ladder(name, self.candidates[0] if unit.inputs else max(floor[layer] for layer in unit.layers))
            for name, unit in self.units.items()
        }
        if self.inputs and all(len(self.ladder[name]) == 1 for name in self.inputs.values()):
            raise ValueError(
                f"The bits of inputs cannot be searched for a budget in {cost.unit}, which does not count them."
            )
        self.floor: Bits = {name: ladder[0] for name, ladder in self.ladder.items()}
        searched = set(self.layers)
        self.base = cost.fixed + sum(cost.of_layer(strategy, name) for name in strategy if name not in searched)
        self._strategy = strategy
        self._check_budgets()
        if start_bits is None:
            start_bits = self._default_start()
        elif start_bits not in self.candidates:
            raise ValueError(f"start_bits must be one of the candidates {self.candidates}, got {start_bits}.")
        self.start: Bits = {
            name: next((bits for bits in ladder if bits >= start_bits), ladder[-1])
            for name, ladder in self.ladder.items()
        }
        if self.total(self.start) < max(self.budgets) - cost.tolerance(max(self.budgets)):
            raise BudgetError(
                f"start_bits {start_bits} is below the budget of {self.text(max(self.budgets))}: bits only fall, so the "
                f"search must start above it, at {self._default_start()} for example."
            )
        self._set_bits(self.start)
        # Estimated damage of the step that led down to a rung: what raising the layer again would win back.
        self.damage: dict[str, dict[int, float]] = {name: {} for name in self.names}
        self.found: dict[float, Strategy] = {}
        self._leave_strategies()

    def _floors(self, patterns: Mapping[str, int]) -> dict[str, int]:
        """Fewest bits of each searched layer."""
        floor = dict.fromkeys(self.layers, self.candidates[0])
        for pattern, bits in patterns.items():
            matches = fnmatch.filter(self.layers, pattern)
            if not matches:
                raise ValueError(f"floors: no searchable layer matches {pattern!r}, e.g. {', '.join(self.layers[:3])}.")
            allowed = [b for b in self.candidates if b >= bits]
            if not allowed:
                raise ValueError(
                    f"floors[{pattern!r}] must be at most {self.candidates[-1]}, the largest candidate, got {bits}."
                )
            floor.update(dict.fromkeys(matches, allowed[0]))
        return floor

    def _ladder(self, name: str, floor: int) -> list[int]:
        """Candidates from `floor` up, each cheaper than all above it."""
        ladder: list[int] = []
        for bits in reversed([b for b in self.candidates if b >= floor]):
            if not ladder or self.table[name][bits] < self.table[name][ladder[0]]:
                ladder.insert(0, bits)
        return ladder

    def text(self, limit: float) -> str:
        """A limit of the sum, as a budget."""
        return f"{self.cost.limit(limit):.4g} {self.cost.unit}"

    def _check_budgets(self) -> None:
        if not self.budgets:
            raise BudgetError("No budget given: pass at least one.")
        low, high = self.total(self.floor), self.total({name: ladder[-1] for name, ladder in self.ladder.items()})
        for budget in self.budgets:
            if not low * (1 - 1e-9) <= budget <= high * (1 + 1e-9):
                ends = sorted((self.cost.limit(low), self.cost.limit(high)))
                raise BudgetError(
                    f"A budget of {self.text(budget)} is out of reach: with candidates {self.candidates} and the floors and "
                    f"pinned layers of this network it must be between {ends[0]:.4g} and {ends[1]:.4g}."
                    + (f" What binds most: {self._binding()}." if budget < low else "")
                )

    def _binding(self, count: int = 3) -> str:
        """The layers that take most of the least cost there is, and their bits."""
        least = self.strategy(self.floor)
        costs = {name: self.cost.of_layer(least, name) for name in least}
        whole, largest = self.total(self.floor), sorted(costs, key=lambda name: -costs[name])[:count]
        return ", ".join(
            f"{name} ({'pinned to' if least[name].pinned else 'at least'} {bits_text(least[name].weight_bits)} bits, "
            f"{costs[name] / whole:.0%})"
            for name in largest
        )

    def _default_start(self) -> int:
        above = [b for b in self.candidates if self.total(dict.fromkeys(self.names, b)) >= max(self.budgets)]
        usual = [b for b in self.candidates if b >= 6]
        return max(above[0] if above else self.candidates[-1], usual[0] if usual else self.candidates[-1])

    # Costs -------------------------------------------------------------------------------------------------------

    def total(self, bits: Mapping[str, int] | None = None) -> float:
        """Cost of `bits` (default: the present ones), pinned layers included where the cost counts them."""
        costs = self._costs.values() if bits is None else [self._group_cost(group, bits) for group in self._groups]
        return self.base + sum(costs)

    def _group_cost(self, group: str, bits: Mapping[str, int]) -> float:
        if group in self.inputs:
            return self._prices[group][bits[group], bits[self.inputs[group]]]
        return sum(self.table[name][bits[name]] for name in self._groups[group])

    def _group_weight_bits(self, group: str) -> float:
        return sum(self._weights[name] * self._bits[name] for name in self._groups[group])

    def _change(self, bits: Mapping[str, int], name: str, width: int) -> float:
        """What the total of `bits` grows by when layer `name` goes to `width`."""
        layer = self.units[name].layers[0]
        if layer not in self.inputs:
            return self.table[name][width] - self.table[name][bits[name]]
        weights, inputs = (bits[layer], width) if self.units[name].inputs else (width, bits[self.inputs[layer]])
        return self._prices[layer][weights, inputs] - self._prices[layer][bits[layer], bits[self.inputs[layer]]]

    def average_bits(self) -> float:
        """Average bits of the searchable layers at present, whatever the cost is."""
        return sum(self._weight_bits.values()) / self._all_weights

    def layer_bits(self, bits: Mapping[str, int]) -> dict[str, int | tuple[int, ...]]:
        """Layer -> bits of its weights, or a tuple of those of its output channels. `bits` may name some units only."""
        found: dict[str, int | tuple[int, ...]] = {}
        channels: dict[str, list[int]] = {}
        for name, width in bits.items():
            unit = self.units[name]
            if unit.inputs:
                continue
            if unit.channel is None:
                found.update(dict.fromkeys(unit.layers, width))
            else:
                channels.setdefault(unit.layers[0], []).append(width)
        return found | {layer: tuple(widths) for layer, widths in channels.items()}

    def strategy(self, bits: Mapping[str, int]) -> Strategy:
        """The strategy with `bits`, all else as it was at the start."""
        inputs = {self.units[name].layers[0]: width for name, width in bits.items() if self.units[name].inputs}
        return self._strategy.with_bits(self.layer_bits(bits)).with_activation_bits(inputs)

    def rungs(self, name: str) -> list[int]:
        """A layer's ladder from its floor up to its start."""
        return [b for b in self.ladder[name] if b <= self.start[name]]

    def next_bits(self, name: str) -> int | None:
        """The next lower candidate of a layer, None at its floor."""
        return self._lower(self._bits, name)

    def saved(self, name: str) -> float:
        """Cost that the layer's next step down saves."""
        lower = self.next_bits(name)
        assert lower is not None
        return -self._change(self._bits, name, lower)

    @property
    def movable(self) -> list[str]:
        """Layers that have a lower candidate."""
        return [name for name in self.names if self.next_bits(name) is not None]

    @property
    def done(self) -> bool:
        return len(self.found) == len(set(self.budgets))

    def strategies(self) -> list[Strategy]:
        """One strategy per budget, in the order in which the budgets were given."""
        return [self.found[budget] for budget in self.budgets]

    # Steps -------------------------------------------------------------------------------------------------------

    @property
    def bits(self) -> Mapping[str, int]:
        """The present bits. `step_down` changes them, and nothing else: sums of them are kept."""
        return MappingProxyType(self._bits)

    def _set_bits(self, bits: Mapping[str, int]) -> None:
        self._bits: Bits = dict(bits)
        # Of each group. A network has tens of thousands of channels, and each step changes one of them.
        self._costs = {group: self._group_cost(group, self._bits) for group in self._groups}
        self._weight_bits = {group: self._group_weight_bits(group) for group in self._groups}
        self._all_weights = sum(self._weights.values())

    def step_down(self, name: str, damage: float) -> None:
        """Step one layer down; `damage` is its estimated price in loss. Leaves a strategy at each budget passed."""
        lower = self.next_bits(name)
        assert lower is not None, f"{name} is at its floor"
        self.damage[name][lower] = damage
        self._bits[name] = lower
        group = self.units[name].layers[0]
        self._costs[group] = self._group_cost(group, self._bits)
        self._weight_bits[group] = self._group_weight_bits(group)
        self._leave_strategies()

    def _leave_strategies(self) -> None:
        for budget in self.budgets:
            if budget not in self.found and self.total() <= budget * (1 + 1e-9):
                self.found[budget] = self.strategy(self._land(budget))

    def _land(self, budget: float) -> Bits:
        """The present bits, refilled to just under the budget.

        One step of a big layer overshoots. Small layers are raised again, largest damage first. Where even that leaves
        more than the tolerance unused, one more layer is stepped down to make room for others; and where no such exchange
        comes close enough, a layer is raised, and others step down for it. Of exchanges that come close enough it is the one
        with the least damage. Where none does, the one that comes closest is made, and the next is looked for from there.
        """
        base = dict(self.bits)
        best = self._refill(base, budget)
        while not self._is_close(best, budget):
            found: list[Bits] = []
            for exchanged in (self._steps_down(base, budget), self._steps_up(base, budget)):
                found += exchanged
                close = [
                    (sum(self._price(name, width) for name, width in bits.items()), i, bits)
                    for i, bits in enumerate(found)
                    if self._is_close(bits, budget)
                ]
                if close:
                    return min(close)[2]
            base = max(found, key=self.total, default=best)
            if self.total(base) <= self.total(best):
                logger.warning(
                    "Budget of %s: the nearest strategy below it that was found costs %s; steps of single layers of this "
                    "network are too large to come closer.",
                    self.text(budget),
                    self.text(self.total(best)),
                )
                break
            best = base
        return best

    def _steps_down(self, base: Bits, budget: float) -> list[Bits]:
        """For each layer: `base` with the layer one step down, and others raised."""
        lower = {name: self._lower(base, name) for name in self.names}
        return [
            self._refill({**base, name: width}, budget, fixed=name)
            for name, width in lower.items()
            if width is not None
        ]

    def _steps_up(self, base: Bits, budget: float) -> list[Bits]:
        """For each layer that has stepped down: `base` with the layer one step up, and others lower, where that is enough.

        Each time it is the layer with the least damage per saved cost, of those that save no more than is needed; of the
        others it is the smallest.
        """
        found = []
        for raised in self.names:
            if base[raised] not in self.damage[raised]:
                continue
            bits = {**base, raised: self._upper(base, raised)}
            while (over := self.total(bits) - budget * (1 + 1e-9)) > 0:
                steps = []
                for name in self.names:
                    width = self._lower(bits, name)
                    if name != raised and width is not None:
                        saved = -self._change(bits, name, width)
                        damage = self._price(name, width) - self._price(name, bits[name])
                        steps.append((saved > over, saved if saved > over else damage / saved, name, width))
                if not steps:
                    break
                *_, name, width = min(steps)
                bits[name] = width
            else:
                found.append(self._refill(bits, budget, fixed=raised))
        return found

    def _lower(self, bits: Bits, name: str) -> int | None:
        below = [b for b in self.ladder[name] if b < bits[name]]
        return below[-1] if below else None

    def _upper(self, bits: Bits, name: str) -> int:
        return self.ladder[name][self.ladder[name].index(bits[name]) + 1]

    def _is_close(self, bits: Bits, budget: float) -> bool:
        return budget - self.total(bits) <= self.cost.tolerance(budget)

    def _price(self, name: str, width: int) -> float:
        """Damage of taking a layer from its present bits to `width`.

        A raised layer takes back what its steps were estimated at. That of steps down is not measured yet: it grows from
        the layer's last one.
        """
        damage, present = self.damage[name], self.bits[name]
        steps = sum(width <= b < present for b in self.ladder[name])
        lost = self._last_damage(name) * sum(ERROR_GROWTH**step for step in range(1, steps + 1)) if steps else 0.0
        return lost - sum(regained for rung, regained in damage.items() if present <= rung < width)

    def _last_damage(self, name: str) -> float:
        """Of the layer's last step down; where it has made none, the mean of the others' first ones."""
        if self.bits[name] in self.damage[name]:
            return self.damage[name][self.bits[name]]
        first = [damages[max(damages)] for damages in self.damage.values() if damages]
        return max(sum(first) / len(first), _LEAST_DAMAGE) if first else _LEAST_DAMAGE

    def _refill(self, bits: Bits, budget: float, fixed: str | None = None) -> Bits:
        """`bits` with layers raised that have stepped down, while there is room; `fixed` stays where it is."""
        bits = dict(bits)
        while True:
            slack = budget * (1 + 1e-9) - self.total(bits)
            options = []
            for name in self.names:
                rung = bits[name]
                if name == fixed or rung not in self.damage[name]:
                    continue
                upper = self._upper(bits, name)
                if self._change(bits, name, upper) <= slack:
                    options.append((self.damage[name][rung], name, upper))
            if not options:
                return bits
            _, name, upper = max(options)
            bits[name] = upper

    # State -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers that JSON can hold."""
        return {
            "bits": dict(self._bits),
            "damage": {name: list(rungs.items()) for name, rungs in self.damage.items()},
            "found": [[budget, strategy.to_json()] for budget, strategy in self.found.items()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if list(state["bits"]) != self.names:
            raise ValueError("The saved search belongs to another network or other pins: start it anew.")
        self._set_bits(state["bits"])
        self.damage = {name: dict(rungs) for name, rungs in state["damage"].items()}
        self.found = {budget: Strategy.from_json(data) for budget, data in state["found"]}
