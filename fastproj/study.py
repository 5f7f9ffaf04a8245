"""Command: does a treatment help? ``python -m fastproj.study --cfg rcfg/study/digits.yaml``

A study file -> arms x sets x seeds as ordinary runs, each brought to its end by the ordinary
commands (train and evaluate; transfer; segment) -> paired differences with intervals, as a table on
the terminal and in the study's folder. Started again, it goes on where it was.
"""

if __name__ == "__main__":  # before torch is imported, so that --help answers at once
    from fastproj.__main__ import main as run_as_script

    run_as_script("study")

import json
import math
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastproj.core.errors import InputError, SettingError
from fastproj.core.files import write_text, writing
from fastproj.core.table import hyperparameters
from fastproj.data.beton import Beton
from fastproj.evaluation import PROBES
from fastproj.evaluation.sets import open_sets
from fastproj.settings import STUDY, Settings, load
from fastproj.settings.run import Trained
from fastproj.settings.study import COMMANDS, SCORED_BY, StudySettings, read_blocks
from fastproj.studies import results, table
from fastproj.studies.plan import Arm, Check, Job, Plan, with_controls
from fastproj.studies.running import FREE, Executor, Runner, locked
from fastproj.studies.scores import Score, Val, read_score, same_protocol

PLACES = ("run.name", "run.dir", "run.resume")  # of a run: no settings of what it learns


def build_plan(settings: StudySettings) -> Plan:
    """The study that the settings describe, its controls added.

    Raises ``SettingError`` for a setting that some run would refuse, and ``InputError`` for arms
    that cannot be compared.
    """
    study, blocks = settings.study, read_blocks(settings)
    trains = study.command == "train"
    arms = []
    for name, block in blocks.arms.items():
        recipe = block.recipe or study.recipe
        if recipe is None:
            raise SettingError(
                f"{block.where}: the arm {name} has no recipe: give it one, or study.recipe"
            )
        check = None if block.acted is None else Check.parse(block.acted, block.where)
        arms.append(
            Arm(name, recipe, block.settings, block.published, check, block.sweep or blocks.sweep)
        )
    for name, block in blocks.arms.items():
        if unknown := block.published.keys() - blocks.sets.keys() - {""}:
            raise SettingError(
                f"{block.where}: arms.{name}.published names {sorted(unknown)[0]!r}, and the sets "
                f"are {', '.join(blocks.sets)}"
            )
    plan = Plan(
        folder=Path(study.dir) / study.name,
        baseline=study.baseline,
        primary=study.primary,
        arms=tuple(arms),
        sets={name: block.settings for name, block in blocks.sets.items()},
        seeds=study.seeds,
        sweep_seeds=study.sweep_seeds,
        # A run's own baselines would be scored once per run; the study may still ask for them.
        settings={**({"eval.baselines": "false"} if trains else {}), **blocks.settings},
        plugins=settings.plugins,
        command=study.command,
    )
    if not trains and any(arm.sweep for arm in arms):
        raise SettingError(
            f"sweep: fastproj {study.command} holds out nothing of train that could choose: leave "
            "the sweep out"
        )
    noisy = []
    for arm in plan.arms:
        for dataset in plan.sets:
            found = [_read(plan.job(arm, dataset, plan.seeds[0], tried)) for tried in arm.tries()]
            for one in found:
                who = f"the arm {arm.name} on {dataset}"
                _check_primary(study.primary, one, who, study.command)
                if arm.sweep and not _holds_out(study.primary, one):
                    raise SettingError(
                        f"sweep: it is chosen on the holdout of {study.primary}, which has none in "
                        f"{who}: take logistic.top1 with several strengths, or leave the sweep out"
                    )
            if any(map(_adds_noise, found)) and arm.name not in noisy:
                noisy.append(arm.name)
    if not study.controls:
        return plan
    return replace(plan, arms=with_controls(plan.arms, plan.baseline, noisy))


def _check_primary(primary: str, settings: Trained, who: str, command: str) -> None:
    """Raise ``SettingError`` where a run would not be scored by the probe that decides."""
    probe = primary.partition(".")[0]
    if not isinstance(settings, Settings):
        if probe != SCORED_BY[command]:
            raise SettingError(
                f"study.primary is {primary!r}, and fastproj {command} gives "
                f"{SCORED_BY[command]}.METRIC"
            )
        return
    if probe not in PROBES:
        raise SettingError(
            f"study.primary is {primary!r}, and no probe is called {probe!r}; write PROBE.METRIC "
            f"with one of {', '.join(PROBES)}"
        )
    if probe not in settings.eval.probes:
        raise SettingError(
            f"study.primary is {primary!r}, and {who} has the probes "
            f"{', '.join(settings.eval.probes)}: name one of them, or add {probe} to eval.probes"
        )


def _holds_out(primary: str, settings: Trained) -> bool:
    """Whether the probe that decides holds out a part of train: with one choice it does not."""
    if not isinstance(settings, Settings):
        return False
    probe, options = primary.partition(".")[0], settings.eval.options
    names = hyperparameters(PROBES[probe])
    lists = [options.get(f"{probe}_{name}") for name in names]
    choices = [len(values) for values in lists if isinstance(values, tuple)]
    return "holdout" in names and (not choices or math.prod(choices) > 1)


def _read(job: Job) -> Trained:
    """The settings of a run, as its command will read them."""
    try:
        return load(COMMANDS[job.command], job.argv(), f"fastproj {job.command}", "")
    except InputError as error:
        message = str(error).replace("command line: ", "").replace("--cfg", "its recipe")
        raise type(error)(f"arm {job.arm} on {job.dataset}: {message}") from None


def _adds_noise(settings: Trained) -> bool:
    if not isinstance(settings, Settings):
        return False
    noisy = settings.superfluous
    return noisy.noise != "none" and any(noisy.lambda_a + noisy.lambda_b)


def check_run(job: Job) -> None:
    """Raise ``InputError`` where the job's folder holds a run of other settings."""
    wanted = _read(job).flat()
    schema, prog = COMMANDS[job.command], f"fastproj {job.command}"
    kept = load(schema, [], prog, "", config=job.run.config).flat()
    for name in [*wanted, *kept]:
        if wanted.get(name) != kept.get(name) and not name.startswith((*PLACES, *FREE)):
            raise InputError(
                f"{job.run.path} is another run: it has {name} = {kept.get(name)}, the study asks "
                f"for {wanted.get(name)}; remove it, or give the study another --study.name"
            )


def study(settings: StudySettings) -> dict[str, Any]:
    """Run what is missing, then write the tables; returns what ``study.json`` holds.

    Raises ``InputError`` for what the user must fix before anything runs. A run that fails is a
    line in ``problems``. A signal ends the runs, which save where they stand; the tables are of
    what is there, and the exit code is 128 + the signal's number.
    """
    plan = build_plan(settings)
    val = {name: _val(plan, name) for name in plan.sets}
    scores: dict[Job, Score] = {}

    def finished(job: Job) -> str:
        scores[job] = read_score(job, plan.primary, val[job.dataset])
        return f"{plan.primary} {scores[job].primary:.2f}"

    with writing(plan.folder):
        plan.folder.mkdir(parents=True, exist_ok=True)
    with locked(plan.folder / "study.lock") as lock:
        runner = _executor(settings, plan.folder, lock, finished)
        runner.run(plan.sweeps())
        problems = same_protocol(scores)
        choices, sweeps = results.choose(plan, scores)
        if not runner.signal:
            runner.run(plan.jobs(choices))
            problems |= same_protocol(scores)
        # In the plan's order: with several runs at once, that in which they end is chance.
        order = [*plan.sweeps(), *plan.jobs(choices)]
        found = {**runner.problems, **problems}
        problems = {job.name: found[job.name] for job in order if job.name in found}
        ordered = {job: scores[job] for job in order if job in scores}
        if not any(job.trial is None for job in scores):
            reason = next(iter(problems.values()), "it was stopped before the first ended")
            _leave(runner.signal)
            raise InputError(f"{plan.folder}: no run has a result: {reason}")
        report = results.report(plan, ordered, sweeps, runner.log.together(), problems)
        report["stopped"] = bool(runner.signal)
        _write(plan.folder, report)
        if runner.signal != signal.SIGHUP:  # else the terminal has closed
            print(table.text(report), flush=True)
    _leave(runner.signal)
    return report


def _executor(
    settings: StudySettings, folder: Path, lock: int, finished: Callable[[Job], str]
) -> Executor:
    """What runs the jobs: processes of this machine, or a scheduler."""
    study = settings.study
    if study.executor == "processes":
        return Runner(
            folder, study.processes, torch.cuda.device_count(), lock, check_run, finished,
            study.ranks,
        )  # fmt: skip
    from fastproj.studies.scheduler import Scheduler  # an extra installs what it imports

    parameters = read_blocks(settings).submitit
    return Scheduler(
        folder, study.processes, study.executor, parameters, check_run, finished, study.ranks
    )


def _leave(number: int) -> None:
    if number:
        raise SystemExit(128 + number)


def _val(plan: Plan, dataset: str) -> Val | None:
    """Every run's val images on ``dataset``; the arms must agree on the data.

    None where no class of an image is predicted.
    """
    found: dict[tuple[object, ...], str] = {}
    for arm in plan.arms:
        flat = _read(plan.job(arm, dataset, plan.seeds[0], arm.tries()[0])).flat()
        where = [flat.get(f"data.{name}") for name in ("format", "root", "train", "val")]
        if where[-1] is None:
            raise InputError(f"arm {arm.name} on {dataset}: data.val is missing")
        found[*where] = arm.name
    if len(found) > 1:
        raise InputError(
            f"the arms {' and '.join(found.values())} have different data on {dataset}: give the "
            f"set's data.train and data.val below sets.{dataset}"
        )
    if plan.command != "train":
        return None
    ((*_, train, val),) = found
    found_val = open_sets(str(train), str(val)).val
    if not isinstance(found_val, Beton):
        raise InputError(f"sets.{dataset}: runs train on betons, not on {val}")
    return Val(found_val.label, found_val.manifest.content)


def _write(folder: Path, report: dict[str, Any]) -> None:
    write_text(folder / "study.json", json.dumps(report, indent=1) + "\n")
    for name, form in (
        ("table.csv", table.as_csv), ("metrics.csv", table.metrics_csv),
        ("table.md", table.as_markdown), ("table.tex", table.as_latex),
    ):  # fmt: skip
        write_text(folder / name, form(report))


def main(argv: Sequence[str]) -> None:
    settings = load(STUDY, argv, "python -m fastproj.study", "Compare arms over seeds and sets.")
    report = study(settings)
    folder = Path(settings.study.dir) / settings.study.name
    print(f"written: {folder}/study.json, table.csv, table.md, table.tex, metrics.csv")
    if problems := report["problems"]:
        first = next(iter(problems.values()))
        raise InputError(f"{len(problems)} runs have no result, the first: {first}")
