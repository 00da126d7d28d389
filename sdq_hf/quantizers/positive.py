"""Learned scales that stay above zero."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class KeepsPositive:
    """Mixin of a quantizer with a learned scale, of any shape: it stays above a hundredth of what it was when fitted.

    An optimizer with a constant step length, as Adam's, could carry a small one past zero.
    """

    _least: Tensor | None = None

    def keep_positive(self, scale: nn.Parameter) -> None:
        """Raise `scale` to the least value. Does nothing before it was fitted or loaded, when it is zero."""
        if torch.compiler.is_exporting():
            # A graph that is kept computes with the scales as they are.
            return
        if self._least is None:
            if torch.compiler.is_compiling() and not torch.is_grad_enabled():
                # Nothing is learned, and asking for a value would split the graph.
                return
            if not scale.all():
                return
            # In double precision: the floor of a scale that was saved in float32 is the same on any device.
            self._least = (0.01 * scale.detach().double().abs()).to(scale.detach())
        if self._least.device != scale.device:
            self._least = self._least.to(scale.device)
        scale.data.clamp_(min=self._least)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._least = None
        super()._load_from_state_dict(*args, **kwargs)  # type: ignore[misc]


def floors(module: nn.Module) -> dict[str, Any]:
    """Name of each quantizer in `module` -> least value of its scale, or list of those of its channels; None before use.

    They are no part of a model's state, but of its training's: one that is resumed without them has other floors.
    """
    found = {name: m._least for name, m in module.named_modules() if isinstance(m, KeepsPositive)}
    return {name: None if least is None else least.tolist() for name, least in found.items()}


def set_floors(module: nn.Module, values: Mapping[str, Any]) -> None:
    """Give the quantizers of `module` the least values that `floors` has told, after its state was loaded."""
    for name, value in values.items():
        quantizer = module.get_submodule(name)
        assert isinstance(quantizer, KeepsPositive)
        quantizer._least = None if value is None else torch.tensor(value)
        if value is not None:
            # An optimizer may have left it below zero, where a step that is loaded counts as not fitted.
            quantizer.keep_positive(next(quantizer.parameters()))
