"""Ctrl-C at a moment that a program's own output tells."""

import io
import signal


class Stopper(io.StringIO):
    """Standard output that sends this process a Ctrl-C, or another signal, when `text` has been printed."""

    def __init__(self, text: str, number: int = signal.SIGINT):
        super().__init__()
        self.text, self.number = text, number

    def write(self, text: str) -> int:
        if self.text in text:
            signal.raise_signal(self.number)
        return super().write(text)
