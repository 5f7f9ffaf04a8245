"""Errors that a user can fix: a command prints one line and exits with a code, no traceback."""

import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

# How torch's RuntimeErrors say it, of a GPU (torch.OutOfMemoryError) and of the host. oneDNN's has
# no other words for it: its kernels could not be made.
NO_MEMORY = re.compile(
    "out of memory|can't allocate memory|not enough memory|could not (create|execute) a primitive$",
    re.IGNORECASE,
)
ASKED = re.compile(r"allocate ([\d.]+) (bytes|[KMGTPE]iB)")  # numpy's MemoryError as well
FREE = re.compile(r"of which ([\d.]+) (bytes|[KMGTPE]iB) is free")  # of a GPU


class InputError(ValueError):
    """A file, folder or value that cannot be used. The message is one line: what, where, fix."""

    exit_code = 1


class SettingError(InputError):
    """A setting that is unknown or ill-typed."""

    exit_code = 2


def memory_shortage(error: Exception) -> str:
    """What was asked for and what is free, where ``error`` says that memory is used up; else empty.

    Of the host it is what is free at the call: before the exception's frames let go of theirs.
    """
    message = str(error)
    if not isinstance(error, MemoryError) and not (
        isinstance(error, RuntimeError) and NO_MEMORY.search(message)
    ):
        return ""
    from fastproj.core.machine import memory_left  # imports numpy, and --help answers at once

    asked, free = ASKED.search(message), FREE.search(message)
    left = _gigabytes(*free.groups()) if free else f"{memory_left() / 2**30:,.2f} GiB"
    return f"{_gigabytes(*asked.groups())} asked for, {left} free" if asked else f"{left} free"


def _gigabytes(number: str, unit: str) -> str:
    return f"{float(number) * 2.0 ** (10 * ('BKMGTPE'.index(unit[0].upper()) - 3)):,.2f} GiB"


def run_command(
    main: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None
) -> NoReturn:
    """Run ``main(argv)`` and end the process with its exit code.

    ``InputError`` becomes one line on stderr and exit code 1 (``SettingError``: 2); so does
    ``OSError`` (missing file, no permission, full disk) and memory that is used up, of the host or
    of a GPU. ``--debug`` anywhere on the command line also shows the traceback. Any other exception
    is a bug and is raised. A terminal or pipe that has been closed changes no exit code.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        code = main(argv) or 0
    except (InputError, OSError, MemoryError, RuntimeError) as error:
        message = " ".join(str(error).split())
        if isinstance(error, MemoryError | RuntimeError):
            shortage = memory_shortage(error)
            if not shortage:
                raise
            message = (
                f"out of memory ({shortage}): lower --optim.batch_size or --eval.batch_size, "
                "raise --optim.accumulate, or take smaller crops or another encoder"
            )
        if "--debug" in argv:
            traceback.print_exc()
        print(f"error: {message}", file=sys.stderr)
        code = getattr(error, "exit_code", 1)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        code = 130  # as a shell reports SIGINT
    finally:
        _give_up_closed_streams()
    sys.exit(code)


def _give_up_closed_streams() -> None:
    """What cannot be written would be tried again at Python's end, which then exits with 120."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), stream.fileno())
