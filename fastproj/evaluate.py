"""Command: what a pre-trained encoder is worth. ``python -m fastproj.evaluate runs/NAME``

Checkpoint -> frozen features of train and val, once -> ``eval.probes`` -> one table, and
``eval.json`` in the run folder. ``--eval.baselines true`` probes raw pixels and the encoder as it
was before pre-training in the same way. ``--eval.checkpoint`` takes other libraries' files too, and
``--eval.out FOLDER`` stands in for the run folder. Several ranks (torchrun) share the features.
"""

if __name__ == "__main__":  # before torch is imported, so that --help answers at once
    from fastproj.__main__ import main as run_as_script

    run_as_script("evaluate")

import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastproj.core import dist
from fastproj.core.device import choose_device, choose_precision, prepare_device
from fastproj.core.errors import InputError
from fastproj.core.files import sha256, writing
from fastproj.core.machine import cores
from fastproj.core.table import hyperparameters
from fastproj.evaluation import PROBES
from fastproj.evaluation.cache import Cache
from fastproj.evaluation.extract import Extractor
from fastproj.evaluation.files import is_features_file
from fastproj.evaluation.load import LoadedEncoder, load_encoder
from fastproj.evaluation.protocol import Protocol, describe_normalization, takes_images
from fastproj.evaluation.published import BATCH_SIZES
from fastproj.evaluation.results import Evaluation, Row, holds_whole, table, write_evaluation
from fastproj.evaluation.sets import Sets, open_folders, open_sets
from fastproj.models.architectures import output_width
from fastproj.runs import checkpoint
from fastproj.runs.command import open_run_or_none
from fastproj.runs.environment import versions
from fastproj.runs.folder import RunFolder
from fastproj.settings import RUN, Settings

# Ranks wait for the first one while it probes: longer than any probe takes.
PATIENCE = 24 * 3600.0  # seconds


def evaluate(run: RunFolder | None, settings: Settings) -> tuple[Evaluation, dict[str, Tensor]]:
    """Probe the encoder as ``settings.eval`` says; writes cached features, if anything.

    ``run`` may be None where ``settings.eval.out`` names a folder. Returns what ``eval.json`` is to
    hold, and the predictions under the paths that its rows name. What cannot be scored is in
    ``missing``. Raises ``InputError`` for a missing or damaged checkpoint, for sets that cannot be
    probed and where nothing can be scored.
    """
    device, out = start_device(settings), results_folder(run, settings)
    sets = _sets(settings)
    path, encoder = None, None
    if is_features_file(settings.data.train):
        how = settings.eval
        if how.sets or how.baselines or tuple(how.depths) != ("h",):
            raise InputError(
                f"{settings.data.train} holds features and no images: leave out eval.sets and "
                "eval.depths, and give --eval.baselines false"
            )
        protocol = _protocol(settings, sets, device, out)
        scores = protocol.score_files()
    else:
        path, encoder = open_encoder(run, settings)
        protocol = _protocol(settings, sets, device, out, encoder)
        scores = protocol.score("pre-trained", encoder)
        if settings.eval.baselines:
            # As pre-training found it, batch-norm statistics included. Estimating them on training
            # images makes a weaker baseline (digits at 16 px, resnet_small, 3 seeds: linear
            # 94.2-95.0 % against 95.8-97.2 %, kNN 93.9-94.4 % against 94.4-95.3 %).
            random = protocol.score("random", encoder.at_random(settings.run.seed), baseline=True)
            scores = chain(protocol.score("pixels", None), random, scores)
    rows: list[Row] = []
    predictions: dict[str, Tensor] = {}
    missing: list[str] = []
    try:
        with dist.losing_ranks():
            for row, result in scores:
                if isinstance(result, InputError):
                    missing.append(f"probe {row.probe} of {row.encoder} on {row.data}: {result}")
                    continue
                file = out.predictions(row.data, row.encoder, row.probe)
                kept = file.relative_to(out.path).as_posix()
                predictions[kept] = result.predictions
                rows.append(replace(row, predictions=kept))
    except InputError as error:  # no features: what comes after them is missing
        if not rows:
            raise
        missing.append(str(error))
    if not rows and missing:
        raise InputError(missing[0])
    evaluation = Evaluation(
        checkpoint={
            "file": path and str(path),
            "sha256": path and sha256(path),
            "step": encoder and encoder.step,
            "epoch": encoder and encoder.epoch,
        },
        versions={
            **versions(),
            "python": platform.python_version(),
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        },
        rows=tuple(rows),
        missing=tuple(missing),
    )
    return evaluation, predictions


def results_folder(run: RunFolder | None, settings: Settings) -> RunFolder:
    """The folder that ``eval.out`` names, or else the run's."""
    if settings.eval.out is not None:
        return RunFolder(Path(settings.eval.out))
    assert run is not None  # the command line has one of them
    return run


def start_device(settings: Settings) -> torch.device:
    """This process's device, after it has joined the other ranks, if there are any."""
    device = choose_device(settings.run.device)
    rank = dist.start(device, PATIENCE)
    return prepare_device(device, rank.local_rank, tf32=False)


def open_encoder(run: RunFolder | None, settings: Settings) -> tuple[Path | None, LoadedEncoder]:
    """The encoder that ``settings.eval`` names, and its file.

    Says on stderr what was loaded from a file that is not ours, and what its images will be. Raises
    ``InputError`` for a size that the encoder does not take, and where nothing says the size.
    """
    how = settings.eval
    path: Path | None = None
    if how.encoder is None or how.checkpoint != "last":
        path = find_checkpoint(run, settings)
    encoder = load_encoder(path, how.encoder, _asked_size(settings))
    size = crop_size(settings, encoder)
    output_width(encoder.module, encoder.about["name"], size)
    if encoder.step is None and dist.is_main():
        print(
            f"{encoder.describe()}; crops of {size} pixels (others: --eval.size), "
            f"{describe_normalization(how.normalize, encoder)} (others: --eval.normalize imagenet "
            "or data)",
            file=sys.stderr,
        )
    return path, encoder


def crop_size(settings: Settings, encoder: LoadedEncoder) -> int:
    """Side of a crop, pixels: what was asked for, or the encoder's own, or that of its run.

    Raises ``InputError`` where nothing says it.
    """
    size = _asked_size(settings) or encoder.size
    if size is None and settings.sources()["views.size"] == "default":
        raise InputError(
            f"nothing says what size the images of {encoder.about['name']} have: give --eval.size "
            "PIXELS, such as 224"
        )
    return size or settings.views.size


def _asked_size(settings: Settings) -> int | None:
    """``eval.size``, or ``views.size`` of the command line."""
    asked = settings.sources()["views.size"] == "command line"
    return settings.eval.size or (settings.views.size if asked else None)


def find_checkpoint(run: RunFolder | None, settings: Settings) -> Path:
    """The file that ``eval.checkpoint`` names; ``last`` is the newest checkpoint in ``run``."""
    if settings.eval.checkpoint != "last":
        return Path(settings.eval.checkpoint)
    newest = checkpoint.latest(run.checkpoints) if run else None
    if newest is None:
        where = f"{run.path} holds no checkpoint: train first, or" if run else "no run folder:"
        raise InputError(f"{where} give --eval.checkpoint FILE")
    return newest


def open_extractor(
    settings: Settings,
    device: torch.device,
    encoder: LoadedEncoder | None = None,
    cache: Cache | None = None,
) -> Extractor:
    """How the settings compute features; ``crop_size`` says of which size.

    With ``data.workers`` 0 the ranks of a machine divide its cores.
    """
    how, data = settings.eval, settings.data
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return Extractor(
        size=crop_size(settings, encoder) if encoder else settings.views.size,
        device=device,
        crop_fraction=how.crop_fraction,
        crops=how.crops,
        batch_size=how.batch_size,
        loader={
            "engine": data.engine,
            "workers": data.workers or max(1, cores() // ranks),
            "memory_share": data.memory_share,
        },
        cache=cache,
    )


def _sets(settings: Settings) -> list[Sets]:
    data = settings.data
    if data.val is None:
        raise InputError("data.val is missing: give --data.val FILE, the beton to score probes on")
    return [open_sets(data.train, data.val), *open_folders(settings.eval.sets or ())]


def _protocol(
    settings: Settings,
    sets: Sequence[Sets],
    device: torch.device,
    out: RunFolder,
    encoder: LoadedEncoder | None = None,
) -> Protocol:
    """The settings of ``eval`` as plain arguments."""
    how = settings.eval
    cache = Cache(out.features) if how.cache else None
    return Protocol(
        sets,
        open_extractor(settings, device, encoder, cache),
        depths=how.depths,
        normalize=how.normalize,
        probes={name: _arguments(name, settings, device) for name in how.probes},
    )


def _arguments(probe: str, settings: Settings, device: torch.device) -> dict[str, Any]:
    """The arguments of a probe: its part of ``eval``'s options, and the run's seed if it takes one.

    The published protocols run the frozen encoder in the precision of pre-training, as their
    sources do. The device is that of the features.
    """
    options = settings.eval.options
    named = hyperparameters(PROBES[probe])
    given = {name: options[f"{probe}_{name}"] for name in named if f"{probe}_{name}" in options}
    if "seed" in named or takes_images(probe):
        given["seed"] = settings.run.seed
    if probe in BATCH_SIZES:
        given["precision"] = choose_precision(settings.train.precision, device)
    return given


def main(argv: Sequence[str]) -> None:
    run, settings = open_run_or_none(
        RUN,
        argv,
        "python -m fastproj.evaluate",
        "Probe a frozen encoder: of a run, or of any checkpoint.",
        ("--eval.out",),
    )
    out = results_folder(run, settings)
    try:
        evaluation, predictions = evaluate(run, settings)
        if not dist.is_main():
            return
    finally:
        dist.stop()
    print(table(evaluation), flush=True)  # before writing: it took minutes, a full disk may come
    missing = evaluation.missing
    more = f" (and {len(missing) - 1} more, see above)" if missing[1:] else ""
    failed = f"{missing[0]}{more}; " if missing else ""
    try:
        if failed and holds_whole(out):
            raise InputError(f"{out.evaluation} holds a whole evaluation and stays as it is")
        with writing(out.path):
            out.path.mkdir(parents=True, exist_ok=True)
        write_evaluation(out, evaluation, predictions)
    except InputError as error:
        raise InputError(
            f"{failed}{error}; the table above was not kept, evaluate again"
        ) from error
    if failed:
        raise InputError(f"{failed}the other rows are in {out.evaluation}")
    print(f"written: {out.evaluation}")
