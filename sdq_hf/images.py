"""Images of any mode, as a network of one or three channels takes them."""

from typing import Any

import numpy as np
import PIL.Image

# Pillow's modes of grey images.
SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")


class DataError(ValueError):
    """Data that cannot be used; one line that names the split or column, what it got and what was expected."""

    def __init__(self, message: str):
        # A loader raises what its worker met with all of the worker's traceback before it.
        super().__init__(message.rpartition("DataError: ")[2].strip())


def with_channels(image: Any, channels: int) -> Any:
    """A PIL image of any mode in mode L or RGB, as `channels` (1 or 3) says. Transparency is dropped, as timm does it.

    16 bits become 8 by dropping the lower half. `DataError` for 32 bits and for floats, whose range is not known.
    """
    if image.mode in SIXTEEN_BITS:
        # Pillow itself would make everything above 255 white.
        image = PIL.Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        kind = "32-bit integers" if image.mode == "I" else "floats"
        raise DataError(
            f"An image holds {kind} (mode {image.mode}), whose range is not known: save it with 8 or 16 bits."
        )
    return image.convert("L" if channels == 1 else "RGB")
