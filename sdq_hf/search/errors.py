"""Weights at other bitwidths, and their quantization errors."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..layers import QuantizedLayer, quantized_layers
from ..modeling_sdq import SDQForImageClassification
from ..quantizers.weight import best_scale, by_channel, fake_quantize
from .descent import Descent


def scale_at(layer: QuantizedLayer, bits: int) -> Tensor:
    """The scale with which the layer's real weights have the least error at `bits`.

    A 0-d float32, or where channels have scales of their own one for each output channel [C].
    """
    quantizer = layer.weight_quantizer
    per_channel = quantizer.scale.dim() > 0
    return best_scale(layer.weight, quantizer.form, quantizer.grid, bits, per_channel, quantizer.power_of_two)


def weight_at(layer: QuantizedLayer, bits: int | Sequence[int], scale: Tensor | None = None) -> Tensor:
    """The layer's real weights, quantized at `bits` (float32, shape of `weight`), with the straight-through gradient.

    bits: of the layer, or of each output channel. scale: 0-d or [C] accordingly; default that of `scale_at`.
    """
    quantizer = layer.weight_quantizer
    if scale is None:
        assert isinstance(bits, int)
        scale = scale_at(layer, bits)

    def quantized(weight: Tensor, width: int, scales: Tensor) -> Tensor:
        return fake_quantize(weight, quantizer.form, quantizer.grid, width, scales)

    return by_channel(quantized, layer.weight.float(), bits, scale)


@torch.no_grad()
def quantization_errors(model: SDQForImageClassification, descent: Descent) -> dict[str, dict[int, float]]:
    """Unit of weights -> bitwidth -> their squared error when quantized, relative to their own square sum."""
    layers = quantized_layers(model.timm_model)
    norms: dict[str, Tensor] = {}
    errors: dict[str, dict[int, Tensor]] = {}
    for name in descent.layers:
        weight = layers[name].weight.detach().float()
        per_channel = not isinstance(layers[name].weight_quantizer.bits, int)
        norms[name] = _squares(weight, per_channel)
        errors[name] = {
            bits: _squares(weight_at(layers[name], bits) - weight, per_channel) for bits in descent.candidates
        }
    found = {}
    for name, unit in descent.units.items():
        if unit.inputs:
            continue
        channel = unit.channel or 0
        norm = torch.stack([norms[layer][channel] for layer in unit.layers]).sum().clamp_min(1e-30)
        found[name] = {
            bits: (torch.stack([errors[layer][bits][channel] for layer in unit.layers]).sum() / norm).item()
            for bits in descent.candidates
        }
    return found


def _squares(values: Tensor, per_channel: bool) -> Tensor:
    """Sum of squares of each output channel [C], or of all [1]."""
    return values.flatten(1).square().sum(1) if per_channel else values.square().sum().view(1)
