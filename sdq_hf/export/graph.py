"""A model in the hardware profile as integer arithmetic: the definition of what every export must compute.

An `IntegerNetwork` is a sequence of nodes. Each gives a tensor of int64, whose values are `integer * 2^exponent` with one
exponent for the tensor. There are whole numbers only: sums, products, shifts, comparisons; the one rounding is that of
`Quantize`, half to even, as in the model itself.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# What float32 and float64 hold exactly; beyond, a sum of floats may be another number than the sum of integers.
FLOAT32_EXACT, FLOAT64_EXACT = 2**24, 2**53
# Images that are computed at a time; int64 takes twice the memory of float32.
BATCH = 64
# The name of what the first nodes take.
IMAGE = "image"


def signed_bits(low: int, high: int) -> int:
    """Bits of the two's complement that holds every integer from `low` to `high`."""
    return max((-low - 1).bit_length() if low < 0 else 0, max(high, 0).bit_length()) + 1


@dataclass(frozen=True, kw_only=True)
class Node:
    """One operation: its inputs by name, and of its output the shape (without the batch), exponent and range.

    low, high: what the integers cannot leave, whatever the image.
    """

    name: str
    inputs: tuple[str, ...]
    shape: tuple[int, ...]
    exponent: int
    low: int
    high: int

    @property
    def op(self) -> str:
        return type(self).__name__

    @property
    def width(self) -> int:
        """Bits that the output takes in two's complement."""
        return signed_bits(self.low, self.high)

    def run(self, *inputs: Tensor) -> Tensor:
        """Integers of the inputs (int64 [B, ...]) -> those of the output (int64 [B, *shape])."""
        raise NotImplementedError

    def facts(self) -> dict[str, Any]:
        """What a manifest says of the node beside its name, inputs, shape, exponent and range; plain values."""
        return {}


@dataclass(frozen=True, kw_only=True)
class Quantize(Node):
    """Rounds to `bits`: `clamp(round_half_even(value / 2^exponent), low, high)`.

    The only node that takes the image, which is float32: there it is the model's first rounding. source_exponent: that of
    the input; None for the image.
    """

    bits: int
    signed: bool
    source_exponent: int | None

    def run(self, *inputs: Tensor) -> Tensor:
        (x,) = inputs
        if self.source_exponent is None:
            # Times a power of two is exact, and so is the rest.
            return torch.round(x.float() * 2.0**-self.exponent).clamp_(self.low, self.high).long()
        return shift_half_even(x, self.exponent - self.source_exponent).clamp_(self.low, self.high)

    def facts(self) -> dict[str, Any]:
        return {"bits": self.bits, "signed": self.signed, "rounding": "half to even", "zero_point": 0}


@dataclass(frozen=True, kw_only=True)
class Layer(Node):
    """A convolution or linear layer: `(sum of weight * input + bias) << shifts`, each output channel with a shift of its own.

    weight: int64 [O, I, kh, kw], or [O, I] of a linear layer, in units of 2^exponents[o]. bias: int64 [O] or None, in units
    of the sum. grid, weight_bits: how the weights stand in the packed file. sum_low, sum_high: what the sum cannot leave at
    any moment, in any order of its terms. padding: pixels of zeros on the left, right, top, bottom.
    """

    weight: Tensor = field(repr=False, compare=False)
    bias: Tensor | None = field(repr=False, compare=False)
    exponents: tuple[int, ...]
    weight_bits: int | tuple[int, ...]
    grid: str
    sum_low: int
    sum_high: int
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def is_linear(self) -> bool:
        return self.weight.dim() == 2

    @property
    def shifts(self) -> Tensor:
        """Of each output channel: how far its units are above the finest ones (int64 [O])."""
        return torch.tensor(self.exponents) - min(self.exponents)

    @property
    def sum_width(self) -> int:
        """Bits of the accumulator."""
        return signed_bits(self.sum_low, self.sum_high)

    def run(self, *inputs: Tensor) -> Tensor:
        (x,) = inputs
        weight, bias = self.weight.to(x.device, x.dtype), None if self.bias is None else self.bias.to(x.device, x.dtype)
        if self.is_linear:
            total = F.linear(x, weight, bias)
        else:
            x = F.pad(x, self.padding)
            total = F.conv2d(x, weight, bias, self.stride, 0, self.dilation, self.groups)
        # A multiplication in place of a shift: calibration runs nodes in float32, which is faster (`onnx_int8.ranges`).
        factors = (2**self.shifts).to(x.device, x.dtype)
        return total * factors.view(-1, *[1] * (total.dim() - 2))

    def facts(self) -> dict[str, Any]:
        low, high = int(self.weight.min()), int(self.weight.max())
        windows = {
            "stride": list(self.stride),
            "padding": list(self.padding),
            "dilation": list(self.dilation),
            "groups": self.groups,
        }
        return {
            "kind": "linear" if self.is_linear else "depthwise" if 1 < self.groups == len(self.weight) else "conv",
            "weight_bits_in_file": self.weight_bits,
            "grid": self.grid,
            "weight_range": [low, high],
            "weight_bits_exported": signed_bits(low, high),
            "weight_shape": list(self.weight.shape),
            "weight_exponents": sorted(set(self.exponents)) if len(set(self.exponents)) > 1 else self.exponents[0],
            "accumulator_bits": self.sum_width,
            "bias": self.bias is not None,
            **({} if self.is_linear else windows),
        }


@dataclass(frozen=True, kw_only=True)
class Clip(Node):
    """`clamp(x, low, high)`: ReLU and ReLU6, whose upper end is a whole number in units of any exponent up to 1."""

    bounds: tuple[int, int | None]

    def run(self, *inputs: Tensor) -> Tensor:
        return inputs[0].clamp(*self.bounds)

    def facts(self) -> dict[str, Any]:
        return {"bounds": list(self.bounds)}


@dataclass(frozen=True, kw_only=True)
class Add(Node):
    """Sum of tensors, each shifted left to the finest units among them."""

    shifts: tuple[int, ...]

    def run(self, *inputs: Tensor) -> Tensor:
        total = inputs[0] * 2 ** self.shifts[0]
        for x, shift in zip(inputs[1:], self.shifts[1:], strict=True):
            total = total + x * 2**shift
        return total

    def facts(self) -> dict[str, Any]:
        return {"shifts": list(self.shifts)}


@dataclass(frozen=True, kw_only=True)
class Concat(Node):
    """Channels of several tensors behind each other, each shifted left to the finest units among them."""

    shifts: tuple[int, ...]

    def run(self, *inputs: Tensor) -> Tensor:
        return torch.cat([x * 2**shift for x, shift in zip(inputs, self.shifts, strict=True)], dim=1)

    def facts(self) -> dict[str, Any]:
        return {"shifts": list(self.shifts)}


@dataclass(frozen=True, kw_only=True)
class _Windows(Node):
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)

    def windows(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H', W', kh, kw]"""
        return x.unfold(2, self.kernel[0], self.stride[0]).unfold(3, self.kernel[1], self.stride[1])

    def facts(self) -> dict[str, Any]:
        return {"kernel": list(self.kernel), "stride": list(self.stride), "padding": list(self.padding)}


@dataclass(frozen=True, kw_only=True)
class MaxPool(_Windows):
    """Largest integer in each window; padding never wins."""

    def run(self, *inputs: Tensor) -> Tensor:
        # Below every integer that there can be.
        x = F.pad(inputs[0], self.padding, value=self.low - 1)
        return self.windows(x).amax((-2, -1))


@dataclass(frozen=True, kw_only=True)
class SumPool(_Windows):
    """Sum of each window. An average: its exponent is that of the input less the logarithm of the divisor."""

    def run(self, *inputs: Tensor) -> Tensor:
        return self.windows(inputs[0]).sum((-2, -1))


@dataclass(frozen=True, kw_only=True)
class Flatten(Node):
    """[B, C, H, W] -> [B, C * H * W]"""

    def run(self, *inputs: Tensor) -> Tensor:
        return inputs[0].flatten(1)


def shift_half_even(x: Tensor, shift: int) -> Tensor:
    """`x / 2^shift` rounded half to even (int64, shape of `x`); to the left, for a negative `shift`, it is exact."""
    if shift <= 0:
        return x << -shift
    floor, half = x >> shift, 1 << (shift - 1)
    rest = x - (floor << shift)
    return floor + ((rest > half) | ((rest == half) & (floor & 1).bool())).long()


@dataclass(frozen=True)
class IntegerNetwork:
    """The nodes in the order of their computation; the last one gives the logits.

    `integer_network` (sdq_hf.export.lower) makes one of a model in the hardware profile.
    """

    nodes: tuple[Node, ...]
    architecture: str
    input_size: tuple[int, int, int]

    def __getitem__(self, name: str) -> Node:
        return self._by_name[name]

    @cached_property
    def _by_name(self) -> Mapping[str, Node]:
        return {node.name: node for node in self.nodes}

    @property
    def output(self) -> Node:
        return self.nodes[-1]

    @cached_property
    def layers(self) -> dict[str, Layer]:
        return {node.name: node for node in self.nodes if isinstance(node, Layer)}

    def check_images(self, pixel_values: Tensor) -> None:
        """`ValueError` for images of another size than the network's."""
        shape = tuple(pixel_values.shape)
        if len(shape) != 4 or shape[1:] != tuple(self.input_size):
            expected = ", ".join(map(str, self.input_size))
            raise ValueError(f"{self.architecture} takes images [B, {expected}], got {list(shape)}.")

    @torch.no_grad()
    def run(self, pixel_values: Tensor, keep: bool = False) -> dict[str, Tensor]:
        """Images as the model takes them (float32 [B, C, H, W]) -> the integers of the logits under the last node's name.

        keep: those of every node. int64 on the device of the images. Raises `ValueError` for images of another size.
        """
        self.check_images(pixel_values)
        values: dict[str, Tensor] = {IMAGE: pixel_values}
        left = Counter(name for node in self.nodes for name in node.inputs)
        for node in self.nodes:
            values[node.name] = node.run(*(values[name] for name in node.inputs))
            for name in node.inputs:
                left[name] -= 1
                if not left[name] and not keep:
                    values.pop(name, None)
        return values if keep else {self.output.name: values[self.output.name]}

    def integers_of(self, name: str, pixel_values: Tensor) -> Tensor:
        """Integers of the node `name` (int64 [B, *shape]) for any number of images (float32 [B, C, H, W])."""
        keep = name != self.output.name
        return torch.cat([self.run(part, keep=keep)[name] for part in pixel_values.split(BATCH)])

    def logits(self, pixel_values: Tensor) -> Tensor:
        """Logits (float64 [B, num_labels], exact) of any number of images (float32 [B, C, H, W])."""
        return self.integers_of(self.output.name, pixel_values).double() * 2.0**self.output.exponent

    def inexact_in_float32(self) -> list[str]:
        """Nodes where float32 may compute another number: the integers, or a sum on the way, can reach 2^24."""
        found = []
        for node in self.nodes:
            low, high = (node.sum_low, node.sum_high) if isinstance(node, Layer) else (node.low, node.high)
            if max(-low, high, -node.low, node.high) >= FLOAT32_EXACT:
                found.append(node.name)
        return found
