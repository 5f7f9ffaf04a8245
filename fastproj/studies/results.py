"""From the run folders of a study to what they say together: a dict as JSON holds it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from fastproj.studies import statistics
from fastproj.studies.plan import NO_OP, Arm, Check, Job, Plan
from fastproj.studies.running import StudyError
from fastproj.studies.scores import POINTS, Score

SCHEMA = 1  # of study.json


def choose(
    plan: Plan, scores: Mapping[Job, Score]
) -> tuple[dict[tuple[str, str], dict[str, str]], list[dict[str, Any]]]:
    """What each arm's sweep chooses on each set, by the mean accuracy on the holdout of train.

    A try with a failed run loses. Returns (arm, set) -> settings, without those of which every try
    failed, and what the sweeps found. Raises ``StudyError`` for a probe without a holdout.
    """
    choices: dict[tuple[str, str], dict[str, str]] = {}
    found = []
    for dataset in plan.sets:
        for arm in plan.arms:
            if arm.control:
                continue
            tries = arm.tries()
            if not arm.sweep:
                choices[arm.name, dataset] = {}
                continue
            means: list[float | None] = []
            for trial, chosen in enumerate(tries):
                jobs = [plan.job(arm, dataset, s, chosen, trial) for s in plan.sweep_seeds]
                held = [scores[job].holdout for job in jobs if job in scores]
                if None in held:
                    raise StudyError(
                        f"a sweep chooses on the holdout of the primary probe, and that of "
                        f"{plan.primary} has none: give a linear probe's metric as study.primary"
                    )
                values = [value for value in held if value is not None]
                means.append(float(np.mean(values)) if len(values) == len(jobs) else None)
            possible = [trial for trial, mean in enumerate(means) if mean is not None]
            best = max(possible, key=lambda trial: means[trial] or 0.0, default=None)
            if best is not None:
                choices[arm.name, dataset] = tries[best]
            edges = [
                name for name, values in arm.sweep.items()
                if best is not None and len(values) > 2
                and tries[best][name] in (values[0], values[-1])
            ]  # fmt: skip
            found.append(
                {"set": dataset, "arm": arm.name, "tries": tries, "holdout": means,
                 "chosen": None if best is None else tries[best], "edge": edges}
            )  # fmt: skip
    return choices, found


def acted(check: Check, ours: Sequence[float], baseline: Sequence[float]) -> bool | None:
    """Whether the treatment acted; None where the numbers do not say (see ``Check``)."""
    if check.bound is not None:
        if not ours:
            return None
        return all(x > check.bound if check.direction == "above" else x < check.bound for x in ours)
    if not ours or len(ours) != len(baseline):
        return None
    gain = statistics.paired_gain(ours, baseline)
    if gain.n < 2:
        return None
    if math.isnan(gain.low):  # all differences are equal
        low = high = float(gain.mean)
    else:
        low, high = float(gain.low), float(gain.high)
    return bool(high < 0 if check.direction == "lower" else low > 0)


def summarize(plan: Plan, dataset: str, scores: Mapping[Job, Score]) -> list[dict[str, Any]]:
    """One row per arm of one set: points, paired by seed with the baseline."""
    by_arm: dict[str, dict[int, Score]] = {arm.name: {} for arm in plan.arms}
    for job, score in scores.items():
        if job.dataset == dataset and job.trial is None:
            by_arm[job.arm][job.pair] = score
    rows = [_row(plan, arm, dataset, by_arm) for arm in plan.arms]
    treatments = [row for row in rows if row.get("p") is not None and not row["control"]]
    adjusted = statistics.holm([row["p"] for row in treatments])
    for row, p in zip(treatments, adjusted, strict=True):
        row["p_holm"] = float(p)
    for arm, row in zip(plan.arms, rows, strict=True):
        row["conclusion"] = _conclude(plan, arm, row)
        row.pop("_gain", None)
    return rows


def _row(plan: Plan, arm: Arm, dataset: str, by_arm: Mapping[str, Any]) -> dict[str, Any]:
    mine, base = by_arm[arm.name], by_arm[plan.baseline]
    values = [mine[seed].primary for seed in sorted(mine)]
    row: dict[str, Any] = {
        "set": dataset, "arm": arm.name, "control": arm.control, "n": len(values),
        "mean": float(np.mean(values)) if values else None,
        "std": float(np.std(values, ddof=1)) if len(values) > 1 else None,
        "published": arm.published_on(dataset), "acted": None,
        "check": None if arm.acted is None else str(arm.acted),
    }  # fmt: skip
    for name in sorted({name for score in mine.values() for name in score.metrics}):
        numbers = [score.metrics[name] for score in mine.values() if name in score.metrics]
        row.setdefault("metrics", {})[name] = float(np.mean(numbers))
    if arm.name == plan.baseline or not mine:
        return row
    row |= _compare(mine, base)
    if arm.control:
        return row
    if arm.acted:
        name = arm.acted.diagnostic
        seeds = [s for s in sorted(mine) if name in mine[s].diagnostics]
        if arm.acted.bound is None:
            seeds = [s for s in seeds if s in base and name in base[s].diagnostics]
        ours = [mine[s].diagnostics[name] for s in seeds]
        theirs = [base[s].diagnostics[name] for s in seeds if arm.acted.bound is None]
        row["acted"] = acted(arm.acted, ours, theirs)
        row["diagnostic"] = {"arm": ours, "baseline": theirs}
    for control in plan.arms:  # what the treatment adds to its own noise
        if arm.name in (control.control, *control.shared) and by_arm[control.name]:
            beyond = _compare(mine, by_arm[control.name])
            beyond.pop("_gain", None)
            row["beyond_noise"] = beyond
    return row


def every_metric(plan: Plan, dataset: str, scores: Mapping[Job, Score]) -> list[dict[str, Any]]:
    """One row per arm and metric of one set, in points: also those that do not decide.

    Gains are paired by seed with the baseline; nothing corrects for how many there are.
    """
    found: dict[tuple[str, str], dict[int, float]] = {}
    for job, score in scores.items():
        if job.dataset == dataset and job.trial is None:
            for name, value in score.metrics.items():
                found.setdefault((job.arm, name), {})[job.pair] = POINTS * value
    rows = []
    for arm, name in sorted(found, key=lambda key: [a.name for a in plan.arms].index(key[0])):
        mine, base = found[arm, name], found.get((plan.baseline, name), {})
        row = {"set": dataset, "arm": arm, "metric": name, "n": len(mine),
               "mean": float(np.mean([*mine.values()]))}  # fmt: skip
        seeds = sorted(mine.keys() & base.keys())
        if arm != plan.baseline and len(seeds) > 1:
            gain = statistics.paired_gain([mine[s] for s in seeds], [base[s] for s in seeds])
            for part in ("mean", "low", "high"):
                value = float(getattr(gain, part))
                row[f"gain_{part}"] = None if math.isnan(value) else value
        if len(mine) > 1:
            row["std"] = float(np.std([*mine.values()], ddof=1))
        rows.append(row)
    return rows


def _compare(mine: Mapping[int, Score], base: Mapping[int, Score]) -> dict[str, Any]:
    """The paired difference over the common seeds; nothing where there are none."""
    seeds = sorted(mine.keys() & base.keys())
    if not seeds:
        return {"pairs": 0}
    ours = [mine[seed].primary for seed in seeds]
    theirs = [base[seed].primary for seed in seeds]
    gain = statistics.paired_gain(ours, theirs)
    found: dict[str, Any] = {"pairs": len(seeds), "_gain": gain}
    for name in ("mean", "std", "low", "high", "p"):
        value = float(getattr(gain, name))
        found[name if name == "p" else f"gain_{name}"] = None if math.isnan(value) else value
    pairs = [(mine[seed].correct, base[seed].correct) for seed in seeds]
    if len(seeds) > 1:
        found["p_permutation"] = statistics.paired_permutation(ours, theirs)
    right = [(a, b) for a, b in pairs if a is not None and b is not None]
    if len(right) == len(pairs):
        difference = np.mean([a.astype(float) - b for a, b in right], axis=0)
        low, high = statistics.image_interval(difference)
        found["images_low"], found["images_high"] = POINTS * low, POINTS * high
        single = [statistics.mcnemar(a, b) for a, b in right]
        found["mcnemar"] = dict(zip(map(str, seeds), single, strict=True))
        if len(right) == 1:
            found["p_mcnemar"] = single[0]
    return found


def _conclude(plan: Plan, arm: Arm, row: dict[str, Any]) -> str:
    if not row["n"]:
        return "no run has a result"
    if arm.name == plan.baseline:
        return "the baseline"
    gain = row.get("_gain")
    if gain is None:
        return f"no seed in common with {plan.baseline}: nothing can be concluded"
    published = row["published"]
    if published and row["gain_std"]:
        row["seeds_needed"] = statistics.seeds_needed(published, row["gain_std"])
    p = row["p"] if arm.control else row.get("p_holm")
    text = statistics.conclusion(gain, math.nan if p is None else p, published)
    if arm.control:
        of = ", ".join((arm.control, *arm.shared))
        kind = "the noise floor" if arm.control == NO_OP else f"the noise of {of} alone"
        return f"{kind}: {text}"
    beyond = row.get("beyond_noise", {})
    if beyond.get("gain_low") is not None:
        text += (
            f"; against its noise alone {beyond['gain_mean']:+.2f} points "
            f"({beyond['gain_low']:+.2f} to {beyond['gain_high']:+.2f})"
        )
    if row["acted"] is False:
        return f"{text}; {row['check']} was not shown, so this is no test of the treatment"
    if row["check"] and row["acted"] is None:
        return f"{text}; whether the treatment acted is not known ({row['check']})"
    return text


def report(
    plan: Plan,
    scores: Mapping[Job, Score],
    sweeps: Sequence[Mapping[str, Any]],
    together: set[str],
    problems: Mapping[str, str],
) -> dict[str, Any]:
    """Everything: what ``study.json`` holds, and the tables are made of."""
    sets = []
    for dataset in plan.sets:
        rows = summarize(plan, dataset, scores)
        groups: dict[str, list[float]] = {}
        for job, score in scores.items():
            if job.dataset == dataset and job.trial is None:
                groups.setdefault(job.arm, []).append(score.primary)
        pooled = statistics.pooled_std(list(groups.values()))
        sets.append({"set": dataset, "pooled_std": None if math.isnan(pooled) else pooled,
                     "rows": rows})  # fmt: skip
    runs = [
        {"job": job.name, "set": job.dataset, "arm": job.arm, "seed": job.pair, "trial": job.trial,
         "overrides": {k: v for k, v in job.overrides.items() if k != "run.dir"},
         "recipe": job.recipe, "metrics": score.metrics, "holdout": score.holdout,
         "diagnostics": score.diagnostics, "hours": score.hours,
         "images_per_second": None if job.name in together else score.rate}
        for job, score in scores.items()
    ]  # fmt: skip
    return {
        "schema": SCHEMA,
        "study": plan.folder.name,
        "primary": plan.primary,
        "baseline": plan.baseline,
        "seeds": list(plan.seeds),
        "arms": [{**asdict(arm), "acted": str(arm.acted) if arm.acted else None}
                 for arm in plan.arms],
        "sets": sets,
        "metrics": [row for name in plan.sets for row in every_metric(plan, name, scores)],
        "sweeps": [dict(sweep) for sweep in sweeps],
        "runs": runs,
        "problems": dict(problems),
        "hours": sum(score.hours for score in scores.values()),
        "environment": _environments(scores.values()),
    }  # fmt: skip


def _environments(scores: Any) -> dict[str, list[Any]]:
    """Each part of the environments, its different values: one where all runs agree."""
    found: dict[str, list[Any]] = {}
    for score in scores:
        for name in ("git", "python", "platform", "cpu", "cores", "gpus", "packages"):
            value = score.environment.get(name)
            if value not in found.setdefault(name, []):
                found[name].append(value)
    return found
