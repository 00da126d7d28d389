"""Where the number of an option may lie: `metadata={"range": ...}` of its field."""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Range:
    """`words` come after "must be" in the error."""

    words: str
    holds: Callable[[float], bool]


POSITIVE = Range("above 0", lambda x: x > 0)
NOT_NEGATIVE = Range("0 or more", lambda x: x >= 0)
FRACTION = Range("from 0 to 1", lambda x: 0 <= x <= 1)
BELOW_ONE = Range("0 or more and below 1", lambda x: 0 <= x < 1)
BETWEEN = Range("between 0 and 1", lambda x: 0 < x < 1)
SEED = Range(f"from 0 to {2**32 - 1}", lambda x: 0 <= x < 2**32)  # NumPy takes no others


def check_numbers(options: Any) -> None:
    """`ValueError` that names the first number of a dataclass, or in a list of it, that is not finite or out of range."""
    for option in fields(options):
        value, where = getattr(options, option.name), option.metadata.get("range")
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                words = "a finite number"
            elif where is not None and number is not None and not where.holds(number):
                words = where.words
            else:
                continue
            raise ValueError(f"--{option.name} must be {words}, got {number}")
