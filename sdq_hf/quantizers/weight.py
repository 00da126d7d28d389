"""Weight quantizers: pure functions, and one small module that holds a layer's scale.

Each form maps the real weights `w` of a layer to a normalised `x` (in units of the grid), rounds it to an integer of the
grid, and gives `integer * unit`:

| form | x / half_range | scale | source |
|---|---|---|---|
| `dorefa` | tanh(w) / max abs tanh(w) | value of the outermost level | Zhou et al. 2016, the form the SDQ paper uses |
| `entropy` | w / (gamma_b mean abs w), gamma_b = (2^b - 1) / 2^(b-1) | value of the outermost level | Liu et al., METHOD 4 |
| `lsq` | w / scale | value of the clip, learned with LSQ's gradient | Esser et al. 2020 |

`scale` is one float per layer: the value that a normalised weight of 1 stands for: `unit = scale / half_range(grid, bits)`.
For the first two forms keeping a scale beside the paper's [-1, 1] is our interpretation: a pretrained network, and a
classifier with no norm behind it, need it. Rounding is straight-through everywhere.
"""

import math

import torch
from torch import Tensor, nn

from .grids import (
    MAX_BITS,
    MIN_BITS,
    codes_to_integers,
    extremes,
    half_range,
    integers_to_codes,
    round_to_grid,
    spacing,
)
from .positive import KeepsPositive

FORMS = ("dorefa", "entropy", "lsq")


def entropy_gamma(bits: int) -> float:
    """Clip in units of mean |w| that fills the bins about equally: (2^b - 1) / 2^(b-1)."""
    return (2**bits - 1) / 2 ** (bits - 1)


def normalise(w: Tensor, form: str, bits: int, scale: Tensor) -> Tensor:
    """The normalised weights of a form, differentiable in `w` (and `scale` for LSQ); 1.0 is the clip."""
    if form == "dorefa":
        t = torch.tanh(w)
        return t / t.abs().max().clamp_min(torch.finfo(t.dtype).tiny)
    if form == "entropy":
        return w / (entropy_gamma(bits) * w.abs().mean()).clamp_min(torch.finfo(w.dtype).tiny)
    if form == "lsq":
        return w / scale
    raise ValueError(f"Unknown weight quantizer {form!r}: expected one of {', '.join(FORMS)}.")


def quantize_to_integers(w: Tensor, form: str, grid: str, bits: int, scale: Tensor) -> Tensor:
    """The integers of the grid (as float, shape of `w`) that the real weights `w` are quantized to."""
    with torch.no_grad():
        return round_to_grid(normalise(w, form, bits, scale) * half_range(grid, bits), grid, bits)


def dequantize(integers: Tensor, grid: str, bits: int, scale: Tensor) -> Tensor:
    """`integers * unit`. The one place where weights are made from integers: saved and trained models agree bit for bit."""
    return integers * (scale / half_range(grid, bits))


class _RoundToGrid(torch.autograd.Function):
    """Round to the grid with the straight-through gradient: 1 inside the grid's range, 0 outside."""

    @staticmethod
    def forward(ctx, x: Tensor, grid: str, bits: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.extremes = extremes(grid, bits)
        return round_to_grid(x, grid, bits)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (x,) = ctx.saved_tensors
        low, high = ctx.extremes
        return grad * ((x >= low) & (x <= high)), None, None


def fake_quantize(w: Tensor, form: str, grid: str, bits: int, scale: Tensor) -> Tensor:
    """Quantized weights (shape of `w`), with straight-through gradients to `w` and the gradient to `scale`.

    The relaxed function, whose gradient this is: rounding replaced by clipping to the grid's extremes, with the rounding
    residual kept as a constant.
    """
    x = normalise(w, form, bits, scale) * half_range(grid, bits)
    return dequantize(_RoundToGrid.apply(x, grid, bits), grid, bits, scale)


class _ScaleGradient(torch.autograd.Function):
    """Identity whose gradient is multiplied by `factor` (LSQ's gradient scale)."""

    @staticmethod
    def forward(ctx, scale: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return scale.view_as(scale)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad * ctx.factor, None


def scale_gradient(scale: Tensor, factor: float) -> Tensor:
    return _ScaleGradient.apply(scale, factor)


@torch.no_grad()
def best_scale(w: Tensor, form: str, grid: str, bits: int) -> Tensor:
    """The scale (0-d float32) with the least squared error for weights `w`, by closed form or by a search over clips."""
    w = w.detach().to(torch.float32)
    one = torch.ones((), device=w.device)
    if form != "lsq":
        values = dequantize(quantize_to_integers(w, form, grid, bits, one), grid, bits, one)
        return ((w * values).sum() / values.square().sum().clamp_min(1e-30)).clamp_min(1e-8)
    top = w.abs().max().clamp_min(1e-8)
    # The best clip falls with the bitwidth: geometric steps from max|w| down to 4 % of it, finer near the top, where
    # those of 7 and 8 bits are, and each is
    # then improved by the closed form for its own integers.
    best, best_error = top, None
    factors = torch.cat([torch.logspace(0, math.log10(0.04), 48), torch.linspace(1.02, 0.7, 33)])
    for factor in factors.tolist():
        scale = top * factor
        integers = quantize_to_integers(w, form, grid, bits, scale)
        norm = integers.square().sum()
        refined = (w * integers).sum() / norm.clamp_min(1) * half_range(grid, bits)
        if norm > 0 and refined > 0:
            scale = refined
        error = (dequantize(quantize_to_integers(w, form, grid, bits, scale), grid, bits, scale) - w).square().sum()
        if best_error is None or error < best_error:
            best, best_error = scale, error
    return best


class WeightQuantizer(KeepsPositive, nn.Module):
    """Quantizes one layer's weights at `bits`, 1 to 8.

    Holds one parameter, `scale` (0-d float32). `bits` is set by the model from its strategy and is not saved here.
    A loaded model has real weights too, those of `latent`. LSQ maps its own output to itself, so a loaded LSQ layer keeps the
    quantized weights, and they are passed through as long as nothing has touched them.
    """

    def __init__(self, form: str, grid: str, bits: int):
        super().__init__()
        self.form, self.grid, self.bits = form, grid, bits
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float32))
        # Place and version of weights and scale that are known to belong together: see `mark_quantized`.
        self._quantized: tuple[int, int, int] | None = None

    def extra_repr(self) -> str:
        return f"{self.form}, {self.grid}, bits={self.bits}"

    def set_bits(self, bits: int, w: Tensor) -> None:
        """Quantize at `bits` from now on; the scale is fitted to the real weights `w`."""
        if not MIN_BITS <= bits <= MAX_BITS:
            raise ValueError(f"Weight bits must be {MIN_BITS} to {MAX_BITS}, got {bits}.")
        self.bits = bits
        self._quantized = None
        if not w.is_meta:
            self.fit_scale(w)

    @torch.no_grad()
    def fit_scale(self, w: Tensor) -> None:
        self.scale.copy_(best_scale(w, self.form, self.grid, self.bits))
        self._least = None

    def forward(self, w: Tensor) -> Tensor:
        if not torch.is_grad_enabled() and self.is_quantized(w):
            return w
        self.keep_positive(self.scale)
        scale: Tensor = self.scale
        if torch.is_grad_enabled() and scale.requires_grad:
            scale = scale_gradient(scale, 1 / math.sqrt(w.numel() * half_range(self.grid, self.bits)))
        return fake_quantize(w.float(), self.form, self.grid, self.bits, scale)

    def integers(self, w: Tensor) -> Tensor:
        """The integers (float, shape of `w`) behind the quantized weights."""
        return quantize_to_integers(w.float(), self.form, self.grid, self.bits, self.scale)

    def codes(self, w: Tensor) -> Tensor:
        """The codes 0 .. 2^bits - 1 (uint8, shape of `w`) to be packed."""
        return integers_to_codes(self.integers(w), self.grid, self.bits)

    def from_codes(self, codes: Tensor) -> Tensor:
        """The quantized weights (float32) that `codes` stand for."""
        return dequantize(codes_to_integers(codes, self.grid, self.bits), self.grid, self.bits, self.scale.detach())

    def mark_quantized(self, w: Tensor) -> None:
        """Say that `w`, from now on this layer's weights, went through LSQ: quantizing it again would change nothing."""
        if self.form == "lsq":
            self._quantized = self._state(w)

    def is_quantized(self, w: Tensor) -> bool:
        """Whether `w` is what was marked, and neither it nor the scale was touched since."""
        return self._quantized is not None and self._quantized == self._state(w)

    def _state(self, w: Tensor) -> tuple[int, int, int]:
        return w.data_ptr(), w._version, self.scale._version

    @torch.no_grad()
    def latent(self, codes: Tensor) -> Tensor:
        """Real weights (float32) that this quantizer maps to exactly what `codes` stand for: those of a loaded model.

        LSQ maps its own output to itself. DoReFa's and the entropy form's normalisation depends on all weights of the
        layer, so weights must be found whose normalisation is right.
        """
        if self.form == "lsq":
            return self.from_codes(codes)
        x = codes_to_integers(codes, self.grid, self.bits) / half_range(self.grid, self.bits)
        if self.form == "dorefa":
            # Any common factor below 1 will do, as the largest |tanh| is divided out again. The largest weight stood on
            # an outermost level; two's complement has none at +1, so one weight of that level goes there.
            if x.abs().max() < 1:
                x.view(-1)[x.argmax()] = 1.0
            return torch.atanh(0.9 * x)
        return _entropy_latent(x, self.grid, self.bits)


def _entropy_latent(x: Tensor, grid: str, bits: int) -> Tensor:
    """Weights that round to the levels `x` (in [-1, 1]) and have mean |w| = 1 / gamma, so that normalising leaves them.

    The outermost bins have no outer edge: their weights move out as far as the mean asks for. Where that is less than
    the bin's inner edge, the other weights make up the difference inside their own bins.
    """
    half_bin = spacing(grid, bits) / 2 / half_range(grid, bits)
    low, high = (n / half_range(grid, bits) for n in extremes(grid, bits))
    outer = (x <= low) | (x >= high)
    inner = ~outer & (x != 0)
    missing = x.numel() / entropy_gamma(bits) - x[inner].abs().sum()
    reach = (missing / outer.sum().clamp_min(1)).clamp_min(1 - 0.9 * half_bin)
    shift = (missing - reach * outer.sum()) / inner.sum().clamp_min(1)
    return x.sign() * torch.where(outer, reach, torch.where(inner, x.abs() + shift, 0.0))
