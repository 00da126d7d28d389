"""Packages that only exports need."""

import importlib
from typing import Any

from .lower import ExportError


def needed(module: str, extra: str) -> Any:
    """The imported module. Raises `ExportError` that names the extra to install where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ExportError(f"This export needs {module}: pip install 'sdq-hf[{extra}]'.") from error
