"""The mathematics of quantization: grids, weights, activations, stochastic bitwidths (DBP), bin regularization (EBR)."""

from .activation import ActivationQuantizer
from .bins import bin_regularization
from .grids import GRIDS
from .weight import FORMS, WeightQuantizer

__all__ = ["FORMS", "GRIDS", "ActivationQuantizer", "WeightQuantizer", "bin_regularization"]
