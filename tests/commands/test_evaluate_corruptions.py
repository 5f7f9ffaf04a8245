"""Robustness by the command, with a stand-in for the package and, where it can, with itself."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from sklearn.linear_model import LogisticRegression

from fastproj import evaluate as command
from fastproj.core.errors import InputError
from fastproj.data.beton import open_beton
from fastproj.evaluation.corruptions import CORRUPTIONS
from fastproj.evaluation.results import Row, read_evaluation
from fastproj.prepare.encode import Store
from fastproj.runs.folder import RunFolder
from tests.support import betons
from tests.support.corruptions import stand_in

COUNTS, SIDE, CLASSES = {"train": 30, "val": 20}, 32, 3
FLAT = ("--eval.encoder", "torch.nn:Flatten", "--eval.normalize", "imagenet")


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = Path(tmp_path_factory.mktemp("sets"))
    for seed, (split, count) in enumerate(COUNTS.items()):
        source = betons.digit_like(np.random.default_rng(seed), count, SIDE, CLASSES)
        betons.write(replace(source, split=split), root, Store("raw"))
    return root


def evaluated(sets: Path, out: Path, *more: str) -> tuple[Row, ...]:
    given = f"""--data.train {sets}/train.beton --data.val {sets}/val.beton --run.device cpu
        --eval.size {SIDE} --eval.probes logistic,corruptions --eval.out {out}"""
    command.main([*given.split(), *more])
    return read_evaluation(RunFolder(out)).rows


def test_the_row_of_a_timm_encoder_and_its_baselines(
    sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "imagecorruptions", stand_in())
    torch.manual_seed(1)
    vit = timm.create_model("test_vit", img_size=SIDE, num_classes=0)
    torch.save({"state_dict": vit.state_dict()}, tmp_path / "vit.pth")
    rows = evaluated(
        sets, tmp_path / "out", "--eval.checkpoint", str(tmp_path / "vit.pth"),
        "--eval.encoder", "timm:test_vit", "--eval.baselines", "true", "--data.workers", "1",
        "--eval.depths", "h", "--eval.corruptions_severities", "3",
        "--eval.logistic_strengths", "1e-3,1e-2", "--eval.corruptions_strengths", "1e-3,1e-2",
    )  # fmt: skip
    assert [(row.encoder, row.probe) for row in rows] == [
        ("pixels", "logistic"),
        *((name, probe) for name in ("random", "pre-trained")
          for probe in ("logistic", "corruptions")),
    ]  # fmt: skip
    for clean, row in (rows[1:3], rows[3:]):
        about, metrics = row.protocol["probe"], row.metrics
        assert metrics["top1_clean"] == clean.metrics["top1"]
        assert about["chosen"] == clean.protocol["probe"]["chosen"]  # on clean train alone
        assert len(about["accuracies"]) == len(CORRUPTIONS)
        assert metrics["top1"] == pytest.approx(np.mean(list(about["accuracies"].values())))
        assert metrics["top1"] == pytest.approx(
            np.mean([metrics[f"top1_{n}"] for n in CORRUPTIONS])
        )
        assert row.protocol["features"] == clean.protocol["features"]
        kept = [np.load(tmp_path / "out" / str(each.predictions)) for each in (clean, row)]
        assert np.array_equal(*kept)
    assert "pre-trained, corruptions: also top1_clean" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--eval.size", "31"], "crops of 31 pixels: the corruptions need 32 or more"),
        (["--eval.corruptions_names", "fog,rain"], "no corruption 'rain': choose from gaussian_"),
        (["--eval.crops", "ten", "--eval.crop_fraction", "0.875"], "give --eval.crops center"),
        (["--eval.depths", "layer4"], "corruptions runs the whole encoder: give eval.depths h as"),
    ],
)
def test_what_cannot_be_corrupted_is_said_first(
    sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], words: str
) -> None:
    monkeypatch.setitem(sys.modules, "imagecorruptions", stand_in())
    _refused(words, sets, tmp_path / "out", *FLAT, *options)


def test_a_missing_package_is_said_first(
    sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "imagecorruptions", None)
    _refused(r"pip install 'fastproj-ssl\[corruptions\]'", sets, tmp_path / "out", *FLAT)


def test_a_features_file_has_no_images_to_corrupt(
    sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        sys.modules, "imagecorruptions", None
    )  # that it is missing is not the point
    np.savez(tmp_path / "a.npz", features=np.eye(4, dtype=np.float32), labels=[0, 1, 0, 1])
    files = [f"--data.{split}={tmp_path}/a.npz" for split in COUNTS]
    words = "corruptions runs the encoder on images, which a features file does not hold: leave it"
    _refused(words, sets, tmp_path / "out", *files)


def _refused(words: str, sets: Path, out: Path, *options: str) -> None:
    """One line, before any features are computed."""
    with pytest.raises(InputError, match=words) as caught:
        evaluated(sets, out, *options)
    assert "\n" not in str(caught.value) and not out.exists()


def test_the_package_itself_corrupts_in_processes(sets: Path, tmp_path: Path) -> None:
    """Its corruptions from the documented random numbers, scored by scikit-learn's model."""
    package = pytest.importorskip("imagecorruptions")
    assert tuple(package.get_corruption_names()) == CORRUPTIONS
    names, strength = ("gaussian_noise", "fog", "jpeg_compression"), 0.1
    (row,) = evaluated(
        sets, tmp_path / "out", *FLAT, "--eval.probes", "corruptions", "--data.workers", "2",
        "--eval.corruptions_names", ",".join(names), "--eval.corruptions_severities", "1,5",
        "--eval.corruptions_strengths", str(strength),
    )  # fmt: skip
    stored, labels = {}, {}
    for split, count in COUNTS.items():
        beton = open_beton(sets / f"{split}.beton")
        stored[split] = np.stack([beton.stored(i).reshape(SIDE, SIDE, 3) for i in range(count)])
        labels[split] = beton.label

    def flat(images: np.ndarray) -> np.ndarray:
        values = (images / 255 - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
        return values.transpose(0, 3, 1, 2).reshape(len(images), -1)

    x = flat(stored["train"])
    model = LogisticRegression(C=1 / (strength * len(x)), tol=1e-8, max_iter=1000)
    model.fit((x - x.mean(0)) / x.std(0), labels["train"])
    for name in names:
        for severity in (1, 5):
            images = []
            for number, image in enumerate(stored["val"]):
                np.random.seed(np.random.SeedSequence(number).generate_state(4))
                images.append(package.corrupt(image, severity=severity, corruption_name=name))
            found = model.predict((flat(np.stack(images)) - x.mean(0)) / x.std(0))
            expected = (found == labels["val"]).mean()
            cell = row.protocol["probe"]["accuracies"][f"{name} {severity}"]
            assert cell == pytest.approx(expected, abs=1e-9), (name, severity)
    assert row.protocol["probe"]["package"].startswith("imagecorruptions")
