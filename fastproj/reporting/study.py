"""The page of a study, from its ``study.json`` and the journals of its runs."""

import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from fastproj.core.errors import InputError
from fastproj.reporting import curves
from fastproj.reporting.figures import (
    COLORS,
    FAINT,
    INK,
    Picture,
    in_style,
    name_below,
    scatter,
    slug,
    start,
)
from fastproj.reporting.page import Block, Download, Missing, Page, Section, Table, Text
from fastproj.reporting.read import Reported
from fastproj.studies import table
from fastproj.studies.plan import NO_OP
from fastproj.studies.results import SCHEMA

Study = Mapping[str, Any]
INFORMATION = "matrix_information"
ONLINE = {"online_top1": "on val", "online_probe": "on training views"}  # the first that is there
LABEL = 32  # letters per line of a label below axes that have long names at their left
FEW = 4  # tries that are written below an axis as they were set


def read_study(path: Path) -> dict[str, Any]:
    """Read ``study.json``. Raises ``InputError`` if it is damaged or of another schema."""
    again = "start the study again, which writes it from its runs"
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}): {again}") from None
    schema = found.get("schema") if isinstance(found, dict) else None
    if schema != SCHEMA:
        raise InputError(f"{path} has schema {schema}, expected {SCHEMA}: {again}")
    wanted = {"study", "primary", "baseline", "arms", "sets", "sweeps", "runs", "problems",
              "environment"}  # fmt: skip
    if missing := wanted - found.keys():
        raise InputError(f"{path} lacks {', '.join(sorted(missing))}: {again}")
    return found


def study_page(study: Study, runs: Mapping[str, Reported], notes: Sequence[str] = ()) -> Page:
    """The answer first, then what it rests on. ``runs``: by the names that ``study`` gives them."""
    gains: list[Block] = [*map(forest_of(study), study["sets"])]
    gains.append(_table(study))
    answers: list[Block] = [Text(sentence) for sentence in table.conclusions(study)]
    sections = [
        Section("What the data allow", answers),
        Section("Gains", gains),
        Section("Arms", [_arms(study)]),
        Section("Did the treatments act?", _checks(study)),
        Section("Sweeps", [sweep(study, found) for found in study["sweeps"]]),
        Section("Information plane", _planes(study, runs)),
        Section("Provenance", _provenance(study)),
    ]
    tries = sum(run["trial"] is not None for run in study["runs"])
    about = (
        f"Gains over {study['baseline']} in {study['primary']} on val, paired by seed; "
        f"{len(study['runs']) - tries} runs to compare and {tries} in sweeps, "
        f"{study.get('hours', 0):.2f} hours."
    )
    return Page(f"Study {study['study']}", about, sections, notes)


def forest_of(study: Study) -> Any:
    """The function that draws the forest plot of one set of ``study``."""

    def draw(part: Mapping[str, Any]) -> Block:
        rows = [row for row in part["rows"] if row.get("gain_mean") is not None]
        if not rows:
            return Missing(part["set"], f"no arm has a seed in common with {study['baseline']}")
        return forest(part["set"], rows, study["baseline"], study["primary"])

    return draw


@in_style
def forest(dataset: str, rows: Sequence[Mapping[str, Any]], baseline: str, primary: str) -> Picture:
    """Paired gains with their 95 % intervals, and the published ones; controls are hollow."""
    figure, axes = start(0.9 + 0.38 * len(rows))
    axes.axvline(0, color=INK, linewidth=1)
    for number, row in enumerate(rows):
        y, color = -number, COLORS[1] if row["control"] else COLORS[0]
        mean, low, high = row["gain_mean"], row.get("gain_low"), row.get("gain_high")
        if low is not None:
            axes.plot([low, high], [y, y], color=color, linewidth=2, solid_capstyle="butt")
        axes.plot([mean], [y], "s" if row["control"] else "o", color=color, markersize=6,
                  markerfacecolor="none" if row["control"] else color,
                  label="control" if row["control"] else "arm")  # fmt: skip
        if row.get("published") is not None:
            axes.plot([row["published"]], [y], "D", color=COLORS[4], markersize=6,
                      markerfacecolor="none", markeredgewidth=1.6, label="published")  # fmt: skip
    names = [f"{row['arm']} (n = {row['pairs']})" for row in rows]
    axes.set_yticks([-n for n in range(len(rows))], names)
    axes.set_ylim(-len(rows) + 0.4, 0.6)
    axes.grid(False, axis="y")
    axes.set_xlabel(textwrap.fill(f"gain in {primary} over {baseline} (points)", LABEL))
    name_below(figure, axes)
    how = (
        "Each mark is the mean gain of one arm over its seeds, and the line its 95 % interval: one "
        "that crosses 0 leaves open whether the arm gains or loses."
    )
    if any(row["control"] for row in rows):
        how += " Squares are controls; no-op is the baseline with other seeds: chance alone."
    if any(row.get("published") is not None for row in rows):
        how += " Diamonds are the papers' gains, in the papers' settings."
    head = ("arm", "pairs", "gain_mean", "gain_low", "gain_high", "published", "p_holm")
    numbers = [[row.get(name) for name in head] for row in rows]
    title = f"Gains on {dataset}"
    return Picture(f"gains-{slug(dataset)}", title, how, figure, head, numbers)


def _table(study: Study) -> Block:
    head = [name.format(primary=study["primary"]) for name in table.HEAD]
    how = (
        "Mean ± standard deviation over n seeds, the gain over the seeds that the arm shares with "
        "the baseline, its 95 % t interval, p after Holm's correction over the arms, and the gain "
        "that the paper published in its own settings. Acted: whether the arm's declared check "
        "found its treatment at work."
    )
    return Table("Table", head, [table.cells(row) for row in table.rows(study)], how=how)


def _arms(study: Study) -> Block:
    """What each arm is, and what its sweep chose."""
    rows = []
    for arm in study["arms"]:
        of = {"": arm["name"], NO_OP: study["baseline"]}.get(arm["control"], arm["control"])
        chosen = [
            (f"{found['set']}: " if len(study["sets"]) > 1 else "")
            + table.settings(found["chosen"])
            for found in study["sweeps"]
            if found["arm"] == of and found["chosen"]
        ]
        own = table.settings({**arm["settings"], **arm["forced"]})
        rows.append((arm["name"], arm["recipe"], own, "; ".join(chosen)))
    head = ("arm", "recipe", "settings of its own", "chosen in its sweep")
    return Table("What each arm is", head, rows)


def _checks(study: Study) -> list[Block]:
    """One line per arm that declares how it acts, and a figure per check with numbers."""
    blocks: list[Block] = []
    rows = [row for row in table.rows(study) if row.get("check")]
    words = {True: "acted", False: "not shown to act", None: "not known"}
    if rows:
        head = ("set", "arm", "declared check", "verdict")
        lines = [(r["set"], r["arm"], r["check"], words[r["acted"]]) for r in rows]
        how = "The gain of an arm that was not shown to act is no test of its treatment."
        blocks.append(Table("", head, lines, how=how))
    for row in rows:
        if row.get("diagnostic", {}).get("arm"):
            blocks.append(check(row, study["baseline"], words[row["acted"]]))
    return blocks


@in_style
def check(row: Mapping[str, Any], baseline: str, verdict: str) -> Picture:
    """The diagnostic that shows whether a treatment acted: each run, beside the baseline's."""
    figure, axes = start(2.2)
    name, *rest = row["check"].split()
    groups = {key: row["diagnostic"][part] for key, part in ((row["arm"], "arm"),
              (baseline, "baseline")) if row["diagnostic"][part]}  # fmt: skip
    for number, values in enumerate(groups.values()):
        axes.plot(values, [-number] * len(values), "os"[number], color=COLORS[number], alpha=0.7)
    if len(groups) == 2:
        axes.plot(list(groups.values()), [0, -1], color=FAINT, linewidth=0.8, zorder=1)
    axes.set_yticks([-n for n in range(len(groups))], list(groups))
    axes.set_ylim(-len(groups) + 0.4, 0.6)
    axes.grid(False, axis="y")
    if len(rest) == 2:
        axes.axvline(float(rest[1]), color=INK, linewidth=1)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    words = name.replace("_", " ")
    axes.set_xlabel(textwrap.fill(f"{words} in the last epoch ({_unit(name)})", LABEL))
    declared = f"{rest[0]} than in {baseline}, by the 95 % interval of paired differences (gray)"
    if len(rest) == 2:
        declared = f"{rest[0]} {rest[1]} (the line) in every run"
    how = f"Each mark is one run. Declared check: {words} {declared}. Verdict: {verdict}."
    numbers = [(key, value) for key, values in groups.items() for value in values]
    return Picture(f"check-{slug(row['set'])}-{slug(row['arm'])}", f"{row['arm']} on {row['set']}",
                   how, figure, ("arm", name), numbers)  # fmt: skip


def _unit(diagnostic: str) -> str:
    """The unit in which the journal has a diagnostic."""
    panel = next((p for p in curves.PANELS if diagnostic in p.curves), None)
    if panel is None:
        return "as logged"
    if panel.factor == curves.PER_CENT:
        return "fraction"
    return panel.axis.rpartition("(")[2].removesuffix(")")  # "I₂(h; z) (nats)" -> "nats"


@in_style
def sweep(study: Study, found: Mapping[str, Any]) -> Picture:
    """The accuracy on the holdout of train of each try, with the choice marked.

    Of a sweep of several settings, the first one is the horizontal axis and the others give one
    line each.
    """
    figure, axes = start()
    first, *others = found["tries"][0]
    groups: dict[str, list[int]] = {}
    for trial, tried in enumerate(found["tries"]):
        label = ", ".join(f"{name} {tried[name]}" for name in others)
        groups.setdefault(label, []).append(trial)
    texts = list(dict.fromkeys(tried[first] for tried in found["tries"]))
    numbers = _numbers(texts)
    places = dict(zip(texts, numbers or range(len(texts)), strict=True))
    for number, (label, trials) in enumerate(groups.items()):
        there = [t for t in trials if found["holdout"][t] is not None]
        there.sort(key=lambda t: places[found["tries"][t][first]])
        axes.plot([places[found["tries"][t][first]] for t in there],
                  [found["holdout"][t] for t in there], "o-", markersize=4,
                  color=COLORS[number % len(COLORS)], label=label)  # fmt: skip
    seeds = [
        (places[found["tries"][run["trial"]][first]], run["holdout"])
        for run in study["runs"]
        if (run["set"], run["arm"]) == (found["set"], found["arm"])
        and run["trial"] is not None
        and run["holdout"] is not None
    ]
    if seeds:
        axes.plot(*zip(*seeds, strict=True), ".", color=COLORS[5], markersize=4, zorder=1)
    if found["chosen"] is not None:
        best = found["tries"].index(found["chosen"])
        axes.plot(places[found["chosen"][first]], found["holdout"][best], "*", markersize=13,
                  markerfacecolor="none", color=INK, label="chosen")  # fmt: skip
    if numbers and min(numbers) > 0 and max(numbers) >= 4 * min(numbers):
        axes.set_xscale("log")
    if len(texts) <= FEW or not numbers:
        axes.minorticks_off()
        axes.set_xticks(list(places.values()), texts)
    axes.set(xlabel=f"{first} (as set)", ylabel="accuracy on the holdout (%)")
    name_below(figure, axes)
    how = "Each mark is one try, scored on images held out of train"
    if len(seeds) > len(found["tries"]):
        how += " (mean over the sweep's seeds; the dots are single runs)"
    how += ". The star is the try that was chosen."
    if found["edge"]:
        edge = " and ".join(found["edge"])
        how += f" It lies at an end of the values of {edge}: a better one may lie beyond."
    head = (first, *others, "holdout (%)")
    rows = [
        (*tried.values(), value)
        for tried, value in zip(found["tries"], found["holdout"], strict=True)
    ]
    name = f"sweep-{slug(found['set'])}-{slug(found['arm'])}"
    return Picture(name, f"{found['arm']} on {found['set']}", how, figure, head, rows)


def _numbers(texts: Sequence[str]) -> list[float]:
    """The texts as numbers; none where one is not."""
    try:
        return [float(text) for text in texts]
    except ValueError:
        return []


def _planes(study: Study, runs: Mapping[str, Reported]) -> list[Block]:
    blocks: list[Block] = []
    for part in study["sets"]:
        groups: dict[str, tuple[list[float], list[float]]] = {}
        for run in study["runs"]:
            information = run["diagnostics"].get(INFORMATION)
            accuracy = run["metrics"].get(study["primary"])
            if run["set"] == part["set"] and run["trial"] is None and information is not None:
                x, y = groups.setdefault(run["arm"], ([], []))
                x.append(information)
                y.append(100 * accuracy)
        if groups:
            how = (
                "Each mark is one run after its last epoch. Further left, the projections z share "
                "less with the features h (I₂: matrix information); further up, the probe on h is "
                "more accurate."
            )
            axes = ("I₂(h; z) (nats)", f"{study['primary']} (%)")
            name = f"plane-{slug(part['set'])}"
            blocks.append(scatter(name, f"Runs on {part['set']}", how, axes, groups))
        if picture := _paths(study, part["set"], runs):
            blocks.append(picture)
    if study["sets"] and not blocks:
        blocks.append(Missing("information plane", "no run has the diagnostic matrix_information"))
    return blocks


def _paths(study: Study, dataset: str, runs: Mapping[str, Reported]) -> Picture | None:
    """Each arm's way through the plane by epoch: the mean over its seeds."""
    of_arm: dict[str, list[dict[str, curves.Curve]]] = {}
    for run in study["runs"]:
        if run["set"] == dataset and run["trial"] is None and run["job"] in runs:
            of_arm.setdefault(run["arm"], []).append(curves.curves(runs[run["job"]].events))
    every = [found for group in of_arm.values() for found in group]
    online = next((name for name in ONLINE if every and all(name in f for f in every)), None)
    if online is None:
        return None
    groups = {}
    for arm, group in of_arm.items():
        path: dict[int, list[tuple[float, float]]] = {}
        for found in group:
            information = dict(zip(*found.get(INFORMATION, ([], [])), strict=True))
            for epoch, accuracy in zip(*found[online], strict=True):
                if epoch in information:
                    path.setdefault(epoch, []).append((information[epoch], 100 * accuracy))
        whole = [np.mean(path[e], axis=0) for e in sorted(path) if len(path[e]) == len(group)]
        if whole:
            groups[arm] = ([float(x) for x, _ in whole], [float(y) for _, y in whole])
    if not groups:
        return None
    how = (
        "Each line follows one arm from epoch to epoch (mean over its seeds) and ends at the large "
        f"mark. The online probe trains beside the encoder and is scored {ONLINE[online]}."
    )
    axes = ("I₂(h; z) (nats)", f"online probe {ONLINE[online]} (%)")
    name = f"paths-{slug(dataset)}"
    return scatter(name, f"Epochs on {dataset}", how, axes, groups, joined=True)


def _provenance(study: Study) -> list[Block]:
    blocks: list[Block] = [Text(note) for note in table.notes(study)]
    if study["problems"]:
        rows = list(study["problems"].items())
        blocks.append(Table("Runs without a result", ("run", "reason"), rows))
    rows = [
        (run["job"], run["arm"], run["set"], run["seed"], run["metrics"].get(study["primary"]),
         run["hours"], run["images_per_second"])
        for run in study["runs"]
    ]  # fmt: skip
    head = ("run", "arm", "set", "seed", study["primary"], "hours", "images/s (alone)")
    blocks.append(Table("Runs", head, rows, folded=True))
    for name, kind, form in (
        ("table.csv", "text/csv", table.as_csv),
        ("table.md", "text/markdown", table.as_markdown),
        ("table.tex", "text/x-tex", table.as_latex),
    ):
        blocks.append(Download(name, kind, form(study)))
    return blocks
