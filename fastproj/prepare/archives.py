"""Images in tars and zips, without unpacking them: folders in one file, and WebDataset's shards."""

import json
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from fastproj.core.errors import InputError
from fastproj.prepare.sources import (
    FOLDERS,
    SUFFIXES,
    Lazy,
    Source,
    by_name,
    by_split,
    split_folders,
    word_of,
)


class Member(NamedTuple):
    """A file in an archive: the archive, the file's name there, and what reads its content."""

    archive: Path
    name: str
    read: Callable[[], bytes]


def archive(root: Path, split: str, download: bool) -> list[Source]:
    """A tar or zip of ``[train|val/]<class>/…/<image>``, below a common folder or not.

    ``root`` is the file, or a folder with files ``train*`` and ``val*``; several of a split are
    one after the other. Images without a folder have no labels.
    """
    found: list[tuple[str, tuple[str, Member]]] = []
    for path in _files(root, (".tar", ".zip")):
        inside = (m for m in _members(path) if m.name.lower().endswith(SUFFIXES))
        images = sorted(inside, key=lambda member: member.name)
        if not images:
            raise InputError(f"{path}: holds no image ({' '.join(SUFFIXES)})")
        found += _placed(word_of(path.name), images)
    sources = []
    for ours, pairs in by_split(root, found, split).items():
        source = _source(ours, [image for _, image in pairs], [name for name, _ in pairs])
        if source.classes and (source.labels < 0).any():
            source = replace(source, classes=("", *source.classes), labels=source.labels + 1)
        sources.append(source)
    return sources


def _placed(word: str, images: list[Member]) -> Iterator[tuple[str, tuple[str, Member]]]:
    """The word for the split, the class and the file of each of an archive's images.

    The word is ``word`` where no folder says another; the class of an image alone is empty.
    """
    parts = [PurePosixPath(image.name).parts for image in images]
    while min(map(len, parts)) > 2 and len(top := {part[0] for part in parts}) == 1:
        if top <= FOLDERS.keys():
            break  # one split alone
        parts = [part[1:] for part in parts]  # a common folder
    nested = {part[0] for part in parts if len(part) > 2}
    words = split_folders({part[0] for part in parts if len(part) > 1}, nested)
    for part, image in zip(parts, images, strict=True):
        if not words:
            yield word, (part[0] if len(part) > 1 else "", image)
        elif part[0] in words:
            yield part[0], (part[1] if len(part) > 2 else "", image)


def webdataset(root: Path, split: str, download: bool) -> list[Source]:
    """WebDataset's tars: files with one name before the first dot are one sample.

    The image is its file of an image's suffix, the label a whole number or a class's name: the text
    of its ``.cls`` or ``.txt``, or ``label`` (``cls``) in its ``.json``. ``root`` is a tar, or a
    folder of tars, of which those of a split begin with its name (``train-000000.tar``).
    """
    shards = [(word_of(path.name), path) for path in _files(root, (".tar",))]
    sources = []
    for ours, paths in by_split(root, shards, split).items():
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
    return sources


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
    """The text of a sample's label; empty without one, or where it is null."""
    try:
        for kind in ("cls", "txt"):
            if kind in parts:
                return parts[kind].read().decode().strip()
        if "json" in parts:
            about: Any = json.loads(parts["json"].read())
            if not isinstance(about, dict):
                raise ValueError(f"its .json is {about!r:.40}, no object with a label")
            label = next((about[name] for name in ("label", "cls") if name in about), None)
            if not isinstance(label, int | str | None):
                raise ValueError(f"{label!r:.40} is neither a whole number nor a name")
            return "" if label is None else str(label)
    except (UnicodeDecodeError, ValueError) as error:
        raise InputError(f"{path}: the label of sample {key} cannot be read ({error})") from None
    return ""


def _source(split: str, images: list[Member], found: list[str]) -> Source:
    classes, labels = by_name(found)
    several = len({image.archive for image in images}) > 1  # which may hold files of one name
    names = [f"{image.archive.name}/{image.name}" if several else image.name for image in images]
    read = Lazy(lambda position: images[position].read(), range(len(images)))
    return Source(split, classes, read, labels, names)


def _files(root: Path, suffixes: tuple[str, ...]) -> list[Path]:
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise InputError(f"{root}: no such file or folder; --data.root names the archive")
    paths = sorted(path for path in root.iterdir() if path.name.lower().endswith(suffixes))
    if not paths:
        raise InputError(f"{root}: holds no {' or '.join(suffixes)} file; unpack .gz files first")
    return paths


def _members(path: Path) -> Iterator[Member]:
    """Every file of an uncompressed tar, or of a zip, but what a Mac adds to its own.

    ``InputError`` where it is damaged.
    """
    try:
        for member in _in_zip(path) if zipfile.is_zipfile(path) else _in_tar(path):
            last = member.name.rpartition("/")[2]
            if not member.name.startswith("__MACOSX/") and not last.startswith("._"):
                yield member
    except (tarfile.TarError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{path}: neither a zip nor an uncompressed tar ({error}): unpack it, or copy it again"
        ) from None


def _in_zip(path: Path) -> Iterator[Member]:
    inside = zipfile.ZipFile(path)
    for name in inside.namelist():
        if not name.endswith("/"):
            yield Member(path, name, partial(inside.read, name))


def _in_tar(path: Path) -> Iterator[Member]:
    places: dict[str, tuple[int, int]] = {}  # where the content of each file lies, and its size
    with tarfile.open(path, "r:") as tar:  # a compressed one has no places to read from
        for info in tar:
            if info.issym() or (info.islnk() and info.linkname not in places):
                raise InputError(
                    f"{path}: {info.name} is a link to {info.linkname}, whose content does not "
                    "stand before it: pack the files themselves, as GNU tar does with "
                    "--dereference --hard-dereference"
                )
            if info.islnk():
                places[info.name] = places[info.linkname]
            elif info.isfile():
                places[info.name] = info.offset_data, info.size
            else:
                continue
            yield Member(path, info.name.removeprefix("./"), _at(path, *places[info.name]))


def _at(path: Path, start: int, size: int) -> Callable[[], bytes]:
    def read() -> bytes:
        with path.open("rb") as file:
            file.seek(start)
            content = file.read(size)
        if len(content) < size:
            raise InputError(f"{path}: {size - len(content)} bytes are missing: copy it again")
        return content

    return read
