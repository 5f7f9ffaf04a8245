"""Command: ``fastproj COMMAND ...``, the same as ``python -m fastproj.COMMAND ...``.

Each command's module is imported when it runs. ``--help`` needs only the settings: importing torch
takes seconds.
"""

import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from fastproj.core.children import die_with
from fastproj.core.errors import InputError, SettingError, run_command


class Command(NamedTuple):
    """``module`` holds its ``main``; ``schema``: its settings' name in ``fastproj.settings``.

    ``about_a_run``: its first argument is a run folder.
    """

    module: str
    about: str
    schema: str = ""
    about_a_run: bool = False


COMMANDS = {
    "train": Command("fastproj.train", "Pre-train an encoder on a beton.", "RUN"),
    "evaluate": Command("fastproj.evaluate", "Probe a run's frozen encoder, or any.", "RUN", True),
    "transfer": Command(
        "fastproj.transfer.detection", "Train a detector on an encoder, and score it.", "TRANSFER"
    ),
    "segment": Command(
        "fastproj.transfer.segmentation", "Classify pixels from a frozen encoder.", "SEGMENT"
    ),
    "embed": Command("fastproj.embed", "Write the features of a set to a file.", "EMBED", True),
    "study": Command("fastproj.study", "Compare arms over seeds and sets.", "STUDY"),
    "report": Command("fastproj.report", "Write a page on runs or a study.", "REPORT", True),
    "export": Command("fastproj.export", "Write the encoder of a run alone.", "RUN", True),
    "prepare": Command("fastproj.prepare.command", "Turn raw images into betons.", "PREPARE"),
    "doctor": Command("fastproj.doctor", "Check this machine, and say how to fix what is missing."),
    "demo": Command("fastproj.demo", "Run the whole way through on a small set.", "DEMO"),
    "bench": Command("fastproj.bench.__main__", "Measure the rate of each stage.", "BENCH"),
}
# What only an extra installs.
EXTRAS = {
    **{"matplotlib": "report", "ffcv": "ffcv", "nvidia": "dali", "timm": "timm"},
    **{"submitit": "slurm", "tensorboard": "tensorboard", "wandb": "wandb"},
    **{"pycocotools": "transfer", "huggingface_hub": "parquet"},
}


def dispatch(argv: Sequence[str]) -> int | None:
    """Run the command that the first word names.

    Raises ``SettingError`` for an unknown one, ``InputError`` where an extra's package is missing.
    """
    name, *rest = argv or ["--help"]
    if name in ("-h", "--help"):
        print("usage: fastproj COMMAND [--help] ...\n\nFrom images to linear-probe accuracy.\n")
        print(*(f"  {name:9} {command.about}" for name, command in COMMANDS.items()), sep="\n")
        return 0
    if name not in COMMANDS:
        near = max(COMMANDS, key=lambda other: difflib.SequenceMatcher(None, name, other).ratio())
        raise SettingError(f"unknown command {name!r}; did you mean {near!r}?")
    command = COMMANDS[name]
    if command.schema and {"-h", "--help"} & {*rest}:
        settings = importlib.import_module("fastproj.settings")
        settings.load(
            getattr(settings, command.schema),
            rest,
            f"fastproj {name}",
            command.about,
            config=Path() if command.about_a_run else None,  # then the usage names its folder
        )
    try:
        return importlib.import_module(command.module).main(rest)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in EXTRAS:
            raise
        extra = EXTRAS[missing]
        raise InputError(
            f"fastproj {name} needs {missing}: run ./setup.sh {extra} in a checkout, elsewhere "
            f"pip install 'fastproj-ssl[{extra}]'"
        ) from error


def main(command: str | None = None) -> NoReturn:
    """The console script. ``command``: the module that runs as a script hands itself over here."""
    if "TORCHELASTIC_RUN_ID" in os.environ:  # a rank: torchrun, when killed, would leave it behind
        follow = die_with(os.getppid())
        if follow is not None:
            follow()
    run_command(dispatch, [*filter(None, [command]), *sys.argv[1:]])


if __name__ == "__main__":
    main()
