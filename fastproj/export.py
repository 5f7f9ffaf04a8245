"""Command: the encoder alone, for other programs. ``python -m fastproj.export runs/NAME``

Writes ``export/`` in the run folder, laid out as Hugging Face's Hub has it: ``model.safetensors``
(the weights under the names of torchvision, or of the library that the encoder is from, without
projector, predictor or probe), ``model.onnx`` and the model card ``README.md``, which says how each
is loaded.
"""

if __name__ == "__main__":  # before torch is imported, so that --help answers at once
    from fastproj.__main__ import main as run_as_script

    run_as_script("export")

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastproj.core.errors import InputError
from fastproj.core.files import sha256, write_text, writing
from fastproj.data.beton import open_beton
from fastproj.data.manifest import Manifest
from fastproj.evaluate import find_checkpoint
from fastproj.evaluation.card import Facts, model_card
from fastproj.evaluation.onnx import NoExport, save_onnx
from fastproj.evaluation.pretrained import Pretrained, load_pretrained, save_pretrained
from fastproj.evaluation.results import Row, read_evaluation
from fastproj.models.encoders import num_features
from fastproj.runs.command import open_run
from fastproj.runs.environment import installed, versions
from fastproj.runs.folder import RunFolder
from fastproj.settings import Settings

WRITERS = ("safetensors", "onnx", "onnxscript", "onnxruntime")  # what the files were made with
ENCODER = "pre-trained"  # whose rows of eval.json the card shows


def export(run: RunFolder, settings: Settings) -> list[Path]:
    """Export ``eval.checkpoint``; returns the files.

    The metadata of ``model.safetensors``: ``encoder`` and, of our own, ``stem``; ``size`` (side of
    the crops, pixels), ``mean`` and ``std`` (per channel, of pixels in 0 to 1), ``step``,
    ``epoch``, and ``sha256`` of the weights. Without the packages of the extra ``onnx``, and where
    torch cannot export the encoder, there is no ``model.onnx``, and stderr says so. The card's
    accuracies are those that ``eval.json`` has of this very checkpoint.

    Raises ``InputError`` for a checkpoint that is missing, damaged, not whole or not finite, and
    where a file cannot be written.
    """
    checkpoint = find_checkpoint(run, settings)
    pretrained = load_pretrained(checkpoint)
    encoder = pretrained.build()
    with writing(run.export):
        run.export.mkdir(exist_ok=True)
    save_pretrained(pretrained, run.weights)
    written = [run.weights]
    difference = None
    try:
        difference = save_onnx(
            encoder, run.onnx, settings.views.size, _metadata(pretrained), pretrained.any_size
        )
        written.append(run.onnx)
    except ModuleNotFoundError as error:
        print(
            f"note: no {run.onnx.name}, {error.name} is missing: run ./setup.sh onnx in a "
            "checkout, elsewhere pip install 'fastproj-ssl[onnx]'",
            file=sys.stderr,
        )
        run.onnx.unlink(missing_ok=True)  # of an earlier export, perhaps of other weights
    except NoExport as error:
        print(f"note: {error}; the other files do not need it", file=sys.stderr)
        run.onnx.unlink(missing_ok=True)
    told = pretrained.settings or settings.flat()  # an export brings none
    environment = _environment(run)
    manifest = _manifest(settings, pretrained)
    facts = Facts(
        name=run.name,
        size=settings.views.size,
        num_features=num_features(encoder),
        settings=told,
        recipe=_recipe(environment),
        data=manifest.dataset if manifest else Path(settings.data.train).name,
        images=manifest.samples if manifest else None,
        rows=_rows(run, checkpoint),
        onnx=difference,
        environment=environment,
        versions=versions() | {name: installed(name) for name in WRITERS},
    )
    write_text(run.card, model_card(pretrained, facts))
    return [*written, run.card]


def _metadata(pretrained: Pretrained) -> dict[str, str]:
    return {name: str(getattr(pretrained, name)) for name in ("encoder", "stem", "mean", "std")}


def _environment(run: RunFolder) -> dict[str, Any]:
    try:
        return json.loads(run.environment.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {run.environment}: {error}") from None


def _recipe(environment: dict[str, Any]) -> str | None:
    """The name of the recipe on the command line that started the run."""
    words = shlex.split(environment["command"])
    for word, following in zip(words, [*words[1:], ""], strict=True):
        option, equals, value = word.partition("=")
        if option == "--cfg":
            return Path(value if equals else following).stem
    return None


def _manifest(settings: Settings, pretrained: Pretrained) -> Manifest | None:
    """That of the training set; None where it is not there any more, or another one is."""
    try:
        found = open_beton(settings.data.train).manifest
    except (InputError, OSError):
        return None
    return found if pretrained.data in (None, found.content) else None


def _rows(run: RunFolder, checkpoint: Path) -> list[Row]:
    """The scores of the checkpoint; none where ``eval.json`` is missing or of other weights."""
    if not run.evaluation.exists():
        return []
    evaluation = read_evaluation(run)
    if evaluation.checkpoint["sha256"] != sha256(checkpoint):
        print(
            f"note: {run.evaluation} is of another checkpoint, the card shows no accuracy: run "
            f"fastproj evaluate {run.path} --eval.checkpoint {checkpoint} first",
            file=sys.stderr,
        )
        return []
    return [row for row in evaluation.rows if row.encoder == ENCODER]


def main(argv: Sequence[str]) -> None:
    run, settings = open_run(argv, "python -m fastproj.export", "Write the encoder of a run alone.")
    for path in export(run, settings):
        print(f"written: {path}")
