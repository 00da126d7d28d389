"""ONNX for runtimes: weights in the smallest integer type that holds them, everything between layers in float32.

A standard file, without operators of its own. Each tensor stands for what the integers of the network do, as real numbers:

- Weights are initializers of type UINT2, INT4, UINT4, INT8 or UINT8, with a `DequantizeLinear` behind them. Levels of 3, 5, 6
  and 7 bits, and two's complement ones, are stored as they are. Mid-rise levels of 4 and 8 bits are odd integers that do not
  fit: their codes are stored, `integer = 2 code - (2^b - 1)`, and a `Sub` follows. So it does for 1 and 2 bits on both grids:
  the default optimization of ONNX Runtime (1.32) puts INT2 weights into a `QLinearConv`, which does not take them.
- Inputs of layers go through `QuantizeLinear` and `DequantizeLinear`, with a `Clip` before where no type has their bits.
- Scales are powers of two, so each product and each sum below 2^24 units is exact in float32 whatever its order, and the
  logits equal those of the network. `IntegerNetwork.inexact_in_float32` says where a sum may be larger.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from ..packing import pack
from ..quantizers.grids import extremes, spacing
from ..quantizers.weight import to_channels
from ..writing import write_beside
from .graph import IMAGE, Add, Clip, Concat, Flatten, IntegerNetwork, Layer, MaxPool, Node, Quantize, SumPool
from .lower import ExportError

INPUT, OUTPUT = "pixel_values", "logits"
# (bits, signed) -> type.
TYPES = {
    (2, True): TensorProto.INT2,
    (2, False): TensorProto.UINT2,
    (4, True): TensorProto.INT4,
    (4, False): TensorProto.UINT4,
    (8, True): TensorProto.INT8,
    (8, False): TensorProto.UINT8,
}
# The first versions of operators and of the file that have 4-bit and 2-bit integers.
_OPSET_IR = {4: (21, 10), 2: (25, 13)}
# Powers of two that float32 holds with full precision below them: 24 bits above the smallest normal number.
_EXPONENTS = range(-126 + 24, 104)


def export_onnx(network: IntegerNetwork, path: str | Path) -> None:
    """Write `network` as an ONNX file: `pixel_values` (float32 [batch, C, H, W]) -> `logits` (float32 [batch, num_labels]).

    The logits equal those of `network.logits` under a runtime that computes in float32 what the file says, as ONNX Runtime
    does with ORT_ENABLE_BASIC. Raises `ExportError` that names the layer, and `WriteError`.
    """
    save_onnx(_Graph(network).model(), path)


def save_onnx(model: onnx.ModelProto, path: str | Path) -> None:
    """Check `model` and write it as one file, weights inside."""
    onnx.checker.check_model(model, full_check=True)
    write_beside(path, lambda beside: beside.write_bytes(model.SerializeToString()))


def type_bits(bits: int) -> int:
    """Bits of the smallest ONNX integer type that holds `bits` bits: 2, 4 or 8."""
    return next(size for size in (2, 4, 8) if bits <= size)


def weight_bits(layer: Layer) -> tuple[int, ...]:
    """Bits of each output channel."""
    bits = layer.weight_bits
    return bits if isinstance(bits, tuple) else (bits,) * len(layer.weight)


class GraphWriter:
    """Nodes and initializers of one graph, by methods that give the name of what they added."""

    def __init__(self, network: IntegerNetwork):
        self.network = network
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def add(self, op: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        """A node with one output, which has the node's `name`."""
        output = OUTPUT if name == self.network.output.name else name
        self.nodes.append(helper.make_node(op, inputs, [output], name=name, **attributes))
        return output

    def constant(self, name: str, values: Any, dtype: Any = np.float32) -> str:
        array = np.asarray(values)
        stored = array.astype(dtype)
        assert np.array_equal(stored.astype(array.dtype), array), name
        self.initializers.append(numpy_helper.from_array(stored, name))
        return name

    def integers(self, name: str, values: Tensor, bits: int, signed: bool) -> str:
        """An initializer of the type of `bits` (2, 4, 8): integers packed without gaps, lowest bits first."""
        packed = pack(values % 2**bits, bits)
        data_type = TYPES[bits, signed]
        self.initializers.append(helper.make_tensor(name, data_type, values.shape, packed.numpy().tobytes(), raw=True))
        return name

    def finished(
        self,
        shape: Sequence[int],
        opsets: Mapping[str, int],
        ir_version: int,
        facts: Mapping[str, str],
        batch: int | str = "batch",
    ) -> onnx.ModelProto:
        """The model, with `facts` as its metadata. opsets: of each domain of operators. batch: images, or a name for any."""
        network = self.network
        graph = helper.make_graph(
            self.nodes,
            network.architecture,
            [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, [batch, *network.input_size])],
            [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, [batch, *shape])],
            self.initializers,
        )
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid(domain, opset) for domain, opset in opsets.items()],
            ir_version=ir_version,
            producer_name="sdq_hf",
            producer_version=version("sdq-hf"),
        )
        layers = network.layers
        helper.set_model_props(
            model,
            {
                "architecture": network.architecture,
                "weight_bits": json.dumps({name: layer.weight_bits for name, layer in layers.items()}),
                "activation_bits": json.dumps({name: input_of(network, layer).bits for name, layer in layers.items()}),
                **facts,
            },
        )
        return model


def input_of(network: IntegerNetwork, layer: Layer) -> Quantize:
    """What rounds the input of `layer`."""
    node = network[layer.inputs[0]]
    if not isinstance(node, Quantize):
        raise ExportError(f"Layer {layer.name!r} takes the output of a {node.op}; its inputs must be quantized.")
    return node


def conv_attributes(layer: Layer) -> dict[str, Any]:
    return {
        "kernel_shape": list(layer.weight.shape[2:]),
        "strides": list(layer.stride),
        "pads": onnx_pads(layer.padding),
        "dilations": list(layer.dilation),
        "group": layer.groups,
    }


def onnx_pads(padding: tuple[int, int, int, int]) -> list[int]:
    """Left, right, top, bottom -> ONNX's order: top, left, bottom, right."""
    left, right, top, bottom = padding
    return [top, left, bottom, right]


def check_layer(network: IntegerNetwork, layer: Layer) -> None:
    """Raises `ExportError` for a layer that ONNX has no operator for."""
    shape = input_of(network, layer).shape
    if layer.is_linear and len(shape) != 1:
        raise ExportError(
            f"Layer {layer.name!r} is linear and takes {list(shape)} for each image; one row of numbers was expected."
        )


def no_operator(node: Node) -> ExportError:
    return ExportError(f"{node.name!r} is a {node.op}, which this export does not know.")


class FloatGraph(GraphWriter):
    """A graph that computes in float32 between layers: the nodes of a network as ONNX's own operators.

    How inputs of layers are rounded, weights are stored and sums of pixels are computed is left to its subclasses.
    """

    def __init__(self, network: IntegerNetwork):
        super().__init__(network)
        # Name of a node -> name of the tensor that holds its output.
        self._of = {IMAGE: INPUT}

    def emit(self) -> None:
        """Add all nodes of the network. Raises `ExportError` for one that has no form here."""
        emitters: dict[type[Node], Callable[[Any], str]] = {
            Quantize: self._quantize,
            Layer: self._layer,
            Clip: self._clip,
            Add: lambda node: self.add("Add" if len(node.inputs) == 2 else "Sum", self._inputs(node), node.name),
            Concat: lambda node: self.add("Concat", self._inputs(node), node.name, axis=1),
            MaxPool: self._max_pool,
            SumPool: self._sum_pool,
            Flatten: lambda node: self.add("Flatten", self._inputs(node), node.name, axis=1),
        }
        for node in self.network.nodes:
            if type(node) not in emitters:
                raise no_operator(node)
            if node.exponent not in _EXPONENTS:
                raise ExportError(f"{node.name!r} has units of 2^{node.exponent}, which float32 does not reach.")
            self._of[node.name] = emitters[type(node)](node)

    def _quantize(self, node: Quantize) -> str:
        raise NotImplementedError

    def _weight(self, node: Layer) -> str:
        """The real weights of a layer."""
        raise NotImplementedError

    def _sum_pool(self, node: SumPool) -> str:
        raise NotImplementedError

    def _inputs(self, node: Node) -> list[str]:
        return [self._of[name] for name in node.inputs]

    def _layer(self, node: Layer) -> str:
        check_layer(self.network, node)
        inputs = [*self._inputs(node), self._weight(node)]
        units = 2.0 ** (torch.tensor(node.exponents) + input_of(self.network, node).exponent).double()
        if node.bias is not None:
            inputs.append(self.constant(f"{node.name}.bias", (node.bias.double() * units).numpy()))
        if node.is_linear:
            return self.add("Gemm", inputs, node.name, transB=1)
        return self.add("Conv", inputs, node.name, **conv_attributes(node))

    def _clip(self, node: Clip) -> str:
        low, high = node.bounds
        if (low, high) == (0, None):
            return self.add("Relu", self._inputs(node), node.name)
        ends = [
            "" if value is None else self.constant(f"{node.name}.{end}", value * 2.0**node.exponent)
            for end, value in (("low", low), ("high", high))
        ]
        return self.add("Clip", [*self._inputs(node), *ends], node.name)

    def _max_pool(self, node: MaxPool) -> str:
        return self.add(
            "MaxPool",
            self._inputs(node),
            node.name,
            kernel_shape=list(node.kernel),
            strides=list(node.stride),
            pads=onnx_pads(node.padding),
        )


class _Graph(FloatGraph):
    def __init__(self, network: IntegerNetwork):
        super().__init__(network)
        self._has_two_bits = False

    def model(self) -> onnx.ModelProto:
        self.emit()
        opset, ir_version = _OPSET_IR[2 if self._has_two_bits else 4]
        inexact = json.dumps(self.network.inexact_in_float32())
        return self.finished(self.network.output.shape, {"": opset}, ir_version, {"inexact_in_float32": inexact})

    def _quantize(self, node: Quantize) -> str:
        (source,) = self._inputs(node)
        bits, unit = type_bits(node.bits), 2.0**node.exponent
        self._has_two_bits |= bits == 2
        if node.bits != bits:
            # Both ends are levels, so to clip before rounding is to clip behind it.
            ends = [
                self.constant(f"{node.name}.{end}", value * unit)
                for end, value in (("low", node.low), ("high", node.high))
            ]
            source = self.add("Clip", [source, *ends], f"{node.name}.clip")
        scale = self.constant(f"{node.name}.scale", unit)
        codes = self.add("QuantizeLinear", [source, scale], f"{node.name}.codes", output_dtype=TYPES[bits, node.signed])
        return self.add("DequantizeLinear", [codes, scale], node.name)

    def _weight(self, node: Layer) -> str:
        """Real weights, made of the integers that are stored."""
        name, widths = f"{node.name}.weight", weight_bits(node)
        bits = type_bits(max(widths))
        self._has_two_bits |= bits == 2
        low, high = extremes(node.grid, max(widths))
        units = 2.0 ** torch.tensor(node.exponents).double()
        if bits > 2 and -(2 ** (bits - 1)) <= low and high < 2 ** (bits - 1):
            stored = self.integers(f"{name}.integers", node.weight, bits, signed=True)
            return self._dequantized(name, stored, units)
        lows = torch.tensor([extremes(node.grid, width)[0] for width in widths])
        each = to_channels(torch.tensor([spacing(node.grid, width) for width in widths]), node.weight)
        codes = (node.weight - to_channels(lows, node.weight)) // each
        stored = self.integers(f"{name}.codes", codes, bits, signed=False)
        real = self._dequantized(f"{name}.from_zero", stored, units * each.flatten())
        return self.add("Sub", [real, self.constant(f"{name}.offset", self._channels(-lows * units, node))], name)

    def _channels(self, values: Tensor, node: Layer) -> np.ndarray:
        """`values` [O] as a number where they are equal, else in a shape that broadcasts over the weights."""
        return (values[0] if (values == values[0]).all() else to_channels(values, node.weight)).numpy()

    def _dequantized(self, name: str, stored: str, scales: Tensor) -> str:
        one = bool((scales == scales[0]).all())
        scale = self.constant(f"{name}.scale", (scales[0] if one else scales).numpy())
        return self.add("DequantizeLinear", [stored, scale], name, **({} if one else {"axis": 0}))

    def _sum_pool(self, node: SumPool) -> str:
        """Sums as an average where that is a shift; else, over whole images, a sum times a power of two."""
        source = self.network[node.inputs[0]]
        divisor = 2 ** (source.exponent - node.exponent)
        if divisor == math.prod(node.kernel):
            return self.add(
                "AveragePool",
                self._inputs(node),
                node.name,
                kernel_shape=list(node.kernel),
                strides=list(node.stride),
            )
        if node.kernel != source.shape[1:]:
            raise ExportError(
                f"{node.name!r} divides sums of {node.kernel[0]} x {node.kernel[1]} pixels by {divisor}: only sums over "
                "whole images, and averages, have a form in ONNX."
            )
        axes = self.constant(f"{node.name}.axes", [2, 3], np.int64)
        total = self.add("ReduceSum", [*self._inputs(node), axes], f"{node.name}.sum", keepdims=1)
        return self.add("Mul", [total, self.constant(f"{node.name}.factor", 1 / divisor)], node.name)
