"""Searches for a strategy, SDQ in two updates and its rivals, behind one function."""

from .descent import BudgetError
from .methods import METHODS, SDQ_METHODS, check_granularity, check_options, search
from .task import SearchLog, SearchState

__all__ = [
    "METHODS",
    "SDQ_METHODS",
    "BudgetError",
    "SearchLog",
    "SearchState",
    "check_granularity",
    "check_options",
    "search",
]
