"""A model whose weights are drawn at one of two adjacent bitwidths, batch by batch."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..layers import QuantizedLayer, quantized_layers
from ..modeling_sdq import SDQForImageClassification
from ..quantizers.stochastic import stochastic_choice
from ..quantizers.weight import best_scale, fake_quantize


@torch.no_grad()
def _quantize(layer: QuantizedLayer, bits: int) -> Tensor:
    quantizer, weight = layer.weight_quantizer, layer.weight.detach().float()
    return fake_quantize(
        weight, quantizer.form, quantizer.grid, bits, best_scale(weight, quantizer.form, quantizer.grid, bits)
    )


@dataclass
class _Pair:
    """One layer's weights at both bitwidths, and the leaf that takes the gradient to its DBP."""

    upper: Tensor
    lower: Tensor
    difference: Tensor
    gate: Tensor
    use_upper: bool = True

    def weight(self, _: Tensor) -> Tensor:
        return stochastic_choice(self.gate, self.upper if self.use_upper else self.lower, self.difference)


class StochasticWeights:
    """Holds `Q_upper(w)` and `Q_lower(w)` of every searched layer. Weights and scales are frozen, so both are computed
    once for each rung."""

    def __init__(self, model: SDQForImageClassification):
        self._layers = quantized_layers(model.timm_model)
        self._pairs: dict[str, _Pair] = {}

    def set(self, name: str, upper: int, lower: int | None) -> None:
        """Draw layer `name` between `upper` and `lower`; None pins it at `upper`."""
        layer = self._layers[name]
        high = _quantize(layer, upper)
        if lower is None:
            self._pairs.pop(name, None)
            layer.weight_source = lambda _: high
            return
        low = _quantize(layer, lower)
        gate = torch.zeros((), device=high.device, requires_grad=True)
        self._pairs[name] = pair = _Pair(high, low, high - low, gate)
        layer.weight_source = pair.weight

    def choose(self, drawn: dict[str, bool]) -> None:
        """Use the upper bitwidth where `drawn` is True, and forget the gradients of the batch before."""
        for name, pair in self._pairs.items():
            pair.use_upper, pair.gate.grad = drawn[name], None

    def gradients(self) -> tuple[list[str], Tensor]:
        """Names of the drawn layers and the loss's gradients to their DBPs (float32 [L]); 0 where nothing flowed."""
        zero = torch.zeros(())
        gates = [pair.gate for pair in self._pairs.values()]
        values = [zero.to(gate.device) if gate.grad is None else gate.grad for gate in gates]
        return list(self._pairs), torch.stack(values) if values else zero.new_zeros(0)

    def clear(self) -> None:
        for layer in self._layers.values():
            layer.weight_source = None
        self._pairs.clear()


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Inside, no parameter takes a gradient, batch norm uses the batch's statistics, all else is in eval mode.

    Afterwards modes, gradient flags and running statistics are what they were.
    """
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    modes = {module: module.training for module in model.modules()}
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = {norm: norm.momentum for norm in norms}
    statistics = [{key: buffer.clone() for key, buffer in norm.named_buffers(recurse=False)} for norm in norms]
    try:
        for parameter in flags:
            parameter.requires_grad_(False)
        model.eval()
        for norm in norms:
            # Running statistics stay: the float network, which is the teacher, goes on using them.
            norm.training, norm.momentum = True, 0.0
        yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
        for module, mode in modes.items():
            module.training = mode
        for norm, momentum in momenta.items():
            norm.momentum = momentum
        for norm, buffers in zip(norms, statistics, strict=True):
            for key, buffer in buffers.items():
                getattr(norm, key).copy_(buffer)
