"""The evaluation of a real, short run on real digits."""

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep.encode import Store
from data_prep.sources import Source, open_sources
from fastproj.errors import InputError
from fastproj.evaluate import evaluate, main, table
from fastproj.features import Features
from fastproj.manifest import open_beton
from fastproj.probe import knn, linear_probe
from fastproj.settings import RUN, Settings, load
from fastproj.train import train
from tests import betons

CLASSES = tuple("0123456789")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """The folder of two betons (200 and 100 digits) and of a run of four steps."""
    root = Path(tmp_path_factory.mktemp("evaluate"))
    for source, count in zip(open_sources("digits", None, "all", False), (200, 100), strict=True):
        some = {"images": source.images[:count], "labels": source.labels[:count]}
        betons.write(replace(source, **some), root, Store("raw"))
    train(settings(root))
    return root


def settings(root: Path, *options: str) -> Settings:
    argv = f"""--run.dir {root} --run.device cpu --data.train {root}/train.beton
        --data.val {root}/val.beton --views.size 8 --model.encoder resnet_small
        --projector.hidden 32 --projector.out 16 --optim.batch_size 50 --optim.epochs 1
        --optim.warmup_epochs 0 --train.keep 9 --eval.epochs 20 --eval.probe_batch 64
        --eval.learning_rates 0.03,0.1,0.3 --eval.weight_decays 1e-3,1e-2 --eval.knn_k 5"""
    return load(RUN, [*argv.split(), *options], "test", "")


def test_the_report_is_what_the_file_holds(root):
    report = evaluate(settings(root, "--eval.baselines", "true"))
    found = json.loads((root / "run/eval.json").read_text())
    assert found == json.loads(json.dumps(report))
    names = [row["features"] for row in found["rows"]]
    assert names == ["raw pixels", "random encoder", "pre-trained encoder"]
    newest = root / "run/checkpoints/step-00000004.pt"
    digest = hashlib.sha256(newest.read_bytes()).hexdigest()
    assert found["checkpoint"] == {"file": str(newest), "sha256": digest, "step": 4, "epoch": 1}
    assert found["protocol"]["crop"] == {"kind": "centre", "size": 8, "share": 1.0}
    assert found["protocol"]["linear"]["learning_rates"] == [0.03, 0.1, 0.3]
    assert [found["protocol"][split]["images"] for split in ("train", "val")] == [200, 100]
    assert not list((root / "run").glob("*.tmp"))
    for row in found["rows"]:
        assert all(seconds > 0 for seconds in row["seconds"].values())
        assert f"{row['linear']['top1']:.2%}" in table(report)


def test_raw_pixels_equal_the_probes_on_the_stored_bytes(root):
    sets = [open_beton(root / f"{split}.beton") for split in ("train", "val")]
    plain = []
    for beton in sets:
        x = np.stack([beton.stored(i) for i in range(len(beton))]).astype(np.float32) / 255
        x, y = torch.from_numpy(x), torch.from_numpy(beton.label)
        plain.append(Features(x, y, torch.arange(len(y))))
    how = settings(root).eval
    linear = linear_probe(
        *plain, 10, learning_rates=how.learning_rates, weight_decays=how.weight_decays,
        epochs=how.epochs, batch_size=how.probe_batch, holdout=how.holdout, seed=0,
        device=torch.device("cpu"),
    )  # fmt: skip
    row = evaluate(settings(root, "--eval.baselines", "true"))["rows"][0]
    assert row["width"] == 192
    assert row["linear"]["top1"] == pytest.approx(linear.top1, abs=0.011)  # one image at most
    assert row["knn"] == asdict(knn(*plain, 10, how.knn_k, how.knn_temperature))


def test_the_random_encoder_is_the_one_pre_training_started_from(root):
    first = root / "run/checkpoints/step-00000000.pt"
    found = evaluate(settings(root, "--eval.baselines", "true", "--eval.checkpoint", str(first)))
    _, random, untrained = ({**row, "seconds": 0, "images_per_second": 0} for row in found["rows"])
    assert random | {"features": ""} == untrained | {"features": ""}
    last = evaluate(settings(root))["rows"][0]
    assert last["linear"]["holdout_top1"] != untrained["linear"]["holdout_top1"]


def test_the_command_prints_the_table(root, capsys):
    main(["--cfg", str(root / "run/config.yaml")])
    out = capsys.readouterr().out.splitlines()
    assert out[0].split()[:3] == ["features", "top-1", "top-5"]
    assert out[1].startswith("pre-trained encoder")
    assert out[-1] == f"written: {root / 'run/eval.json'}"


def test_a_choice_at_the_end_of_its_list_is_printed(root):
    report = evaluate(settings(root, "--eval.learning_rates", "1e-6,2e-6", "--eval.epochs", "1"))
    assert "learning rate" in table(report).splitlines()[2]


def write_split(folder: Path, split: str, classes: tuple[str, ...], labels: list[int]) -> Path:
    images = np.zeros((len(labels), 8, 8, 3), np.uint8)
    source = Source(split, classes, images, np.array(labels), [str(i) for i in labels])
    return betons.write(source, folder, Store("raw")).path


@pytest.mark.parametrize(
    "classes, labels, words",
    [
        (("0", "1", "two", *CLASSES[3:]), [0] * 5, "has class 2 where .* has two"),
        (CLASSES[:4], [0] * 5, "has class 4 where .* has None"),
        (CLASSES, [-1] * 5, "validation labels run from -1"),
    ],
)
def test_sets_that_do_not_belong_together(root, tmp_path, classes, labels, words):
    val = write_split(tmp_path, "val", classes, labels)
    _fails(settings(root, "--data.val", str(val), "--run.name", "run"), words)


def test_one_class(root, tmp_path):
    one = write_split(tmp_path, "one", ("0",), [0] * 5)
    _fails(settings(root, "--data.train", str(one), "--data.val", str(one)), "at least 2")


@pytest.mark.parametrize(
    "options, words",
    [
        (("--run.name", "another"), "no checkpoint"),
        (("--data.val", "null"), "data.val is missing"),
        (("--model.encoder", "resnet18"), "made with model.encoder = resnet_small"),
        (("--eval.checkpoint", "nothing.pt"), "nothing.pt"),
        (("--eval.knn_k", "201"), "k = 201"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(root, options, words):
    _fails(settings(root, *options), words)


def test_a_checkpoint_cut_in_half(root, tmp_path):
    whole = (root / "run/checkpoints/step-00000004.pt").read_bytes()
    half = tmp_path / "half.pt"
    half.write_bytes(whole[: len(whole) // 2])
    _fails(settings(root, "--eval.checkpoint", str(half)), "damaged")


def _fails(given: Settings, words: str) -> None:
    """``evaluate`` raises one line and leaves an earlier report as it was."""
    report = Path(given.run.dir) / given.run.name / "eval.json"
    before = report.read_bytes() if report.exists() else None
    with pytest.raises(InputError, match=words) as caught:
        evaluate(given)
    assert "\n" not in str(caught.value)
    assert (report.read_bytes() if report.exists() else None) == before
