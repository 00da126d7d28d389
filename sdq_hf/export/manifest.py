"""What stands beside the exported files: the network's integers, and a description of what is done with them."""

import hashlib
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..strategy import Strategy
from .graph import IMAGE, IntegerNetwork, Layer

_TOOLS = ("sdq-hf", "torch", "onnx", "onnxruntime", "qonnx", "hls4ml", "da4ml")


def manifest(
    network: IntegerNetwork,
    strategy: Strategy,
    files: Mapping[str, Path],
    targets: Mapping[str, Mapping[str, Any]],
    normalisation: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything that defines the integers of `network`, as plain values; `files` by the names they go by, with their sha256.

    targets: what was exported -> what it was written with. normalisation: `mean` and `std` of each channel of the images.

    A value is `integer * 2^exponent`. Weights and biases are the tensors of `integers.safetensors`. `padding` is that on the
    left, right, top, bottom.
    """
    first = network.nodes[0]
    return {
        "format": 1,
        "architecture": network.architecture,
        "average_bits": round(strategy.average_bits(), 4),
        "input": {
            "name": IMAGE,
            "shape": list(network.input_size),
            "meaning": "the normalised image (float32) as the image processor gives it, (pixel / 255 - mean) / std; the "
            "first node makes integers of it",
            "mean": normalisation.get("mean"),
            "std": normalisation.get("std"),
            "first_node": first.name,
        },
        "output": {
            "name": network.output.name,
            "exponent": network.output.exponent,
            "shape": list(network.output.shape),
        },
        "rounding": "half to even, in the nodes Quantize only",
        "nodes": [
            {
                "name": node.name,
                "op": node.op,
                "inputs": list(node.inputs),
                "shape": list(node.shape),
                "exponent": node.exponent,
                "range": [node.low, node.high],
                "width": node.width,
                **node.facts(),
                **(_digests(node) if isinstance(node, Layer) else {}),
            }
            for node in network.nodes
        ],
        "inexact_in_float32": network.inexact_in_float32(),
        "targets": dict(targets),
        "files": {name: sha256(path.read_bytes()) for name, path in files.items()},
        "versions": versions(),
    }


def integers(network: IntegerNetwork) -> dict[str, Tensor]:
    """Name -> the integers of weights, biases and exponents of each layer, in the smallest types that torch has for them.

    `NAME.weight`: int8 or int16. `NAME.bias`: int32, in units of the sum. `NAME.exponents`: int8 [O], of the weights of each
    output channel.
    """
    found = {}
    for name, layer in network.layers.items():
        fits = int(layer.weight.min()) >= -128 and int(layer.weight.max()) < 128
        found[f"{name}.weight"] = layer.weight.to(torch.int8 if fits else torch.int16)
        found[f"{name}.exponents"] = torch.tensor(layer.exponents, dtype=torch.int8)
        if layer.bias is not None:
            found[f"{name}.bias"] = layer.bias.to(torch.int32)
    return found


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def versions() -> dict[str, str]:
    """Of the tools that have a part in exports, those that are installed."""
    found = {}
    for tool in _TOOLS:
        try:
            found[tool] = version(tool)
        except PackageNotFoundError:
            continue
    return found


def _digests(layer: Layer) -> Mapping[str, str]:
    """Of the integers as little-endian int32, in C order."""
    digests = {"weight_sha256": _digest(layer.weight)}
    return digests if layer.bias is None else {**digests, "bias_sha256": _digest(layer.bias)}


def _digest(values: Tensor) -> str:
    return sha256(values.contiguous().numpy().astype("<i4").tobytes())
