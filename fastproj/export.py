"""Command: the encoder alone, for other programs. ``python -m fastproj.export runs/NAME``

Writes ``encoder.safetensors`` into the run folder: the weights under torchvision's names, without
projector, predictor or probe, and what the encoder expects of its input as metadata.
"""

if __name__ == "__main__":  # before torch is imported, so that --help answers at once
    from fastproj.__main__ import main as run_as_script

    run_as_script("export")

from collections.abc import Sequence
from pathlib import Path

from fastproj.evaluate import find_checkpoint
from fastproj.evaluation.pretrained import load_pretrained, save_pretrained
from fastproj.runs.command import open_run
from fastproj.runs.folder import RunFolder
from fastproj.settings import Settings


def export(run: RunFolder, settings: Settings) -> Path:
    """Export ``eval.checkpoint``; returns the file.

    Its metadata: ``encoder`` and ``stem``, ``mean`` and ``std`` (per channel, of pixels in 0 to 1),
    ``step``, ``epoch``, and ``sha256`` of the weights. A torchvision ResNet loads it with
    ``strict=False`` (it lacks ``fc``); one with the CIFAR stem needs the same ``conv1``. Raises
    ``InputError`` for a missing or damaged checkpoint and where the file cannot be written.
    """
    save_pretrained(load_pretrained(find_checkpoint(run, settings)), run.encoder)
    return run.encoder


def main(argv: Sequence[str]) -> None:
    run, settings = open_run(argv, "python -m fastproj.export", "Write the encoder of a run alone.")
    print(f"written: {export(run, settings)}")
