"""Speed of every stage beside its peers and its limit, measured in the same run, turn by turn."""

import gc
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal, NamedTuple

import torch

from fastproj.manifest import Beton

Role = Literal["ours", "peer", "limit"]


@dataclass(frozen=True)
class Engine:
    """One way to do a stage's work.

    ``prepare()`` imports and builds what is needed and returns the call that is timed, which does
    ``work`` units. It raises ImportError where this machine lacks the engine.
    """

    name: str
    role: Role
    work: int
    prepare: Callable[[], Callable[[], object]]
    note: str = ""


@dataclass(frozen=True)
class Row:
    """What was measured of one engine; rates in ``unit`` a second, over ``repeats`` calls.

    ``seconds`` are the median of a call, ``share`` is the median rate over the limit's. Engines
    with one ``case`` did the same work, in turns. ``missing`` says why nothing was measured.
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
    """What the command was given: betons to read (None: not measured), where, and how often."""

    photos: Beton | None
    squares: Beton | None
    small: Beton | None
    device: torch.device
    workers: int
    repeats: int


def compare(
    stage: str, case: str, unit: str, engines: Sequence[Engine], warmup: int, repeats: int
) -> list[Row]:
    """One row an engine, in the order given; shares are of the limit among them.

    After each engine's warm-up they take turns, so that what else the machine does hits all alike.
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
        for _ in range(warmup):
            calls[engine.name]()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name in calls:
            seconds[name].append(timed(calls[name]))
    calls.clear()
    gc.collect()  # what engines leave behind is not to be collected in the next ones' time
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
    """The row of an engine whose calls took these ``seconds``."""
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
    """Seconds of ``call()`` on the wall clock; a GPU's work is waited for.

    A call that returns a float has timed itself, in a process of its own.
    """
    start = time.perf_counter()
    own = call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return own if isinstance(own, float) else time.perf_counter() - start
