"""Worker processes that cannot leave their parent waiting, however they end."""

import multiprocessing
import signal
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from fastproj.errors import InputError


class Workers:
    """``count`` processes, each behind a thread and a pipe of its own; ``close`` them.

    Not ``ProcessPoolExecutor``: its processes share one pipe, and when one is killed while it
    writes there (by the kernel, for lack of memory), the parent reads half a result for ever.
    A pipe that only one process holds ends with it.
    """

    def __init__(self, count: int):
        # Not fork: this process has threads. Not spawn: that imports once a worker.
        self._context = multiprocessing.get_context("forkserver")
        self._starting = threading.Lock()
        self._own = threading.local()
        self._processes: list[BaseProcess] = []
        self._threads = ThreadPoolExecutor(count, initializer=self._start)

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """``function(*arguments)`` in the next free process; what it raises, the future raises.

        ``InputError`` where its process was killed.
        """
        return self._threads.submit(self._call, function, arguments)

    def close(self) -> None:
        """End the processes, whatever they are at."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        with self._starting:
            for process in self._processes:
                process.kill()  # a thread that still waits for one meets the end of its pipe
        self._threads.shutdown()
        for process in self._processes:
            process.join()

    def _start(self) -> None:
        ours, theirs = self._context.Pipe()
        with self._starting:
            process = self._context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            self._processes.append(process)
        theirs.close()  # or the pipe would not end with the process
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


def _serve(pipe: Connection) -> None:
    """A worker's life: it ends with the pipe, that is with the parent, however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
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
