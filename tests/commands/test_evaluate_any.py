"""Evaluating what is no run: other libraries' checkpoints, functions, features files; embedding."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torchvision.models.resnet import BasicBlock, ResNet

from fastproj import embed
from fastproj import evaluate as command
from fastproj.core.errors import InputError, SettingError
from fastproj.evaluation.results import Row, read_evaluation
from fastproj.models.encoders import from_torchvision
from fastproj.prepare.encode import Store
from fastproj.prepare.sources import open_sources
from fastproj.runs.folder import RunFolder
from tests.support import betons

MODELS = """
from timm.models import VisionTransformer
from torch import nn

def flat():
    return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())

def maps():
    return nn.Conv2d(3, 4, 1)

class Pair(nn.Module):
    def forward(self, x):
        return x.flatten(1), x

def pair():
    return Pair()

def vit_of_16_pixels():
    return VisionTransformer(16, 8, embed_dim=8, depth=1, num_heads=2, num_classes=0)
"""
OPTIONS = "--run.device cpu --eval.logistic_strengths 1e-3,1e-2,1e-1 --eval.knn_k 5"
QUICK = OPTIONS.split()


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Betons of 60 and 40 digits, a transfer set, a module of encoders."""
    root = Path(tmp_path_factory.mktemp("any"))
    for source, count in zip(open_sources("digits", None, "all", False), (60, 40), strict=True):
        some = {"images": source.images[:count], "labels": source.labels[:count]}
        betons.write(replace(source, **some), root, Store("raw"))
    for split, seed in (("train", 0), ("val", 1)):
        source = betons.digit_like(np.random.default_rng(seed), 30, 8, classes=3)
        betons.write(replace(source, split=split), root / "columns", Store("raw"))
    (root / "evaluated_models.py").write_text(MODELS)
    return root


def arguments(house: Path, out: Path, *more: str) -> list[str]:
    sets = ["--data.train", f"{house}/train.beton", "--data.val", f"{house}/val.beton"]
    return [*sets, *QUICK, "--eval.size", "8", "--eval.out", str(out), *more]


def rows(house: Path, out: Path, *more: str) -> tuple[Row, ...]:
    command.main(arguments(house, out, *more))
    return read_evaluation(RunFolder(out)).rows


@pytest.fixture
def flat(house: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.syspath_prepend(str(house))
    return ["--eval.encoder", "evaluated_models:flat"]


def test_a_function_on_two_sets(
    house: Path, tmp_path: Path, flat: list[str], capsys: pytest.CaptureFixture
) -> None:
    found = rows(house, tmp_path / "new/out", *flat, "--eval.sets", f"{house}/columns")
    assert [(r.encoder, r.data, r.probe) for r in found] == [
        ("pre-trained", data, probe)
        for data in ("test", "columns")
        for probe in ("logistic", "knn")
    ]
    for row in found:
        predicted = np.load(tmp_path / "new/out" / str(row.predictions))
        assert len(predicted) == row.protocol["data"]["val"]["images"]
        assert row.protocol["features"]["encoder"]["features"] == "as the module gives them"
        assert row.protocol["features"]["width"] == 12
    # The function's module says nothing of mean and std: those of each training set.
    means = [row.protocol["features"]["mean"] for row in found]
    for path, mean in ((house / "train.json", means[0]), (house / "columns/train.json", means[2])):
        assert mean == json.loads(path.read_text())["mean"]
    assert "evaluated_models:flat: as the function gives them" in capsys.readouterr().err
    header = read_evaluation(RunFolder(tmp_path / "new/out")).checkpoint
    assert header == {"file": None, "sha256": None, "step": None, "epoch": None}


def test_a_checkpoint_of_timm_with_baselines(
    house: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    torch.manual_seed(1)  # the random encoder is that of seed 0
    vit = timm.create_model("test_vit", img_size=32, num_classes=0)
    torch.save({"teacher": {f"backbone.{n}": t for n, t in vit.state_dict().items()}},
               tmp_path / "dino.pth")  # fmt: skip
    given = ["--eval.encoder", "timm:test_vit", "--eval.checkpoint", str(tmp_path / "dino.pth"),
             "--eval.size", "32", "--eval.baselines", "true"]  # fmt: skip
    found = rows(house, tmp_path / "out", *given)
    assert [r.encoder for r in found] == ["pixels"] * 2 + ["random"] * 2 + ["pre-trained"] * 2
    about = found[-1].protocol["features"]
    assert about["mean"] == [0.5, 0.5, 0.5] and about["crop"]["size"] == 32
    (said,) = capsys.readouterr().err.splitlines()
    assert said.endswith(
        "; nothing else in it; crops of 32 pixels (others: --eval.size), mean 0.5, 0.5, 0.5 and "
        "std 0.5, 0.5, 0.5 (others: --eval.normalize imagenet or data)"
    )
    assert "key 'teacher', prefix 'backbone.'" in about["encoder"]["weights"]
    predicted = [np.load(tmp_path / "out" / found[n].predictions) for n in (2, 4)]
    assert not np.array_equal(*predicted)


@pytest.mark.parametrize(("stem", "side"), [("cifar", 32), ("imagenet", 224)])
def test_a_resnet_without_a_run_is_evaluated_at_the_size_of_its_stem(
    house: Path, tmp_path: Path, capsys: pytest.CaptureFixture, stem: str, side: int
) -> None:
    torch.manual_seed(0)
    resnet = from_torchvision(ResNet(BasicBlock, [1, 1, 1, 1]), stem)
    torch.save({"state_dict": resnet.state_dict()}, tmp_path / "it.pth")
    given = arguments(house, tmp_path / "out", "--eval.checkpoint", str(tmp_path / "it.pth"))
    command.main(without_size(given))
    row, _ = read_evaluation(RunFolder(tmp_path / "out")).rows
    assert row.protocol["features"]["crop"]["size"] == side
    (said,) = capsys.readouterr().err.splitlines()
    assert f"crops of {side} pixels" in said and "mean and std of each training set" in said
    assert ("conv1 padding 2" in said) == (stem == "cifar")
    command.main([*without_size(given), "--views.size", "16"])
    row, _ = read_evaluation(RunFolder(tmp_path / "out")).rows
    assert row.protocol["features"]["crop"]["size"] == 16


def without_size(given: list[str]) -> list[str]:
    at = given.index("--eval.size")
    return given[:at] + given[at + 2 :]


def test_a_function_needs_a_size_or_a_recipe_that_says_one(
    house: Path, tmp_path: Path, flat: list[str]
) -> None:
    given = without_size(arguments(house, tmp_path / "out", *flat))
    words = "nothing says what size the images of evaluated_models:flat have: give --eval.size"
    with pytest.raises(InputError, match=words):
        command.main(given)
    (tmp_path / "recipe.yaml").write_text("views: {size: 12}\n")
    command.main([*given, "--cfg", str(tmp_path / "recipe.yaml")])
    rows_of_recipe = read_evaluation(RunFolder(tmp_path / "out")).rows
    assert {row.protocol["features"]["crop"]["size"] for row in rows_of_recipe} == {12}


def test_embedded_features_give_the_rows_of_the_encoder(
    house: Path, tmp_path: Path, flat: list[str], capsys: pytest.CaptureFixture
) -> None:
    base = arguments(house, tmp_path / "direct", *flat)
    for split, name in (("train", "train.npz"), ("val", "val.safetensors")):
        options = ["--data.train", f"{house}/train.beton", "--views.size", "8", *flat]
        embed.main([*options, "--embed.data", f"{house}/{split}.beton",
                    "--embed.out", str(tmp_path / name)])  # fmt: skip
        assert capsys.readouterr().out == f"written: {tmp_path / name}\n"
    command.main(base)
    files = ["--data.train", f"{tmp_path}/train.npz", "--data.val", f"{tmp_path}/val.safetensors"]
    command.main([*files, *QUICK, "--eval.out", str(tmp_path / "files")])
    direct, of_files = (read_evaluation(RunFolder(tmp_path / n)).rows for n in ("direct", "files"))
    assert [row.metrics for row in direct] == [row.metrics for row in of_files]
    assert of_files[0].encoder == "file" and of_files[0].data == "val"
    assert of_files[0].protocol["data"]["classes"] == 10
    with pytest.raises(InputError, match="holds features and no images: leave out eval.sets"):
        command.main([*files, *QUICK, "--eval.out", str(tmp_path), "--eval.sets", str(house)])


def test_validation_images_that_are_the_training_images(
    house: Path, tmp_path: Path, flat: list[str], capsys: pytest.CaptureFixture
) -> None:
    rows(house, tmp_path, *flat, "--data.val", f"{house}/train.beton")
    assert "hold the same images: scores are those of training data" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--eval.encoder", "evaluated_models:maps"], r"\(\d+, 4, 8, 8\).*pool and flatten"),
        (["--eval.encoder", "evaluated_models:nothing"], "cannot be called"),
        (["--eval.encoder", "evaluated_models:pair"], "gives tuple for 2 images, not .2, d"),
        (
            ["--eval.encoder", "evaluated_models:vit_of_16_pixels"],
            "does not take images of 8 pixels",
        ),
        (["--eval.encoder", "timm:test_vit"], "random weights"),
        (["--eval.checkpoint", "none.pt"], "there is no checkpoint none.pt"),
        ([], "no run folder: give --eval.checkpoint FILE"),
        (["--eval.encoder", "evaluated_models:flat", "--eval.depths", "z"], "has no z; it has h"),
        (["--eval.encoder", "evaluated_models:flat", "--eval.crops", "ten"], "all the same"),
        (
            ["--eval.encoder", "evaluated_models:flat", "--eval.sets", "nowhere"],
            "no folder nowhere",
        ),
        (["--data.val", "some.npz"], "give two betons or two features files"),
        (
            ["--eval.encoder", "evaluated_models:flat", "--eval.baselines", "true"],
            "the same weights whatever the seed",
        ),
        (
            [
                "--eval.encoder",
                "evaluated_models:flat",
                "--eval.depths",
                "layer4",
                "--eval.probes",
                "logistic,knn,solo",
            ],
            "solo runs the whole encoder: give eval.depths h as well",
        ),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(
    house: Path, tmp_path: Path, flat: list[str], options: list[str], words: str
) -> None:
    with pytest.raises(InputError, match=words) as caught:
        command.main(arguments(house, tmp_path / "out", *options))
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_two_sets_of_one_name(house: Path, tmp_path: Path, flat: list[str]) -> None:
    (tmp_path / "columns").mkdir()
    for file in (house / "columns").iterdir():
        (tmp_path / "columns" / file.name).write_bytes(file.read_bytes())
    both = f"{house}/columns,{tmp_path}/columns"
    with pytest.raises(InputError, match="two sets are called columns: rename the folder"):
        command.main(arguments(house, tmp_path / "out", *flat, "--eval.sets", both))


def test_labels_outside_the_classes(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", features=np.eye(4, dtype=np.float32), labels=[0, 1, 0, 1])
    np.savez(tmp_path / "b.npz", features=np.eye(4, dtype=np.float32), labels=[0, 1, 2, 1])
    np.savez(tmp_path / "c.npz", features=np.eye(4, 3, dtype=np.float32), labels=[0, 1, 0, 1])
    for name, words in (("b", "validation labels run from 0 to 2, outside 0..1"),
                        ("c", "features are 4 and 3 wide")):  # fmt: skip
        with pytest.raises(InputError, match=words):
            command.main(["--data.train", f"{tmp_path}/a.npz", "--data.val",
                          f"{tmp_path}/{name}.npz", "--eval.out", f"{tmp_path}/out"])  # fmt: skip


def test_neither_a_run_nor_a_folder_for_the_results() -> None:
    with pytest.raises(SettingError, match="not none, or --eval.out and no folder"):
        command.main(["--eval.encoder", "timm:test_vit"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--embed.out", "a.csv"], "embed.out is a.csv: give --embed.out FILE, .npz or .saf"),
        ([], "embed.out is None"),
        (["--embed.out", "a.npz", "--eval.depths", "h,z"], "a file holds one"),
    ],
)
def test_what_cannot_be_embedded(
    house: Path, flat: list[str], options: list[str], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        embed.main(["--data.train", f"{house}/train.beton", *flat, *options])


def test_timm_missing_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, house: Path, tmp_path: Path
) -> None:
    from fastproj.__main__ import dispatch

    monkeypatch.setitem(sys.modules, "timm", None)
    options = arguments(house, tmp_path / "out", "--eval.encoder", "timm:test_vit")
    with pytest.raises(InputError, match=r"needs timm: .*pip install 'fastproj-ssl\[timm\]'"):
        dispatch(["evaluate", *options])


def test_a_linear_module_is_embedded_exactly(house: Path, tmp_path: Path, flat: list[str]) -> None:
    embed.main(["--data.train", f"{house}/train.beton", "--views.size", "8", *flat,
                "--eval.normalize", "imagenet", "--embed.out", f"{tmp_path}/a.npz"])  # fmt: skip
    digits = next(iter(open_sources("digits", None, "all", False))).images[:60]
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    x = (np.asarray(digits, np.float64) / 255 - mean) / std
    pooled = x.reshape(60, 2, 4, 2, 4, 3).mean((2, 4)).transpose(0, 3, 1, 2).reshape(60, 12)
    with np.load(tmp_path / "a.npz") as found:
        np.testing.assert_allclose(found["features"], pooled, atol=1e-5)
