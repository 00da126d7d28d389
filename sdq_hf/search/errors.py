"""Weights at other bitwidths, and their quantization errors."""

import torch
from torch import Tensor

from ..layers import QuantizedLayer, quantized_layers
from ..modeling_sdq import SDQForImageClassification
from ..quantizers.weight import best_scale, fake_quantize


def scale_at(layer: QuantizedLayer, bits: int) -> Tensor:
    """The scale (0-d float32) with which the layer's real weights have the least error at `bits`."""
    return best_scale(layer.weight, layer.weight_quantizer.form, layer.weight_quantizer.grid, bits)


def weight_at(layer: QuantizedLayer, bits: int, scale: Tensor | None = None) -> Tensor:
    """The layer's real weights, quantized at `bits` (float32, shape of `weight`), with the straight-through gradient.

    scale: 0-d; default that of `scale_at`.
    """
    quantizer = layer.weight_quantizer
    scale = scale_at(layer, bits) if scale is None else scale
    return fake_quantize(layer.weight.float(), quantizer.form, quantizer.grid, bits, scale)


@torch.no_grad()
def quantization_errors(
    model: SDQForImageClassification, names: list[str], candidates: list[int]
) -> dict[str, dict[int, float]]:
    """Layer -> bitwidth -> squared error of its quantized weights, relative to the weights' own square sum."""
    layers = quantized_layers(model.timm_model)
    errors: dict[str, dict[int, float]] = {}
    for name in names:
        weight = layers[name].weight.detach().float()
        norm = weight.square().sum().clamp_min(1e-30)
        errors[name] = {
            bits: ((weight_at(layers[name], bits) - weight).square().sum() / norm).item() for bits in candidates
        }
    return errors
