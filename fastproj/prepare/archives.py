"""Images in tars and zips, without unpacking them: folders in one file, and WebDataset's shards."""

import json
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from fastproj.core.errors import InputError
from fastproj.prepare.sources import (
    FOLDERS,
    SUFFIXES,
    Lazy,
    Source,
    by_name,
    same_classes,
    split_of,
)


class Member(NamedTuple):
    """A file in an archive: its name there, and what reads its content."""

    name: str
    read: Callable[[], bytes]


def archive(root: Path, split: str, download: bool) -> list[Source]:
    """A tar or zip of ``[train|val/]<class>/…/<image>``, below a common folder or not.

    ``root`` is the file, or a folder with files ``train.*`` and ``val.*``. Images without a folder
    have no labels.
    """
    sources = []
    for path, ours in _files(root, (".tar", ".zip")):
        images = sorted(
            (m for m in _members(path) if m.name.lower().endswith(SUFFIXES)), key=lambda m: m.name
        )
        if not images:
            raise InputError(f"{path}: holds no image ({' '.join(SUFFIXES)})")
        parts = [PurePosixPath(member.name).parts for member in images]
        while min(map(len, parts)) > 2 and len({part[0] for part in parts}) == 1:
            if parts[0][0] in FOLDERS:
                break  # one split alone
            parts = [part[1:] for part in parts]  # a common folder
        by_split: dict[str, list[int]] = {ours: list(range(len(parts)))}
        if min(map(len, parts)) > 2 and all(part[0] in FOLDERS for part in parts):
            by_split = {}
            for number, part in enumerate(parts):
                by_split.setdefault(FOLDERS[part[0]], []).append(number)
            parts = [part[1:] for part in parts]
        for name, chosen in by_split.items():
            classes = [parts[i][0] if len(parts[i]) > 1 else "" for i in chosen]
            if "" in classes and any(classes):
                loose = images[chosen[classes.index("")]].name
                raise InputError(f"{path}: {loose} lies beside class folders: move it into one")
            sources.append(_source(name, [images[i] for i in chosen], classes))
    return same_classes(root, sources)


def webdataset(root: Path, split: str, download: bool) -> list[Source]:
    """WebDataset's tars: files with one name before the first dot are one sample.

    The image is its file of an image's suffix, the label a whole number or a class's name: the text
    of its ``.cls`` or ``.txt``, or ``label`` (``cls``) in its ``.json``. ``root`` is a tar, or a
    folder of tars, of which those of a split begin with its name (``train-000000.tar``).
    """
    shards: dict[str, list[Path]] = {}
    for path, ours in _files(root, (".tar",)):
        shards.setdefault(ours, []).append(path)
    sources = []
    for ours, paths in shards.items():
        images: list[Member] = []
        found: list[str] = []
        for path in paths:
            for key, parts in _samples(path).items():
                image = next((m for kind, m in parts.items() if _is_image(kind)), None)
                if image is None:
                    raise InputError(f"{path}: sample {key} has no image ({', '.join(parts)})")
                images.append(image)
                found.append(_label(path, key, parts))
        if not images:
            raise InputError(f"{paths[0]}: no sample in it")
        sources.append(_source(ours, images, found))
    return same_classes(root, sources)


def _is_image(kind: str) -> bool:
    return f".{kind.lower()}".endswith(SUFFIXES)


def _samples(path: Path) -> dict[str, dict[str, Member]]:
    """Key -> kind (what follows the first dot of the name) -> file, in the tar's order."""
    samples: dict[str, dict[str, Member]] = {}
    for member in _members(path):
        folder, _, name = member.name.rpartition("/")
        stem, dot, kind = name.partition(".")
        if dot and stem:
            samples.setdefault(f"{folder}/{stem}" if folder else stem, {})[kind] = member
    return samples


def _label(path: Path, key: str, parts: dict[str, Member]) -> str:
    """The text of a sample's label; empty without one."""
    try:
        for kind in ("cls", "txt"):
            if kind in parts:
                return parts[kind].read().decode().strip()
        if "json" in parts:
            about: Any = json.loads(parts["json"].read())
            return str(next((about[name] for name in ("label", "cls") if name in about), ""))
    except (UnicodeDecodeError, ValueError) as error:
        raise InputError(f"{path}: the label of sample {key} cannot be read ({error})") from None
    return ""


def _source(split: str, images: list[Member], found: list[str]) -> Source:
    classes, labels = by_name(found)
    names = [member.name for member in images]
    read = Lazy(lambda position: images[position].read(), range(len(images)))
    return Source(split, classes, read, np.asarray(labels), names)


def _files(root: Path, suffixes: tuple[str, ...]) -> list[tuple[Path, str]]:
    """The archives and the split of each: of its name, or ``all``."""
    if root.is_file():
        return [(root, split_of(root.name) or "all")]
    if not root.is_dir():
        raise InputError(f"{root}: no such file or folder; --data.root names the archive")
    paths = sorted(path for path in root.iterdir() if path.name.lower().endswith(suffixes))
    if not paths:
        raise InputError(f"{root}: holds no {' or '.join(suffixes)} file; unpack .gz files first")
    return [(path, split_of(path.name) or "all") for path in paths]


def _members(path: Path) -> Iterator[Member]:
    """Every file of an uncompressed tar, or of a zip. ``InputError`` where it is damaged."""
    try:
        if zipfile.is_zipfile(path):
            inside = zipfile.ZipFile(path)
            for name in inside.namelist():
                if not name.endswith("/"):
                    yield Member(name, lambda name=name: inside.read(name))  # type: ignore[misc]
            return
        with tarfile.open(path, "r:") as tar:  # a compressed one has no places to read from
            for info in tar:
                if info.isfile():
                    start, size = info.offset_data, info.size
                    yield Member(info.name.removeprefix("./"), _at(path, start, size))
    except (tarfile.TarError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{path}: neither a zip nor an uncompressed tar ({error}): unpack it, or copy it again"
        ) from None


def _at(path: Path, start: int, size: int) -> Callable[[], bytes]:
    def read() -> bytes:
        with path.open("rb") as file:
            file.seek(start)
            content = file.read(size)
        if len(content) < size:
            raise InputError(f"{path}: {size - len(content)} bytes are missing: copy it again")
        return content

    return read
