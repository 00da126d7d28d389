"""What decides which layer steps down next: the two-sided estimate, and the paper's trained DBPs.

Both see, batch by batch, what each layer drew (1 for the upper bitwidth, 0 for the lower one) and the gradient of the loss
to its DBP, `<dL/dw_q, Q_upper(w) - Q_lower(w)>`.
"""

import heapq
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..quantizers.stochastic import draw, gumbel_choice
from .descent import ERROR_GROWTH, Descent


@dataclass(frozen=True)
class Move:
    """A layer to step down: `damage` is the loss that it is estimated to cost, `error` the estimate's standard error."""

    layer: str
    damage: float
    error: float


@dataclass
class RunningMean:
    """Mean and its standard error with exponential forgetting: the newest sample weighs 1, the one before `keep`."""

    keep: float = 0.99
    count: int = 0
    weight: float = 0.0
    weight_squares: float = 0.0
    total: float = 0.0
    squares: float = 0.0

    def add(self, x: float) -> None:
        self.count += 1
        self.weight = self.keep * self.weight + 1
        self.weight_squares = self.keep**2 * self.weight_squares + 1
        self.total = self.keep * self.total + x
        self.squares = self.keep * self.squares + x * x

    @property
    def mean(self) -> float:
        return self.total / self.weight if self.count else 0.0

    @property
    def error(self) -> float:
        """Standard error of the mean; infinite below two samples."""
        if self.count < 2:
            return math.inf
        share = self.weight_squares / self.weight**2
        variance = max(0.0, self.squares / self.weight - self.mean**2) / (1 - share)
        return math.sqrt(variance * share)


# Share of the upper bitwidth -> its weight in the integral of the gradient from the upper to the lower bitwidth.
_TRAPEZOID = {1.0: 1 / 2, 0.0: 1 / 2}
_SIMPSON = {1.0: 1 / 6, 0.5: 4 / 6, 0.0: 1 / 6}


class _Sides:
    """Means of what was seen at each share of the upper bitwidth, and the damage that follows from them."""

    def __init__(self, rule: Mapping[float, float], keep: float):
        self.rule = rule
        self.means = {share: RunningMean(keep) for share in rule}

    @property
    def damage(self) -> float:
        return sum(weight * self.means[share].mean for share, weight in self.rule.items())

    @property
    def error(self) -> float:
        return math.hypot(*(weight * self.means[share].error for share, weight in self.rule.items()))

    @property
    def draws(self) -> list[int]:
        return [mean.count for mean in self.means.values()]

    def draw(self, u: float) -> float:
        """The share of a draw `u` in (0, 1): both ends are equally likely, and what lies between takes half of all."""
        end = 0.25 if len(self.rule) == 3 else 0.5
        return 1.0 if u < end else 0.5 if u < 1 - end else 0.0


class TwoSided:
    """Our extension of SDQ (METHOD 9): every DBP is held at one half, and the step with the least damage comes next.

    The gradient to a DBP at the upper choice is blind to the loss's curvature with one sign, that at the lower choice
    with the other. Their mean is the trapezoid rule for L(lower) - L(upper). From 2 bits to 1 the way is too long for it:
    it finds twice the damage, so there a third place is halfway between both bitwidths, and the rule is Simpson's.
    Per layer and place a running mean is kept; a layer is ready when each has 3 draws and the standard error is at most
    half the damage, or after 13 draws.

    Args:
        min_draws: draws per place before a layer may step. max_draws: draws (all places) after which it may always.
        caution: standard errors that are added to a damage when layers are compared. The least of many noisy estimates
            is one that is too low; with this a layer that is not measured well enough waits (our choice).
        keep: how fast draws are forgotten as other layers step down: the weight of a draw against that of the next.
        simpson_from: steps down from at most so many bits are measured at three places; 0: none.
        growth: of the damage from one step to the next, for a layer that is not measured yet; default: that of the squared
            error of rounding. 0: all others wait for a layer that has just stepped.
    """

    def __init__(
        self,
        descent: Descent,
        seed: int,
        min_draws: int = 3,
        max_draws: int = 13,
        caution: float = 2.0,
        keep: float = 0.99,
        simpson_from: int = 2,
        growth: float = ERROR_GROWTH,
    ):
        self.descent, self.seed, self.caution, self.keep = descent, seed, caution, keep
        self.min_draws, self.max_draws, self.simpson_from, self.growth = min_draws, max_draws, simpson_from, growth
        self.sides = {name: self._fresh(name) for name in descent.names}
        # Of each layer's last step, at the time: its damage and `caution` errors.
        self.last = dict.fromkeys(descent.names, 0.0)

    def _fresh(self, name: str) -> _Sides:
        return _Sides(_SIMPSON if self.descent.bits[name] <= self.simpson_from else _TRAPEZOID, self.keep)

    def draw(self, step: int) -> dict[str, float]:
        """Layer -> share of the upper bitwidth in batch `step`; the same on every rank and after a resume."""
        uniform = draw(self.seed, step, len(self.descent.names)).tolist()
        return {name: self.sides[name].draw(u) for name, u in zip(self.descent.names, uniform, strict=True)}

    def observe(self, gradients: Mapping[str, float], drawn: Mapping[str, float]) -> None:
        for name, gradient in gradients.items():
            self.sides[name].means[drawn[name]].add(-gradient)

    def _ready(self, sides: _Sides) -> bool:
        enough = sides.error <= sides.damage / 2 or sum(sides.draws) >= self.max_draws
        return min(sides.draws) >= self.min_draws and enough

    def next_moves(self, count: int = 1) -> list[Move]:
        """Of the `count` layers with the least damage (estimate and its error) per saved cost, those that are ready.

        Waiting matters: sensitive layers are measured quickly and harmless ones slowly, so taking the best of those
        that are ready would step down the sensitive ones first. A layer with too few draws since its last step counts
        with `growth` times the damage of that step, so that the others need not wait for it. Among layers without damage
        the one that saves most comes first.
        """

        def price(name: str) -> tuple[float, float]:
            saved = self.descent.saved(name)
            return self._cautious(name) / saved, -saved

        best = heapq.nsmallest(count, self.descent.movable, key=price)
        return [Move(n, self.sides[n].damage, self.sides[n].error) for n in best if self._ready(self.sides[n])]

    def _cautious(self, name: str) -> float:
        """The damage that a layer is compared by."""
        sides = self.sides[name]
        if min(sides.draws) < self.min_draws:
            return self.growth * self.last[name]
        return max(sides.damage + self.caution * sides.error, 0.0)

    def reset(self, name: str) -> None:
        self.last[name] = self._cautious(name)
        self.sides[name] = self._fresh(name)

    def estimates(self) -> dict[str, tuple[float, float]]:
        """Layer -> (damage of its next step, standard error), where all places have been drawn."""
        return {name: (sides.damage, sides.error) for name, sides in self.sides.items() if min(sides.draws) >= 2}

    def state_dict(self) -> dict[str, Any]:
        means = {name: [dict(vars(mean)) for mean in sides.means.values()] for name, sides in self.sides.items()}
        return {"means": means, "last": self.last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.last = dict(state["last"])
        for name, means in state["means"].items():
            # After `descent` has its bits again, on which the places depend.
            sides = self.sides[name] = self._fresh(name)
            sides.means = {share: RunningMean(**mean) for share, mean in zip(sides.rule, means, strict=True)}


class Paper:
    """The paper's search as METHOD 3 reads it: DBPs beta = sigmoid(theta), trained through Gumbel-softmax.

    `L = L_task + cost_weight sum_l s_l E[bits_l] + error_weight sum_l E[mse_l]`, by SGD with momentum: Adam would
    normalise the cost away and all layers would step down alike (METHOD 8). s_l is the layer's share of the cost, or of
    its square root, which grades better. A layer whose beta falls below `threshold` steps down with a fresh DBP and no
    momentum; the lowest beta goes first. Where the cost no longer outweighs the error nothing moves, so after `patience`
    batches without a step the cost weighs twice as much (our interpretation; 0: it never does).

    errors: unit -> bitwidth -> relative squared error; those of inputs, where they are searched, may be added later.

    METHOD 8 finds that the cost decides nearly everything here, so this is a layer-size rule in disguise.
    """

    def __init__(
        self,
        descent: Descent,
        seed: int,
        errors: Mapping[str, Mapping[int, float]],
        lr: float = 1.0,
        momentum: float = 0.9,
        temperature: float = 1.0,
        threshold: float = 0.05,
        theta_start: float = 3.0,
        cost_weight: float = 1.0,
        error_weight: float = 1.0,
        cost_shape: str = "sqrt",
        patience: int = 100,
    ):
        if cost_shape not in ("sqrt", "linear"):
            raise ValueError(f"cost_shape must be 'sqrt' or 'linear', got {cost_shape!r}.")
        self.descent, self.seed, self.errors = descent, seed, dict(errors)
        self.lr, self.momentum, self.temperature, self.threshold = lr, momentum, temperature, threshold
        self.theta_start, self.cost_weight, self.error_weight = theta_start, cost_weight, error_weight
        # Batches since the last step, or since the cost's weight was doubled.
        self.patience, self.waited = patience, 0
        # What all bits of a layer cost above the fewest.
        low, high = min(descent.candidates), max(descent.candidates)
        sizes = {name: max(0.0, descent.table[name][high] - descent.table[name][low]) for name in descent.names}
        if cost_shape == "sqrt":
            sizes = {name: math.sqrt(size) for name, size in sizes.items()}
        whole = sum(sizes.values()) or 1.0
        self.share = {name: size / whole for name, size in sizes.items()}
        self.theta = torch.full((len(descent.names),), theta_start, dtype=torch.float64)
        self.velocity = torch.zeros_like(self.theta)
        self._soft: Tensor | None = None
        self._leaf: Tensor | None = None

    def draw(self, step: int) -> dict[str, float]:
        self._leaf = self.theta.clone().requires_grad_()
        hard, self._soft = gumbel_choice(
            self._leaf, draw(self.seed, step, len(self.descent.names)), temperature=self.temperature
        )
        return dict(zip(self.descent.names, hard.double().tolist(), strict=True))

    def observe(self, gradients: Mapping[str, float], drawn: Mapping[str, float]) -> None:
        assert self._soft is not None, "draw comes before observe"
        assert self._leaf is not None
        self.waited += 1
        if self.patience and self.waited > self.patience:
            self.cost_weight, self.waited = 2 * self.cost_weight, 1
        names = self.descent.names
        task = torch.tensor([gradients[name] for name in names], dtype=torch.float64)
        (grad,) = torch.autograd.grad(self._soft, self._leaf, task)
        beta = torch.sigmoid(self.theta)
        for i, name in enumerate(names):
            lower = self.descent.next_bits(name)
            if lower is None:
                grad[i] = 0
                continue
            upper = self.descent.bits[name]
            push = self.cost_weight * self.share[name] * (upper - lower)
            pull = self.error_weight * (self.errors[name][lower] - self.errors[name][upper])
            grad[i] += (push - pull) * beta[i] * (1 - beta[i])
        self.velocity = self.momentum * self.velocity + grad
        # Beyond +-4 the sigmoid is flat and a layer would never come back.
        self.theta = (self.theta - self.lr * self.velocity).clamp(-4, 4)

    def next_moves(self, count: int = 1) -> list[Move]:
        """Of the layers whose beta is below the threshold, the `count` with the lowest."""
        beta = dict(zip(self.descent.names, torch.sigmoid(self.theta).tolist(), strict=True))
        ready = [name for name in self.descent.movable if beta[name] < self.threshold]
        return [self._move(name) for name in heapq.nsmallest(count, ready, key=lambda name: beta[name])]

    def _move(self, name: str) -> Move:
        lower = self.descent.next_bits(name)
        assert lower is not None
        errors = self.errors[name]
        # The paper's search estimates no damage; the growth of the quantization error orders the refill.
        return Move(name, errors[lower] - errors[self.descent.bits[name]], 0.0)

    def reset(self, name: str) -> None:
        index = self.descent.names.index(name)
        self.theta[index], self.velocity[index] = self.theta_start, 0.0
        self.waited = 0

    def estimates(self) -> dict[str, tuple[float, float]]:
        """Layer -> (beta, 0)."""
        return {name: (b, 0.0) for name, b in zip(self.descent.names, torch.sigmoid(self.theta).tolist(), strict=True)}

    def state_dict(self) -> dict[str, Any]:
        waiting = {"cost_weight": self.cost_weight, "waited": self.waited}
        return {"theta": self.theta.tolist(), "velocity": self.velocity.tolist(), **waiting}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.theta = torch.tensor(state["theta"], dtype=torch.float64)
        self.velocity = torch.tensor(state["velocity"], dtype=torch.float64)
        self.cost_weight, self.waited = state["cost_weight"], state["waited"]
