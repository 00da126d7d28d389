"""`search`: strategies for a model's budgets, by SDQ or by one of its rivals."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from inspect import signature
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..costs import Cost, get_cost
from ..modeling_sdq import SDQForImageClassification
from ..strategy import Strategy, is_whole, short
from ..training.ranges import BELOW_ONE, BETWEEN, NOT_NEGATIVE, POSITIVE, Range
from .agreement import check_agreement
from .descent import Descent
from .relaxed import edmips, fracbits
from .rules import greedy, random, size, uniform
from .sdq import paper, two_sided
from .sensitivity import clado, hawq, table
from .task import Batch, SearchLog, SearchState, Task
from .units import input_units, units_of
from .updates import Paper, TwoSided

METHODS: dict[str, Callable[..., list[Strategy]]] = {
    "two_sided": two_sided,
    "paper": paper,
    "uniform": uniform,
    "random": random,
    "size": size,
    "greedy": greedy,
    "table": table,
    "hawq": hawq,
    "clado": clado,
    "fracbits": fracbits,
    "edmips": edmips,
}
# Those whose work does not grow with the number of choices.
KERNEL_METHODS = ("two_sided", "paper", "uniform", "random", "size", "greedy")
# Those that learn DBPs by stochastic quantization, and can be resumed in the middle.
SDQ_METHODS = ("two_sided", "paper")
# Whose statistics batch norm has in a search.
BATCH_NORM = ("batch", "running")
_OPTIONS_OF: dict[str, Callable[..., object]] = {"two_sided": TwoSided, "paper": Paper}


def search(
    model: SDQForImageClassification,
    data: Iterable[Batch | Tensor] | None,
    budgets: Sequence[float],
    cost: str | Path | Mapping[str, Any] | Cost = "bits",
    method: str = "two_sided",
    *,
    teacher: nn.Module | None = None,
    seed: int = 0,
    start_bits: int | None = None,
    floors: Mapping[str, int] | None = None,
    search_activations: bool = False,
    weight_lr: float = 3e-4,
    batch_norm: str = "batch",
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
        model: with its pretrained float weights; `model.config.granularity` says what shares one bitwidth. Activation steps
            that are not fitted yet are fitted to the first batches.
        data: batches `{"pixel_values": [B, C, H, W]}`, or the images alone or in pairs with labels, iterated again and again
            (`set_epoch` is called when there). Labels are not used. The rules "uniform", "random", "size" and "greedy" need
            none.
        budgets: in units of `cost`, and in any order. The strategy found costs at most the budget, and less by no more than
            0.05 bits or 1 %; a warning tells where the steps of a few large layers are too coarse for that.
        cost: "bits", average bits of the searchable layers; of the whole network "bytes" of the packed weights,
            "compression" of the weights, "bitops" for one image, and "lut", LUTs times cycles on an FPGA by our table; or
            a table of one's own, as in `sdq_hf.costs.get_cost`. `get_cost(cost).of_uniform(model.strategy, 3)` is the
            budget that uniform 3 bits use up.
        method: SDQ by the "two_sided" (default; our extension) or the "paper" update, or a rival: the rules "uniform",
            "random", "size" and "greedy" (`sdq_hf.search.rules`), the measured "table", "hawq" and "clado"
            (`.sensitivity`), the relaxed "fracbits" and "edmips" (`.relaxed`).
        teacher: gives the logits to stay close to; default: the model itself in float.
        seed: of the draws. They depend on it and on the batch's number alone, so all ranks of a distributed run agree.
        start_bits: rung where all layers start, and the most bits that a layer gets; default 6, or the lowest that is
            above every budget. Only "uniform" goes above it.
        floors: pattern of layer names -> fewest bits of weights.
        search_activations: also find the bits of the inputs of the searched layers, in the same descent and from the same
            candidates; for SDQ's methods, granularity "layer", and a cost in which inputs count. Inputs that are not rounded
            stay so.
        weight_lr: learning rate (AdamW) at which the weights follow the search, as in the paper's first phase, so that
            damage is measured in a network that has adapted to its bits; 0 keeps them frozen. For SDQ, fracbits and edmips.
        batch_norm: statistics that batch norm has in the search: those of each "batch", as in the training that follows, or
            "running" ones, for a network that is used at its bits without training (then with weight_lr=0) and without
            recalibration; hawq, whose network stays in float, always has these.
        max_batches: gives up after so many, with a `BudgetError` that says how far it came.
        log: is filled with estimates and moves. on_step: is called after each batch.
        accelerator: of a distributed or mixed-precision run; gradients are averaged over its ranks, which are compared at
            each batch (SDQ's methods) and at the end. With its `gradient_accumulation_steps` so many batches share a draw and
            count as one. Batch norm sees each batch of each rank by itself.
        resume_from: a `SearchState.state_dict()` of an interrupted search with the same arguments; SDQ's methods only.
            Plain numbers that JSON can hold, but for the mapping of tensors under "tensors".
        options: of the method; see `sdq_hf.search.updates.TwoSided` and `Paper`, and the functions of the rivals.

    Returns strategies in the order of `budgets`. Raises `BudgetError` (a `ValueError`) for a budget out of reach, with the
    range and the layers that bind, before any work is done; `sdq_hf.search.agreement.RankError` on every rank where ranks
    disagree: SDQ's methods find out at the next batch, the others at the end.
    """
    if torch.is_inference_mode_enabled():
        raise ValueError("search() needs gradients: call it outside torch.inference_mode().")
    if not model.strategy.searchable:
        raise ValueError("The model has no bits to search: every layer is pinned, as after dequantize().")
    check_options(method, options)
    budgets, floors = _budgets(budgets), _floors(floors)
    if not _is_number(weight_lr) or not 0 <= weight_lr < math.inf:
        raise ValueError(f"weight_lr must be a number of at least 0, got {short(weight_lr)}.")
    if batch_norm not in BATCH_NORM:
        raise ValueError(f"batch_norm must be {' or '.join(map(repr, BATCH_NORM))}, got {short(batch_norm)}.")
    cost = get_cost(cost)
    granularity = model.config.granularity
    check_granularity(method, granularity, search_activations)
    units = units_of(model.timm_model, model.strategy, granularity)
    if search_activations:
        units |= input_units(model.strategy)
    descent = Descent(model.strategy, cost, budgets, model.config.candidates, start_bits, floors, units)
    log = SearchLog() if log is None else log
    log.cost, log.unit, log.method = cost.name, cost.unit, method
    log.start, log.start_cost = dict(descent.start), descent.total(descent.start)
    log.start_average_bits = descent.average_bits()
    task = Task(
        model,
        descent,
        data,
        teacher,
        seed,
        weight_lr,
        max_batches,
        log,
        accelerator or Accelerator(),
        on_step,
        resume_from,
        batch_norm,
    )
    with torch.enable_grad():
        found = METHODS[method](task, **options)
    if task.accelerator.num_processes > 1:
        check_agreement(task.accelerator, log.batches, {"strategies": [strategy.to_json() for strategy in found]})
    return found


def _budgets(budgets: Any) -> list[float]:
    numbers = list(budgets) if isinstance(budgets, Iterable) and not isinstance(budgets, str | Mapping) else []
    if not numbers or not all(map(_is_number, numbers)):
        raise ValueError(f"budgets must be a list of numbers, such as [3.0, 2.0], got {short(budgets)}.")
    return [float(number) for number in numbers]


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _floors(floors: Any) -> dict[str, int]:
    if not isinstance(floors, Mapping | None):
        raise ValueError(f"floors must map patterns of layer names to bits, got {short(floors)}.")
    for pattern, bits in (floors or {}).items():
        if not isinstance(pattern, str) or not is_whole(bits):
            raise ValueError(f"floors[{short(pattern)}] must be a whole number of bits, got {short(bits)}.")
    return {pattern: int(bits) for pattern, bits in (floors or {}).items()}


_ANY = Range("a finite number", lambda x: True)
# Where the numbers of a method's options may lie.
_RANGES = {
    "min_draws": POSITIVE,
    "max_draws": POSITIVE,
    "caution": NOT_NEGATIVE,
    "keep": Range("above 0 and at most 1", lambda x: 0 < x <= 1),
    "simpson_from": NOT_NEGATIVE,
    "growth": NOT_NEGATIVE,
    "lr": POSITIVE,
    "momentum": BELOW_ONE,
    "temperature": POSITIVE,
    "threshold": BETWEEN,
    "cost_weight": NOT_NEGATIVE,
    "error_weight": NOT_NEGATIVE,
    "patience": NOT_NEGATIVE,
    "images": POSITIVE,
    "probes": POSITIVE,
    "batches": POSITIVE,
    "cross_bits": POSITIVE,
}


def check_options(method: str, options: Mapping[str, Any]) -> None:
    """`ValueError` for an unknown method or a number out of range, `TypeError` for an unknown option or another type."""
    if method not in METHODS:
        near = get_close_matches(method, METHODS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"Unknown search method {method!r}: expected one of {', '.join(METHODS)}.{hint}")
    parameters = signature(_OPTIONS_OF.get(method, METHODS[method])).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    for option, value in options.items():
        if option not in defaults:
            raise TypeError(
                f"The method {method!r} has no option {option!r}; its options are: {', '.join(defaults) or 'none'}."
            )
        default = defaults[option]
        allowed = int | float if isinstance(default, float) else type(default)
        if not isinstance(value, allowed) or isinstance(value, bool):
            kind = {float: "a number", int: "a whole number"}.get(type(default), "text")
            raise TypeError(f"The method {method!r}: {option} must be {kind}, such as {default!r}, got {value!r}.")
        where = _RANGES.get(option, _ANY)
        if not isinstance(value, str) and not (math.isfinite(value) and where.holds(value)):
            raise ValueError(
                f"The method {method!r}: {option} must be {where.words}, such as {default!r}, got {value!r}."
            )


def check_granularity(method: str, granularity: str, search_activations: bool = False) -> None:
    """`ValueError` for a method that does not search `granularity`, or bits of inputs."""
    if granularity == "kernel" and method not in KERNEL_METHODS:
        raise ValueError(
            f"The method {method!r} does not search granularity 'kernel', which has too many choices for it; "
            f"{', '.join(KERNEL_METHODS)} do."
        )
    if search_activations and (method not in SDQ_METHODS or granularity != "layer"):
        raise ValueError(
            f"search_activations is for the methods {' and '.join(SDQ_METHODS)} and granularity 'layer', got {method!r} and "
            f"{granularity!r}."
        )
