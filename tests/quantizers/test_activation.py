import math
import weakref

import pytest
import torch
import torch.nn.functional as F

from sdq_hf.quantizers import ActivationQuantizer
from sdq_hf.quantizers.activation import (
    _dot,
    _fake_quantize,
    _fused_fake_quantize,
    activation_range,
    best_step,
)


def lsq(x, step, low, high):
    """Learned step size quantization (Esser et al. 2020) with autograd and detach, as its authors write it."""
    factor = 1 / math.sqrt(x.numel() * high)
    step = (step - step * factor).detach() + step * factor
    scaled = (x / step).clamp(low, high)
    return ((scaled.round() - scaled).detach() + scaled) * step


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("channels_last", [False, True])
def test_forward_and_gradients_are_those_of_lsq(signed, bits, channels_last):
    if signed and bits == 1:
        pytest.skip("a signed bit has no positive level for LSQ's gradient scale")
    generator = torch.Generator().manual_seed(bits)
    x = torch.randn(4, 3, 5, 5, generator=generator)
    x = x if signed else x.relu()
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    g = torch.randn(x.shape, generator=generator)
    quantizer = ActivationQuantizer(bits)
    quantizer.fit(x)
    assert bool(quantizer.signed) == signed
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = quantizer(ours)
    (y * g).sum().backward()
    step = quantizer.step.detach().clone().requires_grad_()
    z = lsq(theirs, step, *activation_range(bits, signed))
    (z * g).sum().backward()
    torch.testing.assert_close(y, z, rtol=1e-5, atol=1e-6)
    # LSQ passes gradients up to the outermost level, we up to where rounding still reaches it, half a step further.
    low, high = activation_range(bits, signed)
    edge = ((x / step >= high) & (x / step < high + 0.5)) | ((x / step <= low) & (x / step > low - 0.5))
    torch.testing.assert_close(ours.grad[~edge], theirs.grad[~edge])
    extra = (g * edge * (-x / step + z / step)).sum() - (g * edge * z / step).sum()
    expected = step.grad + extra.detach() / math.sqrt(x.numel() * high)
    torch.testing.assert_close(quantizer.step.grad, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_fitted_step_is_as_good_as_a_dense_search(bits):
    x = torch.randn(3000, generator=torch.Generator().manual_seed(0)).relu()
    high = 2**bits - 1

    def error(step):
        return sum((min(high, max(0, round(v / step))) * step - v) ** 2 for v in x.tolist())

    best = min(error(s / high) for s in torch.linspace(0.3, 4.0, 60).tolist())
    assert error(best_step(x, bits, signed=False).item()) <= 1.05 * best


def test_values_on_a_grid_are_fitted_without_error_and_the_step_grows_with_them():
    for scale in (1.0, 1e-4, 1e4):
        assert best_step(scale * torch.arange(16.0), 4, signed=False).item() == pytest.approx(scale)
        assert best_step(scale * torch.arange(-8.0, 8.0), 4, signed=True).item() == pytest.approx(scale)
    assert best_step(torch.zeros(9), 4, signed=False).item() > 0


def test_first_tensor_fits_and_a_change_of_bits_fits_anew():
    quantizer = ActivationQuantizer(4)
    assert quantizer.step.item() == 0
    quantizer(torch.rand(100))
    first = quantizer.step.item()
    assert first > 0
    quantizer(10 * torch.rand(100))
    assert quantizer.step.item() == first
    quantizer.set_bits(2)
    quantizer(torch.rand(100))
    assert quantizer.step.item() > first


def test_state_survives_saving():
    quantizer, other = ActivationQuantizer(4), ActivationQuantizer(4)
    x = torch.randn(50, generator=torch.Generator().manual_seed(2))
    y = quantizer(x)
    other.load_state_dict(quantizer.state_dict())
    # Nothing that comes by fits a loaded step anew.
    other(10 * x)
    assert torch.equal(other.step, quantizer.step)
    assert torch.equal(other(x), y)
    assert other.range == (-8, 7)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("act", [F.relu, F.silu, F.gelu, F.hardswish, torch.clone])
def test_the_sign_is_that_with_the_smaller_error(act, bits):
    x = act(3 * torch.randn(4000, generator=torch.Generator().manual_seed(0)))
    quantizer = ActivationQuantizer(bits)
    quantizer.fit(x)
    errors = {}
    for signed in (False, True):
        low, high = activation_range(bits, signed)
        steps = x.abs().max() / max(-low, high) * torch.linspace(0.05, 1, 200)
        errors[signed] = min((((x / s).round().clamp(low, high) * s - x) ** 2).sum().item() for s in steps)
    # A signed bit could not be trained: it has no positive level.
    better = bits > 1 and errors[True] < errors[False]
    assert bool(quantizer.signed) == better or errors[True] == pytest.approx(errors[False], rel=0.1)
    assert quantizer.range == activation_range(bits, bool(quantizer.signed))


def test_one_bit_is_unsigned_whatever_comes():
    quantizer = ActivationQuantizer(1)
    quantizer.fit(-torch.rand(1000, generator=torch.Generator().manual_seed(0)))
    assert quantizer.range == (0, 1)


def test_values_of_one_sign_are_unsigned_and_so_is_what_both_signs_fit_as_well():
    quantizer = ActivationQuantizer(3)
    for x in (torch.tensor([0.0, 1.0, 0.53]), torch.zeros(5), torch.rand(7)):
        quantizer.fit(x)
        assert quantizer.range == (0, 7)
    # Too small for any step: all are zero.
    quantizer.fit(torch.tensor([-1e-30, 1e-30]))
    assert quantizer.range == (0, 7)


def test_few_bits_are_unsigned_where_many_are_signed():
    x = F.silu(3 * torch.randn(4000, generator=torch.Generator().manual_seed(0)))
    signs = {}
    for bits in (2, 8):
        quantizer = ActivationQuantizer(bits)
        quantizer.fit(x)
        signs[bits] = bool(quantizer.signed)
    assert signs == {2: False, 8: True}


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", range(1, 9))
def test_numbers_are_those_of_torchs_own_fake_quantization(signed, bits):
    generator = torch.Generator().manual_seed(bits)
    step = torch.rand((), generator=generator) + 0.01
    # Half steps too, where rounding has a tie.
    x = torch.cat([torch.randn(5000, generator=generator) * 9, (torch.arange(-99, 99) + 0.5) * step])
    low, high = activation_range(bits, signed)
    expected = torch.fake_quantize_per_tensor_affine(x, step, torch.zeros((), dtype=torch.int32), low, high)
    assert torch.equal(_fake_quantize(x, step, low, high), expected)
    assert torch.equal(_fused_fake_quantize(x, step, low, high), expected)


@pytest.mark.parametrize("function", [_fake_quantize, _fused_fake_quantize])
def test_what_is_no_number_stays_none_so_that_a_training_that_diverges_is_seen(function):
    x, step = torch.tensor([1.0, torch.nan, torch.inf, -torch.inf]), torch.tensor(0.5)
    torch.testing.assert_close(
        function(x, step, -8, 7), torch.tensor([1.0, torch.nan, 3.5, -4.0]), equal_nan=True, rtol=0, atol=0
    )


def test_copies_for_several_devices_refuse_to_fit_what_would_be_lost():
    quantizer = ActivationQuantizer(4)

    def replica():
        """As torch.nn.parallel.replicate makes it, which needs several devices."""
        copied = quantizer._replicate_for_data_parallel()
        copied.step = quantizer.step.detach()
        return copied

    with pytest.raises(RuntimeError, match=r"call model\.calibrate"):
        replica()(torch.ones(3))
    quantizer(torch.ones(3))
    assert torch.equal(replica()(torch.ones(3)), quantizer(torch.ones(3)))


def test_numbers_of_half_precision_are_quantized_in_float32_and_those_of_float64_in_float64():
    quantizer = ActivationQuantizer(8, power_of_two=True)
    quantizer.step.data.fill_(2.0**-6)
    x = 4 * torch.rand(3000, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(quantizer(x.to(dtype)), quantizer(x.to(dtype).float()).to(dtype))
    # Just below a tie, on which float32 would lie.
    below = torch.tensor([2.5 - 1e-12], dtype=torch.float64) * 2.0**-6
    assert quantizer(below.float()).item() == quantizer(below).item() == 2 * 2.0**-6
    below = torch.tensor([3.5 - 1e-12], dtype=torch.float64) * 2.0**-6
    assert (quantizer(below.float()).item(), quantizer(below).item()) == (4 * 2.0**-6, 3 * 2.0**-6)


def test_sums_of_products_are_right_in_any_memory_format():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(2, 6, 4, 5, generator=generator) for _ in range(2))
    expected = (a.double() * b.double()).sum().item()
    last = {"memory_format": torch.channels_last}
    for one, other in ((a, b), (a.contiguous(**last), b.contiguous(**last)), (a.contiguous(**last), b)):
        assert _dot(one, other).item() == pytest.approx(expected, rel=1e-5)
    # Slices have gaps between their values.
    expected = (a.double() * b.double())[:, ::2].sum().item()
    assert _dot(a[:, ::2], b[:, ::2]).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_kept_as_codes_give_the_same_gradients(signed, dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 6, 9, 9, generator=generator).to(dtype)
    x = x if signed else x.relu()
    quantizer, conv = ActivationQuantizer(4), torch.nn.Conv2d(6, 5, 3).to(dtype)
    quantizer.fit(x.float())
    found = []
    for compact in (False, True):
        quantizer.compact = compact
        conv.zero_grad()
        quantizer.zero_grad()
        leaf = x.clone().requires_grad_()
        y = quantizer(leaf)
        if compact:
            with quantizer.saved_as_codes(y):
                z = conv(y)
        else:
            z = conv(y)
        alive = weakref.ref(y)
        del y
        # Only the codes wait for the backward pass, not the quantized activation.
        assert (alive() is None) == compact
        z.float().square().sum().backward()
        found.append([leaf.grad, conv.weight.grad.clone(), quantizer.step.grad.clone()])
    for plain, small in zip(*found, strict=True):
        assert torch.equal(plain, small)


def test_only_the_activation_itself_is_kept_as_codes():
    quantizer, x = ActivationQuantizer(2), torch.rand(6, 9, generator=torch.Generator().manual_seed(0))
    quantizer.fit(x)
    y = quantizer(x)
    # Of the same shape as the activation, and not on its grid.
    factor = torch.randn(6, 9, requires_grad=True)
    y = y.detach().requires_grad_()
    with quantizer.saved_as_codes(y):
        z = y * factor
    z.sum().backward()
    assert torch.equal(y.grad, factor)
    assert torch.equal(factor.grad, y)


@pytest.mark.filterwarnings("ignore")  # the compiler's own, which differ from version to version
@pytest.mark.parametrize("signed", [False, True])
def test_gradients_of_the_path_for_compilers_and_gpus_are_those_of_the_fused_one(signed):
    x = 3 * torch.randn(500, generator=torch.Generator().manual_seed(0))
    quantizer = ActivationQuantizer(3)
    quantizer.fit(x if signed else x.relu())
    # A step that cuts off values on both sides, and values right where rounding reaches the outermost levels last.
    quantizer.step.data.mul_(0.4)
    low, high = quantizer.range
    x = torch.cat([x[:498], torch.tensor([low - 0.5, high + 0.5]) * quantizer.step.item()])
    found = []
    for function in (quantizer, torch.compile(quantizer, backend="aot_eager", fullgraph=True)):
        leaf = x.clone().requires_grad_()
        quantizer.zero_grad()
        (function(leaf) * torch.arange(500)).sum().backward()
        found.append((leaf.grad, quantizer.step.grad.clone()))
    assert torch.equal(found[0][0], found[1][0])
    assert 0 < (found[0][0] == 0).sum() < 400
    torch.testing.assert_close(found[0][1], found[1][1])


@pytest.mark.parametrize("signed", [False, True])
def test_integers_are_what_the_values_are_made_of(signed: bool):
    torch.manual_seed(0)
    quantizer, x = ActivationQuantizer(3), 2 * torch.randn(500)
    quantizer.step.data.fill_(0.37)
    quantizer.signed.fill_(int(signed))
    low, high = (-4, 3) if signed else (0, 7)
    expected = [min(max(round(value / 0.37), low), high) for value in x.tolist()]
    assert quantizer.integers(x).tolist() == expected
    torch.testing.assert_close(quantizer(x), torch.tensor(expected) * 0.37)
    assert quantizer(x.double()).dtype == torch.float64


def test_a_step_or_an_input_alone_takes_the_gradient_that_it_has_beside_the_other():
    values, found = torch.randn(50, generator=torch.Generator().manual_seed(0)), {}
    for learns in ("both", "step", "input"):
        quantizer, x = ActivationQuantizer(4), values.clone()
        quantizer.fit(x)
        quantizer.step.requires_grad_(learns != "input")
        x.requires_grad_(learns != "step")
        quantizer(x).square().sum().backward()
        found[learns] = (quantizer.step.grad, x.grad)
    assert (found["step"][1], found["input"][0]) == (None, None)
    assert torch.equal(found["step"][0], found["both"][0])
    assert torch.equal(found["input"][1], found["both"][1])
    assert found["both"][0] != 0


def test_what_a_quantizer_says_of_itself():
    assert ActivationQuantizer(4).extra_repr() == "bits=4, range=not fitted yet"
    assert ActivationQuantizer(4, power_of_two=True).extra_repr() == "bits=4, range=not fitted yet, power of two"
