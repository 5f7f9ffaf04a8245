"""Feature maps: those of the encoder's own forward pass, and one line where there are none."""

import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision.ops import Permute

from fastproj.core.errors import InputError
from fastproj.models.encoders import build_encoder
from fastproj.models.maps import FeatureMaps

IMAGES = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
STAGES = ("layer1", "layer2", "layer3", "layer4")


def encoder(name: str, stem: str = "imagenet") -> nn.Module:
    torch.manual_seed(0)
    return build_encoder(name, stem, 224 if ":" in name else None).eval()


def close(ours: Tensor, theirs: Tensor) -> bool:
    return ours.shape == theirs.shape and torch.allclose(ours, theirs, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "stem", "side"),
    [
        ("resnet18", "imagenet", 224),
        ("resnet18", "cifar", 32),
        ("resnet50", "imagenet", 96),
        ("torchvision:resnet18", "", 96),
        ("timm:resnet18", "", 96),
    ],
)
def test_a_resnets_maps_are_its_stages(name: str, stem: str, side: int) -> None:
    """Oracle: what its stages give in the encoder's own forward pass, and its pooled features."""
    probed = encoder(name, stem)
    seen: list[Tensor] = []
    for stage in STAGES:
        getattr(probed, stage).register_forward_hook(lambda *call: seen.append(call[2]))
    images = IMAGES[..., :side, :side]
    features = probed(images)
    theirs = list(seen)
    maps = FeatureMaps(encoder(name, stem)).eval()
    ours = list(maps(images).values())
    assert len(ours) == 4 and all(map(close, ours, theirs))
    assert close(ours[-1].mean((2, 3)), features)
    assert maps.channels == [found.shape[1] for found in ours]
    assert maps.strides == ([1, 2, 4, 8] if stem == "cifar" else [4, 8, 16, 32])


@torch.no_grad()
def test_a_convnexts_maps_are_those_of_features_only() -> None:
    probed = encoder("timm:convnext_atto")
    theirs = timm.create_model("convnext_atto", features_only=True).eval()
    own = {
        name.replace("stages.", "stages_", 1).replace("stem.", "stem_", 1): tensor
        for name, tensor in probed.state_dict().items()
        if not name.startswith("head")
    }
    theirs.load_state_dict(own)
    last = probed.forward_features(IMAGES)  # type: ignore[operator]
    maps = FeatureMaps(encoder("timm:convnext_atto")).eval()
    ours = list(maps(IMAGES).values())
    assert len(ours) == 4 and all(map(close, ours, theirs(IMAGES)))
    assert close(ours[-1], last)
    assert maps.strides == [4, 8, 16, 32]


@torch.no_grad()
def test_a_vits_map_is_its_last_block_and_takes_any_size() -> None:
    probed = encoder("timm:vit_tiny_patch16_224")
    maps = FeatureMaps(encoder("timm:vit_tiny_patch16_224")).eval()
    (ours,) = maps(IMAGES).values()
    tokens = probed.norm(ours.flatten(2).transpose(1, 2))  # type: ignore[operator]
    assert close(tokens, probed.forward_features(IMAGES)[:, 1:])  # type: ignore[operator]
    assert (maps.channels, maps.strides) == ([192], [16])
    assert maps(IMAGES[..., :96, :160])["0"].shape == (2, 192, 6, 10)
    left = {name for name, _ in maps.body.named_parameters()}
    assert not any(name.startswith(("norm", "head", "fc_norm")) for name in left)


@torch.no_grad()
def test_a_convolutional_model_of_torchvisions_gives_the_last_map_of_each_stride() -> None:
    probed = encoder("torchvision:mobilenet_v3_small")
    maps = FeatureMaps(encoder("torchvision:mobilenet_v3_small")).eval()
    ours = list(maps(IMAGES).values())
    assert [224 // found.shape[-1] for found in ours] == maps.strides == [4, 8, 16, 32]
    assert close(ours[-1], probed.features(IMAGES))  # type: ignore[operator]


@torch.no_grad()
def test_a_resnet_can_end_before_its_last_stage() -> None:
    whole = FeatureMaps(encoder("resnet18")).eval()
    maps = FeatureMaps(encoder("resnet18"), until="layer3").eval()
    images = IMAGES[..., :64, :64]
    assert maps.rest is not None and maps.strides == [4, 8, 16]
    assert close(maps.rest.eval()(maps(images)["2"]), whole(images)["3"])
    assert not any("rest" in name for name, _ in maps.named_parameters())


class Functional(nn.Module):
    """A ResNet by its names, whose forward pass does more than run them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.Conv2d(3, 4, 3, 2, 1)
        self.layer2, self.layer3, self.layer4 = (nn.Conv2d(4, 4, 3, 2, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(x).relu())
        return self.layer4(self.layer3(x)).mean((2, 3))


class ChannelsLast(nn.Module):
    """torchvision's Swin: its features are (B, h, w, c)."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 4, 4), Permute([0, 2, 3, 1]))


@pytest.mark.parametrize(
    ("made", "until", "says"),
    [
        (nn.Flatten, None, "gives no feature maps.*timm:vit_base_patch16_224"),
        (ChannelsLast, None, "cannot be a detector's trunk"),
        (lambda: encoder("timm:convnext_atto"), "layer3", "no ResNet"),
        (lambda: encoder("timm:gmlp_ti16_224"), None, "does not take images of any size"),
        (Functional, None, "does more than run its parts"),
    ],
)
def test_an_encoder_without_maps_is_refused_in_one_line(made, until, says) -> None:
    with pytest.raises(InputError, match=says) as refused:
        FeatureMaps(made(), until)
    assert "\n" not in str(refused.value)


def test_a_vit_that_timm_cannot_build_by_its_name_is_one_line() -> None:
    """Other arguments than its name's; no name at all."""
    small = {"embed_dim": 8, "depth": 1, "num_heads": 2, "num_classes": 0}
    for made in (
        timm.create_model("vit_tiny_patch16_224", **small),
        timm.models.VisionTransformer(32, 8, **small),
    ):
        with pytest.raises(InputError, match="build it with dynamic_img_size=True") as refused:
            FeatureMaps(made)
        assert "\n" not in str(refused.value)
    free = timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, **small)
    assert FeatureMaps(free).channels == [8]
