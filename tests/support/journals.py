"""Run folders as training leaves them, with numbers that can be told apart; no training."""

import json
from pathlib import Path

from fastproj.runs.journal import Journal

CONFIG = """\
run:
  name: {name}  # command line
  seed: {seed}  # command line
data:
  train: none/train.beton  # command line
  val: none/val.beton  # command line
model:
  encoder: resnet_small  # file rcfg/demo.yaml
objective:
  name: simclr  # default
optim:
  epochs: {epochs}  # file rcfg/demo.yaml
"""


def write_config(folder: Path, seed: int = 0, epochs: int = 4) -> Path:
    """``config.yaml`` and ``environment.json`` of a run whose betons do not exist."""
    folder.mkdir(parents=True, exist_ok=True)
    text = CONFIG.format(name=folder.name, seed=seed, epochs=epochs)
    (folder / "config.yaml").write_text(text)
    environment = {"command": "python -m fastproj train --x '<y>'", "cpu": "a cpu", "gpus": [],
                   "git": {"commit": "c" * 40, "dirty": False}, "cuda": None,
                   "packages": {"fastproj": "0", "torch": "1", "timm": None}}  # fmt: skip
    (folder / "environment.json").write_text(json.dumps(environment))
    return folder


def write_journal(
    folder: Path, epochs: int = 4, first: int = 0, end: bool = False, **more: float
) -> Path:
    """A journal of ``epochs`` epochs of 10 steps; ``more`` are penalties, in every event."""
    folder.mkdir(parents=True, exist_ok=True)
    total = 10 * (first + epochs)
    terms = {"terms": {"objective": 4.0, **more}} if more else {}
    with Journal(folder / "metrics.jsonl", main=True, total=total, start=10 * first) as book:
        book.event("start", steps=total)
        for epoch in range(first, first + epochs):
            for half in (5, 10):
                book.event("step", step=10 * epoch + half, epoch=epoch, loss=9.0 - epoch,
                           lr=0.1 * (epoch + 1), images_per_second=100.0 + half,
                           data_wait=0.25, **terms)  # fmt: skip
            book.event(
                "epoch",
                step=10 * (epoch + 1),
                epoch=epoch,
                steps=10,
                loss=5.0 - epoch,
                online_probe=0.1 * epoch,
                diagnostics={
                    "matrix_information": 1.0 - 0.1 * epoch,
                    "matrix_information_std": 0.05,
                    "negative_loss_minus_information": -6.0 - epoch,
                    "negative_loss_minus_information_std": 0.5,
                    "entropy_minus_information": 1.0 + epoch,
                    "entropy_minus_information_std": 0.25,
                    "rankme_features": 30.0 + epoch,
                    "dead_latents": 0.25,
                    "spectrum_features": [[1, 0.5 + 0.01 * epoch], [2, 0.25], [9, 0.0]],
                    "spectrum_projections": [[1, 0.75], [4, 0.25]],
                },
                seconds={"data_wait": 0.5, "step": 2.0, "pause": 0.0},
                **more,
            )
            if epoch % 2:
                book.event(
                    "probe",
                    step=10 * (epoch + 1),
                    epoch=epoch,
                    online_top1=0.1 * epoch,
                    online_top5=0.2 * epoch,
                    online_knn_top1=0.3,
                    seconds=1.5,
                    protocol={"knn": {"k": 20, "temperature": 0.07}},
                )
        if end:
            book.event("end", step=total, seconds={"data_wait": 0.5, "step": 1.0, "pause": 0.0},
                       images_per_second=123.0)  # fmt: skip
    return folder / "metrics.jsonl"


def write_run(
    folder: Path, epochs: int = 4, seed: int = 0, end: bool = True, **more: float
) -> Path:
    """Settings, environment and journal; not evaluated."""
    write_config(folder, seed, epochs)
    write_journal(folder, epochs, end=end, **more)
    return folder
