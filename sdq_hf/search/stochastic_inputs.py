"""Inputs of layers that are drawn at one of two adjacent bitwidths, as `stochastic_weights` does with weights."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..layers import quantized_layers
from ..modeling_sdq import SDQForImageClassification
from ..quantizers import ActivationQuantizer
from ..quantizers.stochastic import stochastic_choice
from .descent import Descent


class _Inputs:
    """One layer's input, rounded at its upper or at its lower bitwidth, or the mean of both; `gate` as of weights.

    steps: sign, step and error of each of `candidates` (float32 [3, candidates]), which stay as they are.
    """

    def __init__(self, candidates: list[int], steps: Tensor):
        self._quantizers = {}
        for bits, signed, step, _ in zip(candidates, *steps.tolist(), strict=True):
            self._quantizers[bits] = quantizer = ActivationQuantizer(bits).to(steps.device).requires_grad_(False)
            quantizer.step.fill_(step)
            quantizer.signed.fill_(int(signed))
        self.gate = torch.zeros((), device=steps.device, requires_grad=True)
        self.share = 1.0
        self.bits: tuple[int, int | None] = (candidates[-1], None)

    def __call__(self, x: Tensor) -> Tensor:
        upper, lower = (None if bits is None else self._quantizers[bits](x) for bits in self.bits)
        assert upper is not None
        if lower is None:
            return upper
        chosen = upper if self.share == 1 else lower if self.share == 0 else torch.lerp(lower, upper, self.share)
        return stochastic_choice(self.gate, chosen, (upper - lower).detach())


class StochasticInputs:
    """Holds the inputs of every layer whose input bits `descent` searches, at their present bits and the next ones."""

    def __init__(self, model: SDQForImageClassification, descent: Descent):
        self._layers, self._descent = quantized_layers(model.timm_model), descent
        self._inputs: dict[str, _Inputs] = {}
        self.steps: dict[str, Tensor] = {}

    def start(self, steps: Mapping[str, Tensor]) -> None:
        """Draw the inputs of every layer; `steps` as `Task.input_steps` gives them."""
        self.steps = dict(steps)
        for layer, name in self._descent.inputs.items():
            device = self._layers[layer].weight.device
            self._inputs[name] = source = _Inputs(self._descent.candidates, steps[layer].to(device))
            self._layers[layer].input_source = source
            self.step_down(name)

    def step_down(self, name: str) -> None:
        """Draw the inputs of a unit between its bits and the next ones."""
        self._inputs[name].bits = self._descent.bits[name], self._descent.next_bits(name)

    def errors(self) -> dict[str, dict[int, float]]:
        """Unit -> bitwidth -> squared error of its inputs, relative to their own square sum, as `quantization_errors`."""
        return {
            name: dict(zip(self._descent.candidates, self.steps[layer][2].tolist(), strict=True))
            for layer, name in self._descent.inputs.items()
        }

    def choose(self, drawn: Mapping[str, float]) -> None:
        """Set the share of the upper bitwidth of each unit, and forget the gradients of the batch before."""
        for name, source in self._inputs.items():
            source.share, source.gate.grad = float(drawn[name]), None

    def gradients(self) -> Tensor:
        """The loss's gradients to the DBPs of inputs, in the descent's order (float32 [inputs]); 0 where nothing flowed."""
        gates = [source.gate for source in self._inputs.values()]
        found = [torch.zeros_like(gate) if gate.grad is None else gate.grad for gate in gates]
        return torch.stack(found) if found else torch.zeros(0, device=next(iter(self._layers.values())).weight.device)

    def clear(self) -> None:
        for layer in self._descent.inputs:
            self._layers[layer].input_source = None
        self._inputs.clear()
