"""A model whose weights are drawn at one of two adjacent bitwidths, or halfway between them, batch by batch."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..layers import QuantizedLayer, modes_restored, quantized_layers
from ..modeling_sdq import SDQForImageClassification
from ..quantizers import ActivationQuantizer
from ..quantizers.stochastic import stochastic_choice
from .descent import Descent
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
        return _recomputed(self._drawn)

    def _drawn(self) -> Tensor:
        if len(self._bits) == 1:
            return self._quantize(0)
        # What is not used takes no gradient.
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.share > 0):
            upper = self._quantize(0)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.share < 1):
            lower = self._quantize(1)
        chosen = upper if self.share == 1 else lower if self.share == 0 else torch.lerp(lower, upper, self.share)
        return stochastic_choice(self.gate, chosen, (upper - lower).detach())


class _Channels:
    """The same for a layer whose output channels have bits of their own: `gate` and `share` have one entry for each.

    Scales of all `rungs` are fitted when it is made: a table [rungs, C], since single channels step down all the time.
    """

    def __init__(self, layer: QuantizedLayer, rungs: list[int], scales: Tensor | None):
        self._layer, self._rungs = layer, rungs
        channels, device = len(layer.weight), layer.weight.device
        if scales is None:
            scales = torch.stack([scale_at(layer, bits) for bits in rungs])
        self.scales = scales.to(device)
        self.gate = torch.zeros(channels, device=device, requires_grad=True)
        self.share = torch.ones(channels, device=device)
        # Of each channel: the upper and the lower bitwidth, the same where there is no lower one.
        self.bits = [[rungs[-1], rungs[-1]] for _ in range(channels)]

    def _quantize(self, side: int) -> Tensor:
        bits = [pair[side] for pair in self.bits]
        rows = torch.tensor([self._rungs.index(width) for width in bits], device=self.scales.device)
        return weight_at(self._layer, bits, self.scales.gather(0, rows[None])[0])

    def weight(self, weight: Tensor) -> Tensor:
        return _recomputed(self._drawn)

    def _drawn(self) -> Tensor:
        upper, lower = self._quantize(0), self._quantize(1)
        share = self.share.view(-1, *[1] * (upper.dim() - 1))
        return stochastic_choice(self.gate, torch.lerp(lower, upper, share), (upper - lower).detach())


def _recomputed(drawn: Callable[[], Tensor]) -> Tensor:
    """`drawn()`, which the backward pass computes again: what it would keep is several times the layer's weights."""
    return cast(Tensor, checkpoint(drawn, use_reentrant=False, preserve_rng_state=False))


class StochasticWeights:
    """Holds `Q_upper(w)` and `Q_lower(w)` of every searched layer, at the present bits of `descent` and the next ones.

    trained: the weights change from batch to batch, and take their straight-through gradient.
    """

    def __init__(self, model: SDQForImageClassification, descent: Descent, trained: bool = False):
        self._layers = quantized_layers(model.timm_model)
        self._descent, self._trained = descent, trained
        self._pairs: dict[str, _Pair | _Channels] = {}

    def start(self, scales: Mapping[str, Tensor] | None = None) -> None:
        """Draw the weights of every layer. `scales`: those of a resumed search, as `scales()` gave them."""
        scales = {} if scales is None else scales
        for name, unit in self._descent.units.items():
            if unit.inputs:
                continue
            if unit.channel is None:
                self._set(name, scales)
                continue
            (layer,) = unit.layers
            if unit.channel == 0:
                rungs = [b for b in self._descent.candidates if b <= max(self._descent.start.values())]
                self._pairs[layer] = pair = _Channels(self._layers[layer], rungs, scales.get(layer))
                self._layers[layer].weight_source = pair.weight
            self.step_down(name)

    def step_down(self, name: str) -> None:
        """Draw the weights of a unit between its bits and the next ones."""
        unit = self._descent.units[name]
        if unit.channel is None:
            return self._set(name, {})
        pair = self._pairs[unit.layers[0]]
        assert isinstance(pair, _Channels)
        upper = self._descent.bits[name]
        pair.bits[unit.channel] = [upper, self._descent.next_bits(name) or upper]

    def _set(self, name: str, scales: Mapping[str, Tensor]) -> None:
        upper, lower = self._descent.bits[name], self._descent.next_bits(name)
        for layer in self._descent.units[name].layers:
            self._pairs[layer] = pair = _Pair(self._layers[layer], upper, lower, self._trained, scales.get(layer))
            self._layers[layer].weight_source = pair.weight

    def scales(self) -> dict[str, Tensor]:
        """Layer -> scales of its bitwidths."""
        return {name: pair.scales for name, pair in self._pairs.items()}

    def choose(self, drawn: Mapping[str, float]) -> None:
        """Set the share of the upper bitwidth in each unit's weights, and forget the gradients of the batch before."""
        channels: dict[str, list[float]] = {}
        for name, unit in self._descent.units.items():
            if unit.inputs:
                continue
            if unit.channel is not None:
                channels.setdefault(unit.layers[0], []).append(float(drawn[name]))
                continue
            for layer in unit.layers:
                self._pairs[layer].share = float(drawn[name])  # type: ignore[assignment]
        for layer, shares in channels.items():
            self._pairs[layer].share = torch.tensor(shares, device=self._layers[layer].weight.device)
        for pair in self._pairs.values():
            pair.gate.grad = None

    def gradients(self) -> Tensor:
        """The loss's gradients to the DBPs of weights, in the descent's order (float32 [U]); 0 where nothing flowed."""
        found = {name: _gradient(pair.gate) for name, pair in self._pairs.items()}
        units = self._descent.units
        if any(unit.channel is not None for unit in units.values()):
            # The units of a layer follow each other, in the order of its channels.
            return torch.cat(list(found.values()))
        return torch.stack(
            [torch.stack([found[layer] for layer in unit.layers]).sum() for unit in units.values() if not unit.inputs]
        )

    def clear(self) -> None:
        for layer in self._layers.values():
            layer.weight_source = None
        self._pairs.clear()


def _gradient(gate: Tensor) -> Tensor:
    return torch.zeros_like(gate) if gate.grad is None else gate.grad


@contextmanager
def searching(
    model: nn.Module,
    trained: bool = False,
    original: Mapping[str, Tensor] | None = None,
    batch_norm: str = "batch",
) -> Iterator[list[nn.Parameter]]:
    """Inside, all is in eval mode, but that batch norm uses the batch's statistics; gives the parameters to be trained.

    Those are none, or with `trained` all but the weights' scales, which the search sets itself. Afterwards modes, gradient
    flags, parameters and running statistics are what they were. `original`: the model's state, where there is a copy of it
    already; it saves another one. `batch_norm`: "running" leaves that in eval mode too.
    """
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = {norm: norm.momentum for norm in norms}
    quantizers = [m for m in model.modules() if isinstance(m, ActivationQuantizer)]
    # What a checkpointed block computes again needs not be kept, not even as codes.
    checkpointed = any(getattr(module, "grad_checkpointing", False) for module in model.modules())
    kept = norms if not trained else [model]
    state: list[Mapping[str, Tensor]]
    if trained and original is not None:
        state = [original]
    else:
        state = [{key: value.clone() for key, value in module.state_dict().items()} for module in kept]
    try:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained and not name.endswith("weight_quantizer.scale"))
        for quantizer in quantizers:
            quantizer.compact = not checkpointed
        with modes_restored(model):
            model.eval()
            for norm in norms if batch_norm == "batch" else []:
                norm.training, norm.momentum = True, 0.0
            yield [parameter for parameter in flags if parameter.requires_grad]
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
            parameter.grad = None
        for norm, momentum in momenta.items():
            norm.momentum = momentum
        for quantizer in quantizers:
            quantizer.compact = False
        for module, values in zip(kept, state, strict=True):
            module.load_state_dict(values)
