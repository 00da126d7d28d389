import math

import pytest
import torch

from sdq_hf.quantizers import FORMS, GRIDS, WeightQuantizer, bin_regularization
from sdq_hf.quantizers.grids import extremes, half_range, spacing
from sdq_hf.quantizers.weight import best_scale, dequantize, fake_quantize, normalise, quantize_to_integers

BITS = range(1, 9)


def weights(seed=0, count=200):
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)) * 0.3


def levels(grid, bits):
    """The integers of a grid, written out from their definition."""
    if grid == "midrise" or bits == 1:
        return [2 * k - (2**bits - 1) for k in range(2**bits)]
    return list(range(-(2 ** (bits - 1)), 2 ** (bits - 1)))


def loop_integers(w, form, grid, bits, scale):
    """Plain Python: the nearest level to each normalised weight."""
    values = w.double().tolist()
    if form == "dorefa":
        top = max(abs(math.tanh(v)) for v in values)
        x = [math.tanh(v) / top for v in values]
    elif form == "entropy":
        mean = sum(abs(v) for v in values) / len(values)
        x = [v * 2 ** (bits - 1) / ((2**bits - 1) * mean) for v in values]
    else:
        x = [v / scale for v in values]
    reach = 2**bits - 1 if grid == "midrise" or bits == 1 else 2 ** (bits - 1)
    return [min(levels(grid, bits), key=lambda n: abs(n - v * reach)) for v in x]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("bits", BITS)
def test_integers_are_the_nearest_levels(form, grid, bits):
    w, scale = weights(bits), torch.tensor(0.37)
    found = quantize_to_integers(w, form, grid, bits, scale).tolist()
    expected = loop_integers(w, form, grid, bits, 0.37)
    # float32 may decide otherwise than double precision right at a border, by one level.
    assert sum(a != b for a, b in zip(found, expected, strict=True)) <= 1
    assert set(found) <= set(levels(grid, bits))
    low, high = extremes(grid, bits)
    assert (low, high) == (min(levels(grid, bits)), max(levels(grid, bits)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_gradient_is_that_of_the_relaxed_function(form, grid, bits):
    """Straight through: the rounding residual inside the clip is a constant, and so is what the clip cuts off."""
    w = weights(bits, 24).double().requires_grad_()
    scale = torch.tensor(0.31, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(24, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    (fake_quantize(w, form, grid, bits, scale) * direction).sum().backward()
    reach = half_range(grid, bits)
    low, high = extremes(grid, bits)
    with torch.no_grad():
        x = normalise(w, form, bits, scale) * reach
        inside = (x >= low) & (x <= high)
        residual = quantize_to_integers(w, form, grid, bits, scale) - x

    def relaxed(w, scale):
        x = normalise(w, form, bits, scale) * reach
        clipped = torch.where(inside, x + residual, (residual + x).detach())
        return (clipped * scale / reach * direction).sum()

    def at(i, step):
        moved = w.detach().clone()
        moved[i] += step
        # Outside of the clip the integers stay what they are, so the constant is taken at the unmoved point.
        x = normalise(moved, form, bits, scale.detach()) * reach
        fixed = quantize_to_integers(w.detach(), form, grid, bits, scale.detach())
        return (torch.where(inside, x + residual, fixed) * scale.detach() / reach * direction).sum().item()

    assert relaxed(w.detach(), scale.detach()).isfinite()
    for i in range(24):
        numeric = (at(i, 1e-6) - at(i, -1e-6)) / 2e-6
        assert w.grad[i].item() == pytest.approx(numeric, rel=1e-4, abs=1e-6)


def test_lsq_gradient_to_the_scale():
    w = weights(3, 50)
    quantizer = WeightQuantizer("lsq", "twos_complement", 3)
    quantizer.scale.data.fill_(0.4)
    g = torch.randn(50, generator=torch.Generator().manual_seed(1))
    (quantizer(w) * g).sum().backward()
    # Esser et al. 2020, eq. 3, for the step = scale / 4: -w/s + round(w/s) inside, -Q_N or Q_P outside.
    step, expected = 0.4 / 4, 0.0
    for v, gradient in zip(w.tolist(), g.tolist(), strict=True):
        x = v / step
        expected += gradient * (-4 if x <= -4 else 3 if x >= 3 else round(x) - x)
    expected = expected / 4 / math.sqrt(50 * 4)
    assert quantizer.scale.grad.item() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("bits", BITS)
def test_best_scale_is_as_good_as_a_dense_search(form, grid, bits):
    w = weights(7, 500)

    def error(scale):
        integers = quantize_to_integers(w, form, grid, bits, scale)
        return (dequantize(integers, grid, bits, scale) - w).square().sum().item()

    best = min(error(torch.tensor(s)) for s in torch.linspace(0.01, 2.0, 800).tolist())
    assert error(best_scale(w, form, grid, bits)) <= 1.03 * best + 1e-6


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bits", BITS)
def test_one_weight_is_met_exactly(form, bits):
    for value in (0.7, -0.002):
        quantizer = WeightQuantizer(form, "twos_complement", bits)
        quantizer.fit_scale(torch.tensor([value]))
        assert quantizer(torch.tensor([value])).item() == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("bits", BITS)
def test_weights_at_the_ends_of_the_grid_take_their_gradient(grid, bits):
    low, high = extremes(grid, bits)
    w = torch.tensor([low - 1.0, low, high, high + 1.0], requires_grad=True)
    fake_quantize(w, "lsq", grid, bits, torch.tensor(float(half_range(grid, bits)))).sum().backward()
    assert w.grad.tolist() == [0.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("bits", BITS)
def test_best_scale_has_the_unit_of_the_weights(grid, bits, power_of_two):
    w = weights(5, 120).view(4, 30)
    for per_channel in (False, True):
        for factor in (2.0**-10, 2.0**10):
            found = best_scale(factor * w, "lsq", grid, bits, per_channel, power_of_two)
            assert torch.equal(found, factor * best_scale(w, "lsq", grid, bits, per_channel, power_of_two))


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("grid", GRIDS)
def test_clips_that_are_tried_at_once_give_the_scale_that_they_give_one_by_one(grid, per_channel, monkeypatch):
    for shape in [(1, 1), (8, 1, 3, 3), (7, 150), (20, 60, 3, 3)]:
        w = weights(count=math.prod(shape)).view(shape)
        w[0] = 0
        for bits in BITS:
            at_once = best_scale(w, "lsq", grid, bits, per_channel)
            with monkeypatch.context() as patch:
                patch.setattr("sdq_hf.quantizers.weight._AT_ONCE", 1)
                assert torch.equal(at_once, best_scale(w, "lsq", grid, bits, per_channel))


def test_channels_whose_bits_stay_keep_their_scale():
    w, quantizer = weights(6, 40).view(4, 10), WeightQuantizer("lsq", "midrise", (3, 2, 3, 5), channels=4)
    quantizer.fit_scale(w)
    with torch.no_grad():
        quantizer.scale.mul_(1.25)
    before = quantizer.scale.detach().clone()
    quantizer.set_bits((3, 4, 3, 1), w)
    for c, bits in ((1, 4), (3, 1)):
        torch.testing.assert_close(quantizer.scale[c], best_scale(w[c], "lsq", "midrise", bits))
    assert torch.equal(quantizer.scale[::2], before[::2])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("bits", BITS)
# timm starts some heads at zero. Of uniform weights many are in the outermost bins, of a few large ones nearly none.
@pytest.mark.parametrize(
    "shaped", [torch.clone, torch.zeros_like, lambda w: torch.linspace(-1, 1, len(w)), lambda w: w**5]
)
def test_latent_weights_are_quantized_to_the_same(form, grid, bits, shaped):
    w = shaped(weights(11, 300))
    quantizer = WeightQuantizer(form, grid, bits)
    quantizer.fit_scale(w)
    with torch.no_grad():
        quantized = quantizer(w)
        loaded = WeightQuantizer(form, grid, bits)
        loaded.scale.copy_(quantizer.scale)
        latent = loaded.latent(quantizer.codes(w))
        assert torch.equal(loaded(latent), quantized)


@pytest.mark.parametrize("form", ["dorefa", "entropy"])
@pytest.mark.parametrize("grid", GRIDS)
def test_latent_weights_of_small_layers_are_quantized_to_the_same(form, grid):
    generator = torch.Generator().manual_seed(0)
    # Few weights, most of them large, or zero, or of one sign: their mean then hangs on each of them.
    shapes = (
        torch.clone,
        lambda w: w.sign() + 0.05 * w,
        lambda w: w * (w.abs() < 0.7),
        lambda w: w**3,
        lambda w: w.sign() * (w.abs() < 0.8) + 0.02 * w,
        torch.square,
    )
    for trial in range(240):
        w = shapes[trial % 6](torch.randn(2 + trial % 19, generator=generator))
        quantizer = WeightQuantizer(form, grid, 1 + trial % 8)
        quantizer.fit_scale(w)
        with torch.no_grad():
            codes, quantized = quantizer.codes(w), quantizer(w)
            assert torch.equal(quantizer(quantizer.latent(codes)), quantized)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_bin_regularization_is_the_loop_over_bins(form, grid, bits):
    w, scale = weights(5, 120), torch.tensor(0.5)
    x = normalise(w, form, bits, scale)
    integers = quantize_to_integers(w, form, grid, bits, scale)
    low, high = extremes(grid, bits)
    expected = 0.0
    for level in range(low, high + 1, spacing(grid, bits)):
        members = x[integers == level].clamp(low / half_range(grid, bits), 1.0)
        if len(members):
            expected += (members.mean() - level / half_range(grid, bits)) ** 2
        if len(members) >= 2:
            expected += members.var(correction=0)
    assert bin_regularization(w, form, grid, bits, scale).item() == pytest.approx(float(expected), rel=1e-4, abs=1e-6)


def test_bin_regularization_moves_weights_and_not_the_scale():
    w, scale = weights(5, 60).requires_grad_(), torch.tensor(0.5, requires_grad=True)
    bin_regularization(w, "lsq", "midrise", 2, scale).backward()
    assert scale.grad is None
    assert w.grad.abs().max() > 0


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("bits", [1, 3, 8])
def test_packed_weights_take_their_bits_and_unpack_to_the_quantized_ones(form, grid, bits):
    # More than one part of `unpack_parts`, and no whole number of bytes.
    w = weights(bits, 3 * 5462 + 1)[: 3 * 5462].view(6, 2731)
    quantizer = WeightQuantizer(form, grid, bits)
    quantizer.set_bits(bits, w)
    packed = quantizer.pack(w)
    assert packed.numel() == quantizer.packed_size(w.numel()) == math.ceil(w.numel() * bits / 8)
    with torch.no_grad():
        expected, unpacked = quantizer(w), quantizer.unpack(packed, w.shape)
        assert torch.equal(quantizer.from_codes(quantizer.codes(w)), expected)
        assert torch.equal(quantizer(unpacked), expected)
        torch.testing.assert_close(dequantize(quantizer.integers(w), grid, bits, quantizer.scale), expected)
    if form == "lsq":
        assert torch.equal(unpacked, expected)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("bits", [3, (3, 1, 8, 3, 5)])
def test_channels_with_scales_of_their_own_are_layers_of_their_own(grid, bits):
    w = weights(4, 5 * 2 * 9).view(5, 2, 3, 3) * torch.tensor([0.1, 1.0, 3.0, 0.5, 2.0]).view(-1, 1, 1, 1)
    quantizer, widths = WeightQuantizer("lsq", grid, bits, channels=5), [bits] * 5 if isinstance(bits, int) else bits
    quantizer.fit_scale(w)
    direction = torch.randn(w.shape, generator=torch.Generator().manual_seed(1))
    (quantizer(w) * direction).sum().backward()
    for c, width in enumerate(widths):
        alone = WeightQuantizer("lsq", grid, width)
        alone.fit_scale(w[c])
        torch.testing.assert_close(quantizer.scale[c], alone.scale)
        (alone(w[c]) * direction[c]).sum().backward()
        assert torch.equal(quantizer(w)[c], alone(w[c]))
        assert torch.equal(quantizer.codes(w)[c], alone.codes(w[c]))
        torch.testing.assert_close(quantizer.scale.grad[c], alone.scale.grad)
    packed = quantizer.pack(w)
    assert packed.numel() == quantizer.packed_size(w.numel()) == math.ceil(18 * sum(widths) / 8)
    assert torch.equal(quantizer.unpack(packed, w.shape), quantizer(w))


def test_bits_beyond_one_to_eight_and_another_number_of_channels_are_refused():
    w = weights(0, 30).view(3, 10)
    quantizer = WeightQuantizer("lsq", "midrise", 4)
    for bits in (1, 8):
        quantizer.set_bits(bits, w)
        assert len(quantizer(w).unique()) <= 2**bits
    for bits in (0, 9):
        with pytest.raises(ValueError, match=f"1 to 8, got {bits}"):
            quantizer.set_bits(bits, w)
    with pytest.raises(ValueError, match="Expected 1 bitwidths, got 3"):
        quantizer.set_bits((2, 3, 4), w)
    channels = WeightQuantizer("lsq", "midrise", (2, 3, 4), channels=3)
    with pytest.raises(ValueError, match="Expected 3 bitwidths, got 2"):
        channels.set_bits((2, 3), w)
    with pytest.raises(ValueError, match="Weight bits must be"):
        channels.set_bits(3, w)
    for form in ("dorefa", "entropy"):
        with pytest.raises(ValueError, match=f"need the weight quantizer 'lsq', got '{form}'"):
            WeightQuantizer(form, "midrise", 4, channels=3)


@pytest.mark.parametrize("bits", [4, (4, 4, 4)])
def test_weights_on_the_meta_device_leave_the_scale(bits):
    quantizer = WeightQuantizer("lsq", "midrise", bits, channels=3)
    w, before = torch.empty(3, 10, device="meta"), quantizer.scale.detach().clone()
    quantizer.fit_scale(w)
    quantizer.set_bits(2 if isinstance(bits, int) else (2, 4, 4), w)
    assert torch.equal(quantizer.scale.detach(), before)


def test_marked_weights_are_passed_through_until_they_or_the_scale_are_touched():
    w, quantizer = weights(2, 40), WeightQuantizer("lsq", "midrise", 3)
    quantizer.fit_scale(w)

    def expected(w):
        return fake_quantize(w, "lsq", "midrise", 3, quantizer.scale.detach())

    with torch.no_grad():
        quantized = quantizer(w)
        assert quantized is not w
        quantizer.mark_quantized(quantized)
        assert quantizer.is_quantized(quantized)
        assert quantizer(quantized) is quantized
        assert not quantizer.is_quantized(w)
        assert torch.equal(quantizer(w), expected(w))
        quantized += 0.3
        assert not quantizer.is_quantized(quantized)
        assert torch.equal(quantizer(quantized), expected(quantized))
        quantizer.mark_quantized(quantized)
        quantizer.scale.mul_(1.1)
        assert torch.equal(quantizer(quantized), expected(quantized))
        quantizer.mark_quantized(quantized)
    # With gradients there is a graph to be made.
    quantized.requires_grad_()
    quantizer(quantized).sum().backward()
    assert quantized.grad is not None
    # What a training writes has no version where it goes through `.data`.
    written = quantized.detach()
    quantizer.mark_quantized(written)
    quantizer.train().eval()
    written.data += 0.3
    with torch.no_grad():
        assert torch.equal(quantizer(written), expected(written))
    other = WeightQuantizer("dorefa", "midrise", 3)
    other.mark_quantized(w)
    assert not other.is_quantized(w)
