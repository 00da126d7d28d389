"""Weight quantizers: pure functions, and one small module that holds a layer's scale.

Each form maps the real weights `w` of a layer to a normalised `x` (in units of the grid), rounds it to an integer of the
grid, and gives `integer * unit`:

| form | x / half_range | scale | source |
|---|---|---|---|
| `dorefa` | tanh(w) / max abs tanh(w) | value of the outermost level | Zhou et al. 2016, the form the SDQ paper uses |
| `entropy` | w / (gamma_b mean abs w), gamma_b = (2^b - 1) / 2^(b-1) | value of the outermost level | Liu et al., METHOD 4 |
| `lsq` | w / scale | value of the clip, learned with LSQ's gradient | Esser et al. 2020 |

`scale` is one float per layer (one per output channel, where channels have bits of their own): the value that a normalised
weight of 1 stands for: `unit = scale / half_range(grid, bits)`. For the first two forms keeping a scale beside the paper's
[-1, 1] is our interpretation: a pretrained network, and a classifier with no norm behind it, need it. Rounding is
straight-through everywhere.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..packing import channels_by_bits, pack, pack_channels, packed_size, unpack, unpack_channels, unpack_parts
from ..strategy import bits_text
from .grids import (
    MAX_BITS,
    MIN_BITS,
    codes_to_integers,
    extremes,
    half_range,
    integers_to_codes,
    round_to_grid,
)
from .positive import KeepsPositive
from .power_of_two import nearest_power_of_two

FORMS = ("dorefa", "entropy", "lsq")
# Units that are powers of two do not go below the first, and in a channel not below the second times the largest one's.
_LEAST_UNIT, _LEAST_SHARE = 2.0**-20, 2.0**-10
# Clips that are tried, in units of max|w|. The best one falls with the bitwidth: geometric steps down to 4 %, finer near the
# top, where those of 7 and 8 bits are. Each is then improved by the closed form for its own integers.
_CLIPS = torch.cat([torch.logspace(0, math.log10(0.04), 48), torch.linspace(1.02, 0.7, 33)])
# Numbers in a tensor of weights at several of them.
_AT_ONCE = 2**16


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
        if ctx.needs_input_grad[0]:
            low, high = extremes(grid, bits)
            ctx.save_for_backward((x >= low) & (x <= high))
        return round_to_grid(x, grid, bits)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (inside,) = ctx.saved_tensors
        return grad * inside, None, None


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
def best_scale(
    w: Tensor, form: str, grid: str, bits: int, per_channel: bool = False, power_of_two: bool = False
) -> Tensor:
    """The scale (0-d float32) with the least squared error for weights `w`, by closed form or by a search over clips.

    per_channel: one for each output channel of `w` [C, ...], as a [C]; for LSQ only. power_of_two: of those whose unit is
    a power of two.
    """
    w = w.to(torch.float32)
    find = _best_power_of_two if power_of_two else _best_scale
    return find(w, form, grid, bits, per_channel)


def _best_power_of_two(w: Tensor, form: str, grid: str, bits: int, per_channel: bool) -> Tensor:
    half = half_range(grid, bits)
    largest = w.abs().flatten(1).amax(1) if per_channel else w.abs().max()
    units = nearest_power_of_two((largest / half).clamp_min(_LEAST_UNIT))
    # A channel of zeros, or of next to nothing beside the others, would ask for integers of any length behind it.
    least_unit = max(_LEAST_UNIT, _LEAST_SHARE * units.max().item())
    best, least = units * half, torch.full_like(units, math.inf)
    # All of them, from above the largest weight down to a hundredth of it.
    for k in range(1, -8, -1):
        scale = (units * 2.0**k).clamp_min(least_unit) * half
        values = to_channels(scale, w) if per_channel else scale
        errors = (dequantize(quantize_to_integers(w, form, grid, bits, values), grid, bits, values) - w).square()
        error = errors.flatten(1).sum(1) if per_channel else errors.sum()
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best


def _best_scale(w: Tensor, form: str, grid: str, bits: int, per_channel: bool) -> Tensor:
    one = torch.ones((), device=w.device)
    if form != "lsq":
        values = dequantize(quantize_to_integers(w, form, grid, bits, one), grid, bits, one)
        return ((w * values).sum() / values.square().sum().clamp_min(1e-30)).clamp_min(1e-8)

    # [1, scales of the result, weights of each]; the clips come first.
    rows = (w.flatten(1) if per_channel else w.flatten()[None])[None]
    top = rows.abs().amax(2, keepdim=True).clamp_min(1e-8)
    best, least = top, torch.full_like(top, math.inf)
    # Many at a time, where there are few weights: what takes the time there is the number of operations.
    for factors in _CLIPS.to(w.device).split(max(1, _AT_ONCE // w.numel())):
        scale = top * factors[:, None, None]
        integers = quantize_to_integers(rows, form, grid, bits, scale)
        products, squares = (rows * integers).sum(2, keepdim=True), integers.square().sum(2, keepdim=True)
        refined = products / squares.clamp_min(1) * half_range(grid, bits)
        scale = torch.where(refined > 0, refined, scale)
        values = dequantize(quantize_to_integers(rows, form, grid, bits, scale), grid, bits, scale)
        errors = (values - rows).square().sum(2, keepdim=True).nan_to_num(nan=math.inf)
        first = errors.argmin(0, keepdim=True)
        error, scale = errors.gather(0, first), scale.gather(0, first)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best.flatten() if per_channel else best.view(())


def best_channel_scales(w: Tensor, form: str, grid: str, bits: Sequence[int], power_of_two: bool = False) -> Tensor:
    """`best_scale` of each output channel of `w` at its own bitwidth: float32 [C]."""
    scales = torch.empty(len(bits), device=w.device)
    for width, rows in channels_by_bits(bits):
        scales[rows] = best_scale(w[rows], form, grid, width, per_channel=True, power_of_two=power_of_two)
    return scales


def channel_parts(
    w: Tensor, bits: int | Sequence[int], scale: Tensor
) -> list[tuple[Tensor, int, Tensor, Sequence[int] | None]]:
    """(weights, their bits, their scale, numbers of the channels) of each bitwidth; all of `w` where it has only one."""
    if isinstance(bits, int):
        return [(w, bits, to_channels(scale, w) if scale.dim() else scale, None)]
    return [(w[rows], width, to_channels(scale[rows], w), rows) for width, rows in channels_by_bits(bits)]


def by_channel(
    function: Callable[[Tensor, int, Tensor], Tensor], w: Tensor, bits: int | Sequence[int], scale: Tensor
) -> Tensor:
    """`function(weights, bits, scale)` of `w`, which must give a tensor of their shape; differentiable.

    `scale` is 0-d, or has an entry for each output channel. Where `bits` has that too, the function is called for the
    channels of each bitwidth, and what it gives is put back in their order.
    """
    parts = channel_parts(w, bits, scale)
    if isinstance(bits, int):
        return function(w, bits, parts[0][2])
    # Where each channel stands among the parts; made anew each time, since it takes a few hundredths of the whole.
    places = [0] * len(bits)
    for place, row in enumerate(row for *_, rows in parts for row in rows or ()):
        places[row] = place
    return torch.cat([function(part, width, scales) for part, width, scales, _ in parts])[places]


def to_channels(values: Tensor, w: Tensor) -> Tensor:
    """`values` [C] in a shape that multiplies the output channels of weights like `w`."""
    return values.view(-1, *[1] * (w.dim() - 1))


class WeightQuantizer(KeepsPositive, nn.Module):
    """Quantizes one layer's weights at `bits`, 1 to 8, or at as many bits as a tuple says for each output channel.

    Holds one parameter, `scale` (float32: 0-d, or [C] with a scale for each output channel, which needs LSQ and which
    channels with bits of their own always have). `bits` is set by the model from its strategy and is not saved here.
    With `power_of_two` it computes with `effective_scale`, the nearest to it whose unit is a power of two.
    A loaded model has real weights too, those of `latent`. LSQ maps its own output to itself, so a loaded LSQ layer keeps the
    quantized weights, and they are passed through as long as nothing has touched them.
    """

    def __init__(
        self,
        form: str,
        grid: str,
        bits: int | tuple[int, ...],
        channels: int | None = None,
        power_of_two: bool = False,
    ):
        """`channels`: number of output channels, where each has a scale of its own."""
        super().__init__()
        if channels is not None and form != "lsq":
            raise ValueError(f"Scales for each output channel need the weight quantizer 'lsq', got {form!r}.")
        self.form, self.grid, self.bits, self.power_of_two = form, grid, bits, power_of_two
        self.scale = nn.Parameter(torch.ones(() if channels is None else channels, dtype=torch.float32))
        # Place and version of weights and scale that are known to belong together: see `mark_quantized`.
        self._quantized: tuple[int, int, int] | None = None

    def extra_repr(self) -> str:
        return f"{self.form}, {self.grid}, bits={bits_text(self.bits)}" + ", power of two" * self.power_of_two

    @property
    def effective_scale(self) -> Tensor:
        """The scale that is computed with (shape of `scale`), differentiable in it."""
        if not self.power_of_two:
            return self.scale
        # In float64 weights near a tie would be divided otherwise, and rounded to other integers.
        return nearest_power_of_two(self.scale.float() / self._half_range) * self._half_range

    @property
    def unit(self) -> Tensor:
        """What an integer of 1 stands for (shape of `scale`), differentiable in `scale`."""
        return self.effective_scale / self._half_range

    @property
    def _half_range(self) -> int | Tensor:
        """`half_range` at the bits of the layer, or float32 [C] at those of each channel."""
        if isinstance(self.bits, int):
            return half_range(self.grid, self.bits)
        halves = [half_range(self.grid, bits) for bits in self.bits]
        return torch.tensor(halves, dtype=torch.float32, device=self.scale.device)

    def set_bits(self, bits: int | tuple[int, ...], w: Tensor) -> None:
        """Quantize at `bits` from now on, as many as before; the scale is fitted to the real weights `w`.

        Of channels those whose bits stay keep their scale.
        """
        if isinstance(bits, tuple):
            return self._set_channel_bits(bits, w)
        if not MIN_BITS <= bits <= MAX_BITS or not isinstance(self.bits, int):
            raise ValueError(f"Weight bits must be {MIN_BITS} to {MAX_BITS}, got {bits}.")
        self.bits = bits
        self._quantized = None
        self.fit_scale(w)

    @torch.no_grad()
    def _set_channel_bits(self, bits: tuple[int, ...], w: Tensor) -> None:
        if isinstance(self.bits, int) or len(bits) != len(self.bits):
            raise ValueError(
                f"Expected {1 if isinstance(self.bits, int) else len(self.bits)} bitwidths, got {len(bits)}."
            )
        rows = [c for c, (before, now) in enumerate(zip(self.bits, bits, strict=True)) if before != now]
        self.bits, self._quantized, self._least = bits, None, None
        if rows and not w.is_meta:
            of_rows = [bits[c] for c in rows]
            self.scale[rows] = best_channel_scales(w[rows], self.form, self.grid, of_rows, self.power_of_two)

    @torch.no_grad()
    def fit_scale(self, w: Tensor) -> None:
        """Fit all of `scale` to the real weights `w`; nothing to do on the meta device."""
        if w.is_meta:
            return
        if isinstance(self.bits, int):
            per_channel = self.scale.dim() > 0
            self.scale.copy_(best_scale(w, self.form, self.grid, self.bits, per_channel, self.power_of_two))
        else:
            self.scale.copy_(best_channel_scales(w, self.form, self.grid, self.bits, self.power_of_two))
        self._least = self._quantized = None

    def train(self, mode: bool = True) -> "WeightQuantizer":
        if mode:
            # A training may write through `.data`, which no version counts.
            self._quantized = None
        return super().train(mode)

    def forward(self, w: Tensor) -> Tensor:
        if not torch.is_grad_enabled() and self.is_quantized(w):
            return w
        self.keep_positive(self.scale)
        learns = torch.is_grad_enabled() and self.scale.requires_grad

        def quantized(w: Tensor, bits: int, scale: Tensor) -> Tensor:
            if learns:
                count = w.numel() // scale.numel()
                scale = scale_gradient(scale, 1 / math.sqrt(count * half_range(self.grid, bits)))
            return fake_quantize(w, self.form, self.grid, bits, scale)

        return by_channel(quantized, w.float(), self.bits, self.effective_scale)

    def integers(self, w: Tensor) -> Tensor:
        """The integers (float, shape of `w`) behind the quantized weights."""
        return by_channel(
            lambda w, bits, scale: quantize_to_integers(w, self.form, self.grid, bits, scale),
            w.float(),
            self.bits,
            self.effective_scale,
        )

    def codes(self, w: Tensor) -> Tensor:
        """The codes 0 .. 2^bits - 1 (uint8, shape of `w`) to be packed."""
        return by_channel(
            lambda integers, bits, _: integers_to_codes(integers, self.grid, bits),
            self.integers(w),
            self.bits,
            self.scale,
        )

    def from_codes(self, codes: Tensor) -> Tensor:
        """The quantized weights (float32) that `codes` stand for."""
        return by_channel(
            lambda codes, bits, scale: dequantize(codes_to_integers(codes, self.grid, bits), self.grid, bits, scale),
            codes,
            self.bits,
            self.effective_scale.detach(),
        )

    def packed_size(self, count: int) -> int:
        """Bytes that `count` weights, those of all channels, take."""
        if isinstance(self.bits, int):
            return packed_size(count, self.bits)
        return packed_size(count // len(self.bits) * sum(self.bits), 1)

    def pack(self, w: Tensor) -> Tensor:
        """The weights as they stand in a file: uint8 [packed_size]."""
        codes = self.codes(w)
        return pack(codes, self.bits) if isinstance(self.bits, int) else pack_channels(codes, self.bits)

    def unpack(self, packed: Tensor, shape: torch.Size) -> Tensor:
        """Real weights (float32, of `shape`) from what `pack` has made: those of `latent`."""
        if not isinstance(self.bits, int):
            return self.from_codes(unpack_channels(packed, self.bits, shape))
        if self.form != "lsq" or self.scale.dim():
            # Normalised by all of them together, or by those of their channel.
            return self.latent(unpack(packed, self.bits, shape.numel()).view(shape))
        weight = torch.empty(shape, device=packed.device)
        for start, codes in unpack_parts(packed, self.bits, shape.numel()):
            weight.view(-1)[start : start + codes.numel()] = self.from_codes(codes)
        return weight

    def mark_quantized(self, w: Tensor) -> None:
        """Say that `w`, from now on this layer's weights, went through LSQ: quantizing it again would change nothing.

        Whoever writes to them through `.data` afterwards, other than in a training, must call `set_bits` or `fit_scale`.
        """
        # Tensors made in inference mode have no version, from which a change is known.
        if self.form == "lsq" and not w.is_inference() and not self.scale.is_inference():
            self._quantized = self._state(w)

    def is_quantized(self, w: Tensor) -> bool:
        """Whether `w` is what was marked, and neither it nor the scale was touched since; no in graphs, which cannot tell."""
        if self._quantized is None or torch.compiler.is_compiling():
            return False
        return self._quantized == self._state(w)

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
        assert isinstance(self.bits, int)
        x = codes_to_integers(codes, self.grid, self.bits) / half_range(self.grid, self.bits)
        if (x == round_to_grid(x.new_zeros(()), self.grid, self.bits) / half_range(self.grid, self.bits)).all():
            # A layer that timm starts at zero, as some heads: there is nothing to normalise.
            return torch.zeros_like(x)
        if self.form == "dorefa":
            # Any common factor below 1 will do, as the largest |tanh| is divided out again. The largest weight stood on
            # an outermost level; two's complement has none at +1, so one weight of that level goes there.
            if x.abs().max() < 1:
                x.view(-1)[x.argmax()] = 1.0
            return torch.atanh(0.9 * x)
        return _entropy_latent(x, self.grid, self.bits)


def _entropy_latent(x: Tensor, grid: str, bits: int) -> Tensor:
    """Weights that round to the levels `x` (in [-1, 1]) and have mean |w| = 1 / gamma, so that normalising leaves them.

    They begin at their levels. Where the mean asks for more, those of the outermost levels, whose bins have no outer edge,
    move out. Where there are none, or the mean asks for less, all move by the same part of half a bin, which is enough:
    the weights that `x` was made of had that mean, and stood in the same bins.
    """
    low, high = (n / half_range(grid, bits) for n in extremes(grid, bits))
    missing = x.numel() / entropy_gamma(bits) - x.abs().sum()
    moving = (x <= low) | (x >= high) if missing > 0 else x != 0
    if not moving.any():
        moving = torch.ones_like(moving)
    return torch.where(x < 0, -1.0, 1.0) * (x.abs() + moving * (missing / moving.sum()))
