"""Ctrl-C and SIGTERM at a safe moment: between two optimizer updates."""

import signal
from types import FrameType

import torch
from accelerate import Accelerator


class Interrupted(Exception):
    """Raised after the training state has been written."""


class Interrupt:
    """Remembers the first Ctrl-C or SIGTERM (what a cluster sends before it takes a machine) until the loop asks.

    A Ctrl-C after that stops at once; a second SIGTERM changes nothing, since launchers pass on what their children have got
    already. `signal` is the number of the one that was seen, 0 for none. Use as a context manager around the work; outside
    of it nothing is caught.
    """

    def __init__(self) -> None:
        self.signal = 0

    def __enter__(self) -> "Interrupt":
        self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = self.signal or number

    @property
    def exit_code(self) -> int:
        """As shells give it: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + (self.signal or signal.SIGINT)

    def requested(self, accelerator: Accelerator) -> bool:
        """Whether any rank was interrupted: all of them answer alike."""
        if accelerator.num_processes == 1:
            return self.signal != 0
        signals = accelerator.gather(torch.tensor([self.signal], device=accelerator.device))
        seen = int(signals.max().item())
        self.signal = self.signal or seen
        return seen != 0

    def stop(self) -> None:
        raise Interrupted

    def check(self, accelerator: Accelerator) -> None:
        """Stop here if any rank was interrupted: for places where there is nothing to be saved."""
        if self.requested(accelerator):
            self.stop()
