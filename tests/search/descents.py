"""The way down of a network that is only sizes."""

from sdq_hf import LayerBits, Strategy
from sdq_hf.costs import COSTS
from sdq_hf.search.descent import Descent


def strategy(sizes, macs=None, bits=8):
    macs = macs or sizes
    return Strategy.of({f"l{i}": LayerBits(bits, 4, n, m) for i, (n, m) in enumerate(zip(sizes, macs, strict=True))})


def descent(budgets, cost="bits", sizes=(1000, 400, 50, 10), candidates=range(1, 9), **kwargs):
    return Descent(strategy(sizes), COSTS[cost], budgets, list(candidates), **kwargs)
