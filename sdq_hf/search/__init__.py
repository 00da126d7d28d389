"""Searches for a strategy: SDQ in two updates, and a training-free control, behind one function."""

from .descent import BudgetError
from .sdq import METHODS, SearchLog, SearchState, search

__all__ = ["METHODS", "BudgetError", "SearchLog", "SearchState", "search"]
