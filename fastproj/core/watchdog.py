"""The end of a process whose next batch never comes, with a line and a stack dump that say why."""

import faulthandler
import multiprocessing
import os
import sys
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import thread as pool
from contextlib import suppress
from typing import NoReturn, TypeVar

import psutil

from fastproj.core.progress import write_line

T = TypeVar("T")

TICK = 1.0  # seconds between two looks; a machine that was suspended counts for one


def watched(batches: Iterable[T], seconds: float) -> Iterator[T]:
    """The same batches; where the next one takes more than ``seconds``, the process ends.

    It ends at once with exit code 1, one line that names the worker, and every thread's stack on
    stderr: a thread that hangs in a read of a disk cannot be stopped, so waiting for it, as an
    exception would, is no way out. What was written is complete: files are replaced as a whole.
    """
    waiting, over, came = threading.Event(), threading.Event(), [0]
    watch = threading.Thread(target=_watch, args=(waiting, over, came, seconds), daemon=True)
    watch.start()
    try:
        iterator = iter(batches)
        while True:
            waiting.set()
            batch = next(iterator, None)
            waiting.clear()
            came[0] += 1
            if batch is None:
                return
            yield batch
    finally:
        over.set()


def _watch(
    waiting: threading.Event, over: threading.Event, came: list[int], seconds: float
) -> None:
    tick, waited, before = min(TICK, seconds / 2), 0.0, 0
    while not over.wait(tick):
        here, waits = came[0], waiting.is_set()
        waited = waited + tick if waits and here == before else 0.0
        before = here
        if waited >= seconds:
            _end(seconds)


def _end(seconds: float) -> NoReturn:
    write_line(
        f"error: no batch came for {seconds:g} s, from {_busy() or 'no worker'}: its stack "
        "follows; look at the disk that holds the data, then go on with --run.resume "
        "(train.patience sets these seconds)"
    )
    faulthandler.dump_traceback(sys.stderr)
    for child in multiprocessing.active_children():  # one that is stopped would hear nothing else
        with suppress(OSError):
            child.kill()
    os._exit(1)


def _busy() -> str:
    """The worker threads that are not idle and where they are, and the worker processes."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    found = []
    for ident, frame in sys._current_frames().items():
        name, code = names.get(ident, ""), frame.f_code
        if name.startswith("fastproj-") and code.co_filename != pool.__file__:
            found.append(f"thread {name} ({code.co_name}, {code.co_filename}:{frame.f_lineno})")
    for child in multiprocessing.active_children():
        with suppress(psutil.Error):
            found.append(f"process {child.pid} ({psutil.Process(child.pid).status()})")
    return ", ".join(found)
