"""Learned scales that stay above zero."""

from typing import Any

import torch
from torch import Tensor, nn


class KeepsPositive:
    """Mixin of a quantizer with a learned scale, of any shape: it stays above a hundredth of what it was when fitted.

    An optimizer with a constant step length, as Adam's, could carry a small one past zero.
    """

    _least: Tensor | None = None

    @torch.no_grad()
    def keep_positive(self, scale: nn.Parameter) -> None:
        """Raise `scale` to the least value. Does nothing before it was fitted or loaded, when it is zero."""
        if self._least is None:
            if not scale.all():
                return
            # In double precision: the floor of a scale that was saved in float32 is the same on any device.
            self._least = (0.01 * scale.detach().double().abs()).to(scale)
        scale.data.clamp_(min=self._least.to(scale.device))

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._least = None
        super()._load_from_state_dict(*args, **kwargs)  # type: ignore[misc]
