"""The page of one run."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastproj.core.errors import InputError
from fastproj.evaluation.results import Row
from fastproj.reporting import curves, samples
from fastproj.reporting.curves import Panel
from fastproj.reporting.figures import (
    Picture,
    confusion,
    lines,
    of_panel,
    stacked,
)
from fastproj.reporting.page import Block, Missing, Page, Section, Table, Text
from fastproj.reporting.read import Reported

QUERIES = 6  # val images whose neighbors are shown
ENCODER = "pre-trained"  # the rows of the run's own encoder

STEPS = {
    "loss": Panel(
        "Loss per step",
        "loss",
        {},
        "The whole loss of the logged steps; it should fall and settle, and a jump marks an "
        "unstable learning rate.",
    ),
    "lr": Panel(
        "Learning rate",
        "learning rate",
        {},
        "The optimizer's rate at each logged step: it rises during the warm-up and falls along a "
        "cosine.",
    ),
    "images_per_second": Panel(
        "Throughput",
        "images/s",
        {},
        "Training images per second between logged steps; dips are pauses or other work on the "
        "machine.",
    ),
    "data_wait": Panel(
        "Waiting for data",
        "of the time (%)",
        {},
        "Share of the time that the step waited for the loader; far above 0 means that loading is "
        "the bottleneck.",
        curves.PER_CENT,
    ),
}
TERMS = Panel(
    "Terms of the loss per step",
    "value, before its weight",
    {},
    "The objective and each penalty at the logged steps; the loss is the objective and the "
    "weighted sum of the others, and a treatment pushes its own term down.",
)
PARTS = {"step": "steps", "data_wait": "waiting for data", "pause": "pauses"}


@dataclass(frozen=True)
class Pictures:
    """What needs the run's data and weights: each is there, or the line that says why not."""

    views: samples.Views | str
    embedded: samples.Embedded | str
    # Of val, the classes' names, and the digest of the images' content.
    labels: tuple[NDArray[np.int64], Sequence[str], str] | str


def of_steps(name: str, found: dict[str, curves.Curve]) -> Picture | None:
    """The figure of a quantity of the logged steps; None where there is nothing."""
    if not any(places for places, _ in found.values()):
        return None
    return lines(f"step-{name.replace('_', '-')}", STEPS[name], found, "step")


def run_page(run: Reported, pictures: Pictures) -> Page:
    """Everything that a run has so far."""
    found = curves.curves(run.events)
    panels = curves.panels(found)
    training: list[Block] = [*filter(None, (_steps(run, name) for name in ("loss", "lr")))]
    if terms := curves.terms(run.events):
        named = {name.replace("_", " "): curve for name, curve in terms.items()}
        training.insert(1, lines("step-terms", TERMS, named, "step"))
    training += [of_panel(panel, found) for panel in panels if panel.group == "training"]
    diagnostics: list[Block] = [of_panel(p, found) for p in panels if p.group == "diagnostics"]
    if spectra := curves.spectra(run.events):
        named = {curves.SPECTRA.curves[name]: curve for name, curve in spectra.items()}
        diagnostics.append(spectrum_picture("spectrum", curves.SPECTRA, named))
    if not training:
        training.append(Missing("curves", "no step was logged yet"))
    if not diagnostics:
        diagnostics.append(
            Missing("diagnostics", "no epoch with diagnostics has ended (train.diagnostics_every)")
        )
    sections = [
        Section("Summary", _summary(run)),
        Section("Training", training),
        Section("Diagnostics", diagnostics),
        Section("Throughput", _throughput(run)),
        Section("Probes", _probes(run, pictures)),
        Section("Images", _images(pictures)),
        Section("Settings", _settings(run)),
        Section("Environment", _environment(run)),
    ]
    return Page(f"Run {run.name}", run.status(), sections)


def spectrum_picture(name: str, panel: Panel, found: dict[str, curves.Curve]) -> Picture:
    """Spectra of the last measured epoch: label -> (places, fractions)."""
    positive = {  # a logarithm has no place for 0
        label: ([k for k, v in zip(*curve, strict=True) if v > 0], [v for v in curve[1] if v > 0])
        for label, curve in found.items()
    }
    return lines(name, panel, positive, "singular value, from the largest", yscale="log")


def _steps(run: Reported, name: str) -> Picture | None:
    return of_steps(name, {"": curves.steps(run.events, name)})


def _summary(run: Reported) -> list[Block]:
    epochs = [event for event in run.events if event["event"] == "epoch"]
    chosen = {setting.name: setting.value for setting in run.settings}
    rows: list[tuple[str, Any]] = [("status", run.status())]
    for title, name in {"encoder": "model.encoder", "projector": "projector.kind",
                        "objective": "objective.name", "training data": "data.train",
                        "epochs planned": "optim.epochs", "seed": "run.seed"}.items():  # fmt: skip
        if name in chosen:
            rows.append((title, chosen[name]))
    if epochs:
        rows.append(("loss of the last epoch", epochs[-1]["loss"]))
    for row in run.evaluation.rows if run.evaluation else ():
        if row.encoder == ENCODER and "top1" in row.metrics:
            score = f"{row.metrics['top1']:.2%} top-1 on val"
            rows.append((f"{row.probe} probe, {row.data}", score))
    return [Table("", ("", ""), rows)]


def _throughput(run: Reported) -> list[Block]:
    blocks: list[Block] = [
        *filter(None, (_steps(run, name) for name in ("images_per_second", "data_wait")))
    ]
    if times := curves.times(run.events):
        named = {PARTS.get(name, name): curve for name, curve in times.items()}
        how = (
            "Seconds of each epoch spent in steps, waiting for data, and in pauses (checkpoints, "
            "online scores): where a bar is high, time can be saved."
        )
        blocks.append(stacked("time", "Where the time went", how, named, "seconds per epoch"))
    return blocks


def _probes(run: Reported, pictures: Pictures) -> list[Block]:
    if run.evaluation is None:
        return [Missing("probes", run.missing["eval.json"])]
    corrupted = [row for row in run.evaluation.rows if "accuracies" in row.protocol["probe"]]
    apart = {f"top1_{name}" for row in corrupted for name in row.protocol["probe"]["corruptions"]}
    found = dict.fromkeys(m for row in run.evaluation.rows for m in row.metrics)
    names = [name for name in found if name not in apart]
    rows = [
        (row.encoder, row.data, row.probe,
         *(f"{100 * row.metrics[m]:.2f}" if m in row.metrics else "" for m in names),
         f"{row.seconds.get('features', 0):.1f}", f"{row.seconds.get('probe', 0):.1f}")
        for row in run.evaluation.rows
    ]  # fmt: skip
    head = ("encoder", "data", "probe", *(f"{m} (% of val)" for m in names), "features (s)",
            "probe (s)")  # fmt: skip
    how = (
        "Accuracy on val of probes on frozen features (finetune trains the encoder too); 'random' "
        "is the encoder before pre-training and 'pixels' has none: pre-training is worth the "
        "difference to them."
    )
    blocks: list[Block] = [Table("Scores", head, rows, how=how), *map(_corruptions, corrupted)]
    blocks += [Missing("a score", line) for line in run.evaluation.missing]
    protocols = [
        (row.encoder, row.data, row.probe, json.dumps(row.protocol, sort_keys=True))
        for row in run.evaluation.rows
    ]
    blocks.append(
        Table("Protocols", ("encoder", "data", "probe", "protocol"), protocols, folded=True)
    )
    checkpoint = run.evaluation.checkpoint
    blocks.append(
        Text(f"Scored: {checkpoint['file']} (step {checkpoint['step']}, SHA-256 "
             f"{checkpoint['sha256']}).")
    )  # fmt: skip
    blocks.append(_confusion(run, run.evaluation.rows, pictures))
    return blocks


def _corruptions(row: Row) -> Table:
    """Top-1 of each corruption at each severity."""
    probe = row.protocol["probe"]
    severities, accuracies = probe["severities"], probe["accuracies"]
    rows = [
        (name, *(f"{100 * accuracies[f'{name} {severity}']:.2f}" for severity in severities),
         f"{100 * row.metrics[f'top1_{name}']:.2f}")
        for name in probe["corruptions"]
    ]  # fmt: skip
    head = ("corruption", *(f"severity {severity}" for severity in severities), "mean")
    clean = f"{row.metrics['top1_clean']:.2%}"
    how = f"Top-1 in per cent of val after each corruption; of the images as they are: {clean}."
    return Table(f"Corruptions: {row.encoder} encoder, {row.data}", head, rows, how=how)


def _confusion(run: Reported, rows: Sequence[Row], pictures: Pictures) -> Block:
    row = next((r for r in rows if r.encoder == ENCODER and r.predictions), None)
    if row is None or row.predictions is None:
        return Missing("confusion matrix", "no probe of the run's encoder kept its predictions")
    if isinstance(pictures.labels, str):
        return Missing("confusion matrix", pictures.labels)
    labels, classes, content = pictures.labels
    if row.protocol["data"]["val"]["content"] != content:
        return Missing("confusion matrix", "the predictions are of other images than val now has")
    path = run.folder.path / row.predictions
    try:
        counts = count(labels, np.load(path), len(classes))
    except (OSError, ValueError, EOFError, InputError) as error:
        return Missing("confusion matrix", f"cannot use {path}: {error}")
    picture = confusion(counts, classes)
    title = f"Confusion matrix of the {row.probe} probe"
    return Picture(picture.name, title, picture.how, picture.figure, picture.head, picture.rows)


def count(labels: NDArray[np.int64], predicted: NDArray[Any], classes: int) -> NDArray[np.int64]:
    """How often each class (rows) was predicted as each (columns); int64 (classes, classes).

    Raises ``InputError`` for predictions of other images or classes.
    """
    if predicted.shape != labels.shape or not np.issubdtype(predicted.dtype, np.integer):
        raise InputError(f"{predicted.shape} predictions for {len(labels)} val images")
    if len(predicted) and not 0 <= predicted.min() <= predicted.max() < classes:
        raise InputError(f"it predicts classes that the {classes} of val do not have")
    known = labels >= 0
    flat = labels[known] * classes + predicted[known]
    return np.bincount(flat, minlength=classes**2).reshape(classes, classes)


def _images(pictures: Pictures) -> list[Block]:
    blocks: list[Block] = []
    if isinstance(pictures.views, str):
        blocks.append(Missing("augmented views", pictures.views))
    else:
        blocks += [samples.share_table(pictures.views), samples.sheet(pictures.views)]
    found = pictures.embedded
    if isinstance(found, str):
        return [*blocks, Missing("nearest neighbors and map of the features", found)]
    if len(found.features) <= samples.NEIGHBORS:
        few = f"val has only {len(found.features)} images"
        return [*blocks, Missing("nearest neighbors and map of the features", few)]
    queries = np.linspace(0, len(found.features) - 1, QUERIES).round().astype(int).tolist()
    blocks += [samples.neighbors(found, queries), samples.embedding(found)]
    return blocks


def _settings(run: Reported) -> list[Block]:
    chosen = [setting for setting in run.settings if setting.source != "default"]
    defaults = [setting for setting in run.settings if setting.source == "default"]
    head = ("setting", "value", "source")
    return [
        Table("Given", head, chosen),
        Table("Defaults", head, defaults, folded=True),
    ]


def _environment(run: Reported) -> list[Block]:
    if run.environment is None:
        return [Missing("environment", run.missing["environment.json"])]
    about = dict(run.environment)
    command = about.pop("command", "")
    rows = []
    for name, value in about.items():
        inner = value.items() if isinstance(value, dict) else [("", value)]
        for key, one in inner:
            text = ", ".join(map(str, one)) or "none" if isinstance(one, list) else one
            rows.append((f"{name} {key}".strip(), "none" if text is None else str(text)))
    return [Text(command, "Command", code=True), Table("Machine", ("", ""), rows)]
