"""The sets and the runs of the acceptance run: real recipes through the real commands."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastproj.core import dist
from fastproj.core.files import shipped_recipe
from fastproj.data.beton import Beton
from fastproj.settings import RUN, Settings, load
from fastproj.train import train
from fastproj.training.build import build_trainer
from fastproj.training.trainer import Trainer


@dataclass(frozen=True)
class Sets:
    """What is trained on, and where.

    ``small``: CIFAR-10's size; ``photos``: JPEGs; ``squares``: raw photographs of one size.
    ``photos`` and ``squares`` are repeated to ImageNet-100's size where speed is measured.
    ``tiny``: everything is small enough for a CPU, and no figure means anything.
    """

    small: Beton
    val: Beton
    photos: Beton
    squares: Beton
    device: torch.device
    workers: int
    tiny: bool
    real: bool = False  # small and val are given, not made here

    @property
    def encoder(self) -> str:
        return "resnet_small" if self.tiny else "resnet18"

    @property
    def size(self) -> int:
        """Side of a photograph's crop, pixels."""
        return 32 if self.tiny else 224


def options(sets: Sets, recipe: str, batch: int, epochs: int) -> dict[str, Any]:
    """The settings of a run of ``recipe`` on these sets."""
    given = {
        "cfg": shipped_recipe(recipe),
        "data.train": sets.small.path,
        "data.val": sets.val.path,
        "data.workers": sets.workers,
        "run.device": sets.device.type,
        "optim.batch_size": batch,
        "optim.epochs": epochs,
        "optim.warmup_epochs": min(10, epochs / 2),
    }
    if sets.tiny:
        given |= {"model.encoder": "resnet_small", "views.size": 16, "views.size_start": "null",
                  "projector.hidden": 16, "projector.out": 8, "views.blur_prob": 0}  # fmt: skip
    return given


def settings_of(given: Mapping[str, Any]) -> Settings:
    argv = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    return load(RUN, argv, "python -m fastproj.train", "")


def train_run(sets: Sets, folder: Path, given: Mapping[str, Any]) -> Path:
    """Run ``python -m fastproj.train`` in this process; the run's folder."""
    name = given["run.name"]
    resume = {} if "run.resume" in given else {"run.dir": folder}
    torch.compiler.reset()
    return train(settings_of({**given, **resume, "run.name": name}))


def trainer_of(sets: Sets, given: Mapping[str, Any], beton: Beton | None = None) -> Trainer:
    """The trainer of such a run, on ``beton`` if it is given; no folder is written."""
    torch.compiler.reset()
    return build_trainer(settings_of(given), dist.Rank(0, 1, 0), sets.device, beton)
