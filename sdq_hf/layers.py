"""Puts quantizers on a timm model's own conv and linear layers.

A layer keeps its object, its name and its parameters: only its class is swapped for a subclass of it, whose forward
quantizes the input and the weight. So hooks, names and timm's own code stay valid, and nothing of timm is copied.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame
from timm.layers import Linear as TimmLinear
from timm.layers.conv2d_same import conv2d_same
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .quantizers import ActivationQuantizer, WeightQuantizer
from .strategy import FLOAT_BITS, LayerBits, Strategy, unknown_layer

# What the codes of a layer's weight are called in a file, beside its scale.
PACKED = "weight_packed"
# Integer biases have 32 bits, as is usual in integer hardware. In float32 this is the largest number below 2^31.
MAX_BIAS = 2**31 - 128


class QuantizedLayer(nn.Module):
    """Mixin of a layer with a weight quantizer and an input quantizer.

    `weight_source` and `input_source`, when set, replace the quantizers: the search puts its stochastic weights and inputs
    there.
    `enabled` False makes the layer the float layer it was. `has_float_weight`: only inputs are quantized, as in a
    dequantized model; there is no `weight_quantizer` then.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    weight_quantizer: WeightQuantizer
    input_quantizer: ActivationQuantizer | None
    weight_source: Callable[[Tensor], Tensor] | None
    input_source: Callable[[Tensor], Tensor] | None
    enabled: bool
    has_float_weight: bool
    integer_bias: bool

    def quantized_weight(self) -> Tensor:
        """The weight that the forward pass uses (shape of `weight`)."""
        if not self.enabled or self.has_float_weight:
            return self.weight
        if self.weight_source is not None:
            return self.weight_source(self.weight)
        return self.weight_quantizer(self.weight)

    @torch.no_grad()
    def dequantize(self) -> None:
        """Put the quantized weights, as ordinary float numbers, in the place of the weights and their quantizer."""
        if self.bias is not None:
            self.bias.copy_(cast(Tensor, self.quantized_bias()))
        self.integer_bias = False
        self.weight.copy_(self.weight_quantizer(self.weight))
        del self.weight_quantizer
        self.has_float_weight = True

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        # `load_state_dict` takes the tensors of a packed file too, as transformers' Trainer hands them over.
        if prefix + PACKED in state_dict and not self.has_float_weight:
            quantizer = self.weight_quantizer
            packed = state_dict.pop(prefix + PACKED)
            with torch.no_grad():
                quantizer.scale.copy_(state_dict[f"{prefix}weight_quantizer.scale"])
                state_dict[f"{prefix}weight"] = quantizer.unpack(packed.to(self.weight.device), self.weight.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def quantized_bias(self) -> Tensor | None:
        """The bias that the forward pass uses: with scales of powers of two a whole number of what the sum is made of.

        That is the input's step times the weight's unit. Rounding is straight-through. During a search, whose weights have
        no scale of their own, it stays real.
        """
        idle = not self.integer_bias or not self.enabled or self.weight_source is not None
        if self.bias is None or idle or self.bias.is_meta:
            return self.bias
        assert self.input_quantizer is not None
        unit = (self.input_quantizer.effective_step * self.weight_quantizer.unit).detach()
        rounded = (
            torch.round(self.bias.detach().float() / unit).clamp_(-MAX_BIAS, MAX_BIAS).mul_(unit).to(self.bias.dtype)
        )
        return _StraightThrough.apply(self.bias, rounded) if torch.is_grad_enabled() else rounded

    def forward(self, x: Tensor) -> Tensor:
        if self.enabled and self.input_source is not None:
            x = self.input_source(x)
        elif self.enabled and self.input_quantizer is not None:
            x = self.input_quantizer(x)
            if self.input_quantizer.compact and torch.is_grad_enabled():
                with self.input_quantizer.saved_as_codes(x):
                    return self.compute(x, self.quantized_weight(), self.quantized_bias())
        return self.compute(x, self.quantized_weight(), self.quantized_bias())

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        raise NotImplementedError


class _StraightThrough(torch.autograd.Function):
    """`rounded`, with its gradient given to `x`. Adding a difference instead would not give `rounded` to the last bit."""

    @staticmethod
    def forward(ctx, x: Tensor, rounded: Tensor) -> Tensor:
        return rounded

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None


class QuantizedLinear(QuantizedLayer, nn.Linear):  # type: ignore[misc]
    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight.to(x.dtype), bias)


class QuantizedConv2d(QuantizedLayer, nn.Conv2d):  # type: ignore[misc]
    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._conv_forward(x, weight.to(x.dtype), bias)


class QuantizedConv2dSame(QuantizedLayer, Conv2dSame):
    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return conv2d_same(x, weight.to(x.dtype), bias, self.stride, self.padding, self.dilation, self.groups)


_SUBCLASSES: dict[type[nn.Module], type[QuantizedLayer]] = {
    nn.Linear: QuantizedLinear,
    # It differs from torch's in TorchScript only.
    TimmLinear: QuantizedLinear,
    nn.Conv2d: QuantizedConv2d,
    Conv2dSame: QuantizedConv2dSame,
}


def quantizable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> module of every conv and linear layer, in the network's order, subclasses included."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """Name -> layer of every layer whose weights are quantized, in the network's order."""
    return {name: layer for name, layer in attached_layers(model).items() if not layer.has_float_weight}


def attached_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """Name -> layer of every layer that has a quantizer, for its weights or for its inputs."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLayer)}


def input_quantizers(model: nn.Module) -> dict[str, ActivationQuantizer]:
    """Name of the layer -> quantizer of its inputs, in the network's order."""
    layers = attached_layers(model)
    return {name: layer.input_quantizer for name, layer in layers.items() if layer.input_quantizer is not None}


def own_forward(module: nn.Module) -> str | None:
    """What is to be said of a conv or linear layer whose class computes with its weight in a way of its own, else None."""
    if type(module) in _SUBCLASSES:
        return None
    known = ", ".join(f"{c.__module__.split('.')[0]}'s {c.__name__}" for c in _SUBCLASSES)
    own = f"{type(module).__module__}.{type(module).__name__}"
    return f"is a {own}, whose forward SDQ does not know; it quantizes {known}."


def attach(
    module: nn.Module,
    name: str,
    bits: LayerBits,
    form: str,
    grid: str,
    per_channel: bool = False,
    power_of_two: bool = False,
) -> None:
    """Turn one conv or linear layer into its quantized subclass, in place.

    Raises `ValueError` with the layer's name when its class computes with its weight in a way of its own.
    """
    reason = own_forward(module)
    if reason is not None:
        raise ValueError(f"Layer {name!r} {reason} Keep it float with pins={{{name!r}: {FLOAT_BITS}}}.")
    module.__class__ = cast(Any, _SUBCLASSES[type(module)])
    layer = cast(QuantizedLayer, module)
    device = layer.weight.device
    layer.weight_source, layer.input_source, layer.enabled = None, None, True
    layer.has_float_weight = bits.weight_bits == FLOAT_BITS
    has_input = bits.activation_bits != FLOAT_BITS
    layer.input_quantizer = ActivationQuantizer(bits.activation_bits, power_of_two).to(device) if has_input else None
    layer.integer_bias = power_of_two and has_input and not layer.has_float_weight
    if layer.has_float_weight:
        return
    channels = layer.weight.shape[0] if per_channel or isinstance(bits.weight_bits, tuple) else None
    layer.weight_quantizer = WeightQuantizer(form, grid, bits.weight_bits, channels, power_of_two).to(device)
    if not layer.weight.is_meta:
        layer.weight_quantizer.fit_scale(layer.weight)


def count_macs(model: nn.Module, input_size: tuple[int, int, int]) -> dict[str, int]:
    """Multiply-accumulates of every conv and linear layer for one image of `input_size` (C, H, W), by one forward pass.

    A layer that the network never calls has 0: its parameters are unused, or read past its forward.
    """
    macs = dict.fromkeys(quantizable_layers(model), 0)

    def hook(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def count(module: nn.Module, inputs: Any, output: Tensor) -> None:
            weight = cast(Tensor, module.weight)
            macs[name] += weight.numel() * (output.numel() // weight.shape[0])

        return count

    handles = [module.register_forward_hook(hook(name)) for name, module in quantizable_layers(model).items()]
    run_on_zeros(model, input_size, handles)
    return macs


@contextmanager
def modes_restored(model: nn.Module) -> Iterator[None]:
    """Afterwards each module is in the mode it was in: norms that a user has frozen stay so."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@torch.no_grad()
def run_on_zeros(model: nn.Module, input_size: tuple[int, int, int], handles: Iterable[RemovableHandle] = ()) -> None:
    """One forward pass of an image of zeros (C, H, W) in eval mode, for what the hooks of `handles` see; they are removed."""
    parameter = next(model.parameters())
    try:
        with modes_restored(model):
            model.eval()(torch.zeros(1, *input_size, device=parameter.device, dtype=parameter.dtype))
    finally:
        for handle in handles:
            handle.remove()


def apply_strategy(model: nn.Module, strategy: Strategy) -> None:
    """Set every quantized layer of `model` to the bits of `strategy`. Layers whose bits stay are not touched.

    Raises `KeyError` when the layers of the two differ.
    """
    layers = attached_layers(model)
    quantized = {name: bits for name, bits in strategy.items() if not bits.is_float}
    for name in quantized.keys() ^ layers.keys():
        lacks = f"The strategy lacks the layer {name!r} of the network, or has it as float."
        raise KeyError(unknown_layer(name, list(layers)) if name in quantized else lacks)
    for name, bits in quantized.items():
        layer = layers[name]
        if not layer.has_float_weight and layer.weight_quantizer.bits != bits.weight_bits:
            layer.weight_quantizer.set_bits(bits.weight_bits, layer.weight)
        if layer.input_quantizer is not None and layer.input_quantizer.bits != bits.activation_bits:
            layer.input_quantizer.set_bits(bits.activation_bits)


def is_quantizer_state(name: str) -> bool:
    """Whether the tensor `name` of a state dict belongs to a quantizer, not to the network."""
    return ".weight_quantizer." in name or ".input_quantizer." in name


def quantizer_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Name and parameter of every learned scale and step: they take their own learning rate and no weight decay."""
    for name, parameter in model.named_parameters():
        if name.endswith(("weight_quantizer.scale", "input_quantizer.step")):
            yield name, parameter
