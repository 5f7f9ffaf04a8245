"""Open a beton (FFCV's dataset file) and check it before anything is read from it.

FFCV does not check what it reads. A manifest ``<stem>.json`` therefore lies beside
``<stem>.beton``: ``open_beton`` compares sizes, header, rows and table with it in milliseconds,
``verify`` reads every byte. ``layout`` describes the file. A set may be several files (``shards``).
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastproj.core.errors import InputError
from fastproj.data.foreign import Fields, Rows, describe, read_fields, read_rows
from fastproj.data.layout import (
    DESCRIPTOR,
    FIELDS,
    HEADER,
    IMAGE_TYPE,
    INT_TYPE,
    LONGEST,
    RAW,
    TABLE,
    row_type,
)
from fastproj.data.manifest import Adopted, Manifest, read_manifest, waiting_manifest
from fastproj.data.shards import File, expand, join, map_files, refuse_alone


@dataclass(frozen=True)
class Beton:
    """An opened, checked beton. Arrays have N entries in sample order.

    ``files``: the file, or those of a set of several. ``data``: all of them, uint8, read-only
    memory map. ``mode``: uint8, JPEG or RAW. The others are int64: ``width``, ``height`` as stored
    (pixels); ``pointer``, ``length`` (bytes in ``data``); ``label`` (-1: none); ``index`` (0 …
    N-1); ``source_width``, ``source_height`` (pixels): the original size in a square store, whose
    images are all resized to one square, and the stored size otherwise.
    """

    path: Path
    manifest: Manifest
    files: tuple[File, ...]
    data: np.ndarray
    mode: np.ndarray
    width: np.ndarray
    height: np.ndarray
    pointer: np.ndarray
    length: np.ndarray
    label: np.ndarray
    index: np.ndarray
    source_width: np.ndarray
    source_height: np.ndarray

    def __len__(self) -> int:
        return len(self.label)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; a label is an index into them."""
        return self.manifest.classes

    @property
    def only_file(self) -> Path:
        """The path, for a program that reads one file. Raises ``InputError`` for a set of more."""
        if len(self.files) > 1:
            raise InputError(
                f"{self.path}: FFCV reads one file, and this set is {len(self.files)}: take "
                "--data.engine stream, or write it without --data.shards"
            )
        return self.path

    def file_of(self, samples: np.ndarray) -> np.ndarray:
        """Which of ``files`` holds each of these samples: int64 (n,)."""
        starts = [file.start for file in self.files]
        return np.searchsorted(starts, self.pointer[samples], "right") - 1

    def stored(self, sample: int) -> np.ndarray:
        """The stored bytes of one sample: uint8 (length,), a view into ``data``."""
        start = self.pointer[sample]
        return self.data[start : start + self.length[sample]]

    def rows(self, samples: np.ndarray) -> Iterator[tuple[int, ...]]:
        """Each sample's row, as ``sample_digest`` takes it."""
        image = (self.mode, self.width, self.height)
        columns = (*image, self.label, self.source_width, self.source_height)
        return zip(*(column[samples].tolist() for column in columns), strict=True)


def open_beton(path: str | os.PathLike) -> Beton:
    """Open a beton after checking its size, header, rows, table and manifest; read no sample.

    ``train-{00000..00063}.beton`` opens the files of a set as one; samples are numbered through.
    Raises ``InputError`` with one line that says what is wrong and where.
    """
    beton = open_part(Path(path))
    if beton.manifest.shard:
        raise refuse_alone(beton.path, beton.manifest.shard)
    return beton


def open_part(path: Path) -> Beton:
    """As ``open_beton``, and also opens one file of a set alone."""
    files = expand(path)
    if files == [path]:
        return _open_file(path)
    parts = [_open_file(file) if file.is_file() else None for file in files]
    manifest = join(files, [part.manifest if part else None for part in parts])
    data, mapped = map_files(files)
    columns = {
        name: np.concatenate([getattr(part, name) for part in parts])
        for name in ("mode", "width", "height", "length", "label", "source_width", "source_height")
    }
    there = zip(filter(None, parts), mapped, strict=True)
    return Beton(
        path=path,
        manifest=manifest,
        files=mapped,
        data=data,
        pointer=np.concatenate([part.pointer + file.start for part, file in there]),
        index=np.arange(manifest.samples),
        **columns,
    )


def _open_file(path: Path) -> Beton:
    if not path.is_file():
        raise InputError(f"{path}: no such beton; write it with fastproj prepare")
    size = path.stat().st_size
    if size < HEADER.itemsize:
        raise InputError(f"{path}: {size} bytes, too short for a beton; write it again")
    data = np.memmap(path, np.uint8, mode="r")
    fields = read_fields(path, data)
    described = path.with_suffix(".json")
    waiting = waiting_manifest(described, _content(data))
    if waiting.exists():  # its writer was killed between the renames of the two files
        with suppress(InputError):
            return _described(path, data, fields, waiting)
    if not described.exists():
        raise InputError(
            f"{path}: no manifest beside the beton ({describe(fields)}); if another program wrote "
            "this FFCV file, adopt it once with fastproj prepare --adopt, else write it again"
        )
    return _described(path, data, fields, described)


def _described(path: Path, data: np.ndarray, fields: Fields, described: Path) -> Beton:
    """The beton, checked against the manifest ``described``."""
    manifest = read_manifest(described)
    if manifest.adopted:
        return _open_adopted(path, data, fields, manifest, manifest.adopted)
    rows, table = _read_tables(path, data, fields)
    for what, here, there in (
        ("samples", len(rows), manifest.samples),
        ("bytes", len(data), manifest.file_bytes),
        ("content digest", _content(data), manifest.content),
    ):
        if here != there:
            raise InputError(
                f"{path}: its {what} ({here}) differs from the manifest's ({there}): the manifest "
                "is of another file, or the beton is damaged; write both again"
            )
    beton = _beton(path, manifest, data, rows, table)
    _check_rows(beton, rows, table)
    return beton


def _open_adopted(
    path: Path, data: np.ndarray, fields: Fields, manifest: Manifest, adopted: Adopted
) -> Beton:
    rows = read_rows(path, data, fields, adopted.image, adopted.label)
    if rows.digest != adopted.tables or len(data) != manifest.file_bytes:
        raise InputError(
            f"{path}: not the file that was adopted, or damaged: restore it, or remove "
            f"{path.with_suffix('.json')} and adopt it again"
        )
    return adopted_beton(path, manifest, data, rows)


def adopted_beton(path: Path, manifest: Manifest, data: np.ndarray, rows: Rows) -> Beton:
    """The beton of another program's file; ``InputError`` names the first impossible row."""
    image, number = rows.image, np.arange(len(rows.label))
    width, height = image["width"].astype(np.int64), image["height"].astype(np.int64)
    beton = Beton(
        path=path,
        manifest=manifest,
        files=(File(path, 0, len(data)),),
        data=data,
        mode=image["mode"].copy(),
        width=width,
        height=height,
        pointer=image["data_ptr"].astype(np.int64),
        length=rows.length,
        label=rows.label,
        index=number,
        source_width=width,
        source_height=height,
    )
    _check_samples(beton, rows.start, rows.end, [])
    return beton


def _content(data: np.ndarray) -> str:
    """The content digest, which stands in the arguments of the first field of our files."""
    assert DESCRIPTOR.fields is not None
    start = HEADER.itemsize + DESCRIPTOR.fields["arguments"][1]
    return data[start : start + 32].tobytes().hex()


def _read_tables(path: Path, data: np.ndarray, fields: Fields) -> tuple[np.ndarray, np.ndarray]:
    """Check the sizes; return rows (N,) and allocation table (N,) in sample order."""
    header = np.frombuffer(data, HEADER, 1)[0]
    row = row_type(len(fields) == len(FIELDS), len(fields) > 2)
    samples, table_at = int(header["num_samples"]), int(header["alloc_table_ptr"])
    names = row.names or ()
    rows_at = HEADER.itemsize + len(names) * DESCRIPTOR.itemsize
    if list(fields) != [(IMAGE_TYPE if n == "image" else INT_TYPE, n) for n in names]:
        raise InputError(
            f"{path}: fields {describe(fields)}, expected {', '.join(names)}; write it again"
        )
    wanted = table_at + samples * TABLE.itemsize
    if samples == 0 or wanted != len(data) or rows_at + samples * row.itemsize > table_at:
        raise InputError(
            f"{path}: {len(data)} bytes, but its header promises {samples} samples and {wanted} "
            "bytes: cut, damaged or half written; write it again"
        )
    rows = np.frombuffer(data, row, samples, rows_at)
    table = np.frombuffer(data, TABLE, samples, table_at)
    order = np.argsort(table["sample_id"], kind="stable")
    return rows, table[order]


def _beton(
    path: Path, manifest: Manifest, data: np.ndarray, rows: np.ndarray, table: np.ndarray
) -> Beton:
    image = rows["image"]
    width, height = image["width"].astype(np.int64), image["height"].astype(np.int64)
    names = rows.dtype.names or ()
    square = "width" in names
    return Beton(
        path=path,
        manifest=manifest,
        files=(File(path, 0, len(data)),),
        data=data,
        mode=image["mode"].copy(),
        width=width,
        height=height,
        pointer=table["ptr"].astype(np.int64),
        length=table["size"].astype(np.int64),
        label=rows["label"].astype(np.int64),
        index=rows["index"].astype(np.int64) if "index" in names else np.arange(len(rows)),
        source_width=rows["width"].astype(np.int64) if square else width,
        source_height=rows["height"].astype(np.int64) if square else height,
    )


def _check_rows(beton: Beton, rows: np.ndarray, table: np.ndarray) -> None:
    """Check that every row and table entry is possible; ``InputError`` names the first bad one."""
    rows_end = HEADER.itemsize + len(rows.dtype.names or ()) * DESCRIPTOR.itemsize + rows.nbytes
    covered = table["sample_id"] == np.arange(len(beton))
    agreed = table["ptr"] == rows["image"]["data_ptr"]
    own = [
        ("sample ids do not cover the samples", covered),
        ("pointers of row and table differ", agreed),
    ]
    _check_samples(beton, rows_end, len(beton.data) - table.nbytes, own)


def _check_samples(
    beton: Beton, rows_end: int, table_at: int, own: list[tuple[str, np.ndarray]]
) -> None:
    """Check what every file's rows must hold, after the checks ``own``."""
    pixels = beton.width * beton.height
    for what, good in (
        *own,
        ("stored bytes lie outside the data", (beton.pointer >= rows_end) & (beton.length > 0)),
        ("stored bytes reach past the data", beton.length <= table_at - beton.pointer),
        ("no such image mode", beton.mode <= RAW),
        ("no pixels", (pixels > 0) & (beton.source_width > 0) & (beton.source_height > 0)),
        ("original size too large", np.maximum(beton.source_width, beton.source_height) <= LONGEST),
        ("raw size is not 3·w·h", (beton.mode != RAW) | (beton.length == 3 * pixels)),
        ("label outside the classes", (beton.label >= -1) & (beton.label < len(beton.classes))),
        ("index is not the sample's number", beton.index == np.arange(len(beton))),
    ):
        if not good.all():
            first = int(np.argmin(good))
            raise InputError(
                f"{beton.path}: {what} ({int((~good).sum())} of {len(good)} samples, the first is "
                f"sample {first}): header or table is damaged; write it again"
            )
