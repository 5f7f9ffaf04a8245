"""What a run tells: ``metrics.jsonl``, progress on the screen, rates and where the time went."""

import contextlib
import json
import math
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, get_args

import torch
from torch import Tensor
from tqdm import tqdm

from fastproj.core import dist
from fastproj.core.errors import InputError
from fastproj.core.files import append, lock, writing
from fastproj.core.progress import Progress, write_line
from fastproj.runs.sinks import Sinks

Event = Literal["start", "step", "epoch", "probe", "checkpoint", "end", "error"]
Part = Literal["data_wait", "step", "pause"]
T = TypeVar("T")

KEPT = 256  # steps whose metrics are kept one by one, each a tensor on the device


class Journal:
    """Appends events to the file ``path`` and shows them: a bar on a terminal, else lines.

    ``total`` is the run's number of steps and ``start`` the step this process begins at, for the
    bar and the time left. Only the process with ``main`` writes and shows; the others only check.
    It locks the file, so that a run has one writer: ``InputError`` where another process writes.
    ``sinks`` get every event as well; the journal closes them. A context manager: an exception that
    leaves it is logged as an ``error`` event.
    """

    def __init__(
        self, path: str | Path, main: bool, total: int, start: int = 0, sinks: Sinks | None = None
    ) -> None:
        self.path = Path(path)
        self._main, self._total, self._start = main, total, start
        self._began = time.monotonic()
        self._bar: Progress | None = None
        self._sinks, self._failed = sinks or Sinks({}), False
        if not main:
            return
        with writing(self.path):
            # Unbuffered: a line is with the system at once, and a kill cannot take it back.
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115
            if not lock(self._file):
                self._file.close()
                self._sinks.close(True)
                raise InputError(
                    f"another process writes to {self.path}: wait until it ends, stop it, or give "
                    "another --run.name"
                )
            _drop_half_line(self.path)
        if sys.stderr.isatty():
            self._bar = Progress(total, unit="steps", start=start, keep=True)

    def event(self, kind: Event, **fields: Any) -> None:
        """Append ``{"event": kind, "time": seconds since 1970, **fields}`` and show it.

        ``fields`` are what JSON holds; ``step`` (optimizer steps done) belongs in each event of a
        training run, and ``start`` carries the step this process begins at by itself. Raises
        ``InputError`` for a number that is not finite, on every rank, and where the file is gone.
        """
        if kind not in get_args(Event):
            raise ValueError(f"unknown event {kind!r}")
        if kind == "start":
            fields = {"step": self._start, **fields}
        for name, value in _numbers(fields):
            if not math.isfinite(value):
                step = fields.get("step", "?")
                why = "the run diverged; lower --optim.lr, or set --train.precision float32"
                if step == 1:  # computed before the first update
                    why = (
                        "no update came before it, so look at the data, views and penalties' "
                        "weights, or set --train.precision float32"
                    )
                raise InputError(f"{name} is {value} at step {step}: {why}")
        if not self._main:
            return
        line = json.dumps({"event": kind, "time": time.time(), **fields}) + "\n"
        with writing(self.path):
            append(self._file, line.encode())
        if not self.path.exists():
            raise InputError(
                f"{self.path} was removed while the run wrote to it: give the same command again"
            )
        self._show(kind, fields)
        self._sinks.event(kind, fields)

    def move(self, step: int) -> None:
        """Move the bar to ``step`` optimizer steps done, between step events."""
        if self._bar is not None:
            self._bar.update(step - self._bar.done)

    def picture(self, name: str, draw: Callable[[], Tensor], step: int) -> None:
        """Give the sinks, if there are any, the picture (3, h, w), uint8, that ``draw`` returns."""
        if self._main and self._sinks:
            self._sinks.picture(name, draw(), step)

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
        if self._bar is not None and kind == "step":
            units = {"loss": "loss {:.4g}", "images_per_second": "{:,.0f} images/s"}
            texts = [unit.format(shown[name]) for name, unit in units.items() if name in shown]
            self._bar.say(", ".join(texts))
            self.move(step)
        else:
            write_line(f"{kind:<10}  {text}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._main:
            self._file.close()
        self._sinks.close(self._failed)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._failed = isinstance(error, Exception)
        if isinstance(error, Exception):
            # Whatever stopped the run may stop this line as well; the first error is the one told.
            with contextlib.suppress(InputError):
                self.event("error", message=f"{type(error).__name__}: {error}")
        self.close()


def read(path: str | Path) -> list[dict[str, Any]]:
    """The events of a ``metrics.jsonl``, each step counted once.

    A ``start`` at step s after a kill means that what was logged beyond s was done again: those
    events are left out. So are the ``end`` of a run that was extended, and the half line that a
    kill, or a writer at work, leaves at the end. Raises ``InputError`` if the file is missing or
    another line is no event of a run.
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
        except (ValueError, RecursionError):
            event = None
        if not _is_event(event):
            raise InputError(f"{path}, line {number} is no JSON object of a run: delete that line")
        if event["event"] == "start":
            before = [old for old in events if old.get("step", 0) <= event["step"]]
            events = [old for old in before if old["event"] != "end"]
        events.append(event)
    return events


# What the readers of a journal need of an event, and the fields that are numbers wherever they are.
NEEDED = {"start": {"step"}, "step": {"step"}, "epoch": {"epoch", "steps"}, "probe": {"epoch"}}
NUMBERS = ("time", "step", "steps", "epoch", "loss", "lr", "images_per_second", "data_wait")


def _is_event(event: Any) -> bool:
    if not isinstance(event, dict) or event.get("event") not in get_args(Event):
        return False
    seconds = event.get("seconds", 0)
    if "seconds" in event and event["event"] in ("epoch", "end"):  # of each part
        parts = isinstance(seconds, dict) and {*get_args(Part)} <= seconds.keys()
        if not parts or not all(map(_is_number, seconds.values())):
            return False
    elif not _is_number(seconds):
        return False
    return (
        NEEDED.get(event["event"], set()) <= event.keys()
        and all(_is_number(event[name]) for name in NUMBERS if name in event)
        and all(isinstance(event.get(name, {}), dict) for name in ("diagnostics", "terms"))
        and all(map(_is_number, event.get("terms", {}).values()))
    )


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300  # also false of NaN


class RunClock:
    """Splits the wall time into waiting for data, steps, and pauses (checkpoints, online scores).

    Each ``lap`` gives the time since the last lap to one part, so the parts add up to the whole.
    A GPU works asynchronously, and we wait for it only where something is logged. ``data_wait`` is
    the host's time in the loader: an upper bound on the time that the GPU waited for data.
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


class StepMeter:
    """Times the steps of a run, averages their metrics, and writes its step, epoch and end events.

    ``batch_size`` is the number of images per step over all ranks. Every ``every`` steps a step
    event gives loss, its unweighted terms where there are several, learning rate, images/s and the
    fraction of the time spent waiting for data, the last two since the step event before. Every
    rank must make the same calls. In an epoch:

        meter.begin_epoch(epoch, step)
        for batch in meter.batches(loader):
            logged = meter.step(step, metrics, lr)
        meter.end_epoch(step, diagnostics)
    """

    def __init__(self, journal: Journal, batch_size: int, every: int) -> None:
        self._journal, self._batch_size, self._every = journal, batch_size, every
        self._clock = RunClock()

    def begin_epoch(self, epoch: int, step: int) -> None:
        """``step``: optimizer steps done before this epoch, or before the rest of it."""
        self._epoch, self._logged = epoch, step
        self._metrics: defaultdict[str, list[Tensor]] = defaultdict(list)
        self._sums: dict[str, Tensor] = {}
        self._steps = 0
        self._began = self._since = self._clock.seconds()

    def batches(self, loader: Iterable[T]) -> Iterator[T]:
        """The same batches; the time until each of them counts as waiting for data."""
        for batch in loader:
            self._clock.lap("data_wait")
            yield batch

    def step(self, step: int, metrics: Mapping[str, Tensor], lr: float) -> bool:
        """Count the update that made ``step`` steps; returns whether it was logged.

        ``metrics`` are scalars on the device, ``loss`` among them. Only logging waits for them.
        """
        for name, value in metrics.items():
            self._metrics[name].append(value)
        self._steps += 1
        if self._steps % KEPT == 0:
            self._fold()
        logged = step % self._every == 0
        if logged:
            terms = {n: value.float() for n, value in metrics.items() if n != "online_probe"}
            values = dist.mean(torch.stack([*terms.values()]))
            known = dict(zip(terms, values.tolist(), strict=True))  # the only wait for the device
            loss = known.pop("loss")
            self._clock.lap("step")
            spent = self._clock.seconds(self._since)
            self._journal.event(
                "step",
                step=step,
                epoch=self._epoch,
                loss=loss,
                **({"terms": known} if known else {}),
                lr=lr,
                images_per_second=(step - self._logged) * self._batch_size / sum(spent.values()),
                data_wait=spent["data_wait"] / sum(spent.values()),
            )
            self._logged, self._since = step, self._clock.seconds()
        self._journal.move(step)
        self._clock.lap("step")
        return logged

    def end_epoch(self, step: int, diagnostics: Callable[[], Mapping[str, Any]]) -> None:
        """Write each metric's mean over the epoch's steps and all ranks, and ``diagnostics()``."""
        self._fold()
        means = {n: dist.mean(total / self._steps).item() for n, total in self._sums.items()}
        self._clock.lap("step")
        self._journal.event(
            "epoch",
            step=step,
            epoch=self._epoch,
            steps=self._steps,
            **means,
            diagnostics=diagnostics(),
            seconds=self._clock.seconds(self._began),
        )
        self.pause()

    def _fold(self) -> None:
        """Add the kept steps' metrics to their sums, in float64, without a wait for the device."""
        for name, values in self._metrics.items():
            total = torch.stack(values).double().sum()
            self._sums[name] = self._sums[name] + total if name in self._sums else total
        self._metrics.clear()

    def pause(self) -> None:
        """What was done since the last call, a checkpoint for example, was no training."""
        self._clock.lap("pause")

    def end(self, step: int) -> None:
        """Write the end event: images/s of the whole run, and this process's seconds."""
        if dist.is_main():
            events = read(self._journal.path)
            epochs = [e for e in events if e["event"] == "epoch" and "seconds" in e]
            busy = sum(e["seconds"]["step"] + e["seconds"]["data_wait"] for e in epochs)
            images = self._batch_size * sum(e["steps"] for e in epochs)
            rate = images / busy if busy else 0.0  # no epoch is left where its event was lost
            seconds = self._clock.seconds()
            self._journal.event("end", step=step, seconds=seconds, images_per_second=rate)


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Every float in nested dicts and lists, with its dotted name."""
    if isinstance(value, float):
        yield name, value
    elif isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield from _numbers(inner, f"{name}.{key}" if name else str(key))


def _drop_half_line(path: Path) -> None:
    """Cut a file after its last whole line, where a killed writer left half of one."""
    if path.exists():
        text = path.read_bytes()
        os.truncate(path, text.rfind(b"\n") + 1)
