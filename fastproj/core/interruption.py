"""A stop that is asked for by a signal and granted between two steps."""

import os
import signal
import sys
from threading import Thread
from types import FrameType, TracebackType
from typing import Self

from tqdm import tqdm

from fastproj.core import dist

STOPS = (signal.SIGTERM, signal.SIGINT)


class Interruption:
    """Between enter and exit, SIGTERM and Ctrl-C only ask for a stop: ``signal`` is then not 0.

    Rank 0 answers the first signal at once with one line on stderr, above a progress bar. Python
    runs a signal's handler only after the operation under way, which may take seconds (a backward
    pass on a CPU); so a thread reads the number that the interpreter writes to a pipe
    (``signal.set_wakeup_fd``). A second Ctrl-C raises ``KeyboardInterrupt``.
    """

    def __init__(self) -> None:
        self.signal = 0

    def requested(self, agree: bool) -> bool:
        """Whether to stop now.

        A signal may reach one rank only, so several ranks have to agree, which makes each wait for
        all: they do so only in the calls with ``agree``, and answer false in the others.
        """
        if dist.world_size() == 1:
            return self.signal > 0
        return agree and dist.any_true(self.signal > 0)

    def __enter__(self) -> Self:
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread = Thread(target=self._answer, args=(dist.is_main(),), daemon=True)
        self._thread.start()
        self._before = {number: signal.signal(number, self._ask) for number in STOPS}
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.signal == number == signal.SIGINT:  # twice: the user means now
            raise KeyboardInterrupt
        self.signal = number

    def _answer(self, main: bool) -> None:
        while number := os.read(self._read, 1)[0]:
            if number in STOPS:
                if main:
                    name = signal.Signals(number).name
                    tqdm.write(
                        f"{name}: finishing the step under way, then saving; Ctrl-C again ends now",
                        file=sys.stderr,
                    )
                return

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        # No signal has this number. Closing would not end the thread: forked workers hold the pipe.
        os.write(self._write, b"\0")
        self._thread.join()
        os.close(self._write)
        os.close(self._read)
