"""A study as plain arguments: arms x sets x seeds become jobs, each with its own run folder."""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from fastproj.core.errors import InputError
from fastproj.runs.folder import RunFolder

NO_OP = "no-op"
NUISANCE = 10_000  # added to the seeds of the no-op arm
COMPARED = ("lower", "higher")  # than the baseline's
BOUNDED = ("below", "above")  # a number


@dataclass(frozen=True)
class Check:
    """How an arm shows that its treatment acted: a diagnostic of the last epoch.

    ``direction``: ``lower`` or ``higher`` than the baseline's, by a 95 % interval of the paired
    differences without zero; or ``below`` or ``above`` the number ``bound`` in every run.
    """

    diagnostic: str
    direction: str
    bound: float | None = None

    @classmethod
    def parse(cls, text: str, where: str) -> "Check":
        """``matrix_information lower`` or ``used_codes above 0.5``; ``InputError`` for others."""
        words = text.split()
        if len(words) == 2 and words[1] in COMPARED:
            return cls(words[0], words[1])
        if len(words) == 3 and words[1] in BOUNDED and re.fullmatch(r"-?\d*\.?\d+", words[2]):
            return cls(words[0], words[1], float(words[2]))
        raise InputError(
            f"{where}: acted must be 'DIAGNOSTIC lower', '… higher', '… below NUMBER' or "
            f"'… above NUMBER', not {text!r}"
        )

    def __str__(self) -> str:
        bound = "" if self.bound is None else f" {self.bound:g}"
        return f"{self.diagnostic} {self.direction}{bound}"


@dataclass(frozen=True)
class Arm:
    """One treatment. ``settings`` and ``sweep`` hold values as text, by ``section.name``.

    ``published``: points by the set's name, ``""`` for all. ``control``: ``no-op``, or the arm
    whose noise alone this one has, and ``shared`` the other arms with the same noise; a control
    stands in no family of tests. ``forced``: settings that come after what a sweep chose.
    """

    name: str
    recipe: str
    settings: Mapping[str, str] = field(default_factory=dict)
    published: Mapping[str, float] = field(default_factory=dict)
    acted: Check | None = None
    sweep: Mapping[str, Sequence[str]] = field(default_factory=dict)
    control: str = ""
    shared: tuple[str, ...] = ()
    forced: Mapping[str, str] = field(default_factory=dict)

    def published_on(self, dataset: str) -> float | None:
        """The published gain on a set, points."""
        return self.published.get(dataset, self.published.get(""))

    def tries(self) -> list[dict[str, str]]:
        """Every combination of the values of the sweep; one without settings where it has none."""
        names = list(self.sweep)
        return [
            dict(zip(names, values, strict=True))
            for values in itertools.product(*self.sweep.values())
        ]


@dataclass(frozen=True)
class Job:
    """One run: ``overrides`` of its recipe, as text. ``pair``: the seed it is paired by."""

    arm: str
    dataset: str
    pair: int
    run: RunFolder
    recipe: str
    overrides: Mapping[str, str] = field(compare=False)
    trial: int | None = None  # of a sweep
    plugins: tuple[str, ...] = ()
    command: str = "train"

    @property
    def name(self) -> str:
        """``set/arm-seed0``: its folder below the study's, and in what is printed."""
        return "/".join(self.run.path.parts[-2 if self.trial is None else -3 :])

    def argv(self) -> list[str]:
        """The words after ``fastproj train``, or the job's other command, that start it."""
        options = [f"--{name}={text}" for name, text in self.overrides.items()]
        options += [f"--plugins={','.join(self.plugins)}"] if self.plugins else []
        return [f"--cfg={self.recipe}", *options]


@dataclass(frozen=True)
class Plan:
    """A study: its folder, its arms in order, and what each set changes.

    ``settings`` are every run's; those of the set come after them, then the arm's. In all of them
    ``{set}`` stands for the set's name and ``{seed}`` for the run's. ``plugins``: every run imports
    them. ``command``: of every run.
    """

    folder: Path
    baseline: str
    primary: str
    arms: tuple[Arm, ...]
    sets: Mapping[str, Mapping[str, str]]
    seeds: tuple[int, ...]
    sweep_seeds: tuple[int, ...] = ()
    settings: Mapping[str, str] = field(default_factory=dict)
    plugins: tuple[str, ...] = ()
    command: str = "train"

    def __post_init__(self) -> None:
        names = [arm.name for arm in self.arms]
        if not self.sets:
            raise InputError(
                "a study needs a set: in the file that --cfg names, write 'sets:', and below it "
                "the set's name and data"
            )
        if len(names) < 2:
            raise InputError("a study compares arms: write two or more below 'arms:'")
        if self.baseline not in names:
            raise InputError(
                f"study.baseline is {self.baseline!r}, and the arms are {', '.join(names)}"
            )
        tries = {arm.name: len(arm.tries()) for arm in self.arms if not arm.control}
        if len(set(tries.values())) > 1:
            counts = ", ".join(f"{name} {count}" for name, count in tries.items())
            raise InputError(f"each arm needs the same number of tries in its sweep, not {counts}")

    def arm(self, name: str) -> Arm:
        """The arm of that name."""
        return next(arm for arm in self.arms if arm.name == name)

    def source(self, arm: Arm) -> Arm:
        """The arm whose sweep chooses for ``arm``: itself, or the one it is a control of."""
        if not arm.control:
            return arm
        return self.arm(self.baseline if arm.control == NO_OP else arm.control)

    def job(self, arm: Arm, dataset: str, pair: int, chosen: Mapping[str, str] | None = None,
            trial: int | None = None) -> Job:  # fmt: skip
        """The run of ``arm`` on a set: with what a sweep chose, or as one ``trial`` of it."""
        folder = self.folder / dataset
        tag = f"{arm.name.replace(' ', '-')}-seed{pair}"
        if trial is not None:
            folder, tag = folder / "sweep", f"{arm.name.replace(' ', '-')}-try{trial}-seed{pair}"
        run = RunFolder(folder / tag)
        seed = pair + (NUISANCE if arm.control == NO_OP else 0)
        overrides = {"run.dir": str(folder), "run.name": tag, "run.seed": str(seed)}
        for layer in (self.settings, self.sets[dataset], arm.settings, chosen or {}, arm.forced):
            overrides |= {
                name: text.replace("{set}", dataset).replace("{seed}", str(pair))
                for name, text in layer.items()
            }
        recipe = arm.recipe.replace("{set}", dataset)
        return Job(
            arm.name, dataset, pair, run, recipe, overrides, trial, self.plugins, self.command
        )

    def sweeps(self) -> list[Job]:
        """The runs of the sweeps: nothing where no arm has one."""
        return [
            self.job(arm, dataset, seed, chosen, trial)
            for dataset in self.sets
            for seed in self.sweep_seeds
            for arm in self.arms
            if not arm.control and arm.sweep
            for trial, chosen in enumerate(arm.tries())
        ]

    def jobs(self, choices: Mapping[tuple[str, str], Mapping[str, str]]) -> list[Job]:
        """The runs of the table, seed by seed, so that after a stop all arms have as many.

        ``choices``: (arm, set) -> what its sweep chose. An arm without one there is left out.
        """
        return [
            self.job(arm, dataset, seed, choices[self.source(arm).name, dataset])
            for seed in self.seeds
            for dataset in self.sets
            for arm in self.arms
            if (self.source(arm).name, dataset) in choices
        ]


NOISE_ALONE = {"superfluous.lambda_a": "0", "superfluous.lambda_b": "0"}


def with_controls(arms: Sequence[Arm], baseline: str, noisy: Sequence[str]) -> tuple[Arm, ...]:
    """``arms``, then the baseline with other seeds, then the noise alone of each in ``noisy``.

    Arms that differ in the penalty alone and are not swept have one control in common.
    """
    names = [arm.name for arm in arms]
    if baseline not in names:
        return tuple(arms)  # Plan says so
    added = [replace(arms[names.index(baseline)], name=NO_OP, control=NO_OP)]
    alike: dict[str, list[Arm]] = {}
    for arm in (arms[names.index(name)] for name in noisy):
        rest = {**arm.settings, **NOISE_ALONE}
        chosen = arm.name if arm.sweep else ""  # each arm's sweep may choose other settings
        alike.setdefault(repr((arm.recipe, sorted(rest.items()), chosen)), []).append(arm)
    for first, *others in alike.values():
        added.append(
            replace(
                first, name=f"{first.name} noise only", control=first.name, published={},
                acted=None, shared=tuple(arm.name for arm in others), forced=NOISE_ALONE,
            )
        )  # fmt: skip
    taken = {arm.name for arm in added} & set(names)
    if taken:
        raise InputError(f"the study adds the arm {taken.pop()!r} itself: give yours another name")
    return (*arms, *added)
