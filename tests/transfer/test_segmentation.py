"""The command: a linear classifier of pixels learns, stops, goes on bit for bit, on any ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastproj.core.errors import InputError, SettingError
from fastproj.evaluate import main as evaluate
from fastproj.models.encoders import build_encoder
from fastproj.settings import SEGMENT, load
from fastproj.transfer.segmentation import segment
from tests.support.detection import images
from tests.support.segmentation import write_ade, write_voc_masks
from tests.support.transfers import assert_same, ended

ROOT = Path(__file__).parents[2]
BASE = {"run.device": "cpu", "images.size": 48, "optim.batch_size": 2, "optim.steps": 6,
        "optim.warmup_steps": 2, "train.log_every": 1, "train.checkpoint_every": 2,
        "data.workers": 0}  # fmt: skip
VOC = {"data.format": "voc", "data.train": "2012_train", "data.val": "2012_val"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both sets, and an encoder as torch.save writes it."""
    folder = tmp_path_factory.mktemp("masks")
    made, val = images(0, 9, 48, empty=(4,)), images(1, 5, 48)
    write_voc_masks(folder, "train", made)
    write_voc_masks(folder, "val", val)
    write_ade(folder, "training", made)
    write_ade(folder, "validation", val)
    torch.manual_seed(0)
    torch.save(build_encoder("resnet18", "imagenet").state_dict(), folder / "r18.pt")
    return folder


def options(root: Path, folder: Path, **changes: object) -> list[str]:
    given = {"data.root": root, "encoder.checkpoint": root / "r18.pt", "run.dir": folder,
             "run.name": "r", **BASE, **VOC}  # fmt: skip
    given |= {name.replace("__", "."): value for name, value in changes.items()}
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def run(root: Path, folder: Path, **changes: object) -> Path:
    return segment(load(SEGMENT, options(root, folder, **changes), "fastproj segment", ""))


@pytest.mark.slow
def test_a_stopped_segmenter_resumes_bit_for_bit(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    whole = run(root, tmp_path / "whole")
    said = capsys.readouterr()
    assert "120 of its 120 tensors are in the model; 7 others are new" in said.err
    assert "miou" in said.out and "pixel_accuracy" in said.out
    run(root, tmp_path, train__stop_after=3)  # within an epoch of four steps
    with pytest.raises(InputError, match="was made with optim.lr = 0.001, now it is 0.5"):
        run(root, tmp_path, run__resume=tmp_path / "r", optim__lr=0.5)
    broken = run(root, tmp_path, run__resume=tmp_path / "r", data__workers=1)
    assert_same(whole, broken)
    _, _, row = ended(broken)
    assert row["probe"] == "segmentation" and row["metrics"].keys() == {
        "miou", "mean_accuracy", "pixel_accuracy"}  # fmt: skip
    with pytest.raises(InputError, match="r is a run of fastproj transfer or segment"):
        evaluate([str(broken)])


def test_what_a_segmenter_cannot_use_is_one_line(root: Path, tmp_path: Path) -> None:
    for changes, says in [
        ({"data__val": "2012_trainval"}, "has no split 2012_trainval of VOC"),
        ({"optim__batch_size": 99}, "a batch of 99 .* is larger than the set"),
        ({"encoder__checkpoint": tmp_path / "x"}, "there is no checkpoint"),
        ({"encoder__checkpoint": "null"}, "give --encoder.checkpoint a run folder"),
        (
            {"encoder__checkpoint": "null", "encoder__name": "torchvision:resnet18"},
            "encoder.name torchvision:resnet18 has random weights: .* --encoder.checkpoint FILE",
        ),
        ({"images__scale_min": 3}, "scale_min is larger than images.scale_max"),
        ({"data__format": "coco"}, "data.format"),
    ]:
        with pytest.raises((InputError, SettingError), match=says) as refused:
            run(root, tmp_path, **changes)
        assert "\n" not in str(refused.value)


@pytest.mark.slow
def test_the_encoder_may_be_a_function_with_its_own_weights(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_models.py").write_text(
        "import torchvision\n\ndef small():\n    return torchvision.models.resnet18()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    own = {"encoder__checkpoint": "null", "encoder__name": "own_models:small"}
    made = run(root, tmp_path, optim__steps=2, **own)
    content = json.loads((made / "eval.json").read_text())
    assert content["checkpoint"]["file"] is None
    assert "as the function gives them" in content["rows"][0]["protocol"]["features"]["weights"]


@pytest.mark.slow
@pytest.mark.soak
def test_two_ranks_segment_as_one(root: Path, tmp_path: Path) -> None:
    """torchrun, synchronized batch norm: the losses and the scores of one rank."""
    changes = {"data__format": "ade20k", "data__train": "training", "data__val": "validation",
               "optim__batch_size": 4, "optim__steps": 4}  # fmt: skip
    alone = run(root, tmp_path / "alone", **changes)
    words = options(root, tmp_path, **changes)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "-m", "fastproj", "segment", *words],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    (_, losses, row), (_, others, other_row) = ended(alone), ended(tmp_path / "r")
    assert [loss for _, loss in others] == pytest.approx([loss for _, loss in losses], rel=1e-4)
    for name, value in row["metrics"].items():
        assert other_row["metrics"][name] == pytest.approx(value, abs=2e-3)
