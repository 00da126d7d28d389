"""Whether all ranks of a distributed search are at the same place."""

from collections import Counter
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

import torch
from accelerate import Accelerator


class RankError(RuntimeError):
    """A rank of a distributed search that is not where the others are; the message is one line."""


def check_agreement(accelerator: Accelerator, batch: int, places: Mapping[str, Any]) -> None:
    """Compare `places` (what -> plain numbers) over all ranks, by hash.

    All ranks must call it, in a search that steps down for each batch and before they exchange anything else: ranks that
    disagree about a step would wait for each other forever. It costs one exchange of 8 bytes for each of `places`.

    Raises `RankError` on every rank, with the ranks that differ from most others (from rank 0 where there are two), what
    they differ in, and the batch.
    """
    digests = [_digest(batch), *(_digest(value) for value in places.values())]
    everyone = accelerator.gather(torch.tensor([digests], device=accelerator.device)).tolist()
    for what, found in zip(["number of batches", *places], zip(*everyone, strict=True), strict=True):
        # Of equally frequent ones the first rank's counts.
        usual, _ = Counter(found).most_common(1)[0]
        odd = [rank for rank, digest in enumerate(found) if digest != usual]
        if odd:
            names = f"rank {odd[0]} has" if len(odd) == 1 else f"ranks {', '.join(map(str, odd))} have"
            raise RankError(
                f"The search's ranks disagree at batch {batch}: {names} other {what} than rank {found.index(usual)}. All "
                "ranks need the same options, model and library versions, and only their data may differ."
            )


def _digest(value: Any) -> int:
    """A hash of plain numbers, as a signed 64-bit integer. `repr` writes every bit of a float."""
    return int.from_bytes(blake2b(repr(value).encode(), digest_size=8).digest(), "little", signed=True)
