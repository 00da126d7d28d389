from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdq_hf.export.graph import Add, Concat, MaxPool, SumPool, shift_half_even, signed_bits


@given(st.lists(st.integers(-(2**40), 2**40), min_size=1, max_size=20), st.integers(-8, 30))
def test_a_shift_rounds_half_to_even_as_python_does(values: list[int], shift: int):
    # Of a Fraction round() is exact, half to even.
    expected = [round(Fraction(value) / Fraction(2) ** shift) for value in values]
    assert shift_half_even(torch.tensor(values), shift).tolist() == expected


def test_ties_go_to_the_even_neighbour():
    assert shift_half_even(torch.tensor([-6, -2, 2, 6, 10]), 2).tolist() == [-2, 0, 0, 2, 2]


@pytest.mark.parametrize("bits", range(1, 12))
def test_signed_bits_are_the_fewest_that_hold_the_range(bits: int):
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    assert signed_bits(low, high) == bits
    assert signed_bits(low - 1, 0) == signed_bits(0, high + 1) == bits + 1
    assert signed_bits(0, high) == bits


# What the nodes below have in common and do not use when they run.
BOUNDS = {"name": "node", "shape": (), "exponent": 0, "low": -100, "high": 100}


def integers(*shape: int) -> torch.Tensor:
    return torch.randint(-100, 101, shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_tensors_in_other_units_are_shifted_to_the_finest_before_they_are_joined_or_added():
    a, b = integers(2, 3, 4, 4), integers(2, 3, 4, 4)
    joined = Concat(inputs=("a", "b"), shifts=(0, 3), **BOUNDS).run(a, b)
    assert joined.tolist() == [x + y for x, y in zip(a.tolist(), (8 * b).tolist(), strict=True)]
    assert Add(inputs=("a", "b"), shifts=(2, 0), **BOUNDS).run(a, b).tolist() == (4 * a + b).tolist()


@pytest.mark.parametrize("kind", [MaxPool, SumPool])
@pytest.mark.parametrize("stride", [(2, 2), (1, 3)])
def test_pooling_is_a_plain_loop(kind: type, stride: tuple[int, int]):
    x, kernel = integers(1, 2, 6, 7), (3, 2)
    padding = (1, 0, 2, 1) if kind is MaxPool else (0, 0, 0, 0)
    got = kind(inputs=("x",), kernel=kernel, stride=stride, padding=padding, **BOUNDS).run(x)
    left, right, top, bottom = padding
    for channel in range(2):
        rows = []
        for r in range(-top, 6 + bottom - kernel[0] + 1, stride[0]):
            row = []
            for c in range(-left, 7 + right - kernel[1] + 1, stride[1]):
                places = [(r + i, c + j) for i in range(kernel[0]) for j in range(kernel[1])]
                seen = [int(x[0, channel, i, j]) for i, j in places if 0 <= i < 6 and 0 <= j < 7]
                # A window of padding alone has the value that is below all others.
                row.append(sum(seen) if kind is SumPool else max(seen, default=-101))
            rows.append(row)
        assert got[0, channel].tolist() == rows
