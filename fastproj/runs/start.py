"""The command line of a command that trains: a new run or one to go on with, on any ranks."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from fastproj import __version__
from fastproj.core import dist
from fastproj.core.device import choose_device
from fastproj.core.errors import SettingError
from fastproj.runs.folder import RunFolder
from fastproj.runs.resume import AUTO
from fastproj.settings import load
from fastproj.settings.run import Trained
from fastproj.settings.schema import Schema

S = TypeVar("S", bound=Trained)

# Ranks may be started with other paths of their machines; everything else is compared.
OWN_TO_A_RANK = ("run.dir", "data.")


def start(
    schema: Schema[S],
    argv: Sequence[str],
    prog: str,
    description: str,
    train: Callable[[S], Path],
    facts: Callable[[S], Mapping[str, object]],
) -> None:
    """Read the settings, give a new run its name, ``train`` it, and print its folder.

    On several ranks settings, versions and ``facts(settings)`` (what the data hold) have to be the
    same. ``train`` returns the run folder. Raises ``SettingError`` and ``InputError``.
    """
    settings = _read(schema, argv, prog, description)
    named = settings.sources()["run.name"] != "default"
    if settings.run.resume == AUTO and not named:
        raise SettingError("run.resume auto needs --run.name: by default each start has a new name")
    try:
        dist.start(choose_device(settings.run.device), settings.run.timeout)
        with dist.losing_ranks():
            _require_same_start(settings, facts)
            if settings.run.resume is None and not named:
                stamp = dist.exchange(time.strftime("%Y%m%d-%H%M%S"))[0]
                name = f"{settings.run.name}-seed{settings.run.seed}-{stamp}"
                settings = _read(schema, [*argv, f"--run.name={name}"], prog, description)
            folder = train(settings)
    finally:
        dist.stop()
    print(f"run folder: {folder}")


def _read(schema: Schema[S], argv: Sequence[str], prog: str, description: str) -> S:
    """The settings of a new run, or of the one that ``--run.resume`` names."""
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        option, equals, value = word.partition("=")
        folder = value if equals else following
        if option in ("--run.resume", "--resume") and folder.strip("-") not in ("", "null", AUTO):
            config = RunFolder.open(folder).config
            # ``stop_after`` was the earlier start's own.
            argv = ["--train.stop_after", "null", *argv]
            settings = load(schema, argv, prog, description, config=config)
            epochs = settings.flat().get("run.extend")
            if epochs is None:
                return settings
            argv = [*argv, f"--optim.epochs={epochs}"]
            return load(schema, argv, prog, description, config=config)
    return load(schema, argv, prog, description)


def _require_same_start(settings: S, facts: Callable[[S], Mapping[str, object]]) -> None:
    """Raises InputError on every rank where they have other settings, plugins, data or versions."""
    if dist.world_size() == 1:
        return
    with dist.together():
        found = facts(settings)
    given = settings.flat().items()
    dist.require_same(
        {name: str(value) for name, value in given if not name.startswith(OWN_TO_A_RANK)}
        | {**found, "fastproj": __version__, "torch": torch.__version__}
    )
