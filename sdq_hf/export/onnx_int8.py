"""ONNX for speed on a CPU: every tensor in 8 bits, so that a runtime computes with its integer kernels.

The file is a graph of `QuantizeLinear` and `DequantizeLinear` around float operators, of which ONNX Runtime makes
`QLinearConv`, `QLinearAdd` and so on. It is an approximation of the integer network, unlike `onnx_qdq`:

- Inputs of layers stand on the model's own grid, of 8 bits or less: a grid of b bits is the first 2^b codes of a uint8, and
  a `Clip` of the codes keeps them there. A network without sums of tensors has no other grids.
- Tensors that the model does not round get a uint8 grid over the range that they take for calibration images: the terms of
  a sum, the sum itself, what several layers round in different ways. That is what makes the logits differ.
- Weights are int8 with a scale for each output channel, and equal the model's wherever its integers fit, which is up to 7
  bits and in two's complement. Mid-rise weights of 8 bits, odd integers up to 255, are rounded to 255 levels.

Processors without VNNI add two products of uint8 and int8 in 16 bits, which saturate. ONNX Runtime computes with uint8
weights there, exactly, where a session has the entries of `SESSION`; others are not touched by them.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from torch import Tensor

from .graph import IMAGE, Add, Clip, Concat, Flatten, IntegerNetwork, Layer, MaxPool, Node, Quantize, SumPool
from .onnx_qdq import INPUT, GraphWriter, check_layer, conv_attributes, input_of, no_operator, onnx_pads, save_onnx

# The first opset with scales for each channel: runtimes of many years read it.
_OPSET, _IR_VERSION = 13, 7
_IMAGES = 16
# Entries of an ONNX Runtime session's configuration that the file is to be run with.
SESSION = {"session.x64quantprecision": "1"}


def export_onnx_int8(network: IntegerNetwork, path: str | Path, batches: Iterable[Any]) -> None:
    """Write `network` in 8 bits as an ONNX file: `pixel_values` (float32 [batch, C, H, W]) -> `logits` (float32).

    batches: images for calibration, each a float32 [B, C, H, W] or a mapping with one as "pixel_values". Raises
    `ExportError` that names the layer, and `WriteError`.
    """
    save_onnx(_Graph(network, ranges(network, batches)).model(), path)


@torch.no_grad()
def ranges(network: IntegerNetwork, batches: Iterable[Any]) -> dict[str, tuple[float, float]]:
    """Least and largest value of each node's output over the images of `batches`, 0 among them.

    It computes in float32, which is fast: where a sum of integers is too long for it, the range is off by a rounding.
    """
    found: dict[str, tuple[float, float]] = {}
    for batch in batches:
        pixel_values: Tensor = batch["pixel_values"] if isinstance(batch, Mapping) else batch
        network.check_images(pixel_values)
        for images in pixel_values.split(_IMAGES):
            values = {IMAGE: images}
            for node in network.nodes:
                taken = [values[name] for name in node.inputs]
                if isinstance(node, Quantize) and node.inputs != (IMAGE,):
                    taken = [x.long() for x in taken]
                x = values[node.name] = node.run(*taken).float()
                low, high = (end.item() * 2.0**node.exponent for end in x.aminmax())
                least, largest = found.get(node.name, (0.0, 0.0))
                found[node.name] = min(least, low), max(largest, high)
    if not found:
        raise ValueError("Calibration needs at least one batch of images, got none.")
    return found


@dataclass(frozen=True)
class _Grid:
    """What a uint8 tensor stands for: `(code - zero_point) * scale`. Codes from 0 to `top`."""

    scale: float
    zero_point: int = 0
    top: int = 255

    @classmethod
    def of(cls, node: Quantize) -> "_Grid":
        return cls(2.0**node.exponent, -node.low, node.high - node.low)

    @classmethod
    def over(cls, low: float, high: float) -> "_Grid":
        """Over a range that holds 0."""
        scale = float(np.float32((high - low) / 255)) or 1.0
        return cls(scale, min(round(-low / scale), 255))

    def code(self, value: float) -> int:
        return min(max(self.zero_point + round(value / self.scale), 0), self.top)


@dataclass(frozen=True)
class _Codes:
    """A uint8 tensor of the graph."""

    name: str
    grid: _Grid


class _Graph(GraphWriter):
    def __init__(self, network: IntegerNetwork, ranges: Mapping[str, tuple[float, float]]):
        super().__init__(network)
        self._ranges = ranges
        self._users: dict[str, list[Node]] = {name: [] for name in (IMAGE, *(node.name for node in network.nodes))}
        for node in network.nodes:
            for name in node.inputs:
                self._users[name].append(node)
        # Name of a node -> its output; of a node that only a clip takes: the float tensor that is rounded behind the clip.
        self._codes: dict[str, _Codes] = {}
        self._real: dict[str, str] = {}

    def model(self) -> onnx.ModelProto:
        emitters: dict[type[Node], Callable[[Any], None]] = {
            Quantize: self._quantize,
            Layer: self._layer,
            Clip: self._clip,
            Add: lambda node: self._store(node, self.add("Add", self._inputs(node), node.name)),
            Concat: lambda node: self._store(node, self.add("Concat", self._inputs(node), node.name, axis=1)),
            MaxPool: self._max_pool,
            SumPool: self._sum_pool,
            Flatten: self._flatten,
        }
        for node in self.network.nodes:
            if type(node) not in emitters:
                raise no_operator(node)
            emitters[type(node)](node)
        output = self.network.output
        if output.name in self._codes:
            self._dequantized(self._codes[output.name], output.name)
        return self.finished(output.shape, {"": _OPSET}, _IR_VERSION, {})

    # Grids -------------------------------------------------------------------------------------------------------

    def _grid(self, node: Node) -> _Grid:
        """That of whatever takes the node's output, where all agree; else the range of the output."""
        return self._asked(node) or _Grid.over(*self._ranges[node.name])

    def _asked(self, node: Node) -> _Grid | None:
        asked: set[_Grid | None] = set()
        for user in self._users[node.name]:
            if isinstance(user, Quantize):
                asked.add(_Grid.of(user))
            else:
                # Rounding is monotone: it may come before a maximum.
                asked.add(self._asked(user) if isinstance(user, MaxPool | Flatten) else None)
        return asked.pop() if len(asked) == 1 else None

    # Tensors -----------------------------------------------------------------------------------------------------

    def _inputs(self, node: Node) -> list[str]:
        """The real values of what a node takes."""
        return [self._dequantized(self._codes[name], f"{node.name}.input{i}") for i, name in enumerate(node.inputs)]

    def _dequantized(self, codes: _Codes, name: str) -> str:
        return self.add("DequantizeLinear", [codes.name, *self._scale(codes.grid, f"{name}.from")], name)

    def _scale(self, grid: _Grid, name: str, factor: float = 1.0) -> list[str]:
        scale = self.constant(f"{name}.scale", np.float32(grid.scale * factor))
        return [scale, self.constant(f"{name}.zero_point", grid.zero_point, np.uint8)]

    def _quantized(
        self, name: str, real: str, grid: _Grid, ends: tuple[float, float | None] | None = None, factor: float = 1.0
    ) -> _Codes:
        """`real * factor` rounded to `grid`, and clipped to `ends`."""
        codes = self.add("QuantizeLinear", [real, *self._scale(grid, name, 1 / factor)], f"{name}.codes")
        low = 0 if ends is None else grid.code(ends[0])
        high = grid.top if ends is None or ends[1] is None else grid.code(ends[1])
        return _Codes(self._clipped(f"{name}.clipped", codes, low, high), grid)

    def _clipped(self, name: str, codes: str, low: int, high: int) -> str:
        if (low, high) == (0, 255):
            return codes
        ends = [
            self.constant(f"{name}.{end}", value, np.uint8) if value != free else ""
            for end, value, free in (("low", low, 0), ("high", high, 255))
        ]
        return self.add("Clip", [codes, *ends], name)

    def _store(self, node: Node, real: str) -> None:
        """Round the output of `node`, unless it is the logits, or a clip will."""
        users = self._users[node.name]
        if len(users) == 1 and isinstance(users[0], Clip):
            self._real[node.name] = real
        elif users:
            self._codes[node.name] = self._quantized(node.name, real, self._grid(node))

    # Nodes -------------------------------------------------------------------------------------------------------

    def _quantize(self, node: Quantize) -> None:
        (source,) = node.inputs
        grid = _Grid.of(node)
        if source == IMAGE:
            image = INPUT
            if self._in_quarters(node):
                image = self.add("SpaceToDepth", [INPUT], f"{node.name}.quarters", blocksize=2)
            self._codes[node.name] = self._quantized(node.name, image, grid)
            return
        codes = self._codes[source]
        if codes.grid != grid:
            codes = self._quantized(node.name, self._inputs(node)[0], grid)
        self._codes[node.name] = codes

    def _in_quarters(self, node: Quantize) -> bool:
        """Whether `half_size` is for the layer that takes what `node` rounds."""
        (first, *others) = self._users[node.name]
        if others or node.inputs != (IMAGE,) or not isinstance(first, Layer) or first.is_linear:
            return False
        plain = first.groups == 1 and first.dilation == (1, 1) and first.stride == (2, 2)
        return plain and not any(side % 2 for side in node.shape[1:])

    def _layer(self, node: Layer) -> None:
        check_layer(self.network, node)
        integers, scales = int8_weight(node)
        rounding = input_of(self.network, node)
        step = 2.0**rounding.exponent
        if node.is_linear:
            operator, attributes = "Gemm", {"transB": 1}
        else:
            operator, attributes = "Conv", conv_attributes(node)
        if self._in_quarters(rounding):
            integers, attributes = half_size(node, integers, rounding.shape)
        name = f"{node.name}.weight"
        stored = self.constant(f"{name}.integers", integers.numpy(), np.int8)
        weight = self._constants(name, stored, scales, np.int8)
        inputs = [*self._inputs(node), weight]
        if node.bias is not None:
            units = torch.tensor([2.0**exponent for exponent in node.exponents], dtype=torch.float64)
            bias = (node.bias * (units / scales)).round().clamp(-(2**31), 2**31 - 1).long()
            stored = self.constant(f"{node.name}.bias.integers", bias.numpy(), np.int32)
            inputs.append(self._constants(f"{node.name}.bias", stored, scales * step, np.int32))
        self._store(node, self.add(operator, inputs, node.name, **attributes))

    def _constants(self, name: str, stored: str, scales: Tensor, dtype: Any) -> str:
        scale = self.constant(f"{name}.scale", scales.float().numpy())
        zero_point = self.constant(f"{name}.zero_point", np.zeros(len(scales), np.int64), dtype)
        return self.add("DequantizeLinear", [stored, scale, zero_point], name, axis=0)

    def _clip(self, node: Clip) -> None:
        (source,) = node.inputs
        unit = 2.0**node.exponent
        ends = node.bounds[0] * unit, None if node.bounds[1] is None else node.bounds[1] * unit
        if source in self._real:
            self._codes[node.name] = self._quantized(node.name, self._real[source], self._grid(node), ends)
            return
        codes = self._codes[source]
        high = codes.grid.top if ends[1] is None else codes.grid.code(ends[1])
        clipped = self._clipped(f"{node.name}.codes", codes.name, codes.grid.code(ends[0]), high)
        self._codes[node.name] = _Codes(clipped, codes.grid)

    def _max_pool(self, node: MaxPool) -> None:
        codes = self._codes[node.inputs[0]]
        pooled = self.add(
            "MaxPool",
            [codes.name],
            f"{node.name}.codes",
            kernel_shape=list(node.kernel),
            strides=list(node.stride),
            pads=onnx_pads(node.padding),
        )
        self._codes[node.name] = _Codes(pooled, codes.grid)

    def _sum_pool(self, node: SumPool) -> None:
        """The mean, which runtimes have a kernel for; what it lacks to the sum divided by 2^n is in the scale."""
        source = self.network[node.inputs[0]]
        if node.kernel == source.shape[1:]:
            mean = self.add("GlobalAveragePool", self._inputs(node), f"{node.name}.mean")
        else:
            mean = self.add(
                "AveragePool",
                self._inputs(node),
                f"{node.name}.mean",
                kernel_shape=list(node.kernel),
                strides=list(node.stride),
            )
        factor = math.prod(node.kernel) / 2 ** (source.exponent - node.exponent)
        self._codes[node.name] = self._quantized(node.name, mean, self._grid(node), factor=factor)

    def _flatten(self, node: Flatten) -> None:
        codes = self._codes[node.inputs[0]]
        self._codes[node.name] = _Codes(self.add("Flatten", [codes.name], f"{node.name}.codes", axis=1), codes.grid)


def int8_weight(layer: Layer) -> tuple[Tensor, Tensor]:
    """Integers of -128 .. 127 (int64, shape of the weight) and their unit in each output channel (float64 [O]).

    Those of the layer where they fit; a channel in which they do not is rounded to 255 levels up to its largest one.
    """
    rows = layer.weight.flatten(1)
    fits = (rows.amin(1) >= -128) & (rows.amax(1) <= 127)
    factors = torch.where(fits, 1.0, rows.abs().amax(1).double() / 127)
    integers = (rows / factors[:, None]).round().long()
    scales = factors * 2.0 ** torch.tensor(layer.exponents).double()
    return integers.view_as(layer.weight), scales


def half_size(layer: Layer, weight: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, dict[str, Any]]:
    """A convolution with stride 2 as one with stride 1 on the four quarters of the image, its pixels of even and odd rows
    and columns, stacked as channels: its weight [O, 4 I, ...] and its attributes. shape: of the image.

    It is the same sum. Kernels for channels-last tensors gather windows channel by channel, and take most of their time
    for that in a layer with three channels.
    """
    left, _, top, _ = layer.padding
    rows, columns = weight.shape[2:]
    # Windows begin at an even pixel and have an even size: with zeros before and behind.
    above, before = top % 2, left % 2
    weight = F.pad(weight, (before, (columns + before) % 2, above, (rows + above) % 2))
    outputs, inputs = weight.shape[:2]
    kernel = weight.shape[2] // 2, weight.shape[3] // 2
    weight = weight.view(outputs, inputs, kernel[0], 2, kernel[1], 2).permute(0, 3, 5, 1, 2, 4)
    starts = (top + above) // 2, (left + before) // 2
    ends = [
        count - 1 + size - start - side // 2
        for count, size, start, side in zip(layer.shape[1:], kernel, starts, shape[1:], strict=True)
    ]
    attributes = {"kernel_shape": list(kernel), "strides": [1, 1], "pads": [*starts, *ends]}
    return weight.reshape(outputs, 4 * inputs, *kernel), attributes
