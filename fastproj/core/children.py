"""Child processes that do not outlive their parent."""

import ctypes
import os
import signal
import sys
from collections.abc import Callable


def die_with(parent: int) -> Callable[[], None] | None:
    """What a child calls before its program, to be killed when the process ``parent`` dies.

    For ``subprocess``'s ``preexec_fn``; ``parent`` is ``os.getpid()`` of whoever starts it. Linux's
    PR_SET_PDEATHSIG, which follows the thread that started the child: start it in the main thread.
    None elsewhere, where children live on.
    """
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl

    def ask_to_be_killed() -> None:
        prctl(1, signal.SIGKILL)
        if os.getppid() != parent:  # it died in between
            os.kill(os.getpid(), signal.SIGKILL)

    return ask_to_be_killed
