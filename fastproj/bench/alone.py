"""A measurement in a process of its own: its first moments, and the memory it takes at most."""

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastproj.errors import InputError


def alone(function: Callable[..., Any], **given: Any) -> Any:
    """``function(**given)`` in a new process with this one's count of threads.

    The function must be a module's own; what it takes and returns goes through JSON. Raises
    InputError with the process's last words where it fails.
    """
    given = {"module": function.__module__, "name": function.__name__,
             "threads": torch.get_num_threads(), "given": given}  # fmt: skip
    child = subprocess.run(
        [sys.executable, "-m", "fastproj.bench.alone", json.dumps(given)],
        capture_output=True, text=True,
    )  # fmt: skip
    if child.returncode:
        raise InputError(f"{function.__module__}.{function.__name__}: {child.stderr[-600:]}")
    return json.loads(child.stdout.splitlines()[-1])


def memory(field: str) -> int:
    """Bytes of this process: ``VmRSS`` resident now, ``VmHWM`` at most so far, ``RssAnon`` now but
    for mapped files.

    Not ``ru_maxrss``: a child's begins at its parent's.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}: memory is measured on Linux")


if __name__ == "__main__":  # as alone() starts it
    asked = json.loads(sys.argv[1])
    torch.set_num_threads(asked["threads"])
    function = getattr(importlib.import_module(asked["module"]), asked["name"])
    print(json.dumps(function(**asked["given"])))
