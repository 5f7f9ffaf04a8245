"""Sets that torchvision reads, and any ``torch.utils.data.Dataset``."""

import importlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastproj.core.errors import InputError, SettingError
from fastproj.core.table import nearest
from fastproj.prepare.encode import as_rgb
from fastproj.prepare.sources import SPLITS, Lazy, Source, numbered

STL10_CLASSES = (
    *("airplane", "bird", "car", "cat", "deer"),
    *("dog", "horse", "monkey", "ship", "truck"),
)
LABELS = ("targets", "labels", "_labels")  # what torchvision's sets call them
CLASSES = ("classes", "categories")


def cifar10(root: Path, split: str, download: bool) -> list[Source]:
    """CIFAR-10 as torchvision downloads, checks (MD5) and reads it."""
    from torchvision.datasets import CIFAR10

    return _in_memory("cifar10", CIFAR10, root, split, download)


def cifar100(root: Path, split: str, download: bool) -> list[Source]:
    """CIFAR-100, likewise."""
    from torchvision.datasets import CIFAR100

    return _in_memory("cifar100", CIFAR100, root, split, download)


def stl10(root: Path, split: str, download: bool) -> list[Source]:
    """STL-10, likewise, with its split ``unlabeled``."""
    from torchvision.datasets import STL10

    return _in_memory("stl10", STL10, root, split, download)


def _in_memory(name: str, kind: Any, root: Path, split: str, download: bool) -> list[Source]:
    theirs = {"train": "train", "val": "test"}
    if name == "stl10":
        theirs["unlabeled"] = "unlabeled"
    sources = []
    for ours, part in theirs.items():
        if split not in ("all", ours):
            continue
        try:
            if name == "stl10":
                read = kind(root, split=part, download=download)
                images, labels = read.data.transpose(0, 2, 3, 1), read.labels
                classes: tuple[str, ...] = STL10_CLASSES
            else:
                read = kind(root, train=part == "train", download=download)
                images, labels, classes = read.data, read.targets, tuple(read.classes)
        except RuntimeError as error:
            raise InputError(
                f"{root}: no complete {name} ({error}); fetch it with --data.download true"
            ) from None
        labels = np.asarray(labels).astype(np.int64)
        names = [f"{part}[{i}]" for i in range(len(images))]
        sources.append(Source(ours, classes, images, labels, names))
    return sources


def torchvision_dataset(name: str, root: Path, split: str, download: bool) -> list[Source]:
    """``torchvision.datasets.NAME``: its ``train`` and its ``val``, ``valid`` or ``test`` split.

    Where there is no ``train``, ``trainval`` is it. A set without splits is ``all``.
    """
    from torchvision import datasets

    kind = getattr(datasets, name, None)
    if not inspect.isclass(kind):
        right = nearest(name, datasets.__all__)
        raise SettingError(f"data.dataset: torchvision has no {name!r}; did you mean {right!r}?")
    named = inspect.signature(kind).parameters
    asked = [
        one.name
        for one in named.values()
        if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD
    ]
    more = [other for other in asked if other not in ("root", "split")]
    if more or "root" not in named:
        raise SettingError(
            f"data.dataset torchvision:{name} is not made from its folder alone"
            + (f" ({', '.join(more)})" if more else "")
            + ": write a function that returns it, and give package.module:function"
        )
    options = {"download": True} if download and "download" in named else {}
    parts: dict[str, list[dict[str, Any]]]
    if "train" in named:
        parts = {"train": [{"train": True}], "val": [{"train": False}]}
    elif "split" in named:
        theirs = {**SPLITS, "train": (*SPLITS["train"], "trainval")}
        parts = {ours: [{"split": part} for part in names] for ours, names in theirs.items()}
    else:
        parts = {"all": [{}]}
    sources = []
    for ours, tries in parts.items():
        if split in ("all", ours):
            read = first_of(kind, name, root, tries, options)
            if read is not None:
                sources.append(of_dataset(read, ours, f"torchvision:{name}"))
    return sources


def first_of(
    kind: Any, name: str, root: Path, tries: list[dict[str, Any]], options: Mapping[str, Any]
) -> Any:
    """The set with the first of ``tries`` that it knows; None if it knows none."""
    for attempt in tries:
        try:
            return kind(root, **attempt, **options)
        except ValueError:  # torchvision's word for a split of another name
            continue
        except (RuntimeError, OSError) as error:
            fetch = "" if options else "; fetch it with --data.download true"
            raise InputError(f"{root}: no complete torchvision:{name} ({error}){fetch}") from None
    return None


def from_function(address: str, root: Path, split: str, download: bool) -> list[Source]:
    """What ``package.module:function`` returns: a Dataset of (image, label), or a dict by split."""
    module, _, function = address.partition(":")
    try:
        made = getattr(importlib.import_module(module), function)()
    except Exception as error:  # code of the user's: whatever it raises is said in one line
        raise InputError(
            f"data.dataset {address} cannot be called ({type(error).__name__}: {error}): give "
            "package.module:function, of a module on PYTHONPATH and a function without arguments"
        ) from error
    if not isinstance(made, Mapping):
        made = {"all": made}
    return [of_dataset(part, str(ours), address) for ours, part in made.items()]


def of_dataset(dataset: Any, split: str, name: str) -> Source:
    """A source of any Dataset: ``dataset[i]`` is (image, label), or the image alone.

    An image is PIL's, or uint8 (H, W), (H, W, 3) or, as a tensor, (3, H, W). Labels are the
    attribute ``targets``, ``labels`` or ``_labels`` where there is one, else of one pass over all
    samples; classes are ``classes``, ``categories`` or the labels as text.
    """
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise InputError(
            f"data.dataset {name}: a {type(dataset).__name__} has no length or no items: return a "
            "torch.utils.data.Dataset of (image, label), or a dict of them by split"
        )
    given = next((getattr(dataset, key) for key in LABELS if hasattr(dataset, key)), None)
    if given is None or len(given) != len(dataset):
        given = [_label(dataset, i, name) for i in range(len(dataset))]
    try:
        labels = np.array([-1 if label is None else int(label) for label in given], np.int64)
    except (TypeError, ValueError):
        raise InputError(
            f"data.dataset {name}: a label is {given[0]!r}, not a whole number"
        ) from None
    classes = next((getattr(dataset, key) for key in CLASSES if hasattr(dataset, key)), None)
    if classes is None or len(classes) <= labels.max(initial=-1):
        classes = numbered(labels, f"data.dataset {name}")

    def read(position: int) -> np.ndarray:
        item = dataset[position]
        return pixels(item[0] if isinstance(item, tuple) else item, f"{name}[{position}]")

    names = [f"{split}[{i}]" for i in range(len(dataset))]
    classes = tuple(str(label) for label in classes)
    return Source(split, classes, Lazy(read, range(len(dataset))), labels, names)


def _label(dataset: Any, position: int, name: str) -> Any:
    try:
        item = dataset[position]
    except Exception as error:  # code of the user's
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(
            f"data.dataset {name}: item {position} cannot be read ({reason}): fix it, or give the "
            "labels as the attribute targets"
        ) from error
    return item[1] if isinstance(item, tuple) else -1


def pixels(image: Any, name: str) -> np.ndarray:
    """uint8 (H, W, channels) or (H, W) of PIL's image, an array, or a tensor (channels, H, W).

    ``name`` begins the message of an ``InputError``.
    """
    if isinstance(image, Image.Image):
        rgb = as_rgb(image)
        return np.asarray(rgb.getchannel(0) if rgb.info["gray"] else rgb)
    array = np.asarray(image)
    if hasattr(image, "permute") and array.ndim == 3:  # a tensor
        array = array.transpose(1, 2, 0)
    if array.dtype != np.uint8 or array.ndim not in (2, 3):
        raise InputError(
            f"data.dataset {name} is {array.dtype} {array.shape}: give PIL images or uint8 pixels"
        )
    return np.ascontiguousarray(array)
