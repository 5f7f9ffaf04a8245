"""The command line of a command about a run: its folder, then settings."""

from collections.abc import Sequence
from pathlib import Path

from fastproj.core.errors import SettingError
from fastproj.runs.folder import RunFolder
from fastproj.settings import RUN, Settings, load


def open_run(argv: Sequence[str], prog: str, description: str) -> tuple[RunFolder, Settings]:
    """The run folder that ``argv`` names, and its settings under those of ``argv``.

    ``argv`` is ``FOLDER [--section.name VALUE ...]``; ``--help`` needs no folder. Raises
    ``SettingError`` where there is not exactly one folder and where a setting is wrong, and
    ``InputError`` where the folder is no run.
    """
    if "--help" in argv or "-h" in argv:
        load(RUN, ["--help"], prog, description, config=Path())
    folders, options = _split(argv)
    if len(folders) != 1:
        given = " ".join(folders) if folders else "none"
        raise SettingError(
            f"command line: give one run folder, not {given}: {prog} runs/NAME "
            "[--section.name VALUE ...]"
        )
    run = RunFolder.open(folders[0])
    return run, load(RUN, options, prog, description, config=run.config)


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words that are no option and no option's value, and the rest in its order."""
    folders: list[str] = []
    options: list[str] = []
    takes_value = False
    for word in argv:
        is_option = word.startswith("--")
        (options if is_option or takes_value else folders).append(word)
        takes_value = is_option and "=" not in word and word != "--debug"
    return folders, options
