from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdq_hf.export.graph import shift_half_even, signed_bits


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
