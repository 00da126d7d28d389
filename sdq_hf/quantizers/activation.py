"""Activation quantizer: a learned step (LSQ, Esser et al. 2020), unsigned or signed as suits the data better.

The paper says only that activations have one bitwidth; the learned step is our interpretation (METHOD 2).
"""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .positive import KeepsPositive
from .power_of_two import nearest_power_of_two

logger = logging.getLogger(__name__)
# Values that one tensor contributes to the fit of the step: enough for a 2-bit clip to be stable to about 1 %.
_FIT_SAMPLES = 65536


def activation_range(bits: int, signed: bool) -> tuple[int, int]:
    """Smallest and largest integer of an activation: 0 .. 2^b - 1, or two's complement -2^(b-1) .. 2^(b-1) - 1."""
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


class _LearnedStep(torch.autograd.Function):
    """`clamp(round(x / step), low, high) * step` and its LSQ gradient in one node.

    Naive eager code reads and writes the activation about ten times and keeps four copies of it; this keeps the input
    and the output only, which the layers before and behind keep anyway. LSQ's gradient to the step is
    `sum(g * (y - x) / step)` inside the range and `sum(g * y / step)` outside, so it is `(<g, y> - <dx, x>) / step` with
    dx the gradient to the input: two dot products.
    """

    @staticmethod
    def forward(ctx, x: Tensor, step: Tensor, low: int, high: int, factor: float, compact: bool) -> Tensor:
        y = _fake_quantize(x, step, low, high)
        ctx.save_for_backward(x, step, None if compact else y)
        ctx.range, ctx.factor = (low, high), factor
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, step, y = ctx.saved_tensors
        low, high = ctx.range
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            # One fused pass; it needs plain numbers, which would make a GPU wait and torch.compile split its graph.
            value = step.item()
            dx = torch.ops.aten.hardtanh_backward(grad, x, (low - 0.5) * value, (high + 0.5) * value)
        else:
            dx = grad * ((x > (low - 0.5) * step) & (x < (high + 0.5) * step))
        dstep = None
        if ctx.needs_input_grad[1]:
            y = _fake_quantize(x, step, low, high) if y is None else y
            dstep = (_dot(grad, y) - _dot(dx, x)) / step * ctx.factor
        return dx, dstep, None, None, None, None


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Sum of products in float32, over tensors of equal shape and any memory format."""
    if a.stride() != b.stride() or not (a.is_contiguous() or a.is_contiguous(memory_format=torch.channels_last)):
        return (a.float() * b.float()).sum()
    flat = (a.numel(),)
    return torch.dot(a.as_strided(flat, (1,)).float(), b.as_strided(flat, (1,)).float())


def _fake_quantize(x: Tensor, step: Tensor, low: int, high: int) -> Tensor:
    if x.device.type == "cpu":
        # torch's own kernel below gives the same numbers, and takes eight times as long on a CPU: it is not vectorized.
        y = torch.mul(x, 1 / step)
        if torch.compiler.is_compiling():
            # In graphs of torch 2.11 nothing flows back through what was changed in place.
            return y.round().clamp(low, high) * step
        return y.round_().clamp_(low, high).mul_(step)
    return _fused_fake_quantize(x, step, low, high)


def _fused_fake_quantize(x: Tensor, step: Tensor, low: int, high: int) -> Tensor:
    """By torch's kernel for GPUs, which makes a number of what is none: a training that diverges would not end."""
    zero = torch.zeros((), dtype=torch.int32, device=x.device)
    return torch.where(x.isnan(), x, torch.fake_quantize_per_tensor_affine(x, step, zero, low, high))


@torch.no_grad()
def best_step(x: Tensor, bits: int, signed: bool) -> Tensor:
    """The step (0-d float32) with the least squared error for activations `x`, by a search over 64 clips."""
    return _best_step(_sample(x), bits, signed)[0]


@torch.no_grad()
def best_step_and_sign(x: Tensor, bits: int, power_of_two: bool = False) -> tuple[Tensor, bool]:
    """The step (0-d float32) and the sign with the least squared error for activations `x`.

    power_of_two: of the steps that are one.

    Few bits spend half of their levels on the small negative values of SiLU, GELU or hard-swish if they are signed. A
    signed bit has no positive level, so one bit is unsigned.
    """
    x = _sample(x)
    step, error = _best_step(x, bits, signed=False, power_of_two=power_of_two)
    if bits > 1 and (x < 0).any():
        signed_step, signed_error = _best_step(x, bits, signed=True, power_of_two=power_of_two)
        if signed_error < error:
            return signed_step, True
    return step, False


def _sample(x: Tensor) -> Tensor:
    x = x.reshape(-1).float()
    if x.numel() > _FIT_SAMPLES:
        # A fixed stride would meet the same channels of a channels-last tensor again and again.
        generator = torch.Generator().manual_seed(0)
        x = x[torch.randint(x.numel(), (_FIT_SAMPLES,), generator=generator).to(x.device)]
    return x


def _best_step(x: Tensor, bits: int, signed: bool, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """The step, and its squared error."""
    low, high = activation_range(bits, signed)
    bound = -low if signed else high
    top = x.abs().max().clamp_min(1e-6)
    steps = top / bound * torch.logspace(0, math.log10(0.05), 64, device=x.device)
    if power_of_two:
        steps = nearest_power_of_two(steps).unique()
    errors = torch.stack([(torch.round(x / s).clamp_(low, high) * s - x).square().sum() for s in steps])
    best = errors.argmin()
    return steps[best], errors[best]


@cache
def _tell_of_fitting() -> None:
    """Once in a process."""
    logger.warning(
        "Activation steps that were not fitted are fitted to the first images that come by, and stay so. Call "
        "model.calibrate(images) with images of the task first, also before a moving average of the model is made."
    )


class ActivationQuantizer(KeepsPositive, nn.Module):
    """Quantizes a layer's input at `bits` with one learned `step`, or with `power_of_two` with the one nearest to it.

    State: `step` (parameter, 0-d float32; 0 means not fitted yet) and `signed` (buffer, 0-d uint8, 0 or 1). The first
    tensor that comes by fits both, unless a loaded state has them.
    """

    step: nn.Parameter
    signed: Tensor

    def __init__(self, bits: int, power_of_two: bool = False):
        super().__init__()
        self.bits, self.power_of_two = bits, power_of_two
        self.step = nn.Parameter(torch.zeros((), dtype=torch.float32))
        self.register_buffer("signed", torch.zeros((), dtype=torch.uint8))
        # The integer range, read from the state once: asking a tensor for its value at each step would make a GPU wait.
        self._range: tuple[int, int] | None = None
        # Inside `calibrate`, which chooses its images.
        self.calibrating = False
        # Whether quantized activations wait for the backward pass as codes of a byte; see `saved_as_codes`.
        self.compact = False

    def extra_repr(self) -> str:
        return f"bits={self.bits}, range={self._range or 'not fitted yet'}" + ", power of two" * self.power_of_two

    @property
    def effective_step(self) -> Tensor:
        """The step that is computed with (0-d), differentiable in `step`."""
        return nearest_power_of_two(self.step) if self.power_of_two else self.step

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Fit the step to activations `x` (any shape), signed or unsigned as suits them better."""
        step, signed = best_step_and_sign(x, self.bits, self.power_of_two)
        self.signed.fill_(int(signed))
        self.step.copy_(step)
        self._range = self._least = None

    def set_bits(self, bits: int) -> None:
        """Quantize at `bits` from now on; the next tensor fits step and sign anew."""
        self.bits = bits
        if not self.step.is_meta:
            self.step.data.zero_()
        self._range = self._least = None

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._range = None

    @property
    def range(self) -> tuple[int, int]:
        """Smallest and largest integer."""
        if self._range is None:
            self._range = activation_range(self.bits, bool(self.signed.item()))
        return self._range

    def forward(self, x: Tensor) -> Tensor:
        if x.is_meta:
            return x
        if torch.compiler.is_exporting() and self._range is None:
            raise RuntimeError("A graph cannot fit activation steps: call model.calibrate(images) before exporting it.")
        if self._range is None and self.step.item() <= 0:
            self._fit_first(x)
        self.keep_positive(self.step)
        low, high = self.range
        dtype = x.dtype
        # What is finer stays so: a model in float64 computes exactly what integers would.
        x = x if dtype == torch.float64 else x.float()
        if torch.is_grad_enabled() and (x.requires_grad or self.step.requires_grad):
            y = _LearnedStep.apply(x, self.effective_step, low, high, 1 / math.sqrt(x.numel() * high), self.compact)
        else:
            y = _fake_quantize(x, self.effective_step, low, high)
        return y.to(dtype)

    def _fit_first(self, x: Tensor) -> None:
        """Fit to the first tensor that comes by. Raises `RuntimeError` on several devices, but for a calibration.

        Each process would fit another step to its own images, and what the copies of torch.nn.DataParallel fit is lost.
        """
        of_several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if getattr(self, "_is_replica", False) or (of_several and not self.calibrating):
            raise RuntimeError(
                "An activation step is not fitted, and of several processes or devices each would fit another: call "
                "model.calibrate(images) first, with the same images in every process."
            )
        if not self.calibrating:
            _tell_of_fitting()
        self.fit(x)

    @contextmanager
    def saved_as_codes(self, y: Tensor) -> Iterator[None]:
        """Inside, operations keep their input `y`, an output of this quantizer, as a byte a value instead of four.

        Exact: a quantized activation is its integer times the step, and is made from both again. It spares most of the
        memory that quantized training takes beside float training, for about a sixth more time.
        """
        low, _ = self.range
        # The hooks live until the backward pass, so they must not hold `y` itself.
        step, place, shape, dtype = self.effective_step.detach(), y.data_ptr(), y.shape, y.dtype

        def pack(saved: Tensor) -> Tensor | tuple[Tensor]:
            if saved.data_ptr() != place or saved.shape != shape:
                return saved
            return (torch.mul(saved.float(), 1 / step).round_().sub_(low).to(torch.uint8),)

        def unpack(saved: Tensor | tuple[Tensor]) -> Tensor:
            return saved if isinstance(saved, Tensor) else saved[0].float().add_(low).mul_(step).to(dtype)

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield

    def integers(self, x: Tensor) -> Tensor:
        """The integers (float, shape of `x`) behind the quantized activations."""
        low, high = self.range
        return torch.round(x.float() * (1 / self.effective_step)).clamp(low, high)
