"""The folder of a run: the only place that knows the names of the files in it."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from fastproj.core.errors import InputError


@dataclass(frozen=True)
class RunFolder:
    """``runs/<name>/``. Making one touches no disk; ``open`` checks that a run is there.

    A run may be moved or renamed: nothing in the folder says where it lies.
    """

    path: Path

    @classmethod
    def open(cls, path: str | os.PathLike) -> "RunFolder":
        """The folder of a run that training has started. Raises ``InputError`` for any other."""
        run = cls(Path(path))
        if not run.path.exists():
            raise InputError(f"{path}: no such run folder; give the one that training printed")
        if not run.path.is_dir():
            raise InputError(f"{path} is a file: give the run folder, such as runs/NAME")
        if not run.config.is_file():
            raise InputError(
                f"{path} is no run folder, it has no {run.config.name}: give the one that training "
                "printed"
            )
        return run

    @property
    def name(self) -> str:
        """The folder's own name, also where it is given as ``.``."""
        return self.path.resolve().name

    @property
    def config(self) -> Path:
        """Every setting and where it came from."""
        return self.path / "config.yaml"

    @property
    def environment(self) -> Path:
        """The machine, the versions and the command."""
        return self.path / "environment.json"

    @property
    def metrics(self) -> Path:
        """The journal: one JSON object per line."""
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """The folder of TensorBoard's event files."""
        return self.path / "tensorboard"

    @property
    def wandb_id(self) -> Path:
        """The run's id at Weights & Biases, whose own folder ``wandb`` lies beside it."""
        return self.path / "wandb-id.txt"

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def evaluation(self) -> Path:
        """The scores of the probes."""
        return self.path / "eval.json"

    @property
    def features(self) -> Path:
        """The folder of cached features and of the probes' predictions."""
        return self.path / "features"

    def predictions(self, data: str, encoder: str, probe: str) -> Path:
        """The classes that a probe predicted for the validation images of the set ``data``."""
        words = "-".join((data, encoder, probe, "predictions"))
        return self.features / f"{re.sub(r'[^0-9A-Za-z_.-]', '-', words)}.npy"

    @property
    def report(self) -> Path:
        """The report, one HTML page."""
        return self.path / "report.html"

    @property
    def export(self) -> Path:
        """The folder of the exported encoder, laid out as Hugging Face's Hub has it."""
        return self.path / "export"

    @property
    def weights(self) -> Path:
        """The exported encoder's weights."""
        return self.export / "model.safetensors"

    @property
    def onnx(self) -> Path:
        """The exported encoder as ONNX."""
        return self.export / "model.onnx"

    @property
    def card(self) -> Path:
        """The model card of the export."""
        return self.export / "README.md"
