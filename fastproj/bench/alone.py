"""Run a measurement in a new process: for start-up times and peak memory."""

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastproj.core.errors import InputError


def alone(function: Callable[..., Any], **given: Any) -> Any:
    """Return ``function(**given)``, run in a new process with this process's number of threads.

    The function must be defined at module level; arguments and result are passed as JSON. Raises
    InputError with the end of the process's stderr if it fails.
    """
    job = {"module": function.__module__, "name": function.__name__,
           "threads": torch.get_num_threads(), "given": given}  # fmt: skip
    child = subprocess.run(
        [sys.executable, "-m", "fastproj.bench.alone", json.dumps(job)],
        capture_output=True, text=True,
    )  # fmt: skip
    if child.returncode:
        raise InputError(f"{function.__module__}.{function.__name__}: {child.stderr[-600:]}")
    return json.loads(child.stdout.splitlines()[-1])


def memory(field: str) -> int:
    """Resident memory of this process in bytes.

    ``field``: ``VmRSS`` now, ``VmHWM`` the peak so far, ``RssAnon`` now without mapped files. We do
    not use ``ru_maxrss``, because a child inherits its parent's.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}: memory is measured on Linux")


if __name__ == "__main__":  # started by alone()
    job = json.loads(sys.argv[1])
    torch.set_num_threads(job["threads"])
    function = getattr(importlib.import_module(job["module"]), job["name"])
    print(json.dumps(function(**job["given"])))
