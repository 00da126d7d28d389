"""Quantization errors of weights: what the training-free control and the paper's error term look at."""

import torch

from ..layers import quantized_layers
from ..modeling_sdq import SDQForImageClassification
from ..quantizers.weight import best_scale, fake_quantize


@torch.no_grad()
def quantization_errors(
    model: SDQForImageClassification, names: list[str], candidates: list[int]
) -> dict[str, dict[int, float]]:
    """Layer -> bitwidth -> squared error of its quantized weights, relative to the weights' own square sum."""
    layers = quantized_layers(model.timm_model)
    errors: dict[str, dict[int, float]] = {}
    for name in names:
        weight, quantizer = layers[name].weight.detach().float(), layers[name].weight_quantizer
        norm = weight.square().sum().clamp_min(1e-30)
        errors[name] = {}
        for bits in candidates:
            scale = best_scale(weight, quantizer.form, quantizer.grid, bits)
            quantized = fake_quantize(weight, quantizer.form, quantizer.grid, bits, scale)
            errors[name][bits] = ((quantized - weight).square().sum() / norm).item()
    return errors
