"""A terminal of a given width in place of stderr, and what is shown on it."""

import fcntl
import os
import pty
import re
import struct
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread

import pytest


class Screen:
    """``text``: everything that was written; complete once the terminal is closed."""

    def __init__(self) -> None:
        self.text = ""

    def bars(self) -> list[str]:
        """Every state of a bar, in order: what ends with a carriage return, or a new line."""
        parts = re.split(r"[\r\n]+|\x1b\[A", self.text)
        return [part.rstrip() for part in parts if "%" in part]


@contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch, columns: int = 80) -> Iterator[Screen]:
    """``sys.stderr`` is a terminal of 24 rows within the block."""
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    screen = Screen()

    def read() -> None:
        while True:
            try:
                part = os.read(parent, 10_000)
            except OSError:  # Linux' end of a terminal nobody writes to
                return
            screen.text += part.decode()

    reader = Thread(target=read)
    reader.start()
    try:
        with monkeypatch.context() as patch, open(child, "w", buffering=1) as stderr:
            patch.setattr(sys, "stderr", stderr)
            for name in ("COLUMNS", "LINES"):
                patch.delenv(name, raising=False)
            yield screen
    finally:
        reader.join()
        os.close(parent)
