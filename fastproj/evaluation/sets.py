"""What an encoder is scored on: a training and a validation set of the same classes."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from fastproj.core import dist
from fastproj.core.errors import InputError
from fastproj.data.beton import Beton, open_beton
from fastproj.evaluation.files import FeaturesFile, is_features_file, read_features

Set = Beton | FeaturesFile


@dataclass(frozen=True)
class Sets:
    """A training and a validation set, both betons or both features files.

    ``name``: how rows call them. ``num_classes``: of the manifest, or of a file's training labels.
    """

    name: str
    train: Set
    val: Set
    num_classes: int

    def describe(self) -> dict[str, Any]:
        """What the protocol says of them."""
        return {
            "train": describe(self.train),
            "val": describe(self.val),
            "classes": self.num_classes,
        }


def open_sets(train: str, val: str, name: str | None = None) -> Sets:
    """Both sets; ``name`` None takes the data set's.

    Raises ``InputError`` unless they have the same two or more classes. Says on stderr where both
    hold the same images.
    """
    if is_features_file(train) != is_features_file(val):
        raise InputError(f"{train} and {val}: give two betons or two features files")
    ours: Set
    theirs: Set
    if is_features_file(train):
        ours, theirs = read_features(train), read_features(val)
        classes = int(ours.features.labels.max()) + 1 if len(ours.features) else 0
        same, found = ours.sha256 == theirs.sha256, theirs.path.stem
    else:
        ours, theirs = open_beton(train), open_beton(val)
        for one, other in zip_longest(ours.classes, theirs.classes):
            if one != other:
                raise InputError(
                    f"{ours.path} has class {one} where {theirs.path} has {other}: write both from "
                    "one dataset"
                )
        classes, found = len(ours.classes), theirs.manifest.dataset
        same = ours.manifest.content == theirs.manifest.content
    if classes < 2:
        raise InputError(f"{ours.path} has {classes} class: a probe needs at least 2")
    if same and dist.is_main():
        print(
            f"note: {train} and {val} hold the same images: scores are those of training data",
            file=sys.stderr,
        )
    return Sets(name or found, ours, theirs, classes)


def open_folders(folders: Sequence[str]) -> list[Sets]:
    """The sets ``train.beton`` and ``val.beton`` of each folder, called as the folder is."""
    found = []
    for folder in folders:
        path = Path(folder)
        if not path.is_dir():
            raise InputError(f"eval.sets: there is no folder {folder}: give folders of two betons")
        train, val = (str(path / f"{split}.beton") for split in ("train", "val"))
        found.append(open_sets(train, val, path.resolve().name))
    return found


def describe(part: Set) -> dict[str, Any]:
    """What the protocol says of a set."""
    if isinstance(part, FeaturesFile):
        return {"file": str(part.path), "content": part.sha256, "images": len(part.features)}
    return {"file": str(part.path), "content": part.manifest.content, "images": len(part)}
