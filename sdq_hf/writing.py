"""Files that are whole or not there: written beside, then renamed."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


class WriteError(OSError):
    """A file that cannot be written; one line that names it and the room there is. What was there before is still good."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around the writing of the file or folder `path`: what fails removes it, and ends in a `WriteError`."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:  # of Python, safetensors and torch.save
        with suppress(OSError):
            remove(path)
        if isinstance(error, WriteError):
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).strip().split("\n")[0]
        raise WriteError(f"{path} cannot be written: {reason}{_room(path)}") from error


def _room(path: Path) -> str:
    folder = next(parent for parent in path.absolute().parents if parent.is_dir())
    return f" ({shutil.disk_usage(folder).free / 1e6:,.1f} MB are free there)"


def remove(path: Path) -> None:
    """Remove a file or a folder, which need not be there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_beside(path: str | Path, write: Callable[[Path], Any]) -> None:
    """Let `write` make a file beside `path`, whose folder is made when it is missing, and rename it to `path`.

    Raises `WriteError`; the file that was there is left as it was.
    """
    path = Path(path)
    beside = path.with_name(path.name + ".new")
    with writing(beside):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Open to those that files are open to here: safetensors closes its own to others.
        beside.touch()
        mode = beside.stat().st_mode
        write(beside)
        beside.chmod(mode)
        # Without this a name may outlive a power cut that its contents do not.
        with beside.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)


@contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """An empty folder to write in, until `replace_folder` makes it `path`; it is on the same disk.

    It stands in one with a name that is free, beside `path`, which is removed at the end with all that is left in it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(prefix=f"{path.name}.new-", dir=path.parent)
    except OSError as error:
        raise WriteError(f"{path} cannot be written: {error.strerror}{_room(path)}") from error
    with scratch as parent:
        # Made as folders are made here: temporary ones are closed to others.
        beside = Path(parent) / path.name
        beside.mkdir()
        yield beside


def replace_folder(beside: Path, path: Path) -> None:
    """Put the folder `beside`, of `folder_beside(path)`, in the place of `path`; what was there goes with the scratch."""
    old = beside.with_name(path.name + ".old")
    if path.exists():
        os.replace(path, old)
    try:
        os.replace(beside, path)
    except BaseException:
        if old.exists():
            os.replace(old, path)
        raise


def write_text(path: str | Path, text: str) -> None:
    write_beside(path, lambda beside: beside.write_text(text, encoding="utf-8"))


def write_json(path: str | Path, data: Any) -> None:
    write_text(path, json.dumps(data, indent=1) + "\n")


def save_tensors(state: Mapping[str, Tensor], path: str | Path) -> None:
    """As safetensors, each tensor in its plain memory format."""
    whole = {name: tensor.detach().contiguous() for name, tensor in state.items()}
    write_beside(path, lambda beside: save_file(whole, beside))
