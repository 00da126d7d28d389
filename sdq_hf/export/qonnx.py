"""QONNX: ONNX with nodes that round to any number of bits, as qonnx executes it."""

import logging
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..quantizers.grids import extremes
from ..writing import write_beside
from .graph import (
    IMAGE,
    Add,
    Clip,
    Concat,
    Flatten,
    IntegerNetwork,
    Layer,
    MaxPool,
    Node,
    Quantize,
    SumPool,
    signed_bits,
)
from .lower import ExportError
from .optional import needed

# The opset that qonnx 1.0 writes and its transformations know.
_OPSET = 13
_DOMAIN = "qonnx.custom_op.general"
INPUT, OUTPUT = "pixel_values", "logits"


def export_qonnx(network: IntegerNetwork, path: str | Path, per_channel: bool = True) -> None:
    """Write `network` as a QONNX file for one image, cleaned by qonnx.

    The file computes in float32, on values that are integers times powers of two. Input: float32 [1, C, H, W], as the model
    takes it; output: logits float32 [1, num_labels].

    per_channel: weights keep the scale of their output channel. False: all channels stand on the grid of the finest one, in
    more bits, for tools that know one scale for each layer.

    Raises `ExportError` where qonnx is not installed, and for integers that float32 does not hold.
    """
    onnx = needed("onnx", "fpga")
    needed("qonnx", "fpga")
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.util.cleanup import cleanup_model

    _Writer.check(network)
    model = ModelWrapper(_Writer(onnx, network, per_channel).model())
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


class _Writer:
    """Collects ONNX nodes and constants of the nodes of a network."""

    def __init__(self, onnx: Any, network: IntegerNetwork, per_channel: bool):
        self._onnx, self._network, self._per_channel = onnx, network, per_channel
        self._nodes: list[Any] = []
        self._constants: list[Any] = []

    @staticmethod
    def check(network: IntegerNetwork) -> None:
        for layer in network.layers.values():
            if layer.bias is not None and int(layer.bias.abs().max()) >= 2**24:
                raise ExportError(
                    f"Layer {layer.name!r}: its bias has more than the 24 bits that float32 holds exactly."
                )

    def model(self) -> Any:
        helper, float32 = self._onnx.helper, self._onnx.TensorProto.FLOAT
        for node in self._network.nodes:
            getattr(self, f"_{node.op.lower()}")(node)
        last = self._network.output
        self._nodes[-1].output[0] = OUTPUT
        graph = helper.make_graph(
            self._nodes,
            self._network.architecture,
            [helper.make_tensor_value_info(INPUT, float32, [1, *self._network.input_size])],
            [helper.make_tensor_value_info(OUTPUT, float32, [1, *last.shape])],
            self._constants,
        )
        opsets = [helper.make_opsetid("", _OPSET), helper.make_opsetid(_DOMAIN, 2)]
        model = helper.make_model(
            graph, opset_imports=opsets, producer_name="sdq_hf", producer_version=version("sdq-hf")
        )
        # Of opset 13; newer ones some readers refuse.
        model.ir_version = 8
        return model

    # Pieces ------------------------------------------------------------------------------------------------------

    def _constant(self, name: str, values: Any) -> str:
        self._constants.append(self._onnx.numpy_helper.from_array(np.asarray(values, dtype=np.float32), name))
        return name

    def _emit(self, op: str, inputs: list[str], output: str, domain: str = "", **attributes: Any) -> str:
        self._nodes.append(self._onnx.helper.make_node(op, inputs, [output], name=output, domain=domain, **attributes))
        return output

    def _inputs(self, node: Node) -> list[str]:
        return [INPUT if name == IMAGE else name for name in node.inputs]

    def _quant(self, source: str, output: str, scale: Any, bits: int, signed: bool) -> str:
        inputs = [
            source,
            self._constant(f"{output}.scale", scale),
            self._constant(f"{output}.zero_point", 0),
            self._constant(f"{output}.bits", bits),
        ]
        attributes = {"signed": int(signed), "narrow": 0, "rounding_mode": "ROUND"}
        return self._emit("Quant", inputs, output, _DOMAIN, **attributes)

    def _weights(self, layer: Layer) -> str:
        """The quantized weights as a tensor of the shape of `weight`."""
        shape = (-1, *[1] * (layer.weight.dim() - 1))
        units: Any = 2.0 ** np.array(layer.exponents).reshape(shape)
        source = self._constant(f"{layer.name}.weight", layer.weight.numpy() * units)
        name = f"{layer.name}.weight.quantized"
        if not self._per_channel:
            units = 2.0 ** min(layer.exponents)
        if layer.weight_bits == 1 and (self._per_channel or len(set(layer.exponents)) == 1):
            return self._emit("BipolarQuant", [source, self._constant(f"{name}.scale", units)], name, _DOMAIN)
        return self._quant(source, name, units, self.weight_bits(layer, self._per_channel), True)

    @staticmethod
    def weight_bits(layer: Layer, per_channel: bool = True) -> int:
        """Bits of two's complement that hold the grid's integers; on the finest grid those of the integers that there are."""
        if not per_channel and len(set(layer.exponents)) > 1:
            rows = layer.weight.flatten(1) << layer.shifts[:, None]
            return signed_bits(int(rows.min()), int(rows.max()))
        widths = {layer.weight_bits} if isinstance(layer.weight_bits, int) else set(layer.weight_bits)
        return max(signed_bits(*extremes(layer.grid, bits)) for bits in widths)

    # Nodes -------------------------------------------------------------------------------------------------------

    def _quantize(self, node: Quantize) -> None:
        self._quant(self._inputs(node)[0], node.name, 2.0**node.exponent, node.bits, node.signed)

    def _layer(self, node: Layer) -> None:
        inputs = [self._inputs(node)[0], self._weights(node)]
        if node.bias is not None:
            source = self._network[node.inputs[0]]
            units = 2.0 ** (np.array(node.exponents) + source.exponent)
            inputs.append(self._constant(f"{node.name}.bias", node.bias.numpy() * units))
        if node.is_linear:
            self._emit("Gemm", inputs, node.name, transB=1)
            return
        left, right, top, bottom = node.padding
        self._emit(
            "Conv",
            inputs,
            node.name,
            kernel_shape=list(node.weight.shape[2:]),
            strides=list(node.stride),
            dilations=list(node.dilation),
            group=node.groups,
            pads=[top, left, bottom, right],
        )

    def _clip(self, node: Clip) -> None:
        low, high = node.bounds
        assert low == 0
        if high is None:
            self._emit("Relu", self._inputs(node), node.name)
            return
        ends = [
            self._constant(f"{node.name}.{end}", value * 2.0**node.exponent)
            for end, value in (("low", 0), ("high", high))
        ]
        self._emit("Clip", [*self._inputs(node), *ends], node.name)

    def _add(self, node: Add) -> None:
        self._emit("Add", self._inputs(node), node.name)

    def _concat(self, node: Concat) -> None:
        self._emit("Concat", self._inputs(node), node.name, axis=1)

    def _maxpool(self, node: MaxPool) -> None:
        left, right, top, bottom = node.padding
        pads, kernel = [top, left, bottom, right], list(node.kernel)
        self._emit("MaxPool", self._inputs(node), node.name, kernel_shape=kernel, strides=list(node.stride), pads=pads)

    def _sumpool(self, node: SumPool) -> None:
        # A depthwise convolution: tools read global averages in ways of their own, wrong ones among them.
        source = self._network[node.inputs[0]]
        channels, factor = source.shape[0], 2.0 ** (node.exponent - source.exponent)
        ones = self._constant(f"{node.name}.weight", np.full((channels, 1, *node.kernel), factor))
        weight = self._quant(ones, f"{node.name}.weight.quantized", factor, 2, True)
        self._emit(
            "Conv",
            [*self._inputs(node), weight],
            node.name,
            kernel_shape=list(node.kernel),
            strides=list(node.stride),
            group=channels,
            pads=[0, 0, 0, 0],
            dilations=[1, 1],
        )

    def _flatten(self, node: Flatten) -> None:
        self._emit("Flatten", self._inputs(node), node.name, axis=1)
