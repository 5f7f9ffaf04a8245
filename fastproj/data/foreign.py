"""FFCV files that other programs wrote: any fields, of which one is the image and one the label."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastproj.core.errors import InputError
from fastproj.data.layout import DESCRIPTOR, HEADER, IMAGE, IMAGE_TYPE, INT_TYPE, TABLE, VERSION

_BYTES = np.dtype([("ptr", "<u8"), ("size", "<u8")])
# FFCV's field types by their number: what they are called, and their part of a sample's row.
TYPES: dict[int, tuple[str, np.dtype]] = {
    0: ("float", np.dtype("<f8")),
    INT_TYPE: ("int", np.dtype("<i8")),
    IMAGE_TYPE: ("RGB image", IMAGE),
    3: ("bytes", _BYTES),
    4: ("array", np.dtype("<u8")),
    5: ("JSON", _BYTES),
    6: ("tensor", np.dtype("<u8")),
}

Fields = Sequence[tuple[int, str]]
"""(type's number, name) of each field of a file, in its order."""


class Rows(NamedTuple):
    """Arrays of N samples: the image's part of the row, the label, the image's bytes.

    ``start`` and ``end``: of the images' part of the file, in bytes. ``digest``: SHA-256 of header,
    descriptors, rows and allocation table, in hexadecimal.
    """

    image: np.ndarray
    label: np.ndarray
    length: np.ndarray
    start: int
    end: int
    digest: str


def read_fields(path: Path, data: np.ndarray) -> list[tuple[int, str]]:
    """The fields of an FFCV file; ``InputError`` for a file of another kind."""
    header = np.frombuffer(data, HEADER, 1)[0]
    count = int(header["num_fields"])
    if header["version"] != VERSION or not count:
        raise InputError(f"{path}: not a beton (FFCV version {VERSION} header expected)")
    if HEADER.itemsize + count * DESCRIPTOR.itemsize > len(data):
        raise InputError(
            f"{path}: {len(data)} bytes, too few for the {count} fields that its header promises: "
            "cut, damaged or no beton; write it again"
        )
    descriptors = np.frombuffer(data, DESCRIPTOR, count, HEADER.itemsize)
    return [
        (int(d["type_id"]), d["name"].tobytes().rstrip(b"\0").decode("ascii", "backslashreplace"))
        for d in descriptors
    ]


def describe(fields: Fields) -> str:
    """``image (RGB image), label (int)``"""
    return ", ".join(
        f"{name} ({TYPES[number][0] if number in TYPES else 'of a type of its own'})"
        for number, name in fields
    )


def choose_fields(path: Path, fields: Fields, names: Sequence[str] | None) -> tuple[str, str]:
    """The names of the image and of the label: ``names``, or the only ones that can be.

    Of several, those called ``image`` and ``label``. Raises ``InputError`` where there is none or
    nothing says which.
    """
    found = describe(fields)
    if unknown := [name for number, name in fields if number not in TYPES]:
        raise InputError(
            f"{path}: cannot be adopted: field {unknown[0]} is of a type that is not FFCV's own, "
            f"so nothing says how long a sample's row is; its fields are {found}"
        )
    chosen = []
    for number, usual, given in zip(
        (IMAGE_TYPE, INT_TYPE), ("image", "label"), names or (None, None), strict=True
    ):
        known = [name for kind, name in fields if kind == number]
        name = given or (usual if usual in known else known[0] if len(known) == 1 else None)
        kind = TYPES[number][0]
        if not known or (given and given not in known):
            what = f"no {kind} field" + (f" {given}" if known else "")
            raise InputError(f"{path}: cannot be adopted: it has {what}; its fields are {found}")
        if name is None:
            raise InputError(
                f"{path}: which {kind} field is the {usual}? Its fields are {found}: name the "
                "image and the label, --data.fields IMAGE,LABEL"
            )
        chosen.append(name)
    return chosen[0], chosen[1]


def read_rows(path: Path, data: np.ndarray, fields: Fields, image: str, label: str) -> Rows:
    """Rows and allocation table, checked against the file's size, of the fields chosen.

    Raises ``InputError`` for a file that is cut or damaged.
    """
    header = np.frombuffer(data, HEADER, 1)[0]
    samples, table_at = int(header["num_samples"]), int(header["alloc_table_ptr"])
    names = [name for _, name in fields]
    kinds = [(f"{i}", TYPES[number][1]) for i, (number, _) in enumerate(fields)]
    row = np.dtype(kinds, align=True)
    rows_at = HEADER.itemsize + len(fields) * DESCRIPTOR.itemsize
    rows_end = rows_at + samples * row.itemsize
    entries, rest = divmod(len(data) - table_at, TABLE.itemsize)
    if samples == 0 or rest or entries < samples or rows_end > table_at:
        raise InputError(
            f"{path}: {len(data)} bytes do not fit a header that promises {samples} samples before "
            f"byte {table_at}: cut, damaged or half written"
        )
    rows = np.frombuffer(data, row, samples, rows_at)
    table = np.frombuffer(data, TABLE, entries, table_at)  # of every field that stores bytes
    pointer = rows[str(names.index(image))]["data_ptr"]
    order = np.argsort(table["ptr"], kind="stable")
    place = order[np.searchsorted(table["ptr"], pointer, sorter=order).clip(max=entries - 1)]
    entry = table[place]
    wrong = (entry["ptr"] != pointer) | (entry["sample_id"] != np.arange(samples))
    if wrong.any():
        raise InputError(
            f"{path}: the table has no entry for the image of sample {int(np.argmax(wrong))} "
            f"({int(wrong.sum())} of {samples}): cut, damaged or half written"
        )
    digest = hashlib.sha256(data[:rows_end].data)
    digest.update(data[table_at:].data)
    return Rows(
        rows[str(names.index(image))],
        rows[str(names.index(label))].astype(np.int64),
        entry["size"].astype(np.int64),
        rows_end,
        table_at,
        digest.hexdigest(),
    )
