"""A study whose runs are those of transfer or segment: paired tables of an encoder's worth."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fastproj.core.errors import SettingError
from fastproj.models.encoders import build_encoder
from fastproj.runs import checkpoint
from fastproj.runs.folder import RunFolder
from fastproj.settings import STUDY, load
from fastproj.studies.plan import Job
from fastproj.studies.running import command, state
from fastproj.study import build_plan, main
from tests.support.detection import images
from tests.support.segmentation import write_voc_masks

ROOT = Path(__file__).parents[2]
FILE = """
study: {{command: {command}, recipe: {recipe}, primary: {primary}, seeds: [0, 1], controls: false,
         name: masks, processes: 2}}
settings:
  data: {{root: {root}, workers: 0}}
  {more}
sets:
  shapes:
arms:
  default:
    settings: {{encoder: {{checkpoint: "{root}/seed{{seed}}.pt"}}}}
    {sweep}
  random:
    settings: {{encoder: {{checkpoint: "{root}/seed{{seed}}.pt", weights: random}}}}
    published: -1
    {sweep}
"""
SEGMENT = {"command": "segment", "recipe": "transfer/voc_linear_small", "sweep": "",
           "primary": "segmentation.miou",
           "more": "images: {size: 48}\n  optim: {steps: 8, batch_size: 2}"}  # fmt: skip


def write_study(root: Path, **changes: str) -> list[str]:
    (root / "masks.yaml").write_text(FILE.format(root=root, **SEGMENT | changes))
    return ["--cfg", str(root / "masks.yaml"), "--study.dir", str(root / "runs")]


@pytest.mark.slow
def test_a_study_of_segmentation_pairs_the_scores_of_equal_seeds(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    write_voc_masks(tmp_path, "train", images(0, 8, 48))
    write_voc_masks(tmp_path, "val", images(1, 6, 48))
    for seed in (0, 1):
        torch.manual_seed(seed)
        weights = build_encoder("resnet18", "imagenet").state_dict()
        torch.save(weights, tmp_path / f"seed{seed}.pt")
    argv = write_study(tmp_path)
    main(argv)
    folder = tmp_path / "runs" / "masks"
    found = {}
    for arm in ("default", "random"):
        for seed in (0, 1):
            run = folder / "shapes" / f"{arm}-seed{seed}"
            content = json.loads((run / "eval.json").read_text())
            assert content["checkpoint"]["file"] == str(tmp_path / f"seed{seed}.pt")
            found[arm, seed] = 100 * content["rows"][0]["metrics"]["miou"]
    report = json.loads((folder / "study.json").read_text())
    default, random = report["sets"][0]["rows"]
    assert default["mean"] == pytest.approx(np.mean([found["default", s] for s in (0, 1)]))
    gains = [found["random", seed] - found["default", seed] for seed in (0, 1)]
    assert random["gain_mean"] == pytest.approx(np.mean(gains)) and random["published"] == -1
    assert report["runs"][0]["metrics"].keys() == {
        f"segmentation.{name}" for name in ("miou", "mean_accuracy", "pixel_accuracy")
    }
    assert not report["problems"] and "random" in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("eval.json")}
    main(argv)  # all runs are whole
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("eval.json")}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"primary": "logistic.top1"}, "fastproj segment gives segmentation.METRIC"),
        ({"primary": "detection.box_ap"}, "fastproj segment gives segmentation.METRIC"),
        ({"more": "optim: {epochs: 3}"}, "unknown setting 'optim.epochs'"),
        ({"sweep": "sweep: {optim.lr: [0.1, 0.2]}"}, "fastproj segment holds out nothing of train"),
        ({"command": "evaluate"}, "study.command"),
        ({"more": "images: {size: 8}"}, "arm default on shapes: .*images.size"),
    ],
)
def test_what_such_a_study_cannot_have_is_one_line(
    tmp_path: Path, changes: dict[str, str], says: str
) -> None:
    with pytest.raises(SettingError, match=says) as refused:
        build_plan(load(STUDY, write_study(tmp_path, **changes), "study", ""))
    assert "\n" not in str(refused.value)


def test_seed_and_set_stand_for_the_runs_own_in_every_setting(tmp_path: Path) -> None:
    plan = build_plan(load(STUDY, [*write_study(tmp_path), "--study.controls", "true"], "s", ""))
    argv = plan.job(plan.arm("no-op"), "shapes", 1).argv()
    assert f"--encoder.checkpoint={tmp_path}/seed1.pt" in argv and "--run.seed=10001" in argv


def test_a_run_that_scores_itself_is_whole_once_it_has_ended(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "r")
    run.path.mkdir()
    job = Job("default", "shapes", 0, run, "transfer/voc_small", {}, command="transfer")
    assert command(job, state(run, "transfer")) == ["transfer", "--cfg=transfer/voc_small"]
    checkpoint.save(checkpoint.step_path(run.checkpoints, 8), {"step": 8}, 1)
    run.evaluation.write_text("{}")  # a kill came between it and the journal's end
    assert state(run, "transfer") == "cut"
    assert command(job, "cut") == ["transfer", "--run.resume", str(run.path)]
    run.metrics.write_text('{"event": "end", "step": 8}\n')
    assert state(run, "transfer") == "whole"
