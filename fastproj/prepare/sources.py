"""Raw datasets as lists of images and labels, before anything is decoded."""

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from fastproj.core.errors import InputError
from fastproj.core.table import Table

IMAGENET100 = Path(__file__).with_name("imagenet100.txt")
IMAGENET100_SHA256 = "5ee5db69d488bb799a286d8e181801c3d02798776c1ce9203e5450f64e086e07"
STL10_CLASSES = (
    "airplane",
    "bird",
    "car",
    "cat",
    "deer",
    "dog",
    "horse",
    "monkey",
    "ship",
    "truck",
)
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
WNID = re.compile(r"n\d{8}")


@dataclass(frozen=True)
class Source:
    """One split: N images in a fixed order.

    ``images[i]``: a file path or uint8 pixels (H, W, 3). ``labels``: int64 (N,), indices into
    ``classes``, -1 for no label. ``names[i]``: where the image comes from, for messages; by
    default its path, or its place in the split.
    """

    split: str
    classes: tuple[str, ...]
    images: Sequence[str] | np.ndarray
    labels: np.ndarray
    names: Sequence[str] = ()

    def __post_init__(self) -> None:
        if len(self.labels) != len(self.images):
            raise InputError(
                f"split {self.split}: {len(self.labels)} labels for {len(self.images)} images"
            )
        object.__setattr__(self, "labels", np.asarray(self.labels, np.int64))
        if not self.names:
            names = [x if isinstance(x, str) else f"{self.split}[{i}]"
                     for i, x in enumerate(self.images)]  # fmt: skip
            object.__setattr__(self, "names", names)


def open_sources(
    dataset: str,
    root: str | os.PathLike | None = None,
    split: str = "all",
    download: bool = False,
) -> list[Source]:
    """The split ``split`` of ``dataset`` under ``root``, or every split for ``all``.

    ``dataset``: a name in ``DATASETS``. ``download`` fetches the files into ``root`` first, where
    torchvision can. Raises ``InputError`` if files or classes are missing.
    """
    if root is None and dataset != "digits":
        raise InputError(f"dataset {dataset} needs --data.root: the folder that holds it")
    sources = DATASETS[dataset](Path(root or "."), split, download)
    chosen = [source for source in sources if split in ("all", source.split)]
    if not chosen:
        there = ", ".join(source.split for source in sources)
        raise InputError(
            f"{root or dataset}: dataset {dataset} has no split {split}"
            + (f"; found {there}" if there else "")
        )
    for source in chosen:
        if len(source.classes) < 2:
            raise InputError(
                f"{root}: {len(source.classes)} class in split {source.split}, a probe needs at "
                f"least 2; expected {root}/[train|val/]<class>/<image>"
            )
    return chosen


def _digits(root: Path, split: str, download: bool) -> list[Source]:
    """scikit-learn's 1,797 digits of 8×8 pixels: a fixed stratified split, 360 for ``val``."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    gray = np.rint(images.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    train, val = train_test_split(
        np.arange(len(labels)), test_size=360, random_state=0, stratify=labels
    )
    return [
        Source(
            split=split,
            classes=tuple("0123456789"),
            images=np.repeat(gray[chosen], 3, axis=3),
            labels=labels[chosen].astype(np.int64),
            names=[f"digits[{i}]" for i in chosen],
        )
        for split, chosen in (("train", np.sort(train)), ("val", np.sort(val)))
    ]


def _torchvision(dataset: str, root: Path, split: str, download: bool) -> list[Source]:
    """CIFAR-10, CIFAR-100 and STL-10 as torchvision downloads, checks (MD5) and reads them."""
    from torchvision.datasets import CIFAR10, CIFAR100, STL10

    theirs = {"train": "train", "val": "test"}
    if dataset == "stl10":
        theirs["unlabeled"] = "unlabeled"
    sources = []
    for ours, name in theirs.items():
        if split not in ("all", ours):
            continue
        try:
            if dataset == "stl10":
                read = STL10(root, split=name, download=download)
                images, labels = read.data.transpose(0, 2, 3, 1), read.labels
                classes = STL10_CLASSES
            else:
                kind = {"cifar10": CIFAR10, "cifar100": CIFAR100}[dataset]
                read = kind(root, train=name == "train", download=download)
                images, labels, classes = read.data, read.targets, tuple(read.classes)
        except RuntimeError as error:
            raise InputError(
                f"{root}: no complete {dataset} ({error}); fetch it with --data.download true"
            ) from None
        labels = np.asarray(labels).astype(np.int64)
        names = [f"{name}[{i}]" for i in range(len(images))]
        sources.append(Source(ours, classes, images, labels, names))
    return sources


def _folders(dataset: str, root: Path, split: str, download: bool) -> list[Source]:
    """Image folders: ``root/<split>/<class>/…`` if there are splits, else ``root/<class>/…``.

    The folder of split ``val`` may be named ``test``. Classes are the sorted folder names.
    """
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; --data.root names the folder of the images")
    test = "val" if (root / "val").is_dir() else "test"
    splits = {"train": root / "train", "val": root / test}
    splits = {split: folder for split, folder in splits.items() if folder.is_dir()}
    if dataset == "folder":
        # A class may be named "train". A split's folder holds folders, a class's holds images.
        splits = {split: folder for split, folder in splits.items() if _subfolders(folder)}
    elif dataset == "imagenet" and not splits:
        raise InputError(f"{root}: has neither train nor val; expected {root}/train/<wnid>/…")
    chosen = _CLASSES[dataset]
    classes: tuple[str, ...] | None = None
    sources = []
    for split, folder in (splits or {"all": root}).items():
        found = chosen(folder)
        if classes is not None and found != classes:
            odd = sorted(set(found) ^ set(classes))[0]
            raise InputError(f"{root}: class {odd} is in one split only; both need every class")
        classes = found
        sources.append(_image_folder(root, split, folder, classes))
    return sources


def _imagenet_classes(folder: Path) -> tuple[str, ...]:
    """The class ids (wnids) that have a folder in ``folder``."""
    wnids = tuple(name for name in _subfolders(folder) if WNID.fullmatch(name))
    if not wnids:
        raise InputError(
            f"{folder}: no folder named after a class id (n01440764, …). ImageNet's val folder is "
            "flat: first move each image to val/<wnid>/, as the development kit's "
            "ILSVRC2012_validation_ground_truth.txt says"
        )
    return wnids


def _imagenet1000(folder: Path) -> tuple[str, ...]:
    wnids = _imagenet_classes(folder)
    if len(wnids) != 1000:
        raise InputError(
            f"{folder}: {len(wnids)} class folders, ImageNet has 1000; unpack the rest, or read "
            "a part of it with --data.dataset folder"
        )
    return wnids


def _imagenet100(folder: Path) -> tuple[str, ...]:
    """The 100 classes of ImageNet-100, sorted (Tian et al., Contrastive Multiview Coding)."""
    text = IMAGENET100.read_bytes()
    if hashlib.sha256(text).hexdigest() != IMAGENET100_SHA256:
        raise InputError(f"{IMAGENET100}: not the published list of 100 classes; restore the file")
    wnids = tuple(sorted(text.decode().split()))
    missing = sorted(set(wnids) - set(_imagenet_classes(folder)))
    if missing:
        raise InputError(f"{folder}: {len(missing)} of 100 classes missing, first {missing[0]}")
    return wnids


def _fail(error: OSError) -> None:
    """For os.walk, which otherwise skips a folder that it cannot read."""
    raise error


def _subfolders(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(entry.name for entry in os.scandir(folder) if entry.is_dir()))


_CLASSES: dict[str, Callable[[Path], tuple[str, ...]]] = {
    "folder": _subfolders,
    "imagenet": _imagenet1000,
    "imagenet100": _imagenet100,
}


def _identity(folder: str | Path) -> tuple[int, int]:
    found = os.stat(folder)
    return found.st_dev, found.st_ino


def _walk(folder: Path, seen: dict[tuple[int, int], str]) -> Iterator[tuple[str, list[str]]]:
    """(folder, its files) of all folders below, links followed; ``seen``: identity -> path.

    Raises InputError for a folder that was seen before: a link back would repeat its images, with
    labels of another class.
    """
    for place, _, files in os.walk(folder, onerror=_fail, followlinks=True):
        before = seen.setdefault(_identity(place), place)
        if before != place:
            raise InputError(f"{place} is a link to {before}, which is read already: remove it")
        yield place, files


def _image_folder(root: Path, split: str, folder: Path, classes: tuple[str, ...]) -> Source:
    """Every image below ``folder/<class>``, in the order of torchvision's ``ImageFolder``."""
    images: list[str] = []
    labels: list[int] = []
    seen = {_identity(place): str(place) for place in (folder, *folder.absolute().parents)}
    for label, name in enumerate(classes):
        before = len(images)
        for place, files in sorted(_walk(folder / name, seen)):
            paths = (os.path.join(place, file) for file in sorted(files))
            images.extend(path for path in paths if path.lower().endswith(SUFFIXES))
        if len(images) == before:
            raise InputError(f"{folder / name}: holds no image ({' '.join(SUFFIXES)})")
        labels.extend([label] * (len(images) - before))
    names = [os.path.relpath(path, root) for path in images]
    return Source(split, classes, images, np.array(labels, np.int64), names)


DATASETS = Table(
    "data.dataset",
    {
        "cifar10": partial(_torchvision, "cifar10"),
        "cifar100": partial(_torchvision, "cifar100"),
        "stl10": partial(_torchvision, "stl10"),
        "imagenet": partial(_folders, "imagenet"),
        "imagenet100": partial(_folders, "imagenet100"),
        "folder": partial(_folders, "folder"),
        "digits": _digits,
    },
)
"""Each a function ``f(root, split, download) -> list[Source]``: every split that it has, or at
least those that ``split`` asks for ("all": every one)."""
