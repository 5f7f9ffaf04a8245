"""Starting a run and going on with it: its folder, its newest checkpoint, its lock.

For every command that trains: settings come as ``section.name`` -> value, data as their digest.
"""

import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fastproj.core import dist
from fastproj.core.errors import InputError
from fastproj.core.files import write_text
from fastproj.runs import checkpoint
from fastproj.runs.environment import write_environment
from fastproj.runs.folder import RunFolder
from fastproj.runs.journal import Journal
from fastproj.runs.journal import read as read_journal
from fastproj.runs.sinks import Sinks, check_sinks

AUTO = "auto"  # of run.resume: start where there is nothing, go on where there is something
# A run may be resumed on another machine, with other logging; nothing else may change under it.
FREE_TO_CHANGE = (
    *("run.name", "run.dir", "run.device", "run.resume", "run.extend", "run.timeout"),
    *("data.", "train.", "eval."),
)

COMPARED = ("train.init_from",)  # all the same


def folder(directory: str, name: str, resume: str | None) -> RunFolder:
    """The folder of a new run, or of the one that ``resume`` names."""
    return RunFolder(Path(directory) / name if resume in (None, AUTO) else Path(resume))


def finished(run: RunFolder) -> bool:
    """Whether the run's journal has its end."""
    return run.metrics.exists() and any(e["event"] == "end" for e in read_journal(run.metrics))


def nothing_to_do(run: RunFolder, resume: str | None) -> bool:
    """Whether ``resume`` is auto and the run is finished; says so."""
    if resume != AUTO or not finished(run):
        return False
    if dist.is_main():
        print(f"{run.path} holds a finished run: nothing to do", file=sys.stderr)
    return True


def find_checkpoint(run: RunFolder, resume: str | None, extend: int | None = None) -> Path | None:
    """The checkpoint to resume from; InputError where the folder and ``resume`` do not agree.

    ``extend``: the epochs to which those of a finished run are raised.
    """
    found = checkpoint.latest(run.checkpoints)
    done = finished(run)
    if found and resume is None and not done:
        reached, epochs = _epochs(found)  # a kill may have come between it and "end"
        done = reached >= epochs
    if found and done and extend is not None:
        epochs = _epochs(found)[1]
        if extend <= epochs:
            raise InputError(f"run.extend {extend}: {run.path} has {epochs} epochs: give more")
        done = False
    if done:
        raise InputError(f"{run.path} holds a finished run: give another --run.name, or remove it")
    if resume not in (None, AUTO) and found is None:
        raise InputError(
            f"{run.path} holds no checkpoint to resume from: start without --run.resume"
        )
    if found and resume is None:
        raise InputError(
            f"{run.path} holds an unfinished run: go on with --run.resume {run.path}, or give "
            "another --run.name"
        )
    return found


def agreed_checkpoint(
    run: RunFolder, resume: str | None, sinks: Sequence[str], extend: int | None = None
) -> Path | None:
    """``find_checkpoint`` on every rank, which all fail where one does or where theirs differ.

    ``sinks``: names that must be usable, before anything runs.
    """
    with dist.together():
        if dist.is_main():
            check_sinks(sinks)
        found = find_checkpoint(run, resume, extend)
    dist.require_same({"the newest checkpoint": found and found.name})
    return found


def _epochs(path: Path) -> tuple[int, float]:
    """The epochs that the run has done at the checkpoint, and all that it has."""
    with _fitting(path):
        state = checkpoint.load(path)
        return state["cursor"][0], state["settings"].get("optim.epochs", math.inf)


def restore(
    path: Path,
    settings: Mapping[str, Any],
    content: str,
    data: Path,
    load: Callable[[dict[str, Any]], None],
) -> int | None:
    """Give ``load`` the state in the checkpoint ``path``, after comparing settings and data.

    ``content``: the digest of the data in the file ``data``. Returns the epochs that the run had
    where it is extended: all of them are done, and ``settings`` have more. Raises ``InputError``
    where the checkpoint is of another run or of other data, and where ``load`` fails.
    """
    with _fitting(path):
        state = checkpoint.load(path)
        before, wanted = state["settings"], settings.get("optim.epochs", 0)
        epochs = before.get("optim.epochs", wanted)
        extended = epochs < wanted and epochs <= state["cursor"][0]
        if extended:
            before = {**before, "optim.epochs": wanted}
        _require_same(before, settings, path)
        if state["data"] != content:
            raise InputError(f"{path} was trained on other data than {data}: resume on that data")
        load(state)
    return epochs if extended else None


def write_epochs(run: RunFolder, epochs: int) -> None:
    """Write ``epochs`` to the run's ``config.yaml``, of which nothing else changes."""
    text, own = run.config.read_text(), r"(?m)^(optim:\n(?:  .*\n)*?  epochs: ).*$"
    text, written = re.subn(own, rf"\g<1>{epochs}  # command line", text, count=1)
    if not written:
        raise InputError(f"{run.config}: no line optim.epochs as training wrote it: put it back")
    write_text(run.config, text)


def open_journal(
    run: RunFolder, found: Path | None, config: str, total: int, step: int, sinks: Sinks
) -> Journal:
    """The run's journal, locked against other trainers; rank 0 starts the folder of a new run.

    ``found``: what ``find_checkpoint`` returned. ``config``: the text of ``config.yaml``. The run
    has ``total`` steps and goes on after ``step``.
    """
    main = dist.is_main()
    journal = Journal(run.metrics, main, total, step, sinks)
    if main:
        if checkpoint.latest(run.checkpoints) != found:
            journal.close()
            raise InputError(f"another process has trained in {run.path} just now: start again")
        if not found:
            write_text(run.config, config)
            write_environment(run.environment)
    return journal


@contextmanager
def _fitting(path: Path) -> Iterator[None]:
    """Turn whatever reading a foreign or altered checkpoint raises into one line."""
    try:
        yield
    except (InputError, OSError, MemoryError, torch.OutOfMemoryError):  # no fault of the file
        raise
    except Exception as error:  # missing keys, other types, other shapes: a dozen exceptions
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{path} is no checkpoint of this run ({type(error).__name__}: {reason}): delete it, "
            "or start another run with --run.name"
        ) from error


def _require_same(before: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> None:
    for name in dict.fromkeys([*now, *before]):
        free = name.startswith(FREE_TO_CHANGE) and name not in COMPARED
        if before.get(name) != now.get(name) and not free:
            made, here = (f"{x[name]}" if name in x else "not read" for x in (before, now))
            raise InputError(
                f"{path} was made with {name} = {made}, now it is {here}: resume "
                "without this setting, or start another run with --run.name"
            )
