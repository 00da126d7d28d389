"""Codes of 1-8 bits <-> bytes.

The codes of a tensor are written one after the other, lowest bit first, with no gap between them: code i of b bits
stands in bits `i*b .. i*b + b - 1` of the stream, and bit j of the stream is bit `j % 8` of byte `j // 8`. The last byte
is filled up with zeros. A file is as small as the bitwidth says, odd bitwidths too.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# Codes that are unpacked at a time; a multiple of 8, so that each part begins at a byte.
_PART = 2**14


def packed_size(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take."""
    return (count * bits + 7) // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack `codes` (any shape, integers in 0 .. 2^bits - 1) into a uint8 tensor of `packed_size(codes.numel(), bits)` bytes.

    Raises `ValueError` when a code does not fit.
    """
    _check_bits(bits)
    codes = codes.reshape(-1).to(torch.int64)
    if codes.numel() and (codes.min() < 0 or codes.max() >= 2**bits):
        raise ValueError(f"Codes {codes.min().item()}..{codes.max().item()} do not fit in {bits} bits.")
    # Eight codes of b bits fill exactly b bytes: so each group of eight is one 64-bit word, of which b bytes are kept.
    groups = torch.nn.functional.pad(codes, (0, -codes.numel() % 8)).view(-1, 8)
    words = (groups << (torch.arange(8, device=codes.device) * bits)).sum(dim=1)
    bytes_ = (words[:, None] >> (torch.arange(bits, device=codes.device) * 8)) & 0xFF
    return bytes_.reshape(-1)[: packed_size(codes.numel(), bits)].to(torch.uint8)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack`: `count` codes as a uint8 tensor of shape [count].

    Raises `ValueError` when `packed` has not exactly the bytes that `count` codes take.
    """
    codes = torch.empty(count, dtype=torch.uint8, device=packed.device)
    for start, part in unpack_parts(packed, bits, count):
        codes[start : start + part.numel()] = part
    return codes


def unpack_parts(packed: Tensor, bits: int, count: int) -> Iterator[tuple[int, Tensor]]:
    """Place and codes (uint8 [n]) of one part after the other: the memory it takes does not grow with `count`."""
    _check_bits(bits)
    if packed.dtype != torch.uint8 or packed.numel() != packed_size(count, bits):
        raise ValueError(
            f"{count} codes of {bits} bits take {packed_size(count, bits)} bytes (uint8), "
            f"got {packed.numel()} of {packed.dtype}."
        )
    for start in range(0, count, _PART):
        size = min(_PART, count - start)
        first = start * bits // 8
        yield start, _unpack(packed[first : first + packed_size(size, bits)], bits, size)


def _unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    # int64 words hold 8 bytes: enough for eight codes of 8 bits; the sign bit comes and goes unharmed through the mask.
    bytes_ = torch.nn.functional.pad(packed.to(torch.int64), (0, -packed.numel() % bits)).view(-1, bits)
    words = (bytes_ << (torch.arange(bits, device=packed.device) * 8)).sum(dim=1)
    codes = (words[:, None] >> (torch.arange(8, device=packed.device) * bits)) & (2**bits - 1)
    return codes.reshape(-1)[:count].to(torch.uint8)


def pack_channels(codes: Tensor, bits: Sequence[int]) -> Tensor:
    """Pack `codes` [C, ...], whose channel c has `bits[c]` bits, into one stream without gaps (uint8).

    Channels of one bitwidth stand together, fewest bits first, and in their own order among themselves.
    """
    parts = [_to_bits(codes[rows], width) for width, rows in channels_by_bits(bits)]
    return pack(torch.cat(parts), 1)


def unpack_channels(packed: Tensor, bits: Sequence[int], shape: Sequence[int]) -> Tensor:
    """The inverse of `pack_channels`: codes (uint8) of `shape` [C, ...]."""
    count = math.prod(shape[1:])
    stream = unpack(packed, 1, count * sum(bits))
    codes = torch.empty(shape, dtype=torch.uint8, device=packed.device)
    for width, rows in channels_by_bits(bits):
        size = len(rows) * count * width
        places = (2 ** torch.arange(width, device=packed.device)).to(torch.uint8)
        codes[rows] = (stream[:size].view(-1, width) * places).sum(-1, dtype=torch.uint8).view(len(rows), *shape[1:])
        stream = stream[size:]
    return codes


def channels_by_bits(bits: Sequence[int]) -> list[tuple[int, list[int]]]:
    """Each bitwidth in `bits`, fewest first, with the numbers of the channels that have it."""
    found: dict[int, list[int]] = {}
    for channel, width in enumerate(bits):
        found.setdefault(width, []).append(channel)
    return sorted(found.items())


def _to_bits(codes: Tensor, width: int) -> Tensor:
    """Bits (0 or 1) of each code, lowest first, one after the other."""
    places = torch.arange(width, device=codes.device)
    return ((codes.reshape(-1, 1).to(torch.int64) >> places) & 1).reshape(-1)


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"Codes are packed at 1 to 8 bits, got {bits}.")
