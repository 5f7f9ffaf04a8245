"""Command: the features of a set, for other programs. ``python -m fastproj.embed runs/NAME``

Writes ``features`` (N, d), ``labels`` (N,) and ``index`` (N,) of ``--embed.data`` to
``--embed.out``, under any encoder that ``fastproj evaluate`` takes. ``fastproj evaluate`` reads the
file again: ``--data.train train.npz --data.val val.npz --eval.out FOLDER``.
"""

if __name__ == "__main__":  # before torch is imported, so that --help answers at once
    from fastproj.__main__ import main as run_as_script

    run_as_script("embed")

import json
from collections.abc import Sequence
from pathlib import Path

from fastproj.core import dist
from fastproj.core.errors import InputError
from fastproj.core.files import writing
from fastproj.data.beton import open_beton
from fastproj.evaluate import open_encoder, open_extractor, start_device
from fastproj.evaluation.files import WRITTEN, write_features
from fastproj.evaluation.protocol import normalization
from fastproj.runs.command import open_run_or_none
from fastproj.runs.folder import RunFolder
from fastproj.settings import EMBED, EmbedSettings


def embed(run: RunFolder | None, settings: EmbedSettings) -> Path:
    """Write the features that the settings describe; returns the file.

    Raises ``InputError`` for an encoder or a set that cannot be read, for more than one depth, and
    where the file cannot be written.
    """
    how, to = settings.eval, settings.embed.out
    if to is None or Path(to).suffix not in WRITTEN:
        raise InputError(f"embed.out is {to}: give --embed.out FILE, {' or '.join(WRITTEN)}")
    if len(how.depths) != 1:
        raise InputError(f"eval.depths {', '.join(how.depths)}: a file holds one: give one")
    device = start_device(settings)
    _, encoder = open_encoder(run, settings)
    train = open_beton(settings.data.train)
    beton = open_beton(settings.embed.data) if settings.embed.data else train
    mean, std = normalization(how.normalize, encoder, train)
    extractor = open_extractor(settings, device, encoder)
    found = extractor.encode(beton, encoder, how.depths, (mean, std))[how.depths[0]]
    path = Path(to)
    if dist.is_main():
        about = {
            **extractor.about(),
            "encoder": {**encoder.about, "weights": encoder.weights},
            "depth": how.depths[0],
            "mean": list(mean),
            "std": list(std),
            "data": {"file": str(beton.path), "content": beton.manifest.content},
        }
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_features(path, found, {"protocol": json.dumps(about)})
    return path


def main(argv: Sequence[str]) -> None:
    run, settings = open_run_or_none(
        EMBED,
        argv,
        "python -m fastproj.embed",
        "Write the features of a set: of a run's encoder, or of any checkpoint.",
        ("--eval.checkpoint", "--eval.encoder"),
    )
    try:
        with dist.losing_ranks():
            path = embed(run, settings)
        if dist.is_main():
            print(f"written: {path}")
    finally:
        dist.stop()
