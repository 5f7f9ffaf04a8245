"""The classification sets that papers transfer to, with the split that linear probes are given.

Hyperparameters are chosen on a holdout of train, so ``train`` is everything that is not test: a
``val`` split of the set belongs to it, as in Kornblith et al. 2019 (arXiv 1805.08974).
"""

from pathlib import Path
from typing import Any

import numpy as np

from fastproj.core.errors import InputError
from fastproj.core.table import Table
from fastproj.prepare.datasets import first_of, of_dataset
from fastproj.prepare.sources import Lazy, Source

# Name -> torchvision's class and, for train and for test, the splits that it has them in.
TRANSFER_SETS = Table(
    "data.dataset transfer",
    {
        "dtd": ("DTD", ("train", "val"), "test"),  # partition 1
        "mnist": ("MNIST", (True,), False),
        "fashion_mnist": ("FashionMNIST", (True,), False),
        "flowers102": ("Flowers102", ("train", "val"), "test"),
        "gtsrb": ("GTSRB", ("train",), "test"),
        "pets": ("OxfordIIITPet", ("trainval",), "test"),
        "food101": ("Food101", ("train",), "test"),
        "aircraft": ("FGVCAircraft", ("trainval",), "test"),  # 100 variants
        "cars": ("StanfordCars", ("train",), "test"),
        "cub": None,
    },
)

CUB = "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz"
CUB_MD5 = "97eceeb196236b17998738112f37df78"


def transfer_set(name: str, root: Path, split: str, download: bool) -> list[Source]:
    """``transfer:NAME``: the splits ``train`` and ``val``, the set's test images."""
    entry = TRANSFER_SETS[name]
    if entry is None:
        return cub(root, download)
    kind, train, test = entry
    sources = []
    for ours, theirs in (("train", train), ("val", (test,))):
        if split in ("all", ours):
            parts = [_part(kind, root, part, ours, download) for part in theirs]
            sources.append(_joined(ours, parts))
    return sources


def _part(kind: str, root: Path, part: str | bool, split: str, download: bool) -> Source:
    from torchvision import datasets

    option = {"train" if isinstance(part, bool) else "split": part}
    fetch = {"download": True} if download else {}
    read = first_of(getattr(datasets, kind), kind, root, [option], fetch)
    if read is None:
        raise InputError(f"{root}: torchvision cannot fetch {kind} any more; put its files there")
    return of_dataset(read, split, f"torchvision:{kind}")


def _joined(split: str, parts: list[Source]) -> Source:
    """One source after the other."""
    places = [(part, i) for part in parts for i in range(len(part.images))]

    def read(position: int) -> Any:
        part, place = places[position]
        return part.images[place]

    labels = np.concatenate([part.labels for part in parts])
    names = [part.names[i] for part, i in places]
    return Source(split, parts[0].classes, Lazy(read, range(len(places))), labels, names)


def cub(root: Path, download: bool) -> list[Source]:
    """CUB-200-2011, as its authors split it: ``root/CUB_200_2011/images.txt`` and its like."""
    folder = root / "CUB_200_2011"
    if download and not folder.is_dir():
        from torchvision.datasets.utils import download_and_extract_archive

        try:
            download_and_extract_archive(CUB, str(root), md5=CUB_MD5)
        except (RuntimeError, OSError) as error:
            raise InputError(f"{CUB} cannot be fetched ({error})") from None
    images = _column(folder / "images.txt")
    labels = _column(folder / "image_class_labels.txt")
    in_train = _column(folder / "train_test_split.txt")
    classes = _column(folder / "classes.txt")
    if not images.keys() == labels.keys() == in_train.keys():
        raise InputError(f"{folder}: images.txt and its like do not list the same images")
    place = {number: i for i, number in enumerate(classes)}
    sources = []
    for split, word in (("train", "1"), ("val", "0")):
        chosen = [number for number in images if in_train[number] == word]
        missing = [labels[number] for number in chosen if labels[number] not in place]
        if missing:
            raise InputError(f"{folder / 'classes.txt'}: no class {missing[0]}")
        sources.append(
            Source(
                split,
                tuple(name.partition(".")[2] for name in classes.values()),
                [str(folder / "images" / images[number]) for number in chosen],
                np.array([place[labels[number]] for number in chosen]),
            )
        )
    return sources


def _column(path: Path) -> dict[str, str]:
    """Number -> text of a file with a number and a text per line."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        raise InputError(f"no {path}; fetch the set with --data.download true") from None
    rows = [line.split(maxsplit=1) for line in lines if line.strip()]
    short = [number for number, row in enumerate(rows, 1) if len(row) < 2]
    if short:
        raise InputError(f"{path}, line {short[0]}: expected a number and a text")
    return {number: text.strip() for number, text in rows}
