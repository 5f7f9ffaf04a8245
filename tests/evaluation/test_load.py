"""Checkpoints of other libraries: features equal those of the library's own model."""

import argparse
import functools
import importlib
from collections.abc import Callable
from pathlib import Path

import lightly.models
import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock

from fastproj.core.errors import InputError, SettingError
from fastproj.evaluation.load import load_encoder
from fastproj.models import ENCODERS
from fastproj.models.frozen import frozen

Save = Callable[[nn.Module, Path], object]


def images(side: int = 32) -> Tensor:
    return torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(1))


def warmed(module: nn.Module, side: int = 32) -> nn.Module:
    """Batch-norm statistics other than the initial ones."""
    module.train()(torch.randn(4, 3, side, side))
    return module.eval()


def same(found: nn.Module, own: Callable[[Tensor], Tensor], side: int = 32) -> None:
    x = images(side)
    with frozen(found), torch.no_grad():
        torch.testing.assert_close(found(x), own(x), rtol=1e-5, atol=1e-5)


def resnet(*blocks: int) -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.ResNet(BasicBlock, blocks or (1, 1, 1, 1))


@pytest.fixture(scope="module")
def small() -> nn.Module:
    """torchvision's ResNet with the CIFAR stem, as solo-learn makes it (``fc`` removed)."""
    own = resnet()
    own.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=2, bias=False)
    own.maxpool = nn.Identity()
    own.fc = nn.Identity()
    return warmed(own)


def under(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in module.state_dict().items()}


def other(module: nn.Module) -> dict[str, Tensor]:
    """The same names with other weights: a momentum encoder's or a student's."""
    return {name: tensor + 1 for name, tensor in module.state_dict().items()}


def with_prefix(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


# As each library saves it. solo-learn is a Lightning module with ``backbone``, ``classifier`` and,
# in its momentum methods, ``momentum_backbone``; test_load_solo.py has its own classes' files.
LAYOUTS: dict[str, Callable[[nn.Module], dict]] = {
    "solo-learn": lambda m: {
        "epoch": 9,
        "state_dict": {
            **with_prefix("momentum_backbone.", other(m)),
            **under("backbone.", m),
            "classifier.weight": torch.zeros(10, 512),
            "projector.0.weight": torch.zeros(8, 512),
        },
        "hyper_parameters": {"backbone": {"name": "resnet18"}},
    },
    "moco": lambda m: {
        "epoch": 9,
        "arch": "resnet18",
        "state_dict": {
            **with_prefix("module.encoder_k.", other(m)),
            **under("module.encoder_q.", m),
            "module.encoder_q.fc.weight": torch.zeros(128, 512),
            "module.queue": torch.zeros(128, 64),
        },
        "optimizer": {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": []},
    },
    "mocov3": lambda m: {
        "state_dict": {
            **with_prefix("module.momentum_encoder.", other(m)),
            **under("module.base_encoder.", m),
            "module.predictor.0.weight": torch.zeros(4, 4),
        }
    },
    "dino": lambda m: {
        "student": with_prefix("module.backbone.", other(m)),
        "teacher": {**under("backbone.", m), "head.mlp.0.weight": torch.zeros(4, 4)},
        "args": argparse.Namespace(arch="resnet18", patch_size=16),
    },
    "ijepa": lambda m: {
        "encoder": with_prefix("module.", other(m)),
        "target_encoder": under("module.", m),
        "predictor": {"module.mask_token": torch.zeros(1, 1, 8)},
    },
    "byol-pytorch": lambda m: {
        **with_prefix("target_encoder.net.", other(m)),
        **under("online_encoder.net.", m),
    },
    "model": lambda m: {"model": under("encoder.", m)},
    "alone": lambda m: m.state_dict(),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_cifar_resnet_is_recognized_in_every_layout(
    layout: str, small: nn.Module, tmp_path: Path
) -> None:
    torch.save(LAYOUTS[layout](small), tmp_path / "it.ckpt")
    found = load_encoder(tmp_path / "it.ckpt")
    assert found.about == {"name": "ResNet-10", "stem": "cifar", "padding": 2}
    assert "72 of 72 weights match" in found.weights and found.size == 32
    assert found.describe().endswith("; conv1 padding 2, which no weight shows")
    if layout == "moco":
        words = found.weights
        assert "key 'state_dict', prefix 'module.encoder_q.'" in words and "\n" not in words
        assert "74 not used: fc.weight, module.encoder_k.conv1.weight, " in words
    same(found.module, small)


def test_lightlys_own_resnet(tmp_path: Path) -> None:
    """Its ResNet by name, and its children in a Sequential as lightly's examples have it."""
    torch.manual_seed(0)
    own = warmed(lightly.models.ResNetGenerator("resnet-9"))
    backbone = nn.Sequential(*list(own.children())[:-1], nn.AdaptiveAvgPool2d(1)).eval()
    torch.save({"state_dict": under("backbone.", backbone)}, tmp_path / "children.ckpt")
    torch.save({"state_dict": under("backbone.", own)}, tmp_path / "names.ckpt")
    same(load_encoder(tmp_path / "children.ckpt").module, lambda x: backbone(x).flatten(1))
    own.linear = nn.Identity()
    same(load_encoder(tmp_path / "names.ckpt").module, own)


def test_lightlys_sequential_of_torchvision(tmp_path: Path) -> None:
    backbone = nn.Sequential(*list(warmed(resnet(), 64).children())[:-1])
    momentum = with_prefix("backbone_momentum.", other(backbone))
    torch.save({"state_dict": {**momentum, **under("backbone.", backbone)}}, tmp_path / "it.ckpt")
    found = load_encoder(tmp_path / "it.ckpt")
    assert found.about == {"name": "ResNet-10", "stem": "imagenet"} and found.size == 224
    same(found.module, lambda x: backbone(x).flatten(1), 64)


def test_torchvision_by_name(tmp_path: Path) -> None:
    own = warmed(resnet(2, 2, 2, 2), 64)  # torchvision's resnet18
    torch.save(own.state_dict(), tmp_path / "it.pth")
    found = load_encoder(tmp_path / "it.pth", "torchvision:resnet18")
    assert found.mean == (0.485, 0.456, 0.406) and found.size == 224
    assert "2 not used: fc.weight, fc.bias" in found.weights
    own.fc = nn.Identity()
    same(found.module, own, 64)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_timm_vit_at_32_pixels(suffix: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    torch.manual_seed(0)
    own = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=10).eval()
    path = tmp_path / f"vit.{suffix}"
    save_file(own.state_dict(), path) if suffix == "safetensors" else torch.save(
        {"teacher": under("backbone.", own)}, path
    )
    found = load_encoder(path, "timm:vit_tiny_patch16_224", 32)
    assert found.mean == (0.5, 0.5, 0.5) and found.size == 224
    same(found.module, lambda x: own.forward_head(own.forward_features(x), pre_logits=True))
    with pytest.raises(InputError, match=r"pos_embed is \(1, 5, 192\) there and \(1, 197, 192\)"):
        load_encoder(path, "timm:vit_tiny_patch16_224")


def test_a_function_keeps_its_weights_or_takes_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_models.py").write_text(
        "from torch import nn\n"
        "def flat():\n    return nn.Sequential(nn.Flatten(), nn.Linear(12, 5))\n"
        "def number():\n    return 5\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    torch.manual_seed(0)
    own = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    torch.manual_seed(0)
    same(load_encoder(None, "my_models:flat").module, own, 2)
    nn.init.ones_(own[1].weight)
    torch.save({"state_dict": under("net.", own)}, tmp_path / "it.pt")
    found = load_encoder(tmp_path / "it.pt", "my_models:flat")
    assert found.about["features"] == "as the module gives them"
    same(found.module, own, 2)
    for name, words in (
        ("my_models:number", "returned a int"),
        ("my_models:missing", "cannot be called .AttributeError"),
        ("no_such_package.x:f", "cannot be called .ModuleNotFoundError"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            load_encoder(None, name)
        assert "\n" not in str(caught.value)


def test_a_function_that_gives_its_own_weights_has_no_random_control(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "weighted_models.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def drawn():\n    return nn.Sequential(nn.Flatten(), nn.Linear(12, 5))\n"
        "def given():\n"
        "    made = drawn()\n    nn.init.ones_(made[1].weight)\n"
        "    nn.init.ones_(made[1].bias)\n    return made\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    random = load_encoder(None, "weighted_models:drawn").at_random(3).module
    torch.manual_seed(3)
    same(random, nn.Sequential(nn.Flatten(), nn.Linear(12, 5)), 2)
    with pytest.raises(InputError, match="given has the same weights whatever the seed"):
        load_encoder(None, "weighted_models:given").at_random(3)


def test_a_plugins_encoder_says_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "layers_of_a_plugin.py"
    file.write_text("from torch import nn\nclass Own(nn.Flatten):\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    own = importlib.import_module("layers_of_a_plugin").Own
    monkeypatch.setitem(ENCODERS, "own", lambda stem: own())
    state = {
        "settings": {"model.encoder": "own", "model.stem": "cifar", "views.size": 8},
        "encoder": {}, "projector": None, "mean": (0.5,) * 3, "std": (0.2,) * 3, "step": 1,
        "epoch": 1, "data": "d",
    }  # fmt: skip
    torch.save(state, tmp_path / "it.pt")
    found = load_encoder(tmp_path / "it.pt")
    file.write_text(file.read_text() + "# another forward pass\n")
    again = load_encoder(tmp_path / "it.pt")
    assert found.size == again.size == 8
    assert found.about["source_sha256"] != again.about["source_sha256"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resnet18", "give timm:NAME"),
        ("timm:resnet81", "timm has no 'resnet81'; did you mean 'resnet"),
        ("torchvision:resnet81", "torchvision has no 'resnet81'; did you mean 'resnet"),
    ],
)
def test_a_name_that_does_not_exist(name: str, words: str) -> None:
    with pytest.raises(SettingError, match=words):
        load_encoder(None, name)


def test_a_name_alone_is_random() -> None:
    with pytest.raises(InputError, match="timm:test_resnet has random weights"):
        load_encoder(None, "timm:test_resnet")


def test_another_architecture_is_refused_in_one_line(small: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "it.pth"
    torch.save({"state_dict": under("backbone.", small)}, path)
    with pytest.raises(InputError, match=r"only 71 of 120 weights match .*conv1.weight is") as why:
        load_encoder(path, "torchvision:resnet18")
    assert "(64, 3, 3, 3) there and (64, 3, 7, 7) in the encoder" in str(why.value)
    with pytest.raises(InputError, match="0 of 150 weights match, none is called cls_token"):
        load_encoder(path, "timm:vit_tiny_patch16_224")


def test_a_deeper_network_is_not_taken_for_a_shallower_one(tmp_path: Path) -> None:
    torch.save(resnet(3, 2, 2, 2).state_dict(), tmp_path / "it.pth")
    words = "only 120 of 120 .* 12 are too many: layer1.2.bn1.bias is not in the encoder"
    with pytest.raises(InputError, match=words):
        load_encoder(tmp_path / "it.pth", "torchvision:resnet18")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is damaged or no checkpoint"),
        (b"no checkpoint at all", "is damaged or no checkpoint"),
        ([1, 2], "holds a list and no weights by name"),
        ({"state_dict": {"a": 1}}, "no ResNet that its weights show"),
        ({"code": F.relu}, "it holds .*relu.*, which is more than tensors"),
        (
            {"state_dict": {}, "lr_schedulers": [{"get_lr": functools.partial(F.relu)}]},
            r"is not read, it holds functools.partial, .* alone, .* weights_only=False\)\['state",
        ),
    ],
)
def test_what_is_no_checkpoint(content: object, words: str, tmp_path: Path) -> None:
    path = tmp_path / "it.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(InputError, match=words) as caught:
        load_encoder(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_a_checkpoint_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no checkpoint"):
        load_encoder(tmp_path / "it.pt")
