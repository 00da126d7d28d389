"""Integer grids: where the levels of a b-bit weight stand.

A quantized weight is always `integer * unit`. The grid says which integers exist:

- `midrise`: the 2^b odd integers -(2^b - 1), ..., -1, 1, ..., 2^b - 1. No zero, symmetric. This is DoReFa's grid
  (METHOD: Zhou et al. 2016). As plain integers they need b + 1 bits, or b bits as `code` with `integer = 2 code - (2^b - 1)`.
- `twos_complement`: -2^(b-1), ..., 2^(b-1) - 1, what integer hardware holds in b bits. At 1 bit it is {-1, +1}.

`code` is the unsigned number 0 .. 2^b - 1 that is stored in a file; it grows with the weight on both grids.
"""

import torch
from torch import Tensor

GRIDS = ("midrise", "twos_complement")
MIN_BITS, MAX_BITS = 1, 8


def _is_odd_grid(grid: str, bits: int) -> bool:
    if grid not in GRIDS:
        raise ValueError(f"Unknown weight grid {grid!r}: expected one of {', '.join(GRIDS)}.")
    return grid == "midrise" or bits == 1


def extremes(grid: str, bits: int) -> tuple[int, int]:
    """The smallest and the largest integer of the grid."""
    if _is_odd_grid(grid, bits):
        return -(2**bits - 1), 2**bits - 1
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def spacing(grid: str, bits: int) -> int:
    """Distance between neighbouring integers of the grid: 2 where only odd ones exist, else 1."""
    return 2 if _is_odd_grid(grid, bits) else 1


def half_range(grid: str, bits: int) -> int:
    """The integer that the clipping value 1.0 of a normalised weight in [-1, 1] stands for."""
    return 2**bits - 1 if _is_odd_grid(grid, bits) else 2 ** (bits - 1)


def round_to_grid(x: Tensor, grid: str, bits: int) -> Tensor:
    """The nearest integer of the grid (as float, any shape) to `x` in units; ties between codes go to the even one."""
    low, high = extremes(grid, bits)
    if _is_odd_grid(grid, bits):
        # code = (x - low) / 2 counts the levels from the lowest up.
        if torch.compiler.is_compiling():
            # In graphs of torch 2.11 nothing flows back through what was changed in place.
            return ((x - low) * 0.5).round().clamp(0, 2**bits - 1) * 2 + low
        return torch.sub(x, low).mul_(0.5).round_().clamp_(0, 2**bits - 1).mul_(2).add_(low)
    return torch.round(x).clamp(low, high)


def integers_to_codes(integers: Tensor, grid: str, bits: int) -> Tensor:
    """Integers of the grid -> codes 0 .. 2^b - 1 (uint8, same shape)."""
    low, _ = extremes(grid, bits)
    return torch.div(integers - low, spacing(grid, bits), rounding_mode="floor").to(torch.uint8)


def codes_to_integers(codes: Tensor, grid: str, bits: int) -> Tensor:
    """Codes 0 .. 2^b - 1 -> integers of the grid (float32, exact, same shape)."""
    low, _ = extremes(grid, bits)
    return codes.to(torch.float32) * spacing(grid, bits) + low
