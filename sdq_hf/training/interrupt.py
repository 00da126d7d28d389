"""Ctrl-C at a safe moment: between two optimizer updates."""

import signal
from types import FrameType

import torch
from accelerate import Accelerator


class Interrupted(Exception):
    """Raised after the training state has been written."""


class Interrupt:
    """Remembers the first Ctrl-C until the loop asks; a second one stops at once.

    Use as a context manager around the work; outside of it nothing is caught.
    """

    def __init__(self) -> None:
        self._seen = False

    def __enter__(self) -> "Interrupt":
        self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *exc: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._seen:
            raise KeyboardInterrupt
        self._seen = True

    def requested(self, accelerator: Accelerator) -> bool:
        """Whether any rank was interrupted: all of them answer alike."""
        if accelerator.num_processes == 1:
            return self._seen
        flag = torch.tensor(int(self._seen), device=accelerator.device)
        return bool(accelerator.reduce(flag, reduction="sum").item())

    def stop(self) -> None:
        raise Interrupted
