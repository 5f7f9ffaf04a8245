"""Write stored samples to FFCV's file format, in order, so the same samples give the same file.

FFCV's own ``DatasetWriter`` hangs when a worker fails, and the order of its samples' bytes depends
on which worker is first.
"""

import hashlib
from collections.abc import Iterable
from io import BufferedRandom
from typing import NamedTuple

import numpy as np

from fastproj.data.layout import (
    DESCRIPTOR,
    HASH_BYTES,
    HEADER,
    IMAGE_TYPE,
    INT_TYPE,
    TABLE,
    VERSION,
    row_type,
)
from fastproj.prepare.encode import Stored

PAGE = 1 << 23  # bytes: FFCV's default


class Written(NamedTuple):
    """What was written: sample count, bytes, digests in the manifest's form, and every sample's."""

    samples: int
    file_bytes: int
    sha256: str
    content: str
    hashes: bytes
    digests: bytes


def write_container(
    file: BufferedRandom,
    samples: Iterable[Stored],
    capacity: int,
    square: bool,
    index: bool = True,
) -> Written:
    """Write at most ``capacity`` samples into the empty, readable ``file``.

    ``square``: with the original width and height. ``index``: False leaves the field out.

    No sample crosses a page boundary, because FFCV's process cache reads whole pages. A sample
    larger than a page raises the page size to the next power of two that holds it. What is already
    written stays valid, because a larger page consists of whole smaller ones.
    """
    rows, table = np.zeros(capacity, row_type(square, index)), np.zeros(capacity, TABLE)
    names = rows.dtype.names or ()
    rows_at = HEADER.itemsize + len(names) * DESCRIPTOR.itemsize
    page, count, digests = PAGE, 0, bytearray()
    position = _round_up(rows_at + rows.nbytes, page)
    file.seek(position)
    for sample in samples:
        length = len(sample.data)
        page = max(page, 1 << (length - 1).bit_length())
        if position // page != (position + length - 1) // page:
            position = _round_up(position, page)
            file.seek(position)
        file.write(sample.data)
        image = (sample.mode, sample.width, sample.height, position)
        source = (sample.source_width, sample.source_height) if square else ()
        number = (count,) if len(names) > 2 else ()
        rows[count] = (image, sample.label, *number, *source)
        table[count] = (count, position, length)
        digests += sample.digest
        position += length
        count += 1

    file.write(table[:count].tobytes())
    header = np.array((VERSION, len(names), page, count, position), HEADER)
    descriptors = np.zeros(len(names), DESCRIPTOR)
    for descriptor, name in zip(descriptors, names, strict=True):
        descriptor["type_id"] = IMAGE_TYPE if name == "image" else INT_TYPE
        descriptor["name"][: len(name)] = np.frombuffer(name.encode(), np.uint8)
    content = hashlib.sha256(digests)
    descriptors[0]["arguments"][:32] = np.frombuffer(content.digest(), np.uint8)
    file.seek(0)
    file.write(header.tobytes() + descriptors.tobytes() + rows[:count].tobytes())
    file.seek(0)
    sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    hashes = np.frombuffer(digests, np.uint8).reshape(-1, 32)[:, :HASH_BYTES].tobytes()
    return Written(count, file.tell(), sha256, content.hexdigest(), hashes, bytes(digests))


def _round_up(position: int, page: int) -> int:
    return -(-position // page) * page
