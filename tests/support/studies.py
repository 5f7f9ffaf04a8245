"""Run folders as train and evaluate leave them, with numbers of the test's choice."""

import json
from typing import Any

import numpy as np
import torch

from fastproj.evaluation.results import Evaluation, Row, write_evaluation
from fastproj.runs import checkpoint
from fastproj.studies.plan import Job

LABELS = np.arange(40) % 4  # of the val images


def fake_run(
    job: Job,
    right: int | None = 30,
    holdout: float = 0.5,
    diagnostics: dict[str, float] | None = None,
    **changes: Any,
) -> None:
    """A whole run whose linear probe is right on the first ``right`` of the images.

    ``changes``: ``epochs`` and ``val`` (the content) of the protocol, ``step`` of the evaluation,
    ``ended`` false for a run that was cut; ``right`` None: not evaluated.
    """
    run = job.run
    checkpoint.save(checkpoint.step_path(run.checkpoints, 8), {"step": 8}, 1)
    parts = {"data_wait": 1.0, "step": 8.0, "pause": 1.0}
    events: list[dict[str, Any]] = [
        {"event": "start", "step": 0},
        {"event": "epoch", "epoch": 0, "step": 8, "steps": 8, "seconds": parts,
         "diagnostics": {"matrix_information": 1.0, **(diagnostics or {})}},
    ]  # fmt: skip
    if changes.get("ended", True):
        events.append({"event": "end", "step": 8, "images_per_second": 100.0, "seconds": parts})
    run.metrics.write_text("".join(json.dumps(event) + "\n" for event in events))
    packages = {"fastproj": "0", "torch": "1"}
    about = {"git": {"commit": "c" * 40, "dirty": False}, "cpu": "a cpu", "packages": packages,
             "gpus": [], "python": "3", "platform": "p", "cores": 2}  # fmt: skip
    run.environment.write_text(json.dumps(about))
    if right is None:
        return
    predicted = np.where(np.arange(len(LABELS)) < right, LABELS, (LABELS + 1) % 4)
    rows, kept = [], {}
    for probe in ("logistic", "knn"):
        chosen = {"chosen": {"holdout_top1": holdout}} if probe == "logistic" else {}
        path = run.predictions(job.dataset, "pre-trained", probe).relative_to(run.path).as_posix()
        kept[path] = torch.from_numpy(predicted)
        rows.append(
            Row(
                encoder="pre-trained",
                data=job.dataset,
                probe=probe,
                metrics={"top1": right / len(LABELS), "top5": 1.0},
                protocol={
                    "data": {
                        "train": {"content": "t"},
                        "val": {"content": changes.get("val", "v")},
                    },
                    "features": {"crop": {"size": 8}},
                    "probe": {"epochs": changes.get("epochs", 3), "seed": job.pair, **chosen},
                },
                seconds={"features": 20.0, "probe": 3.0},
                predictions=path,
            )
        )  # fmt: skip
    header = {"file": "f", "sha256": "s", "step": changes.get("step", 8), "epoch": 1}
    write_evaluation(run, Evaluation(header, {}, tuple(rows)), kept)
