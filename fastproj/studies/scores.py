"""What each run of a study gave: read from its folder, and compared by protocol."""

import json
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastproj.core.errors import InputError
from fastproj.evaluation.results import Row, read_evaluation
from fastproj.runs import journal
from fastproj.studies.plan import Job
from fastproj.studies.running import StudyError

ENCODER = "pre-trained"  # the rows that count: not those of the baselines of one run
POINTS = 100.0  # per unit of accuracy


class Val(NamedTuple):
    """The val images of a set: their labels, int (N,), and the digest of their content."""

    labels: NDArray[np.integer]
    content: str


@dataclass(frozen=True)
class Score:
    """What one run gave.

    ``metrics``: ``PROBE.METRIC`` -> value; at another depth than h and on another set than the
    run's own ``PROBE.METRIC@z``, ``PROBE.METRIC@stl10``, ``PROBE.METRIC@stl10/z``. ``primary``: the
    study's, in points.
    ``holdout``: the primary probe's accuracy on its holdout of train, points; None where it has
    none. ``correct``: whether the primary probe is right on each val image, bool (N,).
    ``protocol``: everything that must be the same in all runs of a set. ``rate``: images/s.
    """

    metrics: dict[str, float]
    primary: float
    holdout: float | None
    correct: NDArray[np.bool_] | None
    diagnostics: dict[str, float]
    protocol: dict[str, Any]
    hours: float
    rate: float
    environment: dict[str, Any]


def read_score(job: Job, primary: str, val: Val | None) -> Score:
    """Read a whole run. ``val``: what its images are; None where no class of one is predicted.

    Raises ``StudyError`` where no probe gives the metric ``primary``, and ``InputError`` where a
    file is missing or damaged.
    """
    run = job.run
    evaluation, events = read_evaluation(run), journal.read(run.metrics)
    ours = list(evaluation.rows)
    if job.command == "train":  # another command has one row, of the encoder that it was given
        ours = [row for row in ours if row.encoder.partition("/")[0] == ENCODER]
    own = ours[0].data if ours else ""
    rows = {f"{row.probe}.{m}{_place(row, own)}": (row, m) for row in ours for m in row.metrics}
    metrics = {name: row.metrics[metric] for name, (row, metric) in rows.items()}
    if primary not in metrics:
        raise StudyError(
            f"study.primary is {primary!r}, which no probe gives in {run.evaluation}; choose one "
            f"of {', '.join(metrics)}"
        )
    row, metric = rows[primary]
    # The predictions of the score: not those of the first of several draws, nor of clean images.
    about = row.protocol["probe"]
    single = about.get("draws", 1) == 1 and "corrupted" not in about
    kept = metric == "top1" and row.predictions and row.data == own and single
    held = about.get("chosen", {}).get("holdout_top1")
    epochs = [event for event in events if event["event"] == "epoch"]
    busy = sum(sum(event["seconds"].values()) for event in epochs)
    busy += sum(row.seconds["probe"] for row in ours)
    busy += sum({row.data: row.seconds["features"] for row in ours}.values())
    try:
        environment = json.loads(run.environment.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {run.environment}: {error}") from None
    return Score(
        metrics=metrics,
        primary=POINTS * metrics[primary],
        holdout=None if held is None else POINTS * held,
        correct=_correct(job, row, val) if kept and val is not None else None,
        diagnostics=epochs[-1]["diagnostics"] if epochs else {},
        protocol=_protocol(row) if job.command == "train" else {"data": row.protocol["data"]},
        hours=busy / 3600,
        rate=events[-1].get("images_per_second", math.nan),
        environment=environment,
    )


def _place(row: Row, own: str) -> str:
    """Where a row was scored: ``@z``, ``@stl10``, ``@stl10/z``; empty at h on the run's own set."""
    depth = row.encoder.partition("/")[2]
    place = "/".join(filter(None, ["" if row.data == own else row.data, depth]))
    return f"@{place}" if place else ""


def _correct(job: Job, row: Row, val: Val) -> NDArray[np.bool_]:
    assert row.predictions is not None
    data, labels = row.protocol["data"]["val"], val.labels
    if data["content"] != val.content:
        raise InputError(
            f"{job.run.path} was scored on other images than val now has (it was "
            f"{data.get('file')}): put that back, evaluate the run again, or remove it"
        )
    path = job.run.path / row.predictions
    try:
        predicted = np.load(path)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"cannot read {path}: {error}; evaluate the run again") from None
    if predicted.shape != labels.shape:
        raise InputError(
            f"{path} has {len(predicted)} predictions for {len(labels)} val images: evaluate the "
            "run again"
        )
    return predicted == labels


def _protocol(row: Row) -> dict[str, Any]:
    """What was probed and how, without what differs from run to run: files, seeds, choices."""
    data, features, probe = (row.protocol[part] for part in ("data", "features", "probe"))
    return {
        "train": data["train"]["content"],
        "val": data["val"]["content"],
        "crop": features["crop"],
        "probe": {
            name: value
            for name, value in probe.items()
            if name not in ("chosen", "accuracies", "seed", "order_seed")
        },
    }


def same_protocol(scores: dict[Job, Score]) -> dict[str, str]:
    """Take out of ``scores`` the runs that were probed otherwise than most of their set.

    Returns one line per run taken out, by the job's name.
    """
    lines = {}
    for dataset in dict.fromkeys(job.dataset for job in scores):
        texts = {
            job: json.dumps(score.protocol, sort_keys=True)
            for job, score in scores.items()
            if job.dataset == dataset
        }
        ((most, _),) = Counter(texts.values()).most_common(1)
        for job, text in texts.items():
            if text != most:
                ours, others = scores.pop(job).protocol, json.loads(most)
                parts = ", ".join(name for name in ours if ours[name] != others[name])
                lines[job.name] = (
                    f"{job.run.path} was scored otherwise than the other runs of {dataset} "
                    f"({parts}): evaluate it again, or remove it"
                )
    return lines
