"""Looks a model file over before anything of it is used: a file from the Hub is untrusted.

Names, shapes and types are read from the headers and compared with the network that config.json describes, before memory
is taken for a tensor. A digest of the contents is in the file as a tensor of its own, so that a damaged file is told from a
good one. (Not in the header: safetensors writes entries there in an order that changes from file to file.)
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .quantizers import ActivationQuantizer
from .strategy import short

DIGEST = "sdq_sha256"
_FLOATS = ("F64", "F32", "F16", "BF16")
_KINDS = {torch.uint8: ("U8",), torch.int64: ("I64",)}


class CheckpointError(ValueError):
    """A model file that is damaged, or that does not fit its configuration; names the file or the tensor."""


def digest(state: Mapping[str, Tensor]) -> bytes:
    """sha256 (32 bytes) over names, types, shapes and bytes of all tensors but itself, in the order of their names."""
    sha = hashlib.sha256()
    for name in sorted(state.keys() - {DIGEST}):
        tensor = state[name].detach().cpu().contiguous()
        sha.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.digest()


def stored_digest(folder: Path) -> str | None:
    """The digest, as hexadecimal digits, that the weight files of the model in `folder` hold; None where they hold none."""
    for path in sorted(folder.glob("model*.safetensors")):
        with _opened(str(path)) as file:
            if DIGEST in file.keys():  # noqa: SIM118 (a file handle, not a mapping)
                return bytes(file.get_tensor(DIGEST).tolist()).hex()
    return None


def check_files(files: Sequence[str], expected: Mapping[str, Tensor], optional: Iterable[str] = ()) -> None:
    """Compare the tensors in safetensors `files` with `expected`, name -> tensor of the same shape and type (on any device).

    Floating types stand for one another. Names in `optional` may be missing, and may have any shape. Raises
    `CheckpointError` naming the file or the first tensor that is wrong.
    """
    optional, seen = {*optional, DIGEST}, set[str]()
    for path in files:
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118 (a file handle, not a mapping)
                if name in seen:
                    raise CheckpointError(f"{_name(path)}: tensor {name!r} is in two files.")
                seen.add(name)
                if name == DIGEST:
                    _check_tensor(path, name, file.get_slice(name), {DIGEST: torch.empty(32, dtype=torch.uint8)})
                elif name not in optional:
                    _check_tensor(path, name, file.get_slice(name), expected)
    missing = sorted(expected.keys() - seen - optional)
    if missing:
        files_ = ", ".join(_name(path) for path in files)
        raise CheckpointError(
            f"{files_}: {len(missing)} of {len(expected)} tensors that config.json asks for are missing, "
            f"the first is {missing[0]!r}."
        )
    if DIGEST in seen:
        _check_digest(files)


def check_index(folder: str) -> None:
    """The index of a sharded file in a local `folder`, if there is one, names files of that folder only."""
    path = Path(folder) / "model.safetensors.index.json"
    if not path.is_file():
        return
    try:
        index = json.loads(path.read_text())
        names = set(index["weight_map"].values()) if isinstance(index["metadata"], dict) else set()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path.name} is no index of a sharded model: {error!r}") from error
    wrong = sorted(str(name) for name in names if not isinstance(name, str) or Path(name).name != name)
    if wrong or not names:
        raise CheckpointError(f"{path.name} must name the files of its folder, got {short(wrong or index)}.")


def _check_tensor(path: str, name: str, header: Any, expected: Mapping[str, Tensor]) -> None:
    if name not in expected:
        raise CheckpointError(f"{_name(path)}: tensor {name!r} has no place in the network that config.json describes.")
    shape, kind, wanted = tuple(header.get_shape()), header.get_dtype(), expected[name]
    if shape != tuple(wanted.shape):
        raise CheckpointError(f"{_name(path)}: tensor {name!r} has shape {shape}, expected {tuple(wanted.shape)}.")
    kinds = _KINDS.get(wanted.dtype, _FLOATS)
    if kind not in kinds:
        raise CheckpointError(f"{_name(path)}: tensor {name!r} is of type {kind}, expected {' or '.join(kinds)}.")


def _check_digest(files: Sequence[str]) -> None:
    state: dict[str, Tensor] = {}
    for path in files:
        with _opened(path) as file:
            state.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    if bytes(state[DIGEST].tolist()) != digest(state):
        raise CheckpointError(
            f"{', '.join(_name(path) for path in files)}: the contents do not have the digest that was written with them: "
            "the file is damaged, or was changed after it was saved. Download it again."
        )


def check_scale(name: str, scale: Tensor, field: str = "weight scale") -> None:
    """A scale (of any shape) of layer `name` that is above 0 and finite; else `CheckpointError`."""
    wrong = scale[~((scale > 0) & scale.isfinite())]
    if wrong.numel():
        raise CheckpointError(
            f"Layer {name!r}: its {field} must be above 0 and finite, got {wrong.view(-1)[0].item()}."
        )


def check_inputs(name: str, inputs: ActivationQuantizer) -> None:
    """An input quantizer of layer `name` with a step above 0 and a sign of 0 or 1; else `CheckpointError`."""
    check_scale(name, inputs.step, "activation step")
    if inputs.signed.item() not in (0, 1):
        raise CheckpointError(f"Layer {name!r}: the sign of its inputs must be 0 or 1, got {inputs.signed.item()}.")


@contextmanager
def _opened(path: str) -> Any:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{_name(path)} is no readable safetensors file: {error}") from error


def _name(path: str) -> str:
    return Path(path).name
