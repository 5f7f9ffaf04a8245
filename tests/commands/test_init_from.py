"""``train.init_from``: a new run starts from the encoder of a file, and from nothing else of it."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from fastproj.core.errors import InputError
from fastproj.data.beton import Beton
from fastproj.evaluation.pretrained import load_pretrained, save_pretrained
from fastproj.prepare.encode import Store
from fastproj.settings import RUN, load
from fastproj.train import train
from tests.support.betons import digit_like, write

BASE = {
    "run.device": "cpu",
    "model.encoder": "resnet_small",
    "views.size": 8,
    "views.blur_prob": 0,
    "projector.hidden": 32,
    "projector.out": 16,
    "optim.batch_size": 16,
    "optim.epochs": 2,
    "optim.warmup_epochs": 0.5,
    "train.precision": "float32",
    "train.keep": 9,
}


@pytest.fixture(scope="module")
def beton(tmp_path_factory: pytest.TempPathFactory) -> Beton:
    source = digit_like(np.random.default_rng(0), 40, 12, 4)
    return write(source, tmp_path_factory.mktemp("data"), Store("raw"))


def run(beton: Beton, folder: Path, name: str, **changes: object) -> Path:
    given = {"data.train": beton.path, "run.dir": folder, "run.name": name, **BASE}
    given |= {key.replace("__", "."): value for key, value in changes.items()}
    words = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    return train(load(RUN, words, "test", ""))


def saved(run: Path, step: int) -> dict:
    return torch.load(run / "checkpoints" / f"step-{step:08d}.pt", weights_only=True)


def assert_equal(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


@pytest.fixture(scope="module")
def files(beton: Beton, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same encoder as a checkpoint of ours, an export, and a file as MoCo's code writes it."""
    folder = tmp_path_factory.mktemp("first")
    first = run(beton, folder, "first", run__seed=5) / "checkpoints" / "step-00000004.pt"
    export, foreign = folder / "encoder.safetensors", folder / "moco.pth.tar"
    save_pretrained(load_pretrained(first), export)
    weights = torch.load(first, weights_only=True)["encoder"]
    theirs = {f"module.encoder_q.{name}": tensor for name, tensor in weights.items()}
    theirs |= {f"module.encoder_k.{name}": tensor + 1 for name, tensor in weights.items()}
    torch.save({"epoch": 3, "state_dict": theirs}, foreign)
    return {"checkpoint": first, "export": export, "foreign": foreign}


@pytest.mark.parametrize("kind", ["checkpoint", "export", "foreign"])
def test_the_encoder_is_the_files_and_the_rest_is_new(
    beton: Beton, files: dict[str, Path], tmp_path: Path, kind: str, capsys: pytest.CaptureFixture
) -> None:
    more = {"objective__name": "byol", "train__stop_after": 1}
    started = saved(run(beton, tmp_path, "a", train__init_from=files[kind], **more), 0)
    said = capsys.readouterr().err
    plain = saved(run(beton, tmp_path, "b", **more), 0)
    wanted = torch.load(files["checkpoint"], weights_only=True)["encoder"]
    assert_equal(started["encoder"], wanted)
    teacher = {n.removeprefix("0."): t for n, t in started["teacher"].items() if n[:2] == "0."}
    assert_equal(teacher, wanted)
    assert not torch.equal(plain["encoder"]["conv1.weight"], wanted["conv1.weight"])
    for part in ("projector", "probe"):
        assert_equal(started[part], plain[part])
    line = re.search(r"^encoder from (.*)$", said, re.M)
    assert line and f"{len(wanted)} of {len(wanted)} weights match" in line[1]
    assert str(files[kind]) in line[1] and "starts anew" in line[1]


def test_a_resumed_run_needs_the_file_no_more_and_keeps_its_name(
    beton: Beton, files: dict[str, Path], tmp_path: Path
) -> None:
    source = shutil.copy(files["checkpoint"], tmp_path / "source.pt")
    whole = run(beton, tmp_path, "whole", train__init_from=source)
    broken = run(beton, tmp_path, "broken", train__init_from=source, train__stop_after=1)
    source.unlink()
    resume = {"run__resume": broken}
    with pytest.raises(InputError, match="was made with train.init_from = .*source.pt") as error:
        run(beton, tmp_path, "broken", train__init_from=files["export"], **resume)
    assert "\n" not in str(error.value)
    run(beton, tmp_path, "broken", train__init_from=source, **resume)
    assert_equal(saved(broken, 4)["encoder"], saved(whole, 4)["encoder"])


@pytest.mark.parametrize("bad", ["missing", "damaged", "empty", "another", "text"])
def test_what_cannot_be_loaded_is_one_line_and_leaves_no_folder(
    beton: Beton, files: dict[str, Path], tmp_path: Path, bad: str
) -> None:
    file, changes = tmp_path / "file.pt", {}
    if bad == "damaged":
        file.write_bytes(files["checkpoint"].read_bytes()[:-1000])
    elif bad == "empty":
        torch.save({"state_dict": {}}, file)
    elif bad == "text":
        file.write_text("no weights")
    elif bad == "another":
        file, changes = files["checkpoint"], {"model.encoder": "resnet18"}
    with pytest.raises(InputError) as error:
        run(beton, tmp_path, "new", train__init_from=file, **changes)
    assert str(file) in str(error.value) and "\n" not in str(error.value)
    assert bad != "another" or "--model.encoder" in str(error.value)
    assert not (tmp_path / "new").exists()
