"""Training on what is not fastproj's usual set: unlabeled images, files that FFCV wrote."""

import math
from pathlib import Path

import numpy as np
import pytest

from fastproj import evaluate
from fastproj.core.errors import InputError
from fastproj.data.beton import Beton
from fastproj.prepare.adopt import adopt
from fastproj.prepare.encode import Store
from fastproj.prepare.sources import unlabeled
from fastproj.runs import journal
from fastproj.train import main
from tests.support.betons import digit_like, photograph, write


def options(beton: Beton, folder: Path, *more: str) -> list[str]:
    given = {
        "data.train": beton.path, "run.dir": folder, "run.name": "r", "run.device": "cpu",
        "model.encoder": "resnet_small", "views.size": 16, "projector.hidden": 16,
        "projector.out": 8, "optim.batch_size": 8, "optim.epochs": 2, "optim.warmup_epochs": 0,
        "train.log_every": 1, "train.precision": "float32",
    }  # fmt: skip
    return [*(word for key, value in given.items() for word in (f"--{key}", str(value))), *more]


def losses(folder: Path) -> list[float]:
    events = journal.read(folder / "r" / "metrics.jsonl")
    return [event["loss"] for event in events if event["event"] == "step"]


def test_unlabeled_images_train_and_what_needs_labels_says_so(tmp_path: Path) -> None:
    source = digit_like(np.random.default_rng(0), 24, 20, 3)
    beton = write(unlabeled(source), tmp_path / "data", Store("raw"))
    assert beton.classes == () and set(beton.label.tolist()) == {-1}
    main(options(beton, tmp_path))
    assert len(losses(tmp_path)) == 6 and np.isfinite(losses(tmp_path)).all()
    with pytest.raises(InputError, match="objective supcon needs labels, and 24 of 24"):
        main(options(beton, tmp_path / "supcon", "--objective.name", "supcon"))
    with pytest.raises(InputError, match="label"):
        evaluate.main([str(tmp_path / "r"), "--data.val", str(beton.path)])
    labeled = write(source, tmp_path / "labeled", Store("raw"))
    sets = ["--data.train", str(labeled.path), "--data.val", str(labeled.path)]
    evaluate.main([str(tmp_path / "r"), *sets, "--eval.probes", "knn", "--eval.knn_k", "3"])


class Photographs:
    def __len__(self) -> int:
        return 24

    def __getitem__(self, i: int) -> tuple[int, np.ndarray]:
        rng = np.random.default_rng(i)
        return i % 3, np.asarray(photograph(rng, *rng.integers(30, 60, 2).tolist()))


@pytest.mark.parametrize("mode", ["raw", "jpg"])
def test_an_adopted_file_trains_alike_with_every_engine(mode: str, tmp_path: Path) -> None:
    pytest.importorskip("ffcv", reason="FFCV is not built here")
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    path = tmp_path / "train_500_0.50_90.ffcv"  # as ffcv-imagenet calls its files
    fields = {"target": IntField(), "picture": RGBImageField(mode)}
    DatasetWriter(str(path), fields, num_workers=1).from_indexed_dataset(Photographs())
    beton = adopt(path)
    seen = {}
    for engine in ("stream", "reference"):
        main(options(beton, tmp_path / engine, "--data.engine", engine, "--data.workers", "1"))
        seen[engine] = losses(tmp_path / engine)
    assert len(seen["stream"]) == 6
    assert all(math.isclose(a, b, rel_tol=0.02) for a, b in zip(*seen.values(), strict=True))
