"""Puts quantizers on a timm model's own conv and linear layers.

A layer keeps its object, its name and its parameters: only its class is swapped for a subclass of it, whose forward
quantizes the input and the weight. So hooks, names and timm's own code stay valid, and nothing of timm is copied.
"""

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame
from timm.layers.conv2d_same import conv2d_same
from torch import Tensor, nn

from .quantizers import ActivationQuantizer, WeightQuantizer
from .strategy import FLOAT_BITS, LayerBits, Strategy, unknown_layer


class QuantizedLayer(nn.Module):
    """Mixin of a layer with a weight quantizer and an input quantizer.

    `weight_source`, when set, replaces the weight quantizer: the search puts its stochastic weights there.
    `enabled` False makes the layer the float layer it was.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    weight_quantizer: WeightQuantizer
    input_quantizer: ActivationQuantizer | None
    weight_source: Callable[[Tensor], Tensor] | None
    enabled: bool

    def quantized_weight(self) -> Tensor:
        """The weight that the forward pass uses (shape of `weight`)."""
        if not self.enabled:
            return self.weight
        if self.weight_source is not None:
            return self.weight_source(self.weight)
        return self.weight_quantizer(self.weight)

    @torch.no_grad()
    def make_latent(self) -> None:
        """Replace the weights of a loaded model, which are quantized already, by real ones quantized to the same."""
        if self.weight_quantizer.exact and not self.weight.is_meta:
            self.weight.copy_(self.weight_quantizer.latent(self.weight))
            self.weight_quantizer.exact = False

    def forward(self, x: Tensor) -> Tensor:
        if self.enabled and self.input_quantizer is not None:
            x = self.input_quantizer(x)
            if self.input_quantizer.compact and torch.is_grad_enabled():
                with self.input_quantizer.saved_as_codes(x):
                    return self.compute(x, self.quantized_weight())
        return self.compute(x, self.quantized_weight())

    def compute(self, x: Tensor, weight: Tensor) -> Tensor:
        raise NotImplementedError


class QuantizedLinear(QuantizedLayer, nn.Linear):  # type: ignore[misc]
    def compute(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight.to(x.dtype), self.bias)


class QuantizedConv2d(QuantizedLayer, nn.Conv2d):  # type: ignore[misc]
    def compute(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._conv_forward(x, weight.to(x.dtype), self.bias)


class QuantizedConv2dSame(QuantizedLayer, Conv2dSame):
    def compute(self, x: Tensor, weight: Tensor) -> Tensor:
        return conv2d_same(x, weight.to(x.dtype), self.bias, self.stride, self.padding, self.dilation, self.groups)


_SUBCLASSES: dict[type[nn.Module], type[QuantizedLayer]] = {
    nn.Linear: QuantizedLinear,
    nn.Conv2d: QuantizedConv2d,
    Conv2dSame: QuantizedConv2dSame,
}


def quantizable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> module of every conv and linear layer, in the network's order, subclasses included."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """Name -> layer of every layer that has quantizers, in the network's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLayer)}


def attach(module: nn.Module, name: str, bits: LayerBits, form: str, grid: str) -> None:
    """Turn one conv or linear layer into its quantized subclass, in place.

    Raises `ValueError` with the layer's name when its class computes with its weight in a way of its own.
    """
    subclass = _SUBCLASSES.get(type(module))
    if subclass is None:
        known = ", ".join(c.__name__ for c in _SUBCLASSES)
        raise ValueError(
            f"Layer {name!r} is a {type(module).__name__}, whose forward SDQ does not know; it quantizes {known}. "
            f"Keep the layer float with pins={{{name!r}: {FLOAT_BITS}}}."
        )
    module.__class__ = cast(Any, subclass)
    layer = cast(QuantizedLayer, module)
    device = layer.weight.device
    layer.weight_quantizer = WeightQuantizer(form, grid, bits.weight_bits).to(device)
    has_input = bits.activation_bits != FLOAT_BITS
    layer.input_quantizer = ActivationQuantizer(bits.activation_bits).to(device) if has_input else None
    layer.weight_source, layer.enabled = None, True
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
    training = model.training
    try:
        parameter = next(model.parameters())
        with torch.no_grad():
            model.eval()(torch.zeros(1, *input_size, device=parameter.device, dtype=parameter.dtype))
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return macs


def apply_strategy(model: nn.Module, strategy: Strategy) -> None:
    """Set every quantized layer of `model` to the bits of `strategy`. Layers whose bits stay are not touched.

    Raises `KeyError` when the layers of the two differ.
    """
    layers = quantized_layers(model)
    quantized = {name: bits for name, bits in strategy.items() if bits.weight_bits != FLOAT_BITS}
    for name in quantized.keys() ^ layers.keys():
        raise KeyError(unknown_layer(name, list(layers)))
    for name, bits in quantized.items():
        layer = layers[name]
        if layer.weight_quantizer.bits != bits.weight_bits:
            layer.weight_quantizer.set_bits(bits.weight_bits, layer.weight)
        if layer.input_quantizer is not None and layer.input_quantizer.bits != bits.activation_bits:
            layer.input_quantizer.set_bits(bits.activation_bits)


def quantizer_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Name and parameter of every learned scale and step: they take their own learning rate and no weight decay."""
    for name, parameter in model.named_parameters():
        if name.endswith(("weight_quantizer.scale", "input_quantizer.step")):
            yield name, parameter
