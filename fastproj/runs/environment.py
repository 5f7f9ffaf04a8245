"""The machine, the versions and the command behind a number: what repeating it takes."""

import contextlib
import importlib.metadata
import json
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from fastproj import __version__
from fastproj.core import machine
from fastproj.core.files import write_text


def environment() -> dict[str, Any]:
    """What ``environment.json`` holds: command, commit, versions, processor and GPUs."""
    return {
        "command": shlex.join(sys.orig_argv),
        "git": _git(Path(__file__).resolve().parents[2]),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cores": machine.cores(),
        "packages": versions(),
        "cuda": torch.version.cuda,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def write_environment(path: Path) -> None:
    """Write ``environment()`` to ``path`` as JSON."""
    write_text(path, json.dumps(environment(), indent=2) + "\n")


def versions() -> dict[str, str | None]:
    """The version of each package that numbers depend on; None where it is not installed."""
    packages = ("torch", "torchvision", "timm", "ffcv", "numba", "numpy")
    return {"fastproj": __version__} | {name: installed(name) for name in packages}


def installed(package: str) -> str | None:
    """The version of a distribution; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _git(root: Path) -> dict[str, Any] | None:
    """Commit and whether files differ from it; None outside a checkout or without git.

    An image has no ``.git``: its build writes ``git describe --always --dirty`` into ``.commit``.
    """
    if not (root / ".git").exists():
        with contextlib.suppress(OSError):
            if described := (root / ".commit").read_text().strip():
                commit, dirty, _ = described.partition("-dirty")
                return {"commit": commit, "dirty": bool(dirty)}
        return None
    command = ("git", "-C", str(root))
    try:
        commit = subprocess.check_output([*command, "rev-parse", "HEAD"], text=True)
        changes = subprocess.check_output([*command, "status", "--porcelain"], text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"commit": commit.strip(), "dirty": bool(changes.strip())}
