"""Benchmarks: each stage beside its peers and its limit; all take turns within one run."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:  # so that --help, which imports this file, need not import torch
    import torch

    from fastproj.data.beton import Beton

Role = Literal["ours", "peer", "limit"]


@dataclass(frozen=True)
class Engine:
    """One implementation of a stage's work.

    ``prepare()`` imports and builds everything needed and returns the function to time. One call of
    that function does ``work`` units. ``prepare`` raises ImportError if the engine is not
    installed. ``warm``: each call warms up by itself and returns the seconds of what came after.
    """

    name: str
    role: Role
    work: int
    prepare: Callable[[], Callable[[], object]]
    note: str = ""
    warm: bool = False


@dataclass(frozen=True)
class Row:
    """The measurement of one engine.

    ``rate``, ``slowest`` and ``fastest`` are in ``unit`` per second: median, minimum and maximum of
    ``repeats`` calls. ``seconds`` is a call's median time. ``share`` is ``rate`` divided by the
    limit's. Engines with the same ``case`` did the same work in turns. ``missing`` says why nothing
    was measured.
    """

    stage: str
    case: str
    engine: str
    role: Role
    unit: str
    rate: float | None = None
    slowest: float | None = None
    fastest: float | None = None
    seconds: float | None = None
    repeats: int = 0
    share: float | None = None
    peak_bytes: int | None = None
    note: str = ""
    missing: str = ""


class Plan(NamedTuple):
    """The command's options; a stage that needs a beton which is None is not measured."""

    photos: Beton | None
    squares: Beton | None
    small: Beton | None
    device: torch.device
    workers: int
    repeats: int


def compare(
    stage: str, case: str, unit: str, engines: Sequence[Engine], warmup: int, repeats: int
) -> list[Row]:
    """Time the engines; return one row per engine, in the given order, with its share of the limit.

    All engines warm up first and then take turns, so that other load on the machine slows all of
    them equally.
    """
    calls: dict[str, Callable[[], object]] = {}
    missing: dict[str, str] = {}
    for engine in engines:
        print(f"{stage}, {case}: {engine.name}", file=sys.stderr)
        try:
            calls[engine.name] = engine.prepare()
        except ImportError as error:
            missing[engine.name] = " ".join(str(error).split())
            continue
        for _ in range(0 if engine.warm else warmup):
            calls[engine.name]()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name in calls:
            seconds[name].append(timed(calls[name]))
    calls.clear()
    gc.collect()  # otherwise the next engines' time would include collecting these
    limit = next((e.work / median(seconds[e.name]) for e in engines if e.role == "limit"), None)
    return [
        Row(stage, case, engine.name, engine.role, unit, note=engine.note,
            missing=missing[engine.name])
        if engine.name in missing
        else rates(stage, case, engine, unit, seconds[engine.name], limit)
        for engine in engines
    ]  # fmt: skip


def rates(
    stage: str,
    case: str,
    engine: Engine,
    unit: str,
    seconds: Sequence[float],
    limit: float | None = None,
) -> Row:
    """The row of an engine whose calls took ``seconds``."""
    rate = engine.work / median(seconds)
    return Row(
        stage,
        case,
        engine.name,
        engine.role,
        unit,
        rate=rate,
        slowest=engine.work / max(seconds),
        fastest=engine.work / min(seconds),
        seconds=median(seconds),
        repeats=len(seconds),
        share=rate / limit if limit and engine.role != "limit" else None,
        note=engine.note,
    )


def timed(call: Callable[[], object]) -> float:
    """Wall-clock seconds of ``call()``, with a CUDA synchronization at the end.

    If ``call`` returns a float, that is the time: it was measured in another process.
    """
    import torch

    start = time.perf_counter()
    own = call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return own if isinstance(own, float) else time.perf_counter() - start
