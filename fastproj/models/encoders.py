"""Encoders: torchvision's ResNets without their classifier, a small one, other libraries'."""

from collections.abc import Mapping
from itertools import pairwise

from torch import nn
from torchvision import models
from torchvision.models.resnet import BasicBlock, ResNet, conv1x1

from fastproj.core.errors import InputError, SettingError
from fastproj.models import ENCODERS
from fastproj.models.architectures import (
    build_architecture,
    first_patches,
    is_address,
    output_width,
)
from fastproj.models.pool import MaxPool2d

STEMS = ("imagenet", "cifar")
DEFAULT_SIZE = 224  # pixels: of a function's module, which says nothing


class Encoder(nn.Sequential):
    """Images (N, 3, H, W) -> features (N, ``num_features``).

    The children have torchvision's names (``conv1`` … ``layer4``, ``avgpool``), so state dicts are
    interchangeable with torchvision's ResNet, apart from its ``fc``.
    """

    def __init__(self, layers: Mapping[str, nn.Module], num_features: int) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.num_features = num_features


def from_torchvision(resnet: ResNet, stem: str, padding: int = 2) -> Encoder:
    """``resnet`` without its classifier ``fc``, with one of the stems of ``build_encoder``.

    ``padding`` is that of the CIFAR stem's convolution: 2 as in the authors' code
    (PKU-ML/Projector_Theory), where a 32×32 image becomes 34×34.
    """
    layers = dict(resnet.named_children())
    features = layers.pop("fc").in_features
    layers["maxpool"] = MaxPool2d(3, 2, padding=1)
    if stem == "cifar":
        layers["conv1"] = nn.Conv2d(3, 64, 3, stride=1, padding=padding, bias=False)
        layers["maxpool"] = nn.Identity()
    return Encoder({**layers, "flatten": nn.Flatten()}, features)


# Half of a CPU step is spent at full resolution. A stem of 16 channels (as in CIFAR's ResNet-20)
# instead of 32 makes the step a third shorter; later stages are half as wide as ResNet-18's.
SMALL_WIDTHS = (16, 64, 128, 256)


def resnet18(stem: str) -> Encoder:
    """torchvision's ResNet-18: 11.2 million parameters, 512 features."""
    return from_torchvision(models.resnet18(weights=None), stem)


def resnet34(stem: str) -> Encoder:
    """torchvision's ResNet-34: 21.3 million parameters, 512 features."""
    return from_torchvision(models.resnet34(weights=None), stem)


def resnet50(stem: str) -> Encoder:
    """torchvision's ResNet-50: 23.5 million parameters, 2048 features."""
    return from_torchvision(models.resnet50(weights=None), stem)


def resnet_small(stem: str) -> Encoder:
    """A narrow ResNet-10 (1.2 million parameters) of torchvision's blocks."""
    first = SMALL_WIDTHS[0]
    layers: dict[str, nn.Module] = {}
    if stem == "cifar":
        layers["conv1"] = nn.Conv2d(3, first, 3, padding=1, bias=False)
    else:
        layers["conv1"] = nn.Conv2d(3, first, 7, stride=2, padding=3, bias=False)
    layers |= {"bn1": nn.BatchNorm2d(first), "relu": nn.ReLU(inplace=True)}
    layers["maxpool"] = nn.Identity() if stem == "cifar" else MaxPool2d(3, 2, padding=1)
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


def build_encoder(name: str, stem: str = "cifar", size: int | None = None) -> nn.Module:
    """A new, randomly initialized encoder: images (N, 3, h, w) -> features (N, ``num_features``).

    ``name``: of the table ``ENCODERS``, with ``stem`` of ``STEMS``; or ``timm:NAME``,
    ``torchvision:NAME``, ``package.module:function``, without their classifier, for images of
    ``size`` pixels (None: the size that the library says). Stem ``imagenet`` is torchvision's (7×7
    stride 2, max-pool: for images of about 224 pixels); stem ``cifar`` is 3×3 stride 1 without
    max-pool (for about 32 pixels). Our residual branches are not zero-initialized: the authors'
    code does not. Raises ``SettingError`` for any other name, ``InputError`` for a size that the
    encoder does not take.
    """
    if is_address(name):
        built = build_architecture(name, size)
        module, side = built.module, size or built.size or DEFAULT_SIZE
        width = output_width(module, name, side)
        if getattr(module, "num_features", None) != width:  # timm's may be that before the head
            module.num_features = width  # type: ignore[assignment]
        return module
    if stem not in STEMS:
        raise SettingError(f"model.stem: no {stem!r}; choose one of {', '.join(STEMS)}")
    return ENCODERS[name](stem)


def num_features(encoder: nn.Module) -> int:
    """The width of the encoder's output, its attribute of this name.

    Raises ``InputError`` for a module without it.
    """
    width = getattr(encoder, "num_features", None)
    if not isinstance(width, int):
        raise InputError(
            f"the encoder {type(encoder).__name__} has no num_features: set this attribute to "
            "the width of its output, as timm's models have it"
        )
    return width


def freeze_patch_embedding(encoder: nn.Module) -> None:
    """Leave the first layer of a ViT as it was initialized [MoCo v3, arXiv 2104.02057, section 4].

    Raises ``InputError`` for an encoder whose first convolution does not cut patches.
    """
    patches = first_patches(encoder)
    if patches is None:
        raise InputError(
            f"model.freeze_patch_embedding: {type(encoder).__name__} has no patch embedding; "
            "leave it out"
        )
    patches.requires_grad_(False)
