"""Other libraries' encoders: their output, what size they take, what decays."""

import pytest
import timm
import timm.optim
import torch
from torch import Tensor, nn

from fastproj.core.errors import InputError, SettingError
from fastproj.models.architectures import build_architecture, output_width, undecayed
from fastproj.models.encoders import build_encoder, freeze_patch_embedding, num_features
from fastproj.models.norm import SyncBatchNorm, synchronize
from fastproj.training.optim import parameter_groups


@pytest.mark.parametrize(
    "name", ["timm:test_vit", "timm:test_efficientnet", "timm:test_convnext", "timm:test_resnet",
             "timm:mobilenetv3_small_050", "torchvision:mobilenet_v3_small",
             "torchvision:shufflenet_v2_x0_5"],
)  # fmt: skip
def test_the_width_of_the_output_is_a_forward_passes(name: str) -> None:
    encoder = build_encoder(name, size=32)
    state = {key: tensor.clone() for key, tensor in encoder.state_dict().items()}
    with torch.no_grad():
        assert encoder.eval()(torch.randn(3, 3, 32, 32)).shape == (3, num_features(encoder))
    assert all(not p.is_meta for p in encoder.parameters())
    for key, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, state[key])


class Plain(nn.Module):
    """A pooled convolution; ``looks`` and ``keeps`` are what meta tensors cannot do."""

    def __init__(self, looks: bool = False, keeps: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 7, 3)
        self.looks, self.kept = looks, torch.ones(7) if keeps else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x).mean((2, 3))
        if self.looks and h.sum().item() != h.sum().item():
            raise ValueError("not a number")
        return h if self.kept is None else h * self.kept


@pytest.mark.parametrize("how", [{}, {"looks": True}, {"keeps": True}])
def test_a_module_that_meta_tensors_do_not_fit_gets_small_real_ones(how: dict) -> None:
    assert output_width(Plain(**how), "m:f", 8) == 7


def test_a_name_of_a_module_in_a_recipe(tmp_path, monkeypatch) -> None:
    (tmp_path / "encoders_of_mine.py").write_text(
        "from torch import nn\n"
        "def maps(): return nn.Conv2d(3, 4, 1)\n"
        "def pooled(): return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    encoder = build_encoder("encoders_of_mine:pooled", size=8)
    assert num_features(encoder) == 12
    with pytest.raises(InputError, match=r"gives \(2, 4, 8, 8\) for 2 images, not \(2, d\)"):
        build_encoder("encoders_of_mine:maps", size=8)
    with pytest.raises(InputError, match="AttributeError.*package.module:function"):
        build_encoder("encoders_of_mine:none", size=8)


@pytest.mark.parametrize(
    ("name", "size", "words"),
    [
        ("timm:vit_tiny_patch16_224", 36, "36 pixels are no whole number of its patches of 16"),
        ("timm:vit_tiny_patch16_224", 8, "take crops of 16"),
        ("timm:resnet18", 1, None),
        ("timm:maxvit_rmlp_pico_rw_256", 40, "cannot be built for|does not take"),
    ],
)
def test_a_size_that_does_not_fit_is_refused_in_one_line(name, size, words) -> None:
    if words is None:
        assert num_features(build_encoder(name, size=size)) == 512
        return
    with pytest.raises(InputError, match=words) as why:
        build_encoder(name, size=size)
    assert "\n" not in str(why.value) and name in str(why.value)


def test_a_vit_built_for_one_size_does_not_take_another() -> None:
    encoder = timm.models.VisionTransformer(32, 8, embed_dim=8, depth=1, num_heads=2, num_classes=0)
    assert output_width(encoder, "m:f", 32) == 8
    with pytest.raises(InputError, match="does not take images of 64 pixels .*64.*32"):
        output_width(encoder, "m:f", 64)


def test_a_classifier_in_the_midst_gives_no_second_result() -> None:
    """torchvision's GoogLeNet and Inception return a tuple in training."""
    encoder = build_encoder("torchvision:googlenet", size=64).train()
    assert encoder(torch.rand(2, 3, 64, 64)).shape == (2, 1024)
    assert all("aux" not in name for name, _ in encoder.named_parameters())


@pytest.mark.parametrize(
    ("name", "words"),
    [("timm:test_vit.din0", "timm:test_vit.din0 cannot be built .*din0"),
     ("timm:resnet81", "timm has no 'resnet81'; did you mean 'resnet"), ("timm:", "give timm:NAME"),
     ("torchvision:vit_b_17", "did you mean 'vit_b_16'")],
)  # fmt: skip
def test_a_name_that_there_is_not(name: str, words: str) -> None:
    with pytest.raises(InputError, match=words) as refused:
        build_encoder(name)
    assert isinstance(refused.value, SettingError) == ("din0" not in name)
    assert "\n" not in str(refused.value)


def test_a_partial_and_a_callable_object_are_functions(tmp_path, monkeypatch) -> None:
    (tmp_path / "makers_of_mine.py").write_text(
        "from functools import partial\nfrom torch import nn\n"
        "def pooled(side): return nn.Sequential(nn.AdaptiveAvgPool2d(side), nn.Flatten())\n"
        "class Maker:\n    def __call__(self): return pooled(1)\n"
        "half, maker = partial(pooled, 2), Maker()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, width in (("half", 12), ("maker", 3)):
        assert num_features(build_encoder(f"makers_of_mine:{name}", size=8)) == width


def test_the_source_is_that_of_every_class_and_of_the_function(tmp_path, monkeypatch) -> None:
    layers, makers = tmp_path / "layers_of_mine.py", tmp_path / "made_of_layers.py"
    layers.write_text(
        "from torch import nn\nclass Double(nn.Module):\n    def forward(self, x): return 2 * x\n"
    )
    makers.write_text(
        "from torch import nn\nfrom layers_of_mine import Double\n"
        "def build(): return nn.Sequential(nn.Flatten(), Double())\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))

    def source() -> str:
        return build_architecture("made_of_layers:build").about["source_sha256"]

    first = source()
    assert source() == first
    layers.write_text(layers.read_text().replace("2 * x", "3 * x"))
    second = source()
    makers.write_text(makers.read_text() + "\n")
    assert len({first, second, source()}) == 3
    # torch says its version; nothing else is in it.
    assert "source_sha256" not in build_architecture("torch.nn:Flatten").about


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_efficientnet"])
def test_what_decays_is_what_timm_says(name: str) -> None:
    model = timm.create_model(name, num_classes=0)
    theirs = timm.optim.param_groups_weight_decay(
        model, 0.1, no_weight_decay_list=model_no_weight_decay(model)
    )
    wanted = {group["weight_decay"]: set(map(id, group["params"])) for group in theirs}
    decayed, plain = parameter_groups([model], 0.1)
    assert set(map(id, decayed["params"])) == wanted[0.1]
    assert set(map(id, plain["params"])) == wanted[0.0]
    inside = nn.Sequential(nn.Linear(2, 2), model)
    assert undecayed(inside) == {f"1.{key}" for key in undecayed(model)}


def model_no_weight_decay(model: nn.Module) -> set[str]:
    return model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()


def test_torchvisions_position_embeddings_do_not_decay() -> None:
    from torchvision.models import VisionTransformer

    model = VisionTransformer(32, 16, 1, 2, 8, 16)
    decayed, plain = parameter_groups([model], 0.1)
    named = {id(p): key for key, p in model.named_parameters()}
    assert {"class_token", "encoder.pos_embedding"} <= {named[id(p)] for p in plain["params"]}
    assert {named[id(p)] for p in decayed["params"]} == {
        key for key, p in model.named_parameters()
        if p.ndim > 1 and key not in ("class_token", "encoder.pos_embedding")
    }  # fmt: skip


def test_a_frozen_patch_embedding_stays_as_it_is() -> None:
    encoder = build_encoder("timm:test_vit", size=32)
    freeze_patch_embedding(encoder)
    frozen = {name for name, p in encoder.named_parameters() if not p.requires_grad}
    assert frozen == {"patch_embed.proj.weight", "patch_embed.proj.bias"}
    groups = parameter_groups([encoder], 0.1)
    optimized = {id(p) for group in groups for p in group["params"]}
    assert id(encoder.patch_embed.proj.weight) not in optimized
    with pytest.raises(InputError, match="ResNet has no patch embedding"):
        freeze_patch_embedding(build_encoder("torchvision:resnet18", size=32))


def test_synchronized_batch_norm_keeps_timms_activation() -> None:
    """On one rank it computes what timm's own layers do, in training mode."""
    torch.manual_seed(0)
    own, ours = (build_encoder("timm:test_efficientnet", size=32) for _ in range(2))
    ours.load_state_dict(own.state_dict())
    synchronize(ours)
    assert any(isinstance(part, SyncBatchNorm) for part in ours.modules())
    assert ours.state_dict().keys() == own.state_dict().keys()
    x = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(ours(x), own(x))


def test_a_batch_norm_that_does_more_is_not_synchronized() -> None:
    class Scaled(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    with pytest.raises(InputError, match="model.sync_bn: 0 is a Scaled"):
        synchronize(nn.Sequential(Scaled(3)))
