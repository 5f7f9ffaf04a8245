"""Encoders: torchvision's ResNets without their classifier, and one small enough for a CPU."""

from collections.abc import Callable, Mapping
from itertools import pairwise

from torch import nn
from torchvision.models import resnet18, resnet34, resnet50
from torchvision.models.resnet import BasicBlock, ResNet, conv1x1

from fastproj.errors import SettingError

STEMS = ("imagenet", "cifar")


class Encoder(nn.Sequential):
    """Images (N, 3, H, W) -> features (N, ``features``).

    The children bear torchvision's names (``conv1`` … ``layer4``, ``avgpool``), so a state dict
    moves to and from torchvision's ResNet, its ``fc`` left out.
    """

    def __init__(self, layers: Mapping[str, nn.Module], features: int) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.features = features


def _from_torchvision(build: Callable[..., ResNet], stem: str) -> Encoder:
    layers = dict(build(weights=None).named_children())
    features = layers.pop("fc").in_features
    if stem == "cifar":
        # Padding 2 as in the authors' code (PKU-ML/Projector_Theory): a 32×32 image becomes 34×34.
        layers["conv1"] = nn.Conv2d(3, 64, 3, stride=1, padding=2, bias=False)
        layers["maxpool"] = nn.Identity()
    return Encoder({**layers, "flatten": nn.Flatten()}, features)


# Half of a CPU step is spent at full resolution: a stem of 16 (as CIFAR's ResNet-20 has) instead
# of 32 takes a third off it, and the later stages stay half of ResNet-18's.
SMALL_WIDTHS = (16, 64, 128, 256)


def _small(stem: str) -> Encoder:
    """A narrow ResNet-10 (1.2 million parameters), built of torchvision's blocks."""
    first = SMALL_WIDTHS[0]
    layers: dict[str, nn.Module] = {}
    if stem == "cifar":
        layers["conv1"] = nn.Conv2d(3, first, 3, padding=1, bias=False)
    else:
        layers["conv1"] = nn.Conv2d(3, first, 7, stride=2, padding=3, bias=False)
    layers |= {"bn1": nn.BatchNorm2d(first), "relu": nn.ReLU(inplace=True)}
    layers["maxpool"] = nn.Identity() if stem == "cifar" else nn.MaxPool2d(3, 2, padding=1)
    layers["layer1"] = BasicBlock(first, first)
    for number, (before, width) in enumerate(pairwise(SMALL_WIDTHS), start=2):
        shortcut = nn.Sequential(conv1x1(before, width, stride=2), nn.BatchNorm2d(width))
        layers[f"layer{number}"] = BasicBlock(before, width, stride=2, downsample=shortcut)
    layers |= {"avgpool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}
    encoder = Encoder(layers, SMALL_WIDTHS[-1])
    for module in encoder.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return encoder


ENCODERS: dict[str, Callable[[str], Encoder]] = {
    "resnet18": lambda stem: _from_torchvision(resnet18, stem),
    "resnet34": lambda stem: _from_torchvision(resnet34, stem),
    "resnet50": lambda stem: _from_torchvision(resnet50, stem),
    "resnet_small": _small,
}


def build_encoder(name: str, stem: str) -> Encoder:
    """A new, randomly initialised encoder: ``name`` of ``ENCODERS``, ``stem`` of ``STEMS``.

    Stem ``imagenet`` is torchvision's (7×7 stride 2, max-pool: for images of about 224 pixels);
    stem ``cifar`` is 3×3 stride 1 without max-pool (for about 32 pixels). Residual branches are not
    zero-initialised: the authors' code does not. Raises ``SettingError`` for any other name.
    """
    if name not in ENCODERS:
        raise SettingError(f"model.encoder: no {name!r}; choose one of {', '.join(ENCODERS)}")
    if stem not in STEMS:
        raise SettingError(f"model.stem: no {stem!r}; choose one of {', '.join(STEMS)}")
    return ENCODERS[name](stem)
