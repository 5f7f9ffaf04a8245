"""A stop that is asked for by a signal and granted between two steps."""

import math
import os
import signal
import time
from threading import Event, Thread, main_thread
from types import FrameType, TracebackType
from typing import Self

from fastproj.core import dist
from fastproj.core.progress import write_line

# A terminal that closes sends SIGHUP, a scheduler what it is told to. Windows has the first two.
STOPS = tuple(
    getattr(signal, name)
    for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)
)
SAME = 2.0  # seconds within which a second signal is the first one's echo
GRACE = 5.0  # seconds until a process that does not hear a second signal is ended


# A forked worker inherits the pipe: a signal that it hears late would be the parent's second one.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))


class Interruption:
    """Between enter and exit, signals in ``STOPS`` only ask for a stop: ``signal`` is then not 0.

    One that this process was started to ignore, as by ``nohup``, stays ignored.

    Rank 0 answers the first signal at once with one line on stderr, above a progress bar. Python
    runs a signal's handler only after the operation under way, which may take seconds (a backward
    pass on a CPU); so a thread reads the number that the interpreter writes to a pipe
    (``signal.set_wakeup_fd``), and the time when it came.

    A second signal ends the process now: ``KeyboardInterrupt`` for Ctrl-C, else ``SystemExit``, and
    where the main thread does not hear it within ``GRACE`` seconds, because it waits for a rank
    that is gone, without more ado. One that comes within ``SAME`` seconds of the first is the
    first, twice: a terminal or Slurm signals torchrun and its ranks, and torchrun its ranks again.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._again = False  # a second signal has come
        self._over = Event()

    def requested(self, agree: bool) -> bool:
        """Whether to stop now.

        A signal may reach one rank only, so several ranks have to agree, which makes each wait for
        all: they do so only in the calls with ``agree``, and answer false in the others. A rank
        that stops for another's signal takes it for SIGTERM: none is to leave as if it had ended.
        """
        if dist.world_size() == 1:
            return self.signal > 0
        if not agree or not dist.any_true(self.signal > 0):
            return False
        if not self.signal:
            self.signal = signal.SIGTERM
            if dist.is_main():
                write_line("another rank was told to stop: saving")
        return True

    def __enter__(self) -> Self:
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread = Thread(target=self._answer, args=(dist.is_main(),), daemon=True)
        self._thread.start()
        heard = [number for number in STOPS if signal.getsignal(number) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._ask) for number in heard}
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._again:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        self.signal = self.signal or number

    def _answer(self, main: bool) -> None:
        first = math.inf
        while number := os.read(self._read, 1)[0]:
            if number not in STOPS:
                continue
            now = time.monotonic()
            if now - first > SAME:
                # The handler may have run already, before this thread knew.
                self._again = True
                signal.pthread_kill(main_thread().ident or 0, number)
                if not self._over.wait(GRACE):
                    os._exit(128 + number)
                return
            if main and first == math.inf:
                write_line(
                    f"{signal.Signals(number).name}: finishing the step under way, then saving; "
                    f"again, {SAME:g} s later, ends now"
                )
            first = min(first, now)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        self._over.set()
        # No signal has this number. Closing would not end the thread: forked workers hold the pipe.
        os.write(self._write, b"\0")
        self._thread.join()
        os.close(self._write)
        os.close(self._read)
