"""QONNX: ONNX with nodes that round to any number of bits, as qonnx executes it."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor

from ..quantizers.grids import extremes
from ..quantizers.weight import to_channels
from ..writing import write_beside
from .graph import IntegerNetwork, Layer, Quantize, SumPool, signed_bits
from .lower import ExportError
from .onnx_qdq import FloatGraph, weight_bits
from .optional import needed

# The opset that qonnx 1.0 writes and its transformations know, and the version of files with it, as newer ones some
# readers refuse.
_OPSET, _IR_VERSION = 13, 8
_DOMAIN = "qonnx.custom_op.general"


def export_qonnx(network: IntegerNetwork, path: str | Path, per_channel: bool = True) -> None:
    """Write `network` as a QONNX file for one image, cleaned by qonnx.

    The file computes in float32, on values that are integers times powers of two. Input: float32 [1, C, H, W], as the model
    takes it; output: logits float32 [1, num_labels].

    per_channel: weights keep the scale of their output channel. False: all channels stand on the grid of the finest one, in
    more bits, for tools that know one scale for each layer.

    Raises `ExportError` where qonnx is not installed, and for integers that float32 does not hold.
    """
    needed("qonnx", "fpga")
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.util.cleanup import cleanup_model

    model = ModelWrapper(_Graph(network, per_channel).model())
    logging.getLogger("qonnx").setLevel(logging.ERROR)
    cleaned = cleanup_model(model).model
    write_beside(Path(path), lambda beside: onnx.save(cleaned, str(beside)))


def run_qonnx(path: str | Path, pixel_values: Tensor) -> np.ndarray:
    """Logits (float32 [B, num_labels]) of images (float32 [B, C, H, W]) by qonnx's executor, one image after the other."""
    needed("qonnx", "fpga")
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.core.onnx_exec import execute_onnx

    model = ModelWrapper(str(path))
    source, target = model.graph.input[0].name, model.graph.output[0].name
    return np.concatenate([execute_onnx(model, {source: image[None].numpy()})[target] for image in pixel_values])


class _Graph(FloatGraph):
    def __init__(self, network: IntegerNetwork, per_channel: bool):
        super().__init__(network)
        self._per_channel = per_channel

    def model(self) -> onnx.ModelProto:
        for layer in self.network.layers.values():
            if layer.bias is not None and int(layer.bias.abs().max()) >= 2**24:
                raise ExportError(
                    f"Layer {layer.name!r}: its bias has more than the 24 bits that float32 holds exactly."
                )
        self.emit()
        return self.finished(self.network.output.shape, {"": _OPSET, _DOMAIN: 2}, _IR_VERSION, {}, batch=1)

    def _quant(self, source: str, name: str, scale: Any, bits: int, signed: bool) -> str:
        inputs = [
            source,
            self.constant(f"{name}.scale", scale),
            self.constant(f"{name}.zero_point", 0),
            self.constant(f"{name}.bits", bits),
        ]
        attributes = {"signed": int(signed), "narrow": 0, "rounding_mode": "ROUND"}
        return self.add("Quant", inputs, name, domain=_DOMAIN, **attributes)

    def _quantize(self, node: Quantize) -> str:
        (source,) = self._inputs(node)
        return self._quant(source, node.name, 2.0**node.exponent, node.bits, node.signed)

    def _weight(self, node: Layer) -> str:
        units = to_channels(2.0 ** torch.tensor(node.exponents).double(), node.weight)
        source = self.constant(f"{node.name}.weight", (node.weight * units).numpy())
        name, one = f"{node.name}.weight.quantized", len(set(node.exponents)) == 1
        scale: Any = units.numpy() if self._per_channel else 2.0 ** min(node.exponents)
        if node.weight_bits == 1 and (self._per_channel or one):
            return self.add("BipolarQuant", [source, self.constant(f"{name}.scale", scale)], name, domain=_DOMAIN)
        if self._per_channel or one:
            bits = max(signed_bits(*extremes(node.grid, width)) for width in weight_bits(node))
        else:
            # On the finest grid as many bits as the integers that there are need.
            rows = node.weight.flatten(1) << node.shifts[:, None]
            bits = signed_bits(int(rows.min()), int(rows.max()))
        return self._quant(source, name, scale, bits, True)

    def _sum_pool(self, node: SumPool) -> str:
        # A depthwise convolution: tools read global averages in ways of their own, wrong ones among them.
        source = self.network[node.inputs[0]]
        channels, factor = source.shape[0], 2.0 ** (node.exponent - source.exponent)
        ones = self.constant(f"{node.name}.weight", np.full((channels, 1, *node.kernel), factor))
        weight = self._quant(ones, f"{node.name}.weight.quantized", factor, 2, True)
        return self.add(
            "Conv",
            [*self._inputs(node), weight],
            node.name,
            kernel_shape=list(node.kernel),
            strides=list(node.stride),
            group=channels,
            pads=[0, 0, 0, 0],
            dilations=[1, 1],
        )
