"""Memory of this process, as the benches measure it. Linux only."""

import ctypes
import gc
from pathlib import Path


def resident(field: str = "VmRSS") -> int:
    """Bytes of this process in memory; with "VmHWM" the most since the start, or since `reset_peak`."""
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith(field))


def reset_peak() -> None:
    """Count the peak from here."""
    Path("/proc/self/clear_refs").write_text("5")


def trim() -> None:
    """Give back what was freed: what is measured next would fill it, and not show."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
