"""Architectures by name, with random weights: timm's, torchvision's, or any function's.

``timm:NAME`` and ``torchvision:NAME`` lose their classifier; ``package.module:function`` is called
without arguments, and its module's output is taken as it is. A ResNet needs no name: its weights
say what it is.
"""

import hashlib
import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from torchvision import models
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from fastproj.core.errors import InputError, SettingError
from fastproj.core.table import nearest
from fastproj.evaluation.weights import Group
from fastproj.models.encoders import from_torchvision

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # torchvision's mean and std, of [0, 1]
CLASSIFIERS = ("fc", "heads", "head", "classifier")  # torchvision's names of the last layers


@dataclass(frozen=True)
class Architecture:
    """A module without its classifier, and what it expects of images.

    ``about``: what the protocol says of it, ``name`` among it. ``mean`` and ``std``: per channel,
    of pixels in [0, 1]; None where it does not say. ``size``: side of its images, pixels, or None.
    ``has_weights``: whether it may bring weights of its own.
    """

    module: nn.Module
    about: Mapping[str, Any] = field(default_factory=dict)
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    size: int | None = None
    has_weights: bool = False


def build_architecture(name: str, size: int | None = None) -> Architecture:
    """The architecture called ``name``, as the head of this file says.

    ``size``: side of the images, pixels; a timm model that has a choice is built for it. Raises
    ``SettingError`` for a name that does not exist, ``InputError`` for a function that fails or
    returns no module, and ``ModuleNotFoundError`` where timm is missing.
    """
    kind, _, rest = name.partition(":")
    if not rest:
        raise SettingError(
            f"eval.encoder: no {name!r}; give timm:NAME, torchvision:NAME or "
            "package.module:function; a run folder or a ResNet's checkpoint needs none"
        )
    if kind == "timm":
        return _of_timm(rest, size)
    if kind == "torchvision":
        return _of_torchvision(rest)
    return _of_function(name, kind, rest)


def is_resnet(group: Group) -> bool:
    """Whether ``group`` has the names of torchvision's or lightly's ResNet, 64 channels wide."""
    conv = group.tensors.get("conv1.weight")
    return conv is not None and conv.shape[:2] == (64, 3) and all(_blocks(group))


def of_resnet(group: Group) -> Architecture:
    """The ResNet that ``group`` has the weights of.

    A 3×3 ``conv1`` means the CIFAR stem. Its padding does not show in the weights: it is 1 where
    the names are those of lightly's own ResNet, and otherwise 2, as in solo-learn.
    """
    tensors, blocks = group.tensors, _blocks(group)
    bottleneck = "layer1.0.conv3.weight" in tensors
    stem = "cifar" if tensors["conv1.weight"].shape[-1] == 3 else "imagenet"
    padding = 1 if group.lightly else 2
    resnet = ResNet(Bottleneck if bottleneck else BasicBlock, blocks)
    encoder = from_torchvision(resnet, stem, padding)
    if group.layout.startswith("lightly's"):
        encoder.relu = nn.Identity()  # a function in lightly's forward, lost among the children
    depth = 2 + sum(blocks) * (3 if bottleneck else 2)
    about = {"name": f"ResNet-{depth}", "stem": stem}
    return Architecture(encoder, about | ({"padding": padding} if stem == "cifar" else {}))


def _blocks(group: Group) -> list[int]:
    """Blocks of the four stages."""
    return [
        len({name.split(".")[1] for name in group.tensors if name.startswith(f"layer{stage}.")})
        for stage in range(1, 5)
    ]


def _of_timm(name: str, size: int | None) -> Architecture:
    import timm

    if not timm.is_model(name.split(".")[0]):
        right = nearest(name, timm.list_models())
        raise SettingError(f"eval.encoder: timm has no {name!r}; did you mean {right!r}?")
    model = timm.create_model(name, pretrained=False, num_classes=0)
    says: Any = model.pretrained_cfg
    own = says["input_size"][-1]
    if size not in (None, own) and "img_size" in inspect.signature(type(model)).parameters:
        model = timm.create_model(name, pretrained=False, num_classes=0, img_size=size)
    about = {"name": f"timm:{name}", "features": "timm's, without its classifier"}
    return Architecture(model, about, tuple(says["mean"]), tuple(says["std"]), own)


def _of_torchvision(name: str) -> Architecture:
    known = models.list_models(module=models)
    if name not in known:
        right = nearest(name, known)
        raise SettingError(f"eval.encoder: torchvision has no {name!r}; did you mean {right!r}?")
    model = models.get_model(name, weights=None)
    head = next(head for head in CLASSIFIERS if hasattr(model, head))
    setattr(model, head, nn.Identity())
    about = {"name": f"torchvision:{name}", "features": f"what its {head} took"}
    return Architecture(model, about, *IMAGENET, 224)


def _of_function(address: str, module: str, name: str) -> Architecture:
    try:
        function = getattr(importlib.import_module(module), name)
        made = function()
    except Exception as error:  # code of the user's: whatever it raises is said in one line
        raise InputError(
            f"eval.encoder {address} cannot be called ({type(error).__name__}: {error}): give "
            "package.module:function, of a module on PYTHONPATH and a function without arguments"
        ) from error
    if not isinstance(made, nn.Module):
        raise InputError(
            f"eval.encoder {address} returned a {type(made).__name__}: it must return a module "
            "that maps images (B, 3, h, w) to features (B, d)"
        )
    about = {"name": address, "features": "as the module gives them"}
    source = inspect.getsourcefile(inspect.unwrap(function)) if callable(function) else None
    if source:  # its forward pass may change under the same weights
        about["source_sha256"] = hashlib.sha256(Path(source).read_bytes()).hexdigest()
    return Architecture(made, about, has_weights=True)
