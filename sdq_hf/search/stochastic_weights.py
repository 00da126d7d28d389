"""A model whose weights are drawn at one of two adjacent bitwidths, or halfway between them, batch by batch."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..layers import QuantizedLayer, quantized_layers
from ..modeling_sdq import SDQForImageClassification
from ..quantizers import ActivationQuantizer
from ..quantizers.stochastic import stochastic_choice
from .errors import scale_at, weight_at


class _Pair:
    """One layer's weights at two bitwidths, and the leaf `gate` that takes the gradient to its DBP.

    `lower` None: the layer stays at `upper`. Scales are fitted when the pair is made. Frozen weights are quantized once.
    """

    def __init__(self, layer: QuantizedLayer, upper: int, lower: int | None, trained: bool, scales: Tensor | None):
        self._layer = layer
        self._bits = [upper] if lower is None else [upper, lower]
        if scales is None:
            scales = torch.stack([scale_at(layer, bits) for bits in self._bits])
        self.scales = scales.to(layer.weight.device)
        self.gate = torch.zeros((), device=layer.weight.device, requires_grad=True)
        # Of the upper bitwidth in the weights: 1 or 0, or between them for weights that lie between.
        self.share = 1.0
        self._fixed: list[Tensor] | None = None
        if not trained:
            with torch.no_grad():
                self._fixed = [self._quantize(side) for side in range(len(self._bits))]

    def _quantize(self, side: int) -> Tensor:
        """The weights at the upper (side 0) or the lower bitwidth (side 1)."""
        if self._fixed is not None:
            return self._fixed[side]
        return weight_at(self._layer, self._bits[side], self.scales[side])

    def weight(self, weight: Tensor) -> Tensor:
        if len(self._bits) == 1:
            return self._quantize(0)
        # What is not used takes no gradient.
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.share > 0):
            upper = self._quantize(0)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.share < 1):
            lower = self._quantize(1)
        chosen = upper if self.share == 1 else lower if self.share == 0 else torch.lerp(lower, upper, self.share)
        return stochastic_choice(self.gate, chosen, (upper - lower).detach())


class StochasticWeights:
    """Holds `Q_upper(w)` and `Q_lower(w)` of every searched layer.

    trained: the weights change from batch to batch, and take their straight-through gradient.
    """

    def __init__(self, model: SDQForImageClassification, trained: bool = False):
        self._layers = quantized_layers(model.timm_model)
        self._trained = trained
        self._all: dict[str, _Pair] = {}
        self._pairs: dict[str, _Pair] = {}

    def set(self, name: str, upper: int, lower: int | None, scales: Tensor | None = None) -> None:
        """Draw layer `name` between `upper` and `lower`; None pins it at `upper`. `scales`: those of a resumed search."""
        self._all[name] = pair = _Pair(self._layers[name], upper, lower, self._trained, scales)
        self._layers[name].weight_source = pair.weight
        self._pairs.pop(name, None)
        if lower is not None:
            self._pairs[name] = pair

    def scales(self) -> dict[str, Tensor]:
        """Layer -> scales of its bitwidths (float32 [1 or 2])."""
        return {name: pair.scales for name, pair in self._all.items()}

    def choose(self, drawn: Mapping[str, float]) -> None:
        """Set the share of the upper bitwidth in each layer's weights, and forget the gradients of the batch before."""
        for name, pair in self._pairs.items():
            pair.share, pair.gate.grad = float(drawn[name]), None

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
        self._all.clear()


@contextmanager
def searching(model: nn.Module, trained: bool = False) -> Iterator[list[nn.Parameter]]:
    """Inside, batch norm uses the batch's statistics and all else is in eval mode; gives the parameters that take a gradient.

    Those are none, or with `trained` all but the weights' scales, which the search sets itself. Afterwards modes, gradient
    flags, parameters and running statistics are what they were.
    """
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    modes = {module: module.training for module in model.modules()}
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = {norm: norm.momentum for norm in norms}
    quantizers = [m for m in model.modules() if isinstance(m, ActivationQuantizer)]
    kept = norms if not trained else [model]
    state = [{key: value.clone() for key, value in module.state_dict().items()} for module in kept]
    try:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained and not name.endswith("weight_quantizer.scale"))
        model.eval()
        for norm in norms:
            norm.training, norm.momentum = True, 0.0
        for quantizer in quantizers:
            quantizer.compact = True
        yield [parameter for parameter in flags if parameter.requires_grad]
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
            parameter.grad = None
        for module, mode in modes.items():
            module.training = mode
        for norm, momentum in momenta.items():
            norm.momentum = momentum
        for quantizer in quantizers:
            quantizer.compact = False
        for module, values in zip(kept, state, strict=True):
            module.load_state_dict(values)
