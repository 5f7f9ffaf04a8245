"""What the command study reads: the section ``study``, and the blocks that name sets and arms."""

import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fastargs.validation import Checker

from fastproj.core.errors import SettingError
from fastproj.core.table import nearest
from fastproj.settings.checkers import Bool, Choice, File, Float, Int, OrNull, Text
from fastproj.settings.choose import check
from fastproj.settings.run import RUN
from fastproj.settings.schema import Declared, Given, Loaded, Schema, setting
from fastproj.settings.transfer import SEGMENT, TRANSFER

BLOCKS = ("settings", "sets", "arms", "sweep", "submitit")
PARTS = ("recipe", "settings", "published", "acted", "sweep")  # of an arm
COMMANDS: dict[str, Schema[Any]] = {"train": RUN, "transfer": TRANSFER, "segment": SEGMENT}
SCORED_BY = {"transfer": "detection", "segment": "segmentation"}  # their only probe
# What a study gives each run itself.
FIXED = ("run.name", "run.dir", "run.seed", "run.resume", "train.stop_after")


@dataclass(frozen=True)
class Seeds(Checker):
    """Different whole numbers from 0 to 2**32 - 1; on the command line ``0,1,2``."""

    def check(self, value: str | list[str] | None) -> tuple[int, ...]:
        texts = value.strip("[] ").split(",") if isinstance(value, str) else value or []
        seeds = tuple(Int(0, 2**32 - 1).parse(text) for text in texts)
        if not seeds or len(set(seeds)) < len(seeds):
            raise ValueError
        return seeds

    def help(self) -> str:
        return "different whole numbers"


@dataclass(frozen=True)
class Study:
    """what is compared, how often, and where it is kept"""

    name: str = setting(
        Text(), "folder of the study under study.dir; by default the file's name", "study"
    )
    dir: str = setting(File(), "folder that holds the studies", "runs")
    command: str = setting(
        Choice(*COMMANDS),
        "what each run is: train (and evaluate), or transfer or segment, of an encoder's worth"
        " elsewhere",
        "train",
    )
    recipe: str | None = setting(
        OrNull(File()), "recipe of every arm that names none; {set} stands for the set's name"
    )
    baseline: str = setting(Text(), "arm that the others are compared with", "default")
    primary: str = setting(
        Text(), "metric that decides, PROBE.METRIC, declared before the runs", "logistic.top1"
    )
    seeds: tuple[int, ...] = setting(Seeds(), "one run per arm, set and seed", (0, 1, 2, 3, 4))
    sweep_seeds: tuple[int, ...] = setting(
        Seeds(), "seeds of each try of a sweep; the holdout of the primary probe chooses", (1000,)
    )
    controls: bool = setting(
        Bool(),
        "add the baseline with other seeds (no-op), and noise alone for an arm that adds noise",
        True,
    )
    processes: int | None = setting(
        OrNull(Int(1)),
        "runs at once, fewer where memory is short; null: as many as there are GPUs, or cores"
        " without a GPU, for study.ranks each; on slurm any number",
    )
    ranks: int = setting(
        Int(1), "processes of each run, by torchrun on one machine, each with a GPU of its own", 1
    )
    executor: str = setting(
        Choice("processes", "slurm", "local", "debug"),
        "processes: on this machine; slurm: through submitit, with the block submitit's parameters;"
        " local, debug: submitit's own, to try it",
        "processes",
    )


@dataclass(frozen=True)
class StudySettings(Loaded):
    """Settings of ``fastproj.study``; ``read_blocks`` reads the rest of its file."""

    study: Study


STUDY = Schema(StudySettings, blocks=BLOCKS)


@dataclass
class Block:
    """What one set or one arm says; ``where`` it begins."""

    where: str
    recipe: str | None = None
    settings: dict[str, str] = field(default_factory=dict)
    published: dict[str, float] = field(default_factory=dict)  # "" or the set's name -> points
    acted: str | None = None
    sweep: dict[str, tuple[str, ...]] = field(default_factory=dict)


class Blocks(NamedTuple):
    """The blocks of a study file: of all runs, of each set, of each arm; submitit's parameters."""

    settings: dict[str, str]
    sweep: dict[str, tuple[str, ...]]
    sets: dict[str, Block]
    arms: dict[str, Block]
    submitit: dict[str, Any]


def read_blocks(settings: StudySettings) -> Blocks:
    """What stands in the blocks, in the order of the file; of two values the later one counts.

    Values stay text: the settings of each run are read from them as from a command line. Raises
    ``SettingError`` for a name that no setting of the study's command has, and for a part that an
    arm does not have.
    """
    schema = COMMANDS[settings.study.command]
    found = Blocks({}, {}, {}, {}, {})
    for item in settings._blocks:
        block, _, rest = item.name.partition(".")
        if block == "settings":
            found.settings.update(_setting(rest, item, schema))
        elif block == "sweep":
            found.sweep.update(_tries(rest, item, schema))
        elif block == "submitit":
            found.submitit.update(_parameter(rest, item))
        else:
            name, _, rest = rest.partition(".")
            if not name or any(mark in name for mark in "/{}"):
                raise SettingError(
                    f"{item.where}: write 'NAME:' below {block}, a name that can be a folder's"
                )
            place = found.sets if block == "sets" else found.arms
            one = place.setdefault(name, Block(item.where))
            if rest:
                _read_part(one, block, name, rest, item, schema)
            elif item.text is not None:
                raise SettingError(f"{item.where}: {item.name} has parts; write them below it")
    return found


def _read_part(
    one: Block, block: str, name: str, rest: str, item: Given, schema: Schema[Any]
) -> None:
    if block == "sets":
        one.settings |= _setting(rest, item, schema)
        return
    part, _, inner = rest.partition(".")
    if part == "settings":
        one.settings |= _setting(inner, item, schema)
    elif part == "sweep":
        one.sweep |= _tries(inner, item, schema)
    elif part == "published":
        value = check(Declared(Float(), ""), item)
        assert isinstance(value, float)
        one.published[inner] = value
    elif part in PARTS and not inner:
        value = check(Declared(OrNull(Text()), ""), item)
        assert value is None or isinstance(value, str)
        setattr(one, part, value)
    else:
        right = nearest(item.name, [f"arms.{name}.{known}" for known in PARTS])
        raise SettingError(f"{item.where}: unknown setting {item.name!r}; did you mean {right!r}?")


def _parameter(name: str, item: Given) -> dict[str, Any]:
    """One of submitit's parameters: submitit checks names and types.

    Raises ``SettingError`` for a list in it and for a name inside a name.
    """
    if not name or "." in name or isinstance(item.text, list):
        raise SettingError(
            f"{item.where}: write submitit's parameters below submitit: timeout_min: 240"
        )
    return {name: _value(item.text)}


def _value(text: str | None) -> Any:
    """Null, a truth, a decimal number, or text: YAML 1.1 makes 43,200 of a time of 12:00:00."""
    if text is None or text.lower() in ("null", "none", "~"):
        return None
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if re.fullmatch(r"-?(0|[1-9]\d*)(\.\d+)?", text):
        return float(text) if "." in text else int(text)
    return text


def _setting(name: str, item: Given, schema: Schema[Any]) -> dict[str, str]:
    """One setting of a run. A plugin's own are known only where the run is read."""
    if name in FIXED:
        raise SettingError(f"{item.where}: a study gives {name} to each run itself; leave it out")
    if name not in schema.params and not schema.is_option(name):
        if item.text is None and name in schema.groups:
            return {}
        right = nearest(name, schema.params)
        raise SettingError(f"{item.where}: unknown setting {name!r}; did you mean {right!r}?")
    text = item.text
    return {name: ",".join(text) if isinstance(text, list) else "null" if text is None else text}


def _tries(name: str, item: Given, schema: Schema[Any]) -> dict[str, tuple[str, ...]]:
    """The values that a sweep tries for one setting."""
    _setting(name, item, schema)
    texts = item.text.strip("[] ").split(",") if isinstance(item.text, str) else item.text or []
    values = tuple(text.strip() for text in texts)
    if len(set(values)) < 2:
        raise SettingError(f"{item.where}: a sweep takes two or more values: [0.1, 0.3, 1]")
    return {name: values}
