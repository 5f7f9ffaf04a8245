"""Encoders of other libraries: timm's, torchvision's, or any function's, with random weights.

``timm:NAME`` and ``torchvision:NAME`` lose their classifier; ``package.module:function`` is called
without arguments, and its module's output is taken as it is.
"""

import hashlib
import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models

from fastproj.core.errors import InputError, SettingError
from fastproj.core.files import sha256
from fastproj.core.table import nearest
from fastproj.models.frozen import frozen

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # torchvision's mean and std, of [0, 1]
CLASSIFIERS = ("fc", "heads", "head", "classifier")  # torchvision's names of the last layers
AUXILIARY = ("aux1", "aux2", "AuxLogits")  # and of classifiers in the midst of Inception's
# What torchvision's reference training leaves out of weight decay; its models do not say so.
UNDECAYED = ("class_token", "pos_embedding", "relative_position_bias_table")
VERSIONED = ("torch", "torchvision", "timm", "fastproj")  # their versions say what their code is


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


def is_address(name: str) -> bool:
    """Whether ``name`` is one of ``build_architecture``'s, and not of the table ``ENCODERS``."""
    return ":" in name


def build_architecture(name: str, size: int | None = None) -> Architecture:
    """The architecture called ``name``, as the head of this file says.

    ``size``: side of the images, pixels; a model that has a choice is built for it. Raises
    ``SettingError`` for a name that does not exist, ``InputError`` for a function that fails or
    returns no module, and ``ModuleNotFoundError`` where timm is missing.
    """
    kind, _, rest = name.partition(":")
    if not rest:
        raise SettingError(
            f"encoder: no {name!r}; give timm:NAME, torchvision:NAME or package.module:function"
        )
    if kind == "timm":
        return _of_timm(rest, size)
    if kind == "torchvision":
        return _of_torchvision(rest, size)
    return _of_function(name, kind, rest)


def output_width(module: nn.Module, name: str, size: int) -> int:
    """The width d of the features (N, d) of images of ``size`` pixels: what a forward pass gives.

    The pass is on meta tensors, which have shapes and no values; a module that looks at values gets
    zeros instead. ``name`` begins a message. Raises ``InputError`` for a size that the module does
    not take, that its patches do not divide, and for an output of another shape.
    """
    first = first_patches(module)
    if first is not None and size % first.stride[0]:
        patch = first.stride[0]
        raise InputError(
            f"encoder {name}: images of {size} pixels are no whole number of its patches of "
            f"{patch} pixels; take crops of {max(1, round(size / patch)) * patch}"
        )
    with frozen(module), torch.no_grad():
        try:
            found = _forward_on_meta(module, size)
        except Exception:  # it may look at values, or keep tensors that are no buffers
            try:
                found = module(torch.zeros(2, 3, size, size))
            except Exception as error:  # of another library: whatever it raises
                raise InputError(
                    f"encoder {name} does not take images of {size} pixels ({_one_line(error)})"
                ) from error
    if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != 2:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise InputError(
            f"encoder {name} gives {shape} for 2 images, not (2, d): pool and flatten its output"
        )
    return found.shape[1]


def _forward_on_meta(module: nn.Module, size: int) -> Any:
    state = chain(module.named_parameters(), module.named_buffers())
    shapes = {name: tensor.to("meta") for name, tensor in state}
    images = torch.empty(2, 3, size, size, device="meta")
    return torch.func.functional_call(module, shapes, images)


def first_patches(module: nn.Module) -> nn.Conv2d | None:
    """The first convolution, if it cuts images into patches: its stride is its kernel's size."""
    first = next((part for part in module.modules() if isinstance(part, nn.Conv2d)), None)
    whole = first is not None and first.kernel_size == first.stride and first.stride[0] > 1
    return first if whole else None


def undecayed(module: nn.Module) -> set[str]:
    """Names of parameters that weight decay leaves out, whatever their shape.

    They are those that ``no_weight_decay()`` of the module or of one inside it returns, as timm's
    models do (position embeddings, class tokens), and torchvision's of the same kinds.
    """
    found = {name for name, _ in module.named_parameters() if name.rpartition(".")[2] in UNDECAYED}
    for prefix, part in module.named_modules():
        if hasattr(part, "no_weight_decay"):
            found |= {f"{prefix}.{name}" if prefix else name for name in part.no_weight_decay()}
    return found


def source_sha256(module: nn.Module, *names: str) -> str | None:
    """SHA-256 over the files of the module's classes and of the Python modules ``names``.

    Their forward pass may change under the same weights. None where all are of ``VERSIONED``.
    """
    kinds = {kind for part in module.modules() for kind in type(part).__mro__}
    given = {*names, *(kind.__module__ for kind in kinds)}
    own = {name for name in given if name.partition(".")[0] not in VERSIONED}
    files = {getattr(sys.modules.get(name), "__file__", None) for name in own}
    digests = sorted(sha256(Path(file)) for file in files if file and Path(file).is_file())
    return hashlib.sha256(" ".join(digests).encode()).hexdigest() if digests else None


def _of_timm(name: str, size: int | None) -> Architecture:
    import timm

    if not timm.is_model(name.split(".")[0]):
        right = nearest(name, timm.list_models())
        raise SettingError(f"encoder: timm has no {name!r}; did you mean {right!r}?")
    make = partial(timm.create_model, name, pretrained=False, num_classes=0)
    model = _built(f"timm:{name}", make, "img_size", size)
    says: Any = model.pretrained_cfg
    about = {"name": f"timm:{name}", "features": "timm's, without its classifier"}
    return Architecture(
        model, about, tuple(says["mean"]), tuple(says["std"]), says["input_size"][-1]
    )


def _of_torchvision(name: str, size: int | None) -> Architecture:
    known = models.list_models(module=models)
    if name not in known:
        right = nearest(name, known)
        raise SettingError(f"encoder: torchvision has no {name!r}; did you mean {right!r}?")
    make = partial(models.get_model, name, weights=None)
    model = _built(f"torchvision:{name}", make, "image_size", size)
    head = next(head for head in CLASSIFIERS if hasattr(model, head))
    setattr(model, head, nn.Flatten())  # some took (B, d, 1, 1)
    if getattr(model, "aux_logits", False):  # else they train on a tuple of logits
        setattr(model, "aux_logits", False)  # noqa: B010 - mypy takes it for a layer
        for name_of_part in AUXILIARY:
            if hasattr(model, name_of_part):
                setattr(model, name_of_part, None)
    about = {"name": f"torchvision:{name}", "features": f"what its {head} took"}
    return Architecture(model, about, *IMAGENET, 224)


def _built(name: str, make: Callable[..., nn.Module], option: str, size: int | None) -> nn.Module:
    """``make()``, for images of ``size`` pixels if the model has the ``option`` that says so."""
    asked = {} if size is None else {option: size}
    try:
        try:
            return make(**asked)
        except TypeError:  # no such option: a convolutional model takes any size
            return make()
    except Exception as error:  # windows that do not fit, weights that timm does not know
        images = "" if size is None else f" for images of {size} pixels"
        raise InputError(
            f"encoder {name} cannot be built{images} ({_one_line(error)}): take another encoder or "
            "size"
        ) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _of_function(address: str, module: str, name: str) -> Architecture:
    try:
        function = getattr(importlib.import_module(module), name)
        made = function()
    except Exception as error:  # code of the user's: whatever it raises is said in one line
        raise InputError(
            f"encoder {address} cannot be called ({type(error).__name__}: {error}): give "
            "package.module:function, of a module on PYTHONPATH and a function without arguments"
        ) from error
    if not isinstance(made, nn.Module):
        raise InputError(
            f"encoder {address} returned a {type(made).__name__}: it must return a module "
            "that maps images (B, 3, h, w) to features (B, d)"
        )
    about = {"name": address, "features": "as the module gives them"}
    while isinstance(function, partial):
        function = function.func
    if source := source_sha256(made, module, function.__module__ or module):  # C's has none
        about["source_sha256"] = source
    return Architecture(made, about, has_weights=True)
