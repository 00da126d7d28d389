"""Progress on the main process: a bar on a terminal, one line an epoch in a log."""

import sys
import time
from collections.abc import Mapping

from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm


class Progress:
    """Loss, further numbers, images/s and the time left."""

    def __init__(self, accelerator: Accelerator, name: str, epochs: int, batches: int, batch_size: int):
        self.name, self.epochs, self.batches, self.batch_size = name, epochs, batches, batch_size
        self.is_main = accelerator.is_main_process
        self.is_terminal = sys.stderr.isatty()
        self.mean_loss = 0.0
        self._losses: list[Tensor] = []
        self._bar: tqdm | None = None

    def start(self, epoch: int, done: int = 0) -> None:
        self._epoch, self._losses, self._seen, self._started = epoch, [], 0, time.perf_counter()
        if self.is_main and self.is_terminal:
            total = self.batches * self.batch_size
            title = f"{self.name} {epoch + 1}/{self.epochs}"
            self._bar = tqdm(total=total, initial=done * self.batch_size, desc=title, unit="img", leave=False)

    def batch(self, loss: Tensor, images: int, numbers: Mapping[str, float]) -> None:
        self._losses.append(loss.detach())
        self._seen += images
        if self._bar is not None:
            self._bar.update(self.batch_size)
            if len(self._losses) % 10 == 1:
                self._bar.set_postfix({"loss": f"{loss.item():.3f}", **{k: f"{v:.2f}" for k, v in numbers.items()}})

    def finish(self, metrics: Mapping[str, float]) -> None:
        """End of an epoch: `metrics` on validation."""
        seconds = time.perf_counter() - self._started
        self.mean_loss = sum(x.item() for x in self._losses) / max(1, len(self._losses))
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        if self.is_main:
            left = (self.epochs - self._epoch - 1) * seconds
            print(
                f"{self.name}: epoch {self._epoch + 1}/{self.epochs}, loss {self.mean_loss:.4f}, validation top-1 "
                f"{metrics['top1']:.2f}, {self._seen / seconds:,.0f} images/s"
                + (f", {left:.0f} s left" if left else ""),
                flush=True,
            )
