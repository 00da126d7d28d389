import math

import pytest
import torch
from torch import nn

from sdq_hf.quantizers import ActivationQuantizer, WeightQuantizer
from sdq_hf.quantizers.activation import activation_range, best_step_and_sign
from sdq_hf.quantizers.grids import half_range
from sdq_hf.quantizers.power_of_two import exponent, nearest_power_of_two
from sdq_hf.quantizers.weight import best_scale, dequantize, quantize_to_integers


def test_the_nearest_power_is_exact_and_nearest_on_a_logarithmic_scale():
    torch.manual_seed(0)
    x = torch.cat([torch.exp2(torch.empty(5000).uniform_(-60, 60)), torch.tensor([2.0**k for k in range(-100, 100)])])
    y = nearest_power_of_two(x)
    for value, power in zip(x.tolist(), y.tolist(), strict=True):
        mantissa, _ = math.frexp(power)
        assert mantissa == 0.5
        assert abs(math.log2(power) - math.log2(value)) <= 0.5 + 1e-6
    assert torch.equal(y[5000:], x[5000:])
    assert exponent(y[5000:]).tolist() == list(range(-100, 100))
    with pytest.raises(ValueError, match=r"powers of two, got 3\.0"):
        exponent(torch.tensor([2.0, 3.0]))


def test_a_channel_of_nothing_has_no_unit_far_below_the_others():
    w = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)) * torch.tensor([[0.0], [1e-7], [1.0]])
    quantizer = WeightQuantizer("lsq", "twos_complement", 4, channels=3, power_of_two=True)
    quantizer.fit_scale(w)
    nothing, little, usual = exponent(quantizer.unit).tolist()
    # A thousandth, of a unit that may be twice or half that of the largest channel.
    assert nothing == little
    assert abs(usual - 10 - nothing) <= 1


@pytest.mark.parametrize("form", ["dorefa", "entropy", "lsq"])
def test_the_least_unit_is_a_millionth(form):
    w = 1e-9 * torch.randn(50, generator=torch.Generator().manual_seed(0))
    quantizer = WeightQuantizer(form, "twos_complement", 4, power_of_two=True)
    quantizer.fit_scale(w)
    # All weights of LSQ round to zero, with this unit and with twice as much.
    assert quantizer.unit.item() == 2.0 ** (-19 if form == "lsq" else -20)


def test_what_is_made_of_codes_takes_no_gradient_and_what_a_quantizer_says_of_itself():
    quantizer = WeightQuantizer("lsq", "midrise", 3, power_of_two=True)
    assert not quantizer.from_codes(torch.zeros(4, dtype=torch.uint8)).requires_grad
    assert quantizer.extra_repr() == "lsq, midrise, bits=3, power of two"
    assert WeightQuantizer("dorefa", "midrise", 3).extra_repr() == "dorefa, midrise, bits=3"


def test_its_gradient_goes_straight_through():
    x = torch.tensor([0.3, 1.0, 5.0], requires_grad=True)
    nearest_power_of_two(x).backward(torch.tensor([1.0, 2.0, 3.0]))
    assert x.grad is not None
    assert x.grad.tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("form", ["dorefa", "entropy", "lsq"])
@pytest.mark.parametrize("grid", ["midrise", "twos_complement"])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_weight_scale_is_the_best_of_all_powers_of_two(form: str, grid: str, bits: int):
    torch.manual_seed(bits)
    w = torch.randn(3, 50) * torch.tensor([[0.05], [1.0], [9.0]])
    if form == "lsq":
        scales = best_scale(w, form, grid, bits, per_channel=True, power_of_two=True)
    else:
        scales = torch.stack([best_scale(row, form, grid, bits, power_of_two=True) for row in w])

    def error(channel: int, k: int) -> float:
        candidate = torch.tensor(2.0**k * half_range(grid, bits))
        values = dequantize(quantize_to_integers(w[channel], form, grid, bits, candidate), grid, bits, candidate)
        return float((values - w[channel]).square().sum())

    for channel, k in enumerate(exponent(scales / half_range(grid, bits)).tolist()):
        assert error(channel, k) == min(error(channel, other) for other in range(-16, 6))


@pytest.mark.parametrize("signed", [False, True])
def test_an_activation_step_is_the_best_of_all_powers_of_two(signed: bool):
    torch.manual_seed(1)
    x = torch.randn(4000) if signed else torch.randn(4000).relu()
    step, found = best_step_and_sign(x, 4, power_of_two=True)
    assert found == signed
    low, high = activation_range(4, signed)
    errors = {k: float((torch.round(x / 2.0**k).clamp(low, high) * 2.0**k - x).square().sum()) for k in range(-10, 5)}
    assert int(exponent(step)) == min(errors, key=errors.__getitem__)


def test_quantized_values_are_integers_times_powers_of_two_while_the_scale_is_any_number():
    torch.manual_seed(2)
    quantizer, w = WeightQuantizer("lsq", "midrise", 3, channels=4, power_of_two=True), torch.randn(4, 30)
    quantizer.fit_scale(w)
    quantizer.scale.data *= 1.2
    with torch.no_grad():
        values = quantizer(w)
    assert torch.equal(values, quantizer.integers(w) * quantizer.unit[:, None])
    assert exponent(quantizer.unit).shape == (4,)
    assert torch.equal(quantizer.unpack(quantizer.pack(w), w.shape), values)

    inputs = ActivationQuantizer(4, power_of_two=True)
    x = torch.randn(200).relu()
    inputs(x)
    inputs.step.data *= 0.8
    assert torch.equal(inputs(x), inputs.integers(x) * 2.0 ** int(exponent(inputs.effective_step)))


def test_channels_with_bits_of_their_own_have_units_of_their_own():
    torch.manual_seed(3)
    bits, w = (1, 3, 3, 8), torch.randn(4, 20)
    quantizer = WeightQuantizer("lsq", "twos_complement", bits, channels=4, power_of_two=True)
    quantizer.fit_scale(w)
    quantizer.scale.data *= 1.3
    with torch.no_grad():
        values = quantizer(w)
    for channel, width in enumerate(bits):
        integers = quantizer.integers(w)[channel]
        unit = 2.0 ** int(exponent(quantizer.unit[channel]))
        assert integers.abs().max() <= max(2 ** (width - 1), 1)
        assert torch.equal(values[channel], integers * unit)


def test_a_scale_that_moves_far_enough_takes_the_next_power():
    torch.manual_seed(4)
    quantizer, w = WeightQuantizer("lsq", "twos_complement", 4, power_of_two=True), torch.randn(100)
    quantizer.fit_scale(w)
    before = int(exponent(quantizer.unit))
    optimizer, w = torch.optim.SGD(quantizer.parameters(), lr=1e-2), 4 * w
    for _ in range(100):
        loss = nn.functional.mse_loss(quantizer(w), w, reduction="sum")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # Around the best one, which it cannot rest at: the gradient of the nearest power has a jump there.
    assert int(exponent(quantizer.unit)) in (before + 1, before + 2)


@pytest.mark.parametrize("bits", [8, tuple(range(1, 9)) * 8])
def test_weights_near_a_tie_have_the_same_integers_in_float64(bits: int | tuple[int, ...]):
    """Some of so many have a quotient that float32 rounds to a half, and float64 does not."""
    weight = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0))
    quantizer = WeightQuantizer("lsq", "midrise", bits, channels=64, power_of_two=True)
    quantizer.fit_scale(weight)
    integers, values = quantizer.integers(weight), quantizer(weight)
    quantizer.double()
    assert torch.equal(quantizer.integers(weight.double()), integers)
    assert torch.equal(quantizer(weight.double()), values)
