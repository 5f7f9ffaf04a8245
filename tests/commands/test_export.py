"""The exported encoder, in every program that its card says how to load it with."""

import json
import re
import stat
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models import resnet18

from fastproj.core.errors import InputError
from fastproj.evaluation.onnx import save_onnx
from fastproj.evaluation.pretrained import load_pretrained
from fastproj.evaluation.results import Evaluation, Row, write_evaluation
from fastproj.export import main
from fastproj.models.encoders import Encoder, build_encoder
from fastproj.prepare.encode import Store
from fastproj.runs import checkpoint
from fastproj.runs.environment import write_environment
from fastproj.runs.folder import RunFolder
from fastproj.settings import RUN, load
from fastproj.train import train
from fastproj.training.build import build_learner
from tests.support.betons import digit_like, write

ROOT = Path(__file__).parents[2]
NAMES = ["model.safetensors", "model.onnx", "README.md"]


def test_torchvision_takes_the_exported_encoder(tmp_path):
    """The file alone, in torchvision's own ResNet, gives the features the learner gives."""
    source = digit_like(np.random.default_rng(0), 20, 12, 4)
    beton = write(source, tmp_path / "data", Store("raw"))
    options = {
        "data.train": beton.path, "run.dir": tmp_path, "run.name": "r", "run.device": "cpu",
        "model.encoder": "resnet18", "model.stem": "imagenet", "views.size": 32,
        "views.blur_prob": 0,
        "projector.latents": 32, "projector.kind": "none", "projector.levels": 3,
        "optim.batch_size": 8, "optim.epochs": 1,
    }  # fmt: skip
    argv = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    settings = load(RUN, argv, "test", "")
    run = RunFolder(train(settings))
    main([str(run.path)])

    tensors = load_file(run.weights)
    model = resnet18(num_classes=2)
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert sorted(missing) == ["fc.bias", "fc.weight"] and not unexpected
    model.fc = torch.nn.Identity()
    ours = build_learner(settings, 4).encoder
    ours.load_state_dict(tensors)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model.eval()(images), ours.eval()(images))

    about = safe_open(run.weights, "pt").metadata()
    assert (about["encoder"], about["stem"], about["step"]) == ("resnet18", "imagenet", "2")
    assert about["mean"] == str(beton.manifest.mean)


def fake_run(folder: Path, encoder: str, stem: str, damage: dict[str, Any] | None = None) -> Path:
    """A run folder with one checkpoint, of random weights and batch-norm statistics.

    ``damage`` replaces parts of its state; None removes one.
    """
    argv = ["--data.train", f"{folder}/data/train.beton", "--run.dir", str(folder),
            "--run.name", "r", "--model.encoder", encoder, "--model.stem", stem,
            "--views.size", "32", "--views.flip_prob", "0.5"]  # fmt: skip
    settings = load(RUN, argv, "test", "")
    run = RunFolder(folder / "r")
    run.path.mkdir()
    run.config.write_text(settings.to_yaml())
    write_environment(run.environment)
    state = {
        "settings": settings.flat(), "encoder": random_encoder(encoder, stem).state_dict(),
        "projector": {}, "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.2, 0.3), "step": 7, "epoch": 2,
        "data": "c0ffee", **(damage or {}),
    }  # fmt: skip
    kept = {name: value for name, value in state.items() if value is not None}
    checkpoint.save(checkpoint.step_path(run.checkpoints, 7), kept, 1)
    return run.path


def random_encoder(name: str, stem: str) -> Encoder:
    torch.manual_seed(0)
    encoder = build_encoder(name, stem)
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            module.bias.data.normal_(0, 0.1)
    return encoder.eval()


def card_code(card: str) -> dict[str, str]:
    """The first word before each block of Python in the card -> the block."""
    return dict(re.findall(r"^(\w+)[^\n]*:\n\n```python\n(.*?)```", card, re.M | re.S))


@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
def test_the_cards_code_loads_it_in_torchvision_timm_and_onnx(tmp_path, monkeypatch, stem):
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    onnx = pytest.importorskip("onnx", reason="the extra onnx is not installed")
    pytest.importorskip("timm", reason="the extra timm is not installed")
    run = fake_run(tmp_path, "resnet18", stem)
    main([str(run)])
    assert sorted(path.name for path in (run / "export").iterdir()) == sorted(NAMES)

    monkeypatch.chdir(run / "export")
    images = torch.randn(3, 3, 40, 36)  # neither the size nor the batch of the export
    with torch.no_grad():
        wanted = random_encoder("resnet18", stem)(images)
        code = card_code(Path("README.md").read_text())
        assert list(code) == ["torchvision", "timm", "fastproj", "ONNX"]
        for library in ("torchvision", "timm", "fastproj"):
            found: dict[str, Any] = {}
            exec(code[library], found)
            assert library == "fastproj" or library in type(found["model"]).__module__
            assert (found["model"](images) - wanted).abs().max() < 1e-5
    found = {"images": images.numpy()}
    exec(code["ONNX"], found)
    assert np.abs(found["features"] - wanted.numpy()).max() < 1e-4

    model = onnx.load("model.onnx")
    onnx.checker.check_model(model)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 18)]
    (shape,) = (value.type.tensor_type.shape.dim for value in model.graph.input)
    assert [dim.dim_param or dim.dim_value for dim in shape] == ["batch", 3, "height", "width"]
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert metadata["mean"] == "(0.4, 0.5, 0.6)" and metadata["stem"] == stem


def test_the_readmes_code_loads_it_too(tmp_path, monkeypatch):
    timm = pytest.importorskip("timm", reason="the extra timm is not installed")
    no_onnx(monkeypatch)
    text = (ROOT / "README.md").read_text().partition("**Export.**")[2]
    (code,) = re.findall(r"```python\n(.*?)```", text.partition("**Any encoder")[0], re.S)
    cifar, imagenet = tmp_path / "cifar", tmp_path / "imagenet"
    for folder in (cifar, imagenet):
        folder.mkdir()
        main([str(fake_run(folder, "resnet18", folder.name))])
    images = torch.randn(2, 3, 32, 32)
    monkeypatch.chdir(cifar / "r/export")
    found: dict[str, Any] = {}
    exec(code, found)
    with torch.no_grad():
        wanted = random_encoder("resnet18", "cifar")(images)
        assert (found["model"].eval()(images) - wanted).abs().max() < 1e-5
        line = re.search(r"`(timm\.create_model\(.*checkpoint_path=.*?\))`", text)
        monkeypatch.chdir(imagenet / "r/export")
        model = eval(line[1], {"timm": timm})
        wanted = random_encoder("resnet18", "imagenet")(images)
        assert (model.eval()(images) - wanted).abs().max() < 1e-5


def no_onnx(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the extra is not installed; the tests below are faster without it, too."""
    monkeypatch.setitem(sys.modules, "onnxscript", None)


def test_without_the_extra_one_line_says_what_is_not_written(tmp_path, monkeypatch, capsys):
    no_onnx(monkeypatch)
    run = fake_run(tmp_path, "resnet_small", "cifar")
    (run / "export").mkdir()
    (run / "export/model.onnx").write_text("of an earlier export")
    main([str(run)])
    out, err = capsys.readouterr()
    assert out.splitlines() == [f"written: {run}/export/{n}" for n in NAMES if "onnx" not in n]
    (line,) = err.splitlines()
    assert line.startswith("note: no model.onnx, ") and "[onnx]" in line
    assert not (run / "export/model.onnx").exists()
    card = (run / "export/README.md").read_text()
    assert list(card_code(card)) == ["fastproj"] and "onnx" not in card.partition("## Versions")[0]


def test_an_encoder_that_torch_cannot_export_still_has_the_other_files(
    tmp_path, monkeypatch, capsys
):
    class Undecided(nn.Module):
        """Branches on pixel values, which no graph can hold."""

        def forward(self, images: Tensor) -> Tensor:
            return images.mean((2, 3)) if images.sum() > 0 else images.amax((2, 3))

    def given(encoder: nn.Module, *rest: Any) -> float:
        return save_onnx(Undecided(), *rest)

    monkeypatch.setattr("fastproj.export.save_onnx", given)
    run = fake_run(tmp_path, "resnet_small", "cifar")
    main([str(run)])
    out, err = capsys.readouterr()
    assert out.splitlines() == [f"written: {run}/export/{n}" for n in NAMES if "onnx" not in n]
    assert "torch cannot export the encoder to ONNX" in err.splitlines()[-1]
    assert not (run / "export/model.onnx").exists()


def test_the_card_says_what_was_trained_and_how_it_was_scored(tmp_path, monkeypatch, capsys):
    no_onnx(monkeypatch)
    folder = RunFolder(fake_run(tmp_path, "resnet_small", "cifar"))
    newest = checkpoint.latest(folder.checkpoints)
    part = {"file": f"{tmp_path}/data/x.beton", "content": "c", "images": 1234}
    protocol = {"data": {"train": part, "val": part}, "features": {"depth": "h"}, "probe": {"k": 5}}
    rows = [Row(e, "cubes", "knn", {"top1": 0.12345, "top5": 0.5}, protocol, {})
            for e in ("pixels", "pre-trained")]  # fmt: skip
    sha = checkpoint_sha(newest)
    write_evaluation(folder, Evaluation({"file": "f", "sha256": sha, "step": 7, "epoch": 2}, {},
                                        tuple(rows)), {})  # fmt: skip
    main([str(folder.path)])
    card = folder.card.read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["license"] == "unknown" and front["pipeline_tag"] == "image-feature-extraction"
    (result,) = front["model-index"][0]["results"]
    assert result["dataset"] == {"name": "cubes", "type": "cubes", "split": "val"}
    assert [metric["value"] for metric in result["metrics"]] == [12.35, 50.0]
    for words in (
        "| size | 1,201,808 parameters, 4.8 MB |",
        "| trained | 2 of 200 epochs, 7 steps of 256 images |",
        "| cubes | h | knn | 12.35% | 50.00% | 1,234 | 1,234 |",
        "file: x.beton",
        "flip_prob: [0.5]",
        "SHA-256 of the samples c0ffee",
        f"| torch | {torch.__version__.partition('+')[0]} |",
    ):
        assert words in card, words
    assert str(tmp_path) not in card  # it is published
    assert set(front["model-index"][0]) == {"name", "results"} and front["metrics"] == ["accuracy"]

    saved = json.loads(folder.evaluation.read_text())
    saved["checkpoint"]["sha256"] = "of another"
    folder.evaluation.write_text(json.dumps(saved))
    capsys.readouterr()
    main([str(folder.path)])
    assert "is of another checkpoint, the card shows no accuracy" in capsys.readouterr().err
    assert "have not been evaluated" in folder.card.read_text()


def checkpoint_sha(path: Path | None) -> str:
    import hashlib

    assert path
    return hashlib.sha256(path.read_bytes()).hexdigest()


def with_changed(name: str, value: Tensor | None) -> dict[str, Tensor]:
    weights = random_encoder("resnet_small", "cifar").state_dict()
    if value is None:
        del weights[name]
    else:
        weights[name] = value
    return weights


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ({"encoder": with_changed("bn1.bias", torch.full((16,), float("nan")))},
         "its encoder: bn1.bias holds NaN or infinity: the run diverged"),
        ({"encoder": with_changed("bn1.bias", None)}, 'Missing key.*"bn1.bias"'),
        ({"encoder": with_changed("bn1.bias", torch.zeros(3))}, "size mismatch for bn1.bias"),
        ({"encoder": with_changed("bn9.bias", torch.zeros(3))}, 'Unexpected key.*"bn9.bias"'),
        ({"mean": None}, "is no whole checkpoint of fastproj.train, it lacks 'mean'"),
        ({"encoder": None}, "holds no encoder"),
    ],
)  # fmt: skip
def test_a_checkpoint_that_is_not_whole_is_one_line(tmp_path, damage, words):
    run = fake_run(tmp_path, "resnet_small", "cifar", damage)
    with pytest.raises(InputError, match=words) as caught:
        main([str(run)])
    assert "\n" not in str(caught.value) and "step-00000007.pt" in str(caught.value)
    assert not list(run.glob("export/*"))


def test_a_folder_that_cannot_be_written_and_one_of_others(tmp_path):
    run = fake_run(tmp_path, "resnet_small", "cifar")
    (run / "export").write_text("a file where the folder goes")
    with pytest.raises(InputError, match="cannot write .*export.*fix the permissions"):
        main([str(run)])
    (tmp_path / "other").mkdir(mode=stat.S_IRWXU)
    with pytest.raises(InputError, match="is no run folder"):
        main([str(tmp_path / "other")])


def test_an_export_is_read_again_whole(tmp_path, monkeypatch):
    no_onnx(monkeypatch)
    run = fake_run(tmp_path, "resnet_small", "cifar")
    main([str(run)])
    again = load_pretrained(run / "export/model.safetensors")
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        ours, theirs = (e(images) for e in (random_encoder("resnet_small", "cifar"),
                                            again.build().eval()))  # fmt: skip
    assert torch.equal(ours, theirs) and (again.step, again.epoch) == (7, 2)
