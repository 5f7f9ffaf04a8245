"""Encoders of timm and torchvision through the commands: train, resume, evaluate, export."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from fastproj import evaluate, export
from fastproj.core.errors import InputError, SettingError
from fastproj.data.beton import Beton
from fastproj.evaluation.card import load_code
from fastproj.evaluation.load import load_encoder
from fastproj.evaluation.pretrained import load_pretrained
from fastproj.evaluation.results import read_evaluation
from fastproj.prepare.encode import Store
from fastproj.runs import checkpoint, journal
from fastproj.runs.folder import RunFolder
from fastproj.train import main
from tests.support.betons import digit_like, write

# The smallest that the libraries have; tests/bench/test_bench_encoders.py has one of each family.
SIZES = {"timm:test_vit": 32, "timm:test_efficientnet": 32, "torchvision:shufflenet_v2_x0_5": 32}


@pytest.fixture(scope="module")
def betons(tmp_path_factory: pytest.TempPathFactory) -> tuple[Beton, Beton]:
    folder = tmp_path_factory.mktemp("data")
    train, val = (digit_like(np.random.default_rng(seed), 40, 24, 3) for seed in (0, 1))
    return write(train, folder / "train", Store("raw")), write(val, folder / "val", Store("raw"))


def options(betons: tuple[Beton, Beton], folder: Path, name: str, size: int) -> list[str]:
    given = {
        "data.train": betons[0].path, "data.val": betons[1].path, "run.dir": folder,
        "run.name": "r", "run.device": "cpu", "model.encoder": name, "views.size": size,
        "projector.hidden": 16, "projector.out": 8, "optim.optimizer": "adamw", "optim.lr": 1e-3,
        "optim.batch_size": 8, "optim.epochs": 1, "optim.warmup_epochs": 0, "train.log_every": 1,
        "train.precision": "float32", "eval.probes": "knn", "eval.knn_k": 3,
    }  # fmt: skip
    return [word for key, value in given.items() for word in (f"--{key}", str(value))]


def own(name: str, size: int) -> nn.Module:
    """The library's own model without its head, made without fastproj."""
    library, _, name = name.partition(":")
    if library == "timm":
        try:
            return timm.create_model(name, num_classes=0, img_size=size)
        except TypeError:
            return timm.create_model(name, num_classes=0)
    model = torchvision.models.get_model(name)
    model.fc = nn.Identity()
    return model


@pytest.mark.parametrize("name", SIZES)
def test_it_trains_resumes_is_evaluated_and_loads_back(
    name: str, betons: tuple[Beton, Beton], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = SIZES[name]
    argv = options(betons, tmp_path, name, size)
    main([*argv, "--train.stop_after", "2"])
    run = RunFolder(tmp_path / "r")
    main(["--run.resume", str(run.path)])
    losses = [e["loss"] for e in journal.read(run.metrics) if e["event"] == "step"]
    assert len(losses) == 5 and np.isfinite(losses).all()

    evaluate.main([str(run.path)])
    (row,) = read_evaluation(run).rows
    assert row.protocol["features"]["encoder"]["name"] == name
    assert row.protocol["features"]["crop"]["size"] == size

    export.main([str(run.path)])
    assert run.onnx.exists()
    newest = checkpoint.latest(run.checkpoints)
    assert newest is not None
    trained = checkpoint.load(newest)["encoder"]
    model = own(name, size).eval()
    model.load_state_dict(load_file(run.weights), strict=True)
    loaded = load_encoder(run.weights).module.eval()
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), model(images))
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, trained[key])
    if name.startswith("timm:"):  # as the model card says
        monkeypatch.chdir(run.export)
        said: dict[str, Any] = {}
        exec(load_code(load_pretrained(run.weights))["timm"], said)
        with torch.no_grad():
            torch.testing.assert_close(said["model"](images), model(images))
    about = safe_open(run.weights, "pt").metadata()
    assert (about["encoder"], about["size"]) == (name, str(size)) and "stem" not in about


def test_a_broken_run_of_a_vit_is_an_unbroken_one(
    betons: tuple[Beton, Beton], tmp_path: Path
) -> None:
    ends = []
    for folder, stop in (("whole", "null"), ("broken", "2")):
        argv = options(betons, tmp_path / folder, "timm:test_vit", 32)
        argv += ["--objective.name", "mocov3", "--objective.predictor_norm", "true"]
        main([*argv, "--model.freeze_patch_embedding", "true", "--train.stop_after", stop])
        if stop != "null":
            main(["--run.resume", str(tmp_path / folder / "r")])
        newest = checkpoint.latest(tmp_path / folder / "r" / "checkpoints")
        assert newest is not None
        ends.append(checkpoint.load(newest))
    for part in ("encoder", "projector", "objective", "teacher"):
        for key, tensor in ends[0][part].items():
            assert torch.equal(tensor, ends[1][part][key]), f"{part}.{key}"
    first = checkpoint.load(checkpoint.step_path(tmp_path / "whole" / "r" / "checkpoints", 0))
    same = [key for key, x in ends[0]["encoder"].items() if torch.equal(x, first["encoder"][key])]
    assert same == ["patch_embed.proj.weight", "patch_embed.proj.bias"]


FIXED = ["--model.encoder", "vit_of_32_pixels:vit"]


@pytest.fixture
def fixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module with a tiny ViT; timm's test_vit takes every size."""
    (tmp_path / "vit_of_32_pixels.py").write_text(
        "from timm.models import VisionTransformer\n"
        "def vit():\n"
        "    return VisionTransformer(32, 8, embed_dim=8, depth=1, num_heads=2, num_classes=0)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.parametrize(
    ("more", "kind", "words"),
    [
        (["--views.size", "36"], InputError, "no whole number of its patches of 16"),
        ([*FIXED, "--views.size_start", "16", "--optim.epochs", "4"], InputError, "16 pixels"),
        ([*FIXED, "--objective.name", "swav", "--views.local_crops", "2", "--views.local_size",
          "16"], InputError, "does not take images of 16 pixels"),
        (["--model.stem", "cifar"], SettingError, "read only where model.encoder is a name"),
        (["--model.encoder", "resnet_small", "--model.freeze_patch_embedding", "true"],
         SettingError, "read only where model.encoder is timm:NAME"),
        (["--model.encoder", "timm:test_resnet", "--model.freeze_patch_embedding", "true"],
         InputError, "has no patch embedding"),
        (["--model.encoder", "timm:vit_tiny_patch16_225"], SettingError, "'vit_tiny_patch16_224'"),
        ([*FIXED, "--train.online_every", "1", "--eval.size", "64"], InputError, "64 pixels"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said_before_training(
    more: list[str], kind: type, words: str, betons: tuple[Beton, Beton], tmp_path: Path,
    fixed: None,
) -> None:  # fmt: skip
    with pytest.raises(kind, match=words) as why:
        main([*options(betons, tmp_path, "timm:test_vit", 32), *more])
    assert "\n" not in str(why.value)
    assert not (tmp_path / "r").exists()


def test_a_vit_is_not_evaluated_at_another_size(
    betons: tuple[Beton, Beton], tmp_path: Path, fixed: None
) -> None:
    main([*options(betons, tmp_path, FIXED[1], 32), "--train.stop_after", "1"])
    with pytest.raises(InputError, match="does not take images of 64 pixels"):
        evaluate.main([str(tmp_path / "r"), "--eval.size", "64"])
