"""Command: what a pre-trained encoder is worth. ``python -m fastproj.evaluate runs/NAME``

Checkpoint -> frozen features of train and val, once -> ``eval.probes`` -> one table, and
``eval.json`` in the run folder. ``--eval.baselines true`` probes raw pixels and the encoder as it
was before pre-training in the same way.
"""

if __name__ == "__main__":  # before torch is imported, so that --help answers at once
    from fastproj.__main__ import main as run_as_script

    run_as_script("evaluate")

import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastproj.core.device import choose_device
from fastproj.core.errors import InputError
from fastproj.core.files import sha256
from fastproj.core.machine import keep_freed_memory
from fastproj.core.table import hyperparameters
from fastproj.evaluation import PROBES
from fastproj.evaluation.pretrained import load_pretrained
from fastproj.evaluation.protocol import Protocol, open_sets
from fastproj.evaluation.results import Evaluation, table, write_evaluation
from fastproj.models.encoders import build_encoder
from fastproj.runs import checkpoint
from fastproj.runs.command import open_run
from fastproj.runs.environment import versions
from fastproj.runs.folder import RunFolder
from fastproj.settings import Settings


def evaluate(run: RunFolder, settings: Settings) -> tuple[Evaluation, dict[str, Tensor]]:
    """Probe the run's encoder as ``settings.eval`` says; writes nothing.

    Returns what ``eval.json`` is to hold, and the predictions under the paths that its rows name.
    Raises ``InputError`` for a missing or damaged checkpoint and for sets that cannot be probed.
    """
    protocol = _protocol(settings)
    path = find_checkpoint(run, settings)
    pretrained = load_pretrained(path)
    encoders: dict[str, tuple[nn.Module | None, str]] = {}
    if settings.eval.baselines:
        # As pre-training found it, batch-norm statistics included. Estimating them on training
        # images makes a weaker baseline (digits at 16 px, resnet_small, 3 seeds: linear 94.2-95.0 %
        # against 95.8-97.2 %, kNN 93.9-94.4 % against 94.4-95.3 %).
        torch.manual_seed(settings.run.seed)
        random = build_encoder(pretrained.encoder, pretrained.stem)
        encoders["pixels"] = None, ""
        encoders["random"] = random, f"as initialized from seed {settings.run.seed}"
    encoders["pre-trained"] = pretrained.build(), "of the checkpoint"
    rows, predictions = [], {}
    for name, (encoder, weights) in encoders.items():
        for row, result in protocol.score(name, encoder, weights, pretrained):
            kept = run.predictions(name, row.probe).relative_to(run.path).as_posix()
            predictions[kept] = result.predictions
            rows.append(replace(row, predictions=kept))
    device = protocol.device
    evaluation = Evaluation(
        checkpoint={
            "file": str(path),
            "sha256": sha256(path),
            "step": pretrained.step,
            "epoch": pretrained.epoch,
        },
        versions={
            **versions(),
            "python": platform.python_version(),
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        },
        rows=tuple(rows),
    )
    return evaluation, predictions


def find_checkpoint(run: RunFolder, settings: Settings) -> Path:
    """The file that ``eval.checkpoint`` names; ``last`` is the newest checkpoint in ``run``."""
    if settings.eval.checkpoint != "last":
        return Path(settings.eval.checkpoint)
    newest = checkpoint.latest(run.checkpoints)
    if newest is None:
        raise InputError(
            f"{run.path} holds no checkpoint: train first, or give --eval.checkpoint FILE"
        )
    return newest


def _protocol(settings: Settings) -> Protocol:
    """The settings of ``eval`` as plain arguments, and the sets opened."""
    how, data = settings.eval, settings.data
    if data.val is None:
        raise InputError("data.val is missing: give --data.val FILE, the beton to score probes on")
    train, val = open_sets(data.train, data.val)
    device = choose_device(settings.run.device)
    if device.type == "cpu":
        keep_freed_memory()
    return Protocol(
        train,
        val,
        size=how.size or settings.views.size,
        crop_fraction=how.crop_fraction,
        batch_size=how.batch_size,
        device=device,
        loader={name: getattr(data, name) for name in ("engine", "workers", "memory_share")},
        probes={
            name: _arguments(name, how.options, settings.run.seed) for name in how.probes
        },
    )


def _arguments(probe: str, options: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """The arguments of a probe: its part of ``eval``'s options, and the run's seed if it takes one.

    The device is that of the features.
    """
    named = hyperparameters(PROBES[probe])
    own = {name: options[f"{probe}_{name}"] for name in named if f"{probe}_{name}" in options}
    return own | ({"seed": seed} if "seed" in named else {})


def main(argv: Sequence[str]) -> None:
    run, settings = open_run(
        argv, "python -m fastproj.evaluate", "Probe the frozen encoder of a run."
    )
    evaluation, predictions = evaluate(run, settings)
    print(table(evaluation), flush=True)  # before writing: it took minutes, a full disk may come
    try:
        write_evaluation(run, evaluation, predictions)
    except InputError as error:
        raise InputError(f"{error}; the table above was not kept, evaluate again") from error
    print(f"written: {run.evaluation}")
