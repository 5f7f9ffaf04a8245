"""Images as files in folders: any, ImageNet, ImageNet-100."""

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from fastproj.core.errors import InputError
from fastproj.prepare.sources import FOLDERS, SUFFIXES, Source, by_split, split_folders

IMAGENET100 = Path(__file__).with_name("imagenet100.txt")
IMAGENET100_SHA256 = "5ee5db69d488bb799a286d8e181801c3d02798776c1ce9203e5450f64e086e07"
WNID = re.compile(r"n\d{8}")


def folder(root: Path, split: str, download: bool) -> list[Source]:
    """``root/[train|val/]<class>/…/<image>``; classes are the sorted names of the folders.

    The folder of a split goes by any word in ``SPLITS``, as ``test`` for ``val``. A folder of
    images alone has no labels.
    """
    words = _split_words(root)
    nested = [word for word in words if _subfolders(root / word)]
    return _read(root, split_folders(words, nested), split, _subfolders)


def imagenet(root: Path, split: str, download: bool) -> list[Source]:
    """``root/train/<wnid>/<image>`` and ``root/val/<wnid>/<image>``, 1000 classes."""
    words = _split_words(root)
    if not words:
        raise InputError(f"{root}: has neither train nor val; expected {root}/train/<wnid>/…")
    return _read(root, words, split, _imagenet1000)


def imagenet100(root: Path, split: str, download: bool) -> list[Source]:
    """The 100 classes of ImageNet-100 in a folder with ImageNet's layout."""
    return _read(root, _split_words(root), split, _imagenet100)


def _split_words(root: Path) -> list[str]:
    """The folders in ``root`` that are named by a word for a split."""
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; --data.root names the folder of the images")
    return [name for name in _subfolders(root) if name in FOLDERS]


def _read(
    root: Path, words: list[str], split: str, chosen: Callable[[Path], tuple[str, ...]]
) -> list[Source]:
    """A source per split, of its folder's ``chosen`` classes; without words, of ``root``."""
    found = by_split(root, [(word, root / word) for word in words] or [("", root)], split)
    return [_image_folder(root, ours, place, chosen(place)) for ours, (place,) in found.items()]


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
    # A link to where the classes lie, or above, leads back; without classes that is read itself.
    above = (*[place] * bool(classes), *place.absolute().parents)
    seen = {_identity(folder): str(folder) for folder in above}
    found = {name: _images(place / name, seen) for name in classes or [""]}
    beside = (entry for entry in os.scandir(place) if not entry.is_dir())
    loose = sorted(entry.path for entry in beside if entry.name.lower().endswith(SUFFIXES))
    if classes and loose:
        classes, found = ("", *classes), {"": loose, **found}
    images = [path for paths in found.values() for path in paths]
    labels = np.repeat(range(len(classes)) if classes else [-1], [*map(len, found.values())])
    names = [os.path.relpath(path, root) for path in images]
    return Source(split, classes, images, labels, names)
