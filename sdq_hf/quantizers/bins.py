"""Entropy-aware bin regularization, EBR (METHOD 4; Han et al., ICCV 2021)."""

from torch import Tensor

from .grids import extremes, half_range, integers_to_codes, spacing
from .weight import normalise, quantize_to_integers


def bin_regularization(w: Tensor, form: str, grid: str, bits: int, scale: Tensor) -> Tensor:
    """`sum_n (mean of bin n - level_n)^2 + Var(bin n)` in normalised units, [-1, 1] being the clip: a 0-d tensor.

    The variance counts only bins with at least two weights, an empty bin nothing. One scatter-add does all bins. The
    scale is a constant here: the regularizer moves weights, not the grid (our interpretation).
    """
    x = normalise(w.float(), form, bits, scale.detach()).reshape(-1)
    codes = integers_to_codes(quantize_to_integers(w.float(), form, grid, bits, scale), grid, bits).reshape(-1).long()
    low, _ = extremes(grid, bits)
    # Weights beyond the clip count as standing on it: EBR shall not pull at what the grid cuts off anyway.
    x = x.clamp(low / half_range(grid, bits), 1.0)
    residual = x - (codes * spacing(grid, bits) + low) / half_range(grid, bits)
    count = x.new_zeros(2**bits).index_add_(0, codes, x.new_ones(()).expand_as(x))
    total = x.new_zeros(2**bits).index_add_(0, codes, residual)
    squares = x.new_zeros(2**bits).index_add_(0, codes, residual.square())
    mean = total / count.clamp_min(1)
    variance = (squares / count.clamp_min(1) - mean.square()) * (count >= 2)
    return (mean.square() + variance).sum()
