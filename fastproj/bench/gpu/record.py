"""What a part of the acceptance run found: kept in a JSON file that is complete after each item."""

import gc
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

from fastproj.core.files import write_text

# Seconds after which a part starts no other item. The one under way may compile for 1 to 2 minutes.
LIMIT = 420.0


@dataclass(frozen=True)
class Figure:
    """A measured number: median, lowest and highest of ``n`` values in ``unit``.

    ``name`` is what docs/scaling.md predicts, if it predicts this. ``peak_bytes``: of the device's
    memory. ``data_wait``: fraction of the time. ``share``: of the device's own limit, which
    ``note`` names.
    """

    name: str
    unit: str
    median: float
    low: float
    high: float
    n: int
    peak_bytes: int | None = None
    data_wait: float | None = None
    share: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Check:
    """Something that must hold, whether it does, and what was seen."""

    name: str
    passed: bool
    seen: str


class NotMeasuredError(Exception):
    """Raised by an item that cannot run here; the message is the reason."""


Item = Callable[[], Iterable[Figure | Check | dict[str, Any]]]
"""Yields figures and checks, each kept at once; a dictionary is kept as it is, as a profile."""


def figure(name: str, unit: str, values: Sequence[float], **more: Any) -> Figure:
    """The figure of several measured values."""
    return Figure(name, unit, median(values), min(values), max(values), len(values), **more)


@dataclass
class Record:
    """One part: ``about`` it and its items, written to ``path`` after every figure."""

    path: Path
    about: dict[str, Any]
    limit: float = LIMIT
    items: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._began = time.monotonic()

    @property
    def left(self) -> float:
        """Seconds in which another item may still start."""
        return self.limit - (time.monotonic() - self._began)

    def run(self, items: dict[str, Item]) -> None:
        """Run the items in order; one that fails is kept with its error, and the next one runs."""
        for name, item in items.items():
            entry: dict[str, Any] = {"name": name, "found": [], "error": "", "missing": ""}
            self.items.append(entry)
            start = time.monotonic()
            print(f"{self.about['part']}: {name}", file=sys.stderr, flush=True)
            try:
                for found in self._within_limit(item):
                    entry["found"].append(_as_json(found))
                    self._write()
            except NotMeasuredError as reason:
                entry["missing"] = str(reason)
            except Exception as error:  # the others must still be measured
                entry["error"] = "".join(traceback.format_exception(error))[-3000:]
                print(entry["error"], file=sys.stderr, flush=True)
            entry["seconds"] = time.monotonic() - start
            self._write()
            _forget()

    def _within_limit(self, item: Item) -> Iterator[Figure | Check | dict[str, Any]]:
        if self.left <= 0:
            raise NotMeasuredError(f"the part's {self.limit:.0f} s were spent")
        try:
            for found in item():
                yield found
                if self.left <= 0:
                    raise NotMeasuredError(f"cut: the part's {self.limit:.0f} s were spent")
        except ModuleNotFoundError as error:
            package = (error.name or "fastproj").partition(".")[0]
            if package == "fastproj":
                raise  # a mistake, not something that was not carried here
            raise NotMeasuredError(f"{package} is not installed") from error

    def _write(self) -> None:
        text = json.dumps({**self.about, "items": self.items}, indent=1, allow_nan=False)
        write_text(self.path, text + "\n")

    def problems(self) -> list[str]:
        """The names of what failed or did not hold."""
        wrong = [item["name"] for item in self.items if item["error"]]
        found = [found for item in self.items for found in item["found"]]
        return wrong + [one["name"] for one in found if one.get("passed") is False]


def _as_json(found: Figure | Check | dict[str, Any]) -> dict[str, Any]:
    return found if isinstance(found, dict) else asdict(found)


def _forget() -> None:
    """Free what an item left, so that neither memory nor compiled code is the next one's."""
    torch.compiler.reset()  # Dynamo compiles a function 8 times at most, then falls back to eager
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
