"""What a run folder holds for a report, as far as the run came."""

import json
import re
import time
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fastproj.core.errors import InputError
from fastproj.evaluation.results import Evaluation, read_evaluation
from fastproj.runs import journal
from fastproj.runs.folder import RunFolder

# A line of config.yaml, as ``Loaded.to_yaml`` writes it: value, and as a comment its source.
LINE = re.compile(r"^  (\w+): (.*)  # (default|command line|file .*)$")
SECTION = re.compile(r"^(\w+):$")


class Setting(NamedTuple):
    """One line of ``config.yaml``, as text."""

    name: str
    value: str
    source: str


@dataclass(frozen=True)
class Reported:
    """A run, as far as it came.

    ``evaluation`` and ``environment``: None where the run has none; ``missing`` then says why, one
    line by the file's name.
    """

    folder: RunFolder
    settings: tuple[Setting, ...]
    events: tuple[dict[str, Any], ...]
    evaluation: Evaluation | None = None
    environment: dict[str, Any] | None = None
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.name

    @property
    def over(self) -> bool:
        """Whether the run has ended or stopped with an error: nothing more will come."""
        return bool(self.events) and self.events[-1]["event"] in ("end", "error")

    def status(self) -> str:
        """One line: how far the run came, and whether it has ended."""
        if not self.events:
            return "started, and its journal is still empty"
        last, step = self.events[-1], max(event.get("step", 0) for event in self.events)
        total = next((e["steps"] for e in reversed(self.events) if e["event"] == "start"
                      and "steps" in e), None)  # fmt: skip
        so_far = f"{step} steps" if total is None else f"{step} of {total} steps"
        if last["event"] == "error":
            return f"stopped by an error after {so_far}: {last.get('message', 'no message')}"
        if last["event"] == "end":
            return f"ended after {so_far}"
        if "time" not in last:
            return f"{so_far}, no end: still going, or cut"
        minutes = max(0.0, time.time() - last["time"]) / 60
        return f"{so_far}, no end: still going, or cut {minutes:,.0f} min after its last event"


def read_run(run: RunFolder) -> Reported:
    """Read what ``run`` holds. Raises ``InputError`` for a foreign run and a damaged journal."""
    missing: dict[str, str] = {}
    settings = read_settings(run)
    events = journal.read(run.metrics)
    evaluation = None
    try:
        evaluation = read_evaluation(run)
    except InputError as error:
        missing["eval.json"] = str(error)
    environment = None
    try:
        environment = json.loads(run.environment.read_bytes())
        if not isinstance(environment, dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError) as error:
        missing["environment.json"] = f"cannot read {run.environment}: {error}"
        environment = None
    return Reported(run, settings, tuple(events), evaluation, environment, missing)


def read_settings(run: RunFolder) -> tuple[Setting, ...]:
    """Every setting in ``config.yaml`` with its source.

    Raises ``InputError`` where the file is not one that training has written.
    """
    try:
        lines = run.config.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {run.config}: {error}") from None
    found, section = [], ""
    for line in lines:
        if match := SECTION.match(line):
            section = match[1]
        elif match := LINE.match(line):
            found.append(Setting(f"{section}.{match[1]}", match[2], match[3]))
        elif line.startswith("plugins: "):
            found.append(Setting("plugins", line.removeprefix("plugins: "), "file or command line"))
    if not found:
        raise InputError(
            f"{run.config} was not written by fastproj train: give the run folder that it printed"
        )
    return tuple(found)
