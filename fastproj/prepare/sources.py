"""Raw datasets as lists of images and labels, before anything is decoded."""

import os
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastproj.core.errors import InputError
from fastproj.core.table import Table, resolve

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
# The folder, file or column of each split goes by one of these words in other people's sets.
SPLITS = {"train": ("train", "training"), "val": ("val", "validation", "valid", "test")}
FOLDERS = {name: split for split, names in SPLITS.items() for name in names}
MOST_CLASSES = 1_000_000  # that are named after their labels


class Lazy(Sequence[Any]):
    """Images that are read when they are asked for: ``read(position)`` of each of ``positions``.

    ``read`` returns a file's content as bytes, or pixels: uint8 (H, W, 3) or (H, W).
    """

    def __init__(self, read: Callable[[int], bytes | np.ndarray], positions: Sequence[int]) -> None:
        self.read, self.positions = read, positions

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, chosen: Any) -> Any:
        if isinstance(chosen, slice):
            return [self.read(int(position)) for position in self.positions[chosen]]
        return self.read(int(self.positions[chosen]))

    def __iter__(self) -> Iterator[Any]:
        return (self[number] for number in range(len(self)))


@dataclass(frozen=True)
class Source:
    """One split: N images in a fixed order.

    ``images[i]``: a file path, uint8 pixels (H, W, 3), or what ``Lazy`` reads. ``labels``: int64
    (N,), indices into ``classes``, -1 for no label. ``names[i]``: where the image comes from, for
    messages; by default its path, or its place in the split. The class "" is images that lie beside
    class folders: ``open_sources`` refuses it unless labels are left out.
    """

    split: str
    classes: tuple[str, ...]
    images: Sequence[str] | np.ndarray | Lazy
    labels: np.ndarray
    names: Sequence[str] = ()

    def __post_init__(self) -> None:
        if len(self.labels) != len(self.images):
            raise InputError(
                f"split {self.split}: {len(self.labels)} labels for {len(self.images)} images"
            )
        labels = np.asarray(self.labels, np.int64)
        wrong = np.flatnonzero((labels < -1) | (labels >= len(self.classes)))
        if len(wrong):
            raise InputError(
                f"split {self.split}: image {wrong[0]} has the label {labels[wrong[0]]}, and there "
                f"are {len(self.classes)} classes: labels count from 0, and -1 is no label"
            )
        object.__setattr__(self, "labels", labels)
        if not self.names:
            places = [f"{self.split}[{i}]" for i in range(len(self.images))]
            if not isinstance(self.images, Lazy | np.ndarray):
                places = [
                    image if isinstance(image, str) else place
                    for image, place in zip(self.images, places, strict=True)
                ]
            object.__setattr__(self, "names", places)

    def at(self, positions: np.ndarray) -> "Source":
        """The images at ``positions`` (int64, (n,)), in this order."""
        images: Any = self.images
        if isinstance(images, Lazy):
            images = Lazy(images.read, [images.positions[i] for i in positions])
        elif isinstance(images, np.ndarray):
            images = images[positions]
        else:
            images = [images[i] for i in positions]
        names = [self.names[i] for i in positions]
        return replace(self, images=images, labels=self.labels[positions], names=names)


def open_sources(
    dataset: str,
    root: str | os.PathLike | None = None,
    split: str = "all",
    download: bool = False,
    *,
    labels: bool = True,
    classes: Sequence[str] | None = None,
    val_share: float = 0.0,
    seed: int = 0,
) -> list[Source]:
    """The split ``split`` of ``dataset`` under ``root``, or every split for ``all``.

    Args:
        dataset: a name in ``DATASETS``; or ``torchvision:NAME``; ``transfer:NAME``, a set that
            papers transfer to; ``hf:NAME``, a set of images on Hugging Face's hub; or
            ``package.module:function``, which is called without arguments and returns a
            ``torch.utils.data.Dataset`` of (image, label), or a dict of those by split.
        root: the folder, or for ``csv`` and the archives also the file, that holds it.
        download: fetch the files into ``root`` first, where torchvision or the hub can.
        labels: False: every image is unlabeled (-1), and folders are no classes.
        classes: only these, in this order.
        val_share: fraction of the images of each class that becomes split ``val``, chosen by
            ``seed``, where the set has no ``val`` of its own. The rest is split ``train``.

    Raises ``InputError`` if files or classes are missing.
    """
    library, _, name = dataset.partition(":")
    if root is None and dataset != "digits" and not (name and library not in ADDRESSED):
        raise InputError(f"dataset {dataset} needs --data.root: the folder that holds it")
    # A split that does not exist yet is cut from the others, so every one is read.
    wanted = "all" if val_share else split
    sources = _open(dataset)(Path(root or "."), wanted, download)
    if not labels:
        sources = [unlabeled(source) for source in sources]
    if classes is not None:
        sources = [of_classes(source, classes) for source in sources]
    place = root or dataset
    _check_splits(place, sources)
    if val_share:
        sources = held_out(sources, val_share, seed)
    chosen = [source for source in sources if split in ("all", source.split)]
    if not chosen:
        there = ", ".join(source.split for source in sources)
        raise InputError(
            f"{place}: dataset {dataset} has no split {split}"
            + (f"; found {there}" if there else "")
        )
    _check_classes(place, chosen)
    for source in chosen:
        if len(source.classes) < 2 and (source.labels >= 0).any():
            raise InputError(
                f"{place}: {len(source.classes)} class in split {source.split}, a probe needs at "
                f"least 2; expected {root}/[train|val/]<class>/<image>, or --data.labels false"
            )
    return chosen


def _open(dataset: str) -> Callable[[Path, str, bool], list[Source]]:
    """The function that reads ``dataset``."""
    library, _, name = dataset.partition(":")
    if not name:
        return DATASETS[dataset]
    entry = resolve(ADDRESSED.get(library, ADDRESSED[""]))
    return lambda root, split, download: entry(
        name if library in ADDRESSED else dataset, root, split, download
    )


def unlabeled(source: Source) -> Source:
    """The same images without labels and classes."""
    return replace(source, classes=(), labels=np.full(len(source.labels), -1))


def of_classes(source: Source, classes: Sequence[str]) -> Source:
    """The images of ``classes``, whose order becomes that of the labels; unlabeled ones stay.

    ``InputError`` names a class that the source does not have, or that is listed twice.
    """
    if len(set(classes)) < len(classes):
        twice = next(name for name in classes if list(classes).count(name) > 1)
        raise InputError(f"data.classes: {twice} is listed twice")
    missing = [name for name in classes if name not in source.classes]
    if missing and source.classes:
        raise InputError(
            f"data.classes: split {source.split} has no class {missing[0]} ({len(missing)} of "
            f"{len(classes)} are missing)"
        )
    place = {name: number for number, name in enumerate(classes)}
    new = np.array([*(place.get(name, -2) for name in source.classes), -1])[source.labels]
    kept = np.flatnonzero(new != -2)
    return replace(source.at(kept), classes=tuple(classes), labels=new[kept])


def held_out(sources: Sequence[Source], share: float, seed: int) -> list[Source]:
    """The only source, ``train`` or ``all``, cut in two; the same share of each class is ``val``.

    Both keep the order of the whole. Raises ``InputError`` where there is a val split already, or a
    class is too small to be cut.
    """
    from sklearn.model_selection import train_test_split

    whole = next((source for source in sources if source.split in ("train", "all")), None)
    if whole is None or any(source.split == "val" for source in sources):
        there = ", ".join(source.split for source in sources)
        raise InputError(
            f"data.val_share cuts val from train, and the set has the splits {there}: leave it out"
        )
    try:
        train, val = train_test_split(
            np.arange(len(whole.labels)), test_size=share, random_state=seed, stratify=whole.labels
        )
    except ValueError as error:
        raise InputError(f"data.val_share {share} does not fit: {error}") from None
    parts = [("train", train), ("val", val)]
    rest = [source for source in sources if source is not whole]
    return [replace(whole.at(np.sort(part)), split=split) for split, part in parts] + rest


def by_name(found: Sequence[str]) -> tuple[tuple[str, ...], np.ndarray]:
    """Class names, sorted, and labels from one class name per image; empty or -1: no label.

    Whole numbers are sorted as numbers.
    """
    names = sorted(set(found) - {"", "-1"})
    if all(re.fullmatch("-?[0-9]+", name) for name in names):
        names.sort(key=int)
    place = {name: label for label, name in enumerate(names)} | {"": -1, "-1": -1}
    return tuple(names), np.array([place[name] for name in found], np.int64)


def numbered(labels: np.ndarray, where: object) -> tuple[str, ...]:
    """Classes that are named after their labels: "0" to the largest.

    ``InputError``, which begins with ``where``, for a label that no set of classes has.
    """
    top = int(labels.max(initial=-1))
    if top >= MOST_CLASSES:
        raise InputError(
            f"{where}: a label is {top}: it is damaged, or no class; {MOST_CLASSES:,} classes are "
            "the most"
        )
    return tuple(map(str, range(top + 1)))


def by_split(root: Path, found: Iterable[tuple[str, Any]], split: str) -> dict[str, list[Any]]:
    """Split -> what was ``found`` with a word for it; the empty word is that of ``all``.

    Only ``split``, if it is there. Where there are several words for a split, as validation and
    test, the first in ``SPLITS`` is taken, and a note names the others.
    """
    groups: dict[str, list[Any]] = {}
    for word, thing in found:
        groups.setdefault(word, []).append(thing)
    named = {**SPLITS, "all": ("",)}
    there = {ours: [word for word in words if word in groups] for ours, words in named.items()}
    wanted = [ours for ours in there if there[ours]]
    if split in SPLITS and split in wanted:
        wanted = [split]
    for ours in wanted:
        first, *others = there[ours]
        if others:
            left = " and ".join(others)
            print(f"note: {root}: split {ours} is {first}, without {left}", file=sys.stderr)
    return {ours: groups[there[ours][0]] for ours in wanted}


def split_folders(folders: Iterable[str], nested: Collection[str]) -> list[str]:
    """Those of ``folders`` that are of splits; ``nested``: those that hold folders.

    A class may be named "train". A split's folder holds folders or, beside another split's,
    images; a class's holds images.
    """
    words = [name for name in folders if name in FOLDERS]
    every = {FOLDERS[word] for word in words} == set(SPLITS)
    return words if every or any(word in nested for word in words) else []


def word_of(name: str) -> str:
    """The word for a split that a file's ``name`` begins with; empty: none."""
    for word in FOLDERS:
        if name.lower().startswith((f"{word}-", f"{word}_", f"{word}.")):
            return word
    return ""


def _check_splits(place: str | os.PathLike, sources: Sequence[Source]) -> None:
    """``InputError`` where two sources are one split, or images lie beside class folders."""
    splits = [source.split for source in sources]
    for source in sources:
        if splits.count(source.split) > 1:
            raise InputError(
                f"{place}: split {source.split} is there {splits.count(source.split)} times, and "
                "each would be written over the one before: join them"
            )
        if "" in source.classes:
            loose = np.flatnonzero(source.labels == source.classes.index(""))
            raise InputError(
                f"{place}: split {source.split} holds images ({source.names[loose[0]]}, "
                f"{len(loose)} in all) beside class folders: move them into a class's folder, or "
                "give --data.labels false"
            )


def _check_classes(place: str | os.PathLike, sources: Sequence[Source]) -> None:
    """``InputError`` unless train and val, if they have labels, have the same classes."""
    labeled = [source for source in sources if source.split in SPLITS and source.classes]
    for source in labeled[1:]:
        odd = sorted(set(source.classes) ^ set(labeled[0].classes))
        if odd:
            raise InputError(f"{place}: class {odd[0]} is in one split only; both need every class")


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


DATASETS = Table(
    "data.dataset",
    {
        "cifar10": "fastproj.prepare.datasets:cifar10",
        "cifar100": "fastproj.prepare.datasets:cifar100",
        "stl10": "fastproj.prepare.datasets:stl10",
        "imagenet": "fastproj.prepare.folders:imagenet",
        "imagenet100": "fastproj.prepare.folders:imagenet100",
        "folder": "fastproj.prepare.folders:folder",
        "csv": "fastproj.prepare.files:csv_files",
        "parquet": "fastproj.prepare.files:parquet",
        "archive": "fastproj.prepare.archives:archive",
        "webdataset": "fastproj.prepare.archives:webdataset",
        "digits": _digits,
    },
)
"""Each a function ``f(root, split, download) -> list[Source]``: every split that it has, or at
least those that ``split`` asks for ("all": every one)."""

ADDRESSED = {
    "torchvision": "fastproj.prepare.datasets:torchvision_dataset",
    "transfer": "fastproj.prepare.transfer_sets:transfer_set",
    "hf": "fastproj.prepare.files:from_hub",
    "": "fastproj.prepare.datasets:from_function",
}
"""What stands before the colon of a dataset: functions ``f(name, root, split, download)``. The last
one takes ``package.module:function`` as a whole."""
