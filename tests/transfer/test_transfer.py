"""The command: a detector learns, stops, goes on bit for bit, on one rank and on two."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastproj.core.errors import InputError, SettingError
from fastproj.evaluate import main as evaluate
from fastproj.export import main as export
from fastproj.models.encoders import build_encoder
from fastproj.report import main as report
from fastproj.settings import TRANSFER, load
from fastproj.transfer.detection import transfer
from tests.support.detection import images, write_coco, write_voc
from tests.support.transfers import assert_same, ended

ROOT = Path(__file__).parents[2]
BASE = {
    "run.device": "cpu",
    "images.train_sizes": "48,56",
    "images.val_size": 48,
    "images.max_size": 80,
    "detector.proposals": 24,
    "detector.rois": 8,
    "detector.precise_bn": 2,
    "optim.batch_size": 2,
    "optim.steps": 6,
    "optim.warmup_steps": 2,
    "train.log_every": 1,
    "train.checkpoint_every": 2,
    "data.workers": 0,
}
VOC = {"data.train": "2007_trainval", "data.val": "2007_test"}
COCO = {"data.format": "coco", "data.train": "train2017", "data.val": "val2017",
        "detector.masks": "true"}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both sets, and an encoder as torch.save writes it."""
    folder = tmp_path_factory.mktemp("sets")
    made, val = images(0, 9, 48, empty=(4,)), images(1, 4, 48)
    write_voc(folder, "2007", "trainval", made)
    write_voc(folder, "2007", "test", val)
    write_coco(folder, "train2017", made)
    write_coco(folder, "val2017", val)
    torch.manual_seed(0)
    torch.save(build_encoder("resnet18", "imagenet").state_dict(), folder / "r18.pt")
    return folder


def options(root: Path, folder: Path, **changes: object) -> list[str]:
    given = {"data.root": root, "encoder.checkpoint": root / "r18.pt", "run.dir": folder,
             "run.name": "r", **BASE, **VOC}  # fmt: skip
    given |= {name.replace("__", "."): value for name, value in changes.items()}
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def run(root: Path, folder: Path, **changes: object) -> Path:
    return transfer(load(TRANSFER, options(root, folder, **changes), "fastproj transfer", ""))


@pytest.mark.slow
def test_stopped_and_resumed_it_is_the_same_bit_for_bit(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    whole = run(root, tmp_path / "whole")
    said = capsys.readouterr()
    assert "120 of its 120 tensors are in the model" in said.err
    assert "1 of 9 images of 2007_trainval have no object to train on" in said.err
    assert "voc07_ap50" in said.out and "box_ap50" in said.out
    run(root, tmp_path, train__stop_after=3)  # within an epoch of four steps
    resume = {"run__resume": tmp_path / "r"}
    run(root, tmp_path, train__stop_after=1, data__workers=1, **resume)
    broken = run(root, tmp_path, **resume)
    assert_same(whole, broken)
    state, _, row = ended(broken)
    assert row["probe"] == "detection" and row["protocol"]["probe"]["optim.steps"] == 6
    assert state["data"] == row["protocol"]["data"]["content"]
    for command in (evaluate, export):
        with pytest.raises(InputError, match="r is a run of fastproj transfer .* eval.json"):
            command([str(broken)])
    report([str(broken)])
    assert "voc07_ap50" in (broken / "report.html").read_text()
    with pytest.raises(InputError, match="holds a finished run"):
        run(root, tmp_path)


def other_set(root: Path, folder: Path) -> dict[str, object]:
    write_voc(folder, "2007", "trainval", images(5, 9, 48))
    write_voc(folder, "2007", "test", images(1, 4, 48))
    return {"data__root": folder}


@pytest.mark.slow
def test_what_does_not_fit_a_run_is_refused_in_one_line(root: Path, tmp_path: Path) -> None:
    run(root, tmp_path, train__stop_after=1)
    resume = {"run__resume": tmp_path / "r"}
    for changes, says in [
        ({}, "holds an unfinished run"),
        (resume | {"optim__lr": 0.5}, "was made with optim.lr = 0.02, now it is 0.5"),
        (resume | other_set(root, tmp_path / "other"), "was trained on other data"),
        ({"run__name": "b", "optim__batch_size": 99}, "a batch of 99 .* is larger than the set"),
        ({"run__name": "b", "encoder__checkpoint": tmp_path / "x"}, "there is no checkpoint"),
        ({"run__name": "b", "detector__masks": "true"}, "trainval have no outline"),
    ]:
        with pytest.raises(InputError, match=says) as refused:
            run(root, tmp_path, **changes)
        assert "\n" not in str(refused.value)


def test_an_object_to_score_without_an_outline_is_said_before_training(
    root: Path, tmp_path: Path
) -> None:
    write_coco(tmp_path, "train2017", images(0, 4, 48))
    file = write_coco(tmp_path, "val2017", images(1, 4, 48), crowd=(0,))
    content = json.loads(file.read_text())
    del content["annotations"][0]["segmentation"]  # the crowd's: pycocotools reads it as well
    file.write_text(json.dumps(content))
    changes = {k.replace(".", "__"): v for k, v in COCO.items()} | {"data__root": tmp_path}
    with pytest.raises(InputError, match="1 objects of val2017 have no outline, one in .*jpg"):
        run(root, tmp_path, **changes)
    assert not (tmp_path / "r").exists()


def test_the_commands_errors_are_one_line_and_an_exit_code(root: Path, tmp_path: Path) -> None:
    words = options(root, tmp_path, data__train="2012_trainval")
    done = subprocess.run(
        [sys.executable, "-m", "fastproj", "transfer", *words],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert re.search("error: .* has no split 2012_trainval of VOC", line)
    with pytest.raises(SettingError, match="detector.head"):
        run(root, tmp_path, detector__head="fpm")


@pytest.mark.slow
@pytest.mark.soak
def test_two_ranks_run_coco_with_masks(root: Path, tmp_path: Path) -> None:
    """torchrun, synchronized batch norm, a C4 head, every image scored once."""
    changes = {k.replace(".", "__"): v for k, v in COCO.items()}
    words = options(root, tmp_path, detector__head="c4", detector__sync_bn="true",
                    optim__steps=2, **changes)  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "-m", "fastproj", "transfer", *words],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    _, losses, row = ended(tmp_path / "r")
    assert [step for step, _ in losses] == [1, 2]
    assert {"box_ap50", "mask_ap50"} <= row["metrics"].keys()
