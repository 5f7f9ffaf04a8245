"""Worker processes whose death, however it comes, never leaves the parent waiting."""

import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from fastproj.core.errors import InputError


class Workers:
    """``count`` processes, each with its own thread and pipe; call ``close`` when done.

    Not ``ProcessPoolExecutor``: its processes share one pipe. If one is killed while it writes
    (by the kernel, for lack of memory), the parent waits forever for the rest of that result.
    A pipe of one process ends with that process.
    """

    def __init__(self, count: int):
        # Not fork: this process has threads. Not spawn, except on Windows, which has nothing else:
        # every worker would import everything.
        methods = multiprocessing.get_all_start_methods()
        self._context: Any = multiprocessing.get_context(
            "forkserver" if "forkserver" in methods else "spawn"
        )
        self._starting = threading.Lock()
        self._own = threading.local()
        self._processes: list[BaseProcess] = []
        self._threads = ThreadPoolExecutor(count, initializer=self._start)

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Run ``function(*arguments)`` in the next free process.

        The future raises what the function raises, or ``InputError`` if the process was killed.
        """
        return self._threads.submit(self._call, function, arguments)

    def close(self) -> None:
        """Kill the processes, whatever they are doing."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        with self._starting:
            for process in self._processes:
                process.kill()  # a thread that still waits for it then reads the end of its pipe
        self._threads.shutdown()
        for process in self._processes:
            process.join()

    def _start(self) -> None:
        ours, theirs = self._context.Pipe()
        with self._starting:
            process = self._context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            self._processes.append(process)
        theirs.close()  # otherwise the pipe would not end with the process
        self._own.pipe = ours

    def _call(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        try:
            self._own.pipe.send((function, arguments))
            value, error = self._own.pipe.recv()
        except (EOFError, OSError):
            raise InputError(
                "a worker process was killed (for lack of memory?); nothing was written, try "
                "again with fewer --data.workers"
            ) from None
        if error is not None:
            raise error
        return value


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _serve(pipe: Connection) -> None:
    """A worker's loop: it ends when its pipe does, that is when the parent ends."""
    threading.Thread(target=_end_with_parent, daemon=True).start()  # in the middle of a task too
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    warnings.filterwarnings("ignore", module="PIL")  # odd EXIF blocks: ImageNet has hundreds
    try:
        while True:
            function, arguments = pipe.recv()
            value, error = None, None
            try:
                value = function(*arguments)
            except Exception as raised:
                error = raised
            pipe.send((value, error))
    except (EOFError, OSError):
        return
