"""Command: the encoder alone, for other programs. ``python -m fastproj.export --cfg CONFIG``

Writes ``encoder.safetensors`` into the run folder: the weights under torchvision's names, without
projector, predictor or probe, and what the encoder expects of its input as metadata.
"""

from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save

from fastproj.errors import run_command
from fastproj.evaluate import load_checkpoint
from fastproj.manifest import replacing
from fastproj.settings import RUN, Settings, load


def export(settings: Settings) -> Path:
    """Export ``eval.checkpoint``; returns the file.

    Its metadata: ``encoder`` and ``stem``, ``mean`` and ``std`` (per channel, of pixels in 0 to 1),
    ``step`` and ``epoch``. A torchvision ResNet loads it with ``strict=False`` (it lacks ``fc``);
    one with the CIFAR stem needs the same ``conv1``. Raises ``InputError`` as evaluation does.
    """
    run = Path(settings.run.dir) / settings.run.name
    _, state = load_checkpoint(settings, run)
    about = {name: state["settings"][f"model.{name}"] for name in ("encoder", "stem")}
    about |= {name: str(state[name]) for name in ("mean", "std", "step", "epoch")}
    tensors = {name: tensor.contiguous() for name, tensor in state["encoder"].items()}
    path = run / "encoder.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(save(tensors, metadata=about))
    return path


def main(argv: Sequence[str]) -> None:
    settings = load(RUN, argv, "python -m fastproj.export", "Write the encoder of a run alone.")
    print(f"written: {export(settings)}")


if __name__ == "__main__":
    run_command(main)
