"""What a study asks of the processes that it started: their memory, and why one has failed."""

import signal
from contextlib import suppress
from pathlib import Path

import psutil


def own_memory(pid: int) -> int:
    """Bytes that a process and its children, such as ranks, hold for themselves; 0 once ended."""
    total = 0
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        for one in (process, *process.children(recursive=True)):
            with suppress(psutil.Error):
                info = one.memory_info()
                total += info.rss - getattr(info, "shared", 0)
    return total


def reason(path: Path, since: int, code: int) -> str:
    """Why a command failed that wrote into ``path`` after the first ``since`` bytes.

    The first line of an error: of several ranks, the others' only say that they lost one. Else the
    exit code and the last line.
    """
    with path.open(errors="replace") as file:
        file.seek(since)
        lines = file.read().strip().splitlines()
    for line in lines:
        if line.startswith("error: "):
            return line.removeprefix("error: ")
    return f"{_ending(code)}, and its last line is {lines[-1]!r}" if lines else _ending(code)


def _ending(code: int) -> str:
    """An exit code in words; a negative one is a signal's number, as ``Popen`` says it."""
    return f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
