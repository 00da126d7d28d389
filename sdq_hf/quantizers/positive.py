"""Learned scales that stay above zero."""

from typing import Any

import torch
from torch import nn


class KeepsPositive:
    """Mixin of a quantizer with one learned 0-d scale: at each use it is at least a hundredth of what it was when fitted.

    An optimizer with a constant step length, as Adam's, could carry a small one past zero.
    """

    _least: float | None = None

    @torch.no_grad()
    def keep_positive(self, scale: nn.Parameter) -> None:
        """Raise `scale` to the least value. Does nothing before it was fitted or loaded, when it is zero."""
        if self._least is None:
            value = scale.item()
            if value == 0:
                return
            self._least = 0.01 * abs(value)
        scale.data.clamp_(min=self._least)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._least = None
        super()._load_from_state_dict(*args, **kwargs)  # type: ignore[misc]
