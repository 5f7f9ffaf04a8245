"""The command line of a command about a run: its folder, then settings."""

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from fastproj.core.errors import InputError, SettingError
from fastproj.runs.folder import RunFolder
from fastproj.settings import RUN, Settings, load
from fastproj.settings.schema import Schema

S = TypeVar("S", bound=Settings)


def open_run(argv: Sequence[str], prog: str, description: str) -> tuple[RunFolder, Settings]:
    """The run folder that ``argv`` names, and its settings under those of ``argv``.

    ``argv`` is ``FOLDER [--section.name VALUE ...]``; ``--help`` needs no folder. Raises
    ``SettingError`` where there is not exactly one folder and where a setting is wrong, and
    ``InputError`` where the folder is no run.
    """
    run, settings = open_run_or_none(RUN, argv, prog, description, ())
    assert run is not None
    return run, settings


def open_run_or_none(
    schema: Schema[S], argv: Sequence[str], prog: str, description: str, instead: Sequence[str]
) -> tuple[RunFolder | None, S]:
    """The same, and without a folder where ``argv`` has one of the options ``instead``.

    Settings then come from ``--cfg`` and ``argv`` alone.
    """
    if "--help" in argv or "-h" in argv:
        load(schema, ["--help"], prog, description, config=Path())
    folders, options = split(argv)
    if not folders and {option.partition("=")[0] for option in options} & {*instead}:
        return None, load(schema, options, prog, description)
    if len(folders) != 1:
        given = " ".join(folders) if folders else "none"
        other = f", or {instead[0]} and no folder" if instead else ""
        raise SettingError(
            f"command line: give one run folder, not {given}{other}: {prog} runs/NAME "
            "[--section.name VALUE ...]"
        )
    run = RunFolder.open(folders[0])
    require_pretraining(run)
    return run, load(schema, options, prog, description, config=run.config)


def require_pretraining(run: RunFolder) -> None:
    """Raises ``InputError`` for a run of ``transfer`` or ``segment``: other settings."""
    if any(line.startswith("encoder:") for line in run.config.read_text().splitlines()):
        raise InputError(
            f"{run.path} is a run of fastproj transfer or segment, which has no encoder of its own:"
            f" its scores are in {run.evaluation.name}; give the run that pre-trained its encoder"
        )


def split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words that are no option and no option's value, and the rest in its order."""
    folders: list[str] = []
    options: list[str] = []
    takes_value = False
    for word in argv:
        is_option = word.startswith("--")
        (options if is_option or takes_value else folders).append(word)
        takes_value = is_option and "=" not in word and word != "--debug"
    return folders, options
