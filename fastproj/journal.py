"""What a run tells: ``metrics.jsonl``, progress on the screen, where the time went, and on what."""

import contextlib
import importlib.metadata
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, get_args

import torch
from tqdm import tqdm

from fastproj import __version__, machine
from fastproj.errors import InputError

Event = Literal["start", "step", "epoch", "probe", "checkpoint", "end", "error"]
Part = Literal["data_wait", "step", "pause"]


class Journal:
    """Appends events to ``run_dir/metrics.jsonl`` and shows them: a bar on a terminal, else lines.

    ``total`` is the run's number of steps and ``start`` the step this process begins at, for the
    bar and the time left. Only the process with ``main`` writes and shows; the others only check.
    A context manager: an exception that leaves it is logged as an ``error`` event.
    """

    def __init__(self, run_dir: str | Path, main: bool, total: int, start: int = 0):
        self._path = Path(run_dir) / "metrics.jsonl"
        self._main, self._total, self._start = main, total, start
        self._began = time.monotonic()
        self._bar: tqdm | None = None
        if not main:
            return
        with _writing(self._path):
            _drop_half_line(self._path)
            # Unbuffered: a line is with the system at once, and a kill cannot take it back.
            self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115
        if sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True)

    def event(self, kind: Event, **fields: Any) -> None:
        """Append ``{"event": kind, "time": seconds since 1970, **fields}`` and show it.

        ``fields`` are what JSON holds; ``step`` (optimiser steps done) belongs in each event of a
        training run, and ``start`` carries the step this process begins at by itself. Raises
        ``InputError`` for a number that is not finite, on every rank.
        """
        if kind not in get_args(Event):
            raise ValueError(f"unknown event {kind!r}")
        if kind == "start":
            fields = {"step": self._start, **fields}
        for name, value in _numbers(fields):
            if not math.isfinite(value):
                raise InputError(
                    f"{name} is {value} at step {fields.get('step', '?')}: the run diverged; lower "
                    "--optim.lr, or set --train.precision float32"
                )
        if not self._main:
            return
        line = json.dumps({"event": kind, "time": time.time(), **fields}) + "\n"
        with _writing(self._path):
            self._file.write(line.encode())
        self._show(kind, fields)

    def _show(self, kind: Event, fields: dict[str, Any]) -> None:
        step = fields.get("step", self._start)
        shown = {k: v for k, v in fields.items() if isinstance(v, int | float | str)}
        if kind == "step":
            shown["step"] = f"{step}/{self._total}"
            if step > self._start:
                pace = (time.monotonic() - self._began) / (step - self._start)
                shown["left"] = tqdm.format_interval(round(pace * (self._total - step)))
        text = "  ".join(
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in shown.items()
        )
        if self._bar is None:
            print(f"{kind:<10}  {text}", file=sys.stderr, flush=True)
        elif kind == "step":
            rest = {k: v for k, v in shown.items() if k not in ("step", "left")}
            self._bar.set_postfix(rest, refresh=False)
            self._bar.update(step - self._bar.n)
        else:
            self._bar.write(f"{kind:<10}  {text}", file=sys.stderr)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._main:
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if isinstance(error, Exception):
            # Whatever stopped the run may stop this line as well; the first error is the one told.
            with contextlib.suppress(InputError):
                self.event("error", message=f"{type(error).__name__}: {error}")
        self.close()


def read(path: str | Path) -> list[dict[str, Any]]:
    """The events of a ``metrics.jsonl``, each step counted once.

    A ``start`` at step s after a kill means that what was logged beyond s was done again: those
    events are left out. So is the half line that a kill, or a writer at work, leaves at the end.
    Raises ``InputError`` if the file is missing or another line is not a JSON object.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; is this a run folder?") from None
    events: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            event = json.loads(line)
        except ValueError:
            event = None
        if not isinstance(event, dict):
            raise InputError(f"{path}, line {number} is no JSON object: delete that line")
        if event.get("event") == "start":
            events = [old for old in events if old.get("step", 0) <= event["step"]]
        events.append(event)
    return events


class RunClock:
    """Splits the time on the wall: waiting for data, the step, and pauses (checkpoint, probe).

    Each ``lap`` gives the time since the last one to a part, so that the parts add up to all of it.
    A device works on behind the step's back: its time is waited for where something is logged. So
    ``data_wait``, the host's time in the loader, is the most that a device can have waited.
    """

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self._seconds: dict[Part, float] = {part: 0.0 for part in get_args(Part)}

    def lap(self, part: Part) -> None:
        """Give the time since the last lap to ``part``."""
        now = time.perf_counter()
        self._seconds[part] += now - self._last
        self._last = now

    def seconds(self, since: dict[Part, float] | None = None) -> dict[Part, float]:
        """Seconds of each part, less those of an earlier call's result."""
        since = since or {}
        return {part: total - since.get(part, 0.0) for part, total in self._seconds.items()}


def environment() -> dict[str, Any]:
    """On what machine, with what versions, by what command: what repeating a number takes."""
    packages = ("torch", "torchvision", "ffcv", "numba", "numpy")
    return {
        "command": shlex.join(sys.orig_argv),
        "git": _git(Path(__file__).resolve().parents[1]),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cores": machine.cores(),
        "packages": {"fastproj": __version__} | {name: _version(name) for name in packages},
        "cuda": torch.version.cuda,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def write_environment(run_dir: str | Path) -> None:
    """Write ``environment.json`` into the run folder."""
    path = Path(run_dir) / "environment.json"
    with _writing(path):
        path.write_text(json.dumps(environment(), indent=2) + "\n", encoding="utf-8")


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Every float in nested dicts and lists, with its dotted name."""
    if isinstance(value, float):
        yield name, value
    elif isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield from _numbers(inner, f"{name}.{key}" if name else str(key))


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"cannot write {path}: {error.strerror}; make room or mend the permissions"
        ) from error


def _drop_half_line(path: Path) -> None:
    """Cut a file after its last whole line, where a killed writer left half of one."""
    if path.exists():
        text = path.read_bytes()
        os.truncate(path, text.rfind(b"\n") + 1)


def _version(package: str) -> str | None:
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
    """Commit and whether files differ from it; None outside a checkout or without git."""
    if not (root / ".git").exists():
        return None
    command = ("git", "-C", str(root))
    try:
        commit = subprocess.check_output([*command, "rev-parse", "HEAD"], text=True)
        changes = subprocess.check_output([*command, "status", "--porcelain"], text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"commit": commit.strip(), "dirty": bool(changes.strip())}
