"""Bits for all layers at once, with the least damage within a budget: exact where damages add up, else by exchanges."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp

from .descent import Bits, Descent

# Layer -> bitwidth -> damage.
Damages = Mapping[str, Mapping[int, float]]
Choice = tuple[str, int]


def choices(descent: Descent, damages: Damages) -> list[Choice]:
    """(layer, bits) of every choice in `damages`, in the network's order."""
    return [(name, bits) for name in descent.names for bits in damages[name]]


def least_sum(descent: Descent, budget: float, damages: Damages) -> Bits:
    """The bits with the least `sum_l damages[l][b_l]` whose cost is within `budget`: an integer program, solved exactly.

    Of the budget no more than the cost's tolerance is left unused, where that is possible: noise in measured damages would
    otherwise pass for an optimum that spends nothing.
    """
    options = choices(descent, damages)
    cost = np.array([descent.table[name][bits] for name, bits in options])
    price = np.array([damages[name][bits] for name, bits in options], float)
    one_each = np.array([[float(owner == name) for owner, _ in options] for name in descent.names])
    room = budget - descent.base
    # The solver's tolerances are absolute; BitOPs are large numbers and damages small ones.
    unit, largest = max(abs(room), 1e-30), max(float(np.abs(price).max()), 1e-30)
    for unused in (descent.cost.tolerance(budget), np.inf):
        solution = milp(
            price / largest,
            constraints=[
                LinearConstraint(one_each, 1, 1),
                LinearConstraint(cost[None] / unit, (room - unused) / unit, room / unit * (1 + 1e-9)),
            ],
            integrality=np.ones(len(options)),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": 0.0},
        )
        if solution.x is not None:
            return {name: bits for (name, bits), x in zip(options, solution.x, strict=True) if x > 0.5}
    raise RuntimeError(f"No bits within a budget of {descent.text(budget)}: {solution.message}")


def least_quadratic(
    descent: Descent, budget: float, damages: Damages, matrix: NDArray[np.float64], starts: int = 20, seed: int = 0
) -> Bits:
    """Bits with a small `x' M x` within `budget`; x marks the choice of each layer, `matrix` M is symmetric.

    From several starts one or two layers at a time are changed, whichever lowers the sum most, until none does. The result is
    a local optimum of that neighbourhood; on the small networks of the tests it is the best of all strategies.

    Args:
        damages: which choices there are. matrix: rows and columns as in `choices(descent, damages)`.
        starts: of which the first two are the solutions for the diagonal of M and for its row sums, the others random.
    """
    options = choices(descent, damages)
    cost = np.array([descent.table[name][bits] for name, bits in options])
    owner = np.array([descent.names.index(name) for name, _ in options])
    room = (budget - descent.base) * (1 + 1e-9)
    index = {choice: i for i, choice in enumerate(options)}
    random = np.random.default_rng(seed)
    best: tuple[float, NDArray[np.int64]] | None = None
    for start in range(starts):
        # Random damages give a random strategy within the budget.
        price = np.diag(matrix) if start == 0 else matrix.sum(axis=1) if start == 1 else random.random(len(options))
        guess: dict[str, dict[int, float]] = {name: {} for name in descent.names}
        for (name, bits), value in zip(options, price.tolist(), strict=True):
            guess[name][bits] = value
        first = least_sum(descent, budget, guess)
        chosen = np.array([index[name, first[name]] for name in descent.names])
        # As close to the budget as the start is, so that noise does not pass for savings.
        least = min(float(cost[chosen].sum()), room - descent.cost.tolerance(budget))
        chosen = _exchange(matrix, cost, owner, least, room, chosen)
        value = float(matrix[np.ix_(chosen, chosen)].sum())
        if best is None or value < best[0]:
            best = value, chosen
    assert best is not None
    return {options[i][0]: options[i][1] for i in best[1].tolist()}


def _exchange(
    matrix: NDArray[np.float64],
    cost: NDArray[np.float64],
    owner: NDArray[np.int64],
    least: float,
    room: float,
    chosen: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Improve `chosen` (one choice of each layer) by the best change of one or two layers, until there is none.

    The cost stays between `least` and `room`.
    """
    count, chosen = len(owner), chosen.copy()
    same_layer = owner[:, None] == owner[None]
    while True:
        old = chosen[owner]  # the choice that each choice would replace
        rows = matrix[:, chosen].sum(axis=1)
        own = np.arange(count)
        # Change of the sum when one choice replaces the present one of its layer.
        single = 2 * (rows - rows[old]) + matrix[own, own] + matrix[old, old] - 2 * matrix[own, old]
        cross = matrix - matrix[:, old] - matrix[old, :] + matrix[np.ix_(old, old)]
        pair = single[:, None] + single[None] + 2 * cross
        # A choice paired with itself stands for a change of this layer alone.
        pair[own, own] = single
        extra = cost - cost[old]
        spent = extra[:, None] + extra[None]
        spent[own, own] = extra
        total = cost[chosen].sum() + spent
        allowed = (total >= least) & (total <= room) & (~same_layer | np.eye(count, dtype=bool))
        pair = np.where(allowed, pair, np.inf)
        i, j = np.unravel_index(int(pair.argmin()), pair.shape)
        if pair[i, j] >= -1e-12 * max(1.0, float(np.abs(matrix).max())):
            return chosen
        chosen[owner[i]], chosen[owner[j]] = i, j
