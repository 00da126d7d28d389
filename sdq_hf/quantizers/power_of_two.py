"""Scales that are powers of two, as integer hardware shifts by: the "hardware profile" of a model.

What is learned stays a real number; what is computed with is the nearest power of two.
"""

import math

import torch
from torch import Tensor

SCALES = ("float", "power_of_two")


def nearest_power_of_two(x: Tensor) -> Tensor:
    """2^k nearest to `x` > 0 on a logarithmic scale (shape of `x`), exactly, with the straight-through gradient."""
    return _NearestPower.apply(x)


class _NearestPower(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        mantissa, _ = torch.frexp(x)
        # x = mantissa * 2^e with a mantissa from 0.5 up to 1, so the quotient is exact; exp2 of a whole number is not,
        # everywhere.
        power = x / mantissa
        return torch.where(mantissa < math.sqrt(0.5), power * 0.5, power)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad


def exponent(x: Tensor) -> Tensor:
    """k of each `x` = 2^k (int64, shape of `x`). Raises `ValueError` for another number."""
    mantissa, k = torch.frexp(x)
    if not (mantissa == 0.5).all():
        raise ValueError(f"Expected powers of two, got {x[mantissa != 0.5].flatten()[0].item()}.")
    return k.long() - 1
