"""Images as files in folders: any, ImageNet, ImageNet-100."""

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from fastproj.core.errors import InputError
from fastproj.prepare.sources import SUFFIXES, Source, same_classes

IMAGENET100 = Path(__file__).with_name("imagenet100.txt")
IMAGENET100_SHA256 = "5ee5db69d488bb799a286d8e181801c3d02798776c1ce9203e5450f64e086e07"
WNID = re.compile(r"n\d{8}")


def folder(root: Path, split: str, download: bool) -> list[Source]:
    """``root/[train|val/]<class>/…/<image>``; classes are the sorted names of the folders.

    The folder of split ``val`` may be named ``test``. A folder of images alone has no labels.
    """
    # A class may be named "train". A split's folder holds folders or, beside another split's that
    # does, images; a class's holds images.
    splits = _split_folders(root)
    if not any(map(_subfolders, splits.values())) and set(splits) != {"train", "val"}:
        splits = {}
    return _read(root, splits, _subfolders)


def imagenet(root: Path, split: str, download: bool) -> list[Source]:
    """``root/train/<wnid>/<image>`` and ``root/val/<wnid>/<image>``, 1000 classes."""
    splits = _split_folders(root)
    if not splits:
        raise InputError(f"{root}: has neither train nor val; expected {root}/train/<wnid>/…")
    return _read(root, splits, _imagenet1000)


def imagenet100(root: Path, split: str, download: bool) -> list[Source]:
    """The 100 classes of ImageNet-100 in a folder with ImageNet's layout."""
    return _read(root, _split_folders(root), _imagenet100)


def _split_folders(root: Path) -> dict[str, Path]:
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; --data.root names the folder of the images")
    test = "val" if (root / "val").is_dir() else "test"
    splits = {"train": root / "train", "val": root / test}
    return {split: folder for split, folder in splits.items() if folder.is_dir()}


def _read(
    root: Path, splits: dict[str, Path], chosen: Callable[[Path], tuple[str, ...]]
) -> list[Source]:
    """A source per split; all that have labels have the same classes."""
    places = (splits or {"all": root}).items()
    found = [_image_folder(root, split, place, chosen(place)) for split, place in places]
    return same_classes(root, found)


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


def _images(place: Path, seen: dict[tuple[int, int], str]) -> list[str]:
    """Every image below ``place``, in the order of torchvision's ``ImageFolder``."""
    images: list[str] = []
    for where, files in sorted(_walk(place, seen)):
        paths = (os.path.join(where, file) for file in sorted(files))
        images.extend(path for path in paths if path.lower().endswith(SUFFIXES))
    if not images:
        raise InputError(f"{place}: holds no image ({' '.join(SUFFIXES)})")
    return images


def _image_folder(root: Path, split: str, place: Path, classes: tuple[str, ...]) -> Source:
    """Every image below ``place/<class>``, or without classes every image in ``place``."""
    images: list[str] = []
    labels: list[int] = []
    loose = [entry.name for entry in os.scandir(place) if entry.name.lower().endswith(SUFFIXES)]
    if classes and loose:
        raise InputError(
            f"{place}: holds images ({min(loose)}, {len(loose)} in all) beside class folders: move "
            "them into a class's folder"
        )
    # A link to where the classes lie, or above, leads back; without classes that is read itself.
    above = (*[place] * bool(classes), *place.absolute().parents)
    seen = {_identity(folder): str(folder) for folder in above}
    for label, name in enumerate(classes) if classes else [(-1, "")]:
        found = _images(place / name, seen)
        images.extend(found)
        labels.extend([label] * len(found))
    names = [os.path.relpath(path, root) for path in images]
    return Source(split, classes, images, np.array(labels, np.int64), names)
