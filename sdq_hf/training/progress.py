"""Progress on the main process: a bar on a terminal, one line an epoch in a log."""

import sys
import time
from collections.abc import Mapping

from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm


class Progress:
    """Loss, further numbers, images/s and the time left."""

    def __init__(self, accelerator: Accelerator, name: str, epochs: float, batches: int, batch_size: int):
        self.name, self.epochs, self.batches, self.batch_size = name, epochs, batches, batch_size
        self.is_main = accelerator.is_main_process
        self.is_terminal = sys.stderr.isatty()
        self.mean_loss = 0.0
        self.loss_sum, self.loss_count = 0.0, 0
        self._losses: list[Tensor] = []
        self._bar: tqdm | None = None

    def start(self, epoch: int, done: int = 0, loss_sum: float = 0.0, loss_count: int = 0) -> None:
        """Begin an epoch, or go on in it after `done` batches, whose losses are `loss_count` numbers with this sum."""
        self._epoch, self._losses, self._seen, self._started = epoch, [], 0, time.perf_counter()
        self.loss_sum, self.loss_count = loss_sum, loss_count
        if self.is_main and self.is_terminal:
            total = self.batches * self.batch_size
            title = f"{self.name} {epoch + 1}/{self.epochs:g}"
            self._bar = tqdm(total=total, initial=done * self.batch_size, desc=title, unit="img", leave=False)

    def batch(self, loss: Tensor, images: int, numbers: Mapping[str, float]) -> None:
        self._losses.append(loss.detach())
        self._seen += images
        if self._bar is not None:
            self._bar.update(self.batch_size)
            if len(self._losses) % 10 == 1:
                self._bar.set_postfix({"loss": f"{loss.item():.3f}", **{k: f"{v:.2f}" for k, v in numbers.items()}})

    def collect(self) -> float:
        """Add the losses since the last call to `loss_sum`, and return it. Waits for the device."""
        # One by one: the sum is the same wherever an epoch is interrupted.
        for loss in self._losses:
            self.loss_sum += loss.item()
        self.loss_count += len(self._losses)
        self._losses.clear()
        return self.loss_sum

    def finish(self, metrics: Mapping[str, float]) -> None:
        """End of an epoch: `metrics` on validation."""
        seconds = time.perf_counter() - self._started
        self.mean_loss = self.collect() / max(1, self.loss_count)
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        if self.is_main:
            left = max(0.0, self.epochs - self._epoch - 1) * seconds
            print(
                f"{self.name}: epoch {self._epoch + 1}/{self.epochs:g}, loss {self.mean_loss:.4f}, validation top-1 "
                f"{metrics['top1']:.2f}, {self._seen / seconds:,.0f} images/s"
                + (f", {left:.0f} s left" if left else ""),
                flush=True,
            )


class SearchProgress:
    """The same for a search, whose length nobody knows: its bar shows the part of the way down that is done."""

    def __init__(self, accelerator: Accelerator, name: str, budget: float, done_batches: int = 0):
        self.accelerator, self.name, self.budget, self.done = accelerator, name, budget, done_batches
        self._started = self._printed = time.perf_counter()
        self._start_cost: float | None = None
        show = accelerator.is_main_process and sys.stderr.isatty()
        self._bar = tqdm(total=100, desc=name, unit="%", leave=False) if show else None

    def batch(self, number: int, images: int, loss: float, cost: float, average_bits: float) -> None:
        """`number` batches are done; `cost` is in the unit of the budget."""
        now = time.perf_counter()
        rate = self.accelerator.num_processes * images * (number - self.done) / (now - self._started)
        if number % 10 == 0:
            self.accelerator.log(
                {f"{self.name}/loss": loss, f"{self.name}/cost": cost, f"{self.name}/bits": average_bits}, step=number
            )
        if self._start_cost is None:
            self._start_cost = cost
        if self._bar is not None:
            way = self._start_cost - self.budget
            self._bar.n = round(100 * min(1.0, (self._start_cost - cost) / way), 1) if way > 0 else 100
            self._bar.set_postfix_str(f"loss {loss:.3f}, {average_bits:.2f} bits, {rate:,.0f} images/s")
        elif now - self._printed > 10:
            self._printed = now
            self.accelerator.print(
                f"{self.name}: batch {number}, loss {loss:.4f}, {average_bits:.2f} average bits, {rate:,.0f} images/s",
                flush=True,
            )

    def finish(self) -> None:
        if self._bar is not None:
            self._bar.close()
