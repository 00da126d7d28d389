"""Files that are whole or not there: written beside, then renamed."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor


def write_beside(path: str | Path, write: Callable[[Path], Any]) -> None:
    """Let `write` make a file beside `path`, whose folder is made when it is missing, and rename it to `path`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".new")
    write(beside)
    os.replace(beside, path)


def write_text(path: str | Path, text: str) -> None:
    write_beside(path, lambda beside: beside.write_text(text, encoding="utf-8"))


def write_json(path: str | Path, data: Any) -> None:
    write_text(path, json.dumps(data, indent=1) + "\n")


def save_tensors(state: Mapping[str, Tensor], path: str | Path) -> None:
    """As safetensors, each tensor in its plain memory format."""
    whole = {name: tensor.detach().contiguous() for name, tensor in state.items()}
    write_beside(path, lambda beside: save_file(whole, beside))
