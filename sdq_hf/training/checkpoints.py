"""Checkpoints of a running training or search: numbered folders, each whole or not there, of which the newest are kept."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..writing import remove, writing

_STATE = "state.json"


class DamagedError(ValueError):
    """A file of a run that cannot be read; names it, and what to do."""


class Checkpoints:
    """Folders `checkpoint-<number>` in `folder`; all ranks call each method.

    A checkpoint is written beside and renamed. Its last file holds the caller's numbers and the sha256 of all other files, so
    one that is damaged is told from a good one, and the one before takes its place.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, limit: int = 2):
        self.folder, self.accelerator, self.limit = folder, accelerator, limit

    def save(self, number: int, state: Mapping[str, Any], write: Callable[[Path], object]) -> None:
        """Let `write` put files into a folder, add `state` (plain numbers), and keep the newest `limit` checkpoints.

        A `WriteError` leaves the earlier checkpoints as they are.
        """
        beside, is_main = self.folder / "checkpoint.new", self.accelerator.is_main_process
        if is_main:
            remove(beside)
        self.accelerator.wait_for_everyone()
        with writing(beside):
            beside.mkdir(parents=True, exist_ok=True)
            write(beside)
        # Each rank writes a file of its own.
        self.accelerator.wait_for_everyone()
        if is_main:
            path = self.folder / f"checkpoint-{number}"
            with writing(beside):
                files = {file.name: _digest(file) for file in sorted(beside.iterdir())}
                content = {"processes": self.accelerator.num_processes, "files": files, "state": dict(state)}
                (beside / _STATE).write_text(json.dumps(content))
                remove(path)
                os.replace(beside, path)
            for old in self._all()[self.limit :]:
                remove(old)
        self.accelerator.wait_for_everyone()

    def load(self, read: Callable[[Path], object]) -> dict[str, Any] | None:
        """The state of the newest whole checkpoint, whose folder `read` is given; None where there is no checkpoint.

        Raises `DamagedError` where none is whole, and where another number of processes wrote it.
        """
        # One rank looks, so that all take the same.
        found = self._newest() if self.accelerator.is_main_process else ("", "", "")
        name, note, error = broadcast_object_list(list(found))
        if note:
            self.accelerator.print(note)
        if error:
            raise DamagedError(error)
        if not name:
            return None
        path = self.folder / name
        read(path)
        return json.loads((path / _STATE).read_text())["state"]

    def _newest(self) -> tuple[str, str, str]:
        """Name of the folder to go on from, a line to print, and an error; each may be empty."""
        faults: list[str] = []
        for path in self._all():
            try:
                content = json.loads((path / _STATE).read_text())
                fault = next((fault for file in content["files"].items() if (fault := _fault(path, *file))), None)
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                fault = f"{path / _STATE} is missing or damaged"
            if fault is None:
                processes, here = content["processes"], self.accelerator.num_processes
                if processes != here:
                    error = f"{path} was written by {processes} processes, and this run has {here}: start as many"
                    return "", "", error
                note = f"{'; '.join(faults)}: going on from the checkpoint before, {path}." if faults else ""
                return path.name, note, ""
            faults.append(fault)
        if not faults:
            return "", "", ""
        return "", "", f"{'; '.join(faults)}, and no other checkpoint is whole: remove {self.folder} to start it anew"

    def _all(self) -> list[Path]:
        """Newest first."""
        paths = [p for p in self.folder.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
        return sorted(paths, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True)

    def remove(self) -> None:
        """Remove all checkpoints, and the folder when nothing else is in it."""
        if self.accelerator.is_main_process:
            for path in [*self._all(), self.folder / "checkpoint.new"]:
                remove(path)
            with suppress(OSError):
                self.folder.rmdir()
        self.accelerator.wait_for_everyone()


def load_json(path: Path, advice: str = "remove it, and --resume makes it anew") -> Any:
    """What a JSON file of a run holds; `DamagedError` with `advice` where it cannot be read."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DamagedError(f"{path} cannot be read ({str(error).strip()}): {advice}") from error


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file of a run; `DamagedError` where it cannot be read."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        reason = str(error).strip()
        raise DamagedError(f"{path} cannot be read ({reason}): remove it, and --resume makes it anew") from error


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fault(folder: Path, name: str, digest: str) -> str | None:
    path = folder / name
    if not path.exists():
        return f"{path} is missing"
    return None if _digest(path) == digest else f"{path} is damaged"
