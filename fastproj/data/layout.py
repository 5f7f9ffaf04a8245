"""The layout of a beton, FFCV's dataset file of version 2 (``ffcv.types``, ``ffcv.fields``)::

    header | field descriptors | one row per sample | page-aligned sample bytes | allocation table

The layout is declared here again because importing FFCV takes seconds and the check before a run
should take milliseconds. The tests compare every type with FFCV's own.
"""

import hashlib
import struct

import numpy as np

LONGEST = 65535  # pixels: FFCV stores width and height in 16 bits
VERSION = 2  # of FFCV's file format
JPEG, RAW = 0, 1  # ffcv.fields.rgb_image.IMAGE_MODES
HASH_BYTES = 4  # of each sample's SHA-256 in the manifest: enough to find a damaged sample

HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ],
    align=True,
)
# FFCV's image and int fields do not use a descriptor's arguments. The first 32 bytes of the image
# field's arguments hold the content digest, so a manifest of another file is noticed on opening.
DESCRIPTOR = np.dtype([("type_id", "<u1"), ("name", "<u1", 16), ("arguments", "<u1", 1024)])
IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
TABLE = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
IMAGE_TYPE, INT_TYPE = 2, 1  # ffcv.types.TYPE_ID_HANDLER
FIELDS = ("image", "label", "index", "width", "height")  # the last two in a square store only


def row_type(square: bool, index: bool = True) -> np.dtype:
    """The structured dtype of a sample's row: image, label, index (and original width, height).

    Without ``index``, image and label alone.
    """
    names = FIELDS if square else FIELDS[: 3 if index else 2]
    return np.dtype([(n, IMAGE if n == "image" else np.dtype("<i8")) for n in names], align=True)


def sample_digest(stored: bytes | memoryview, *row: int) -> bytes:
    """SHA-256 of a sample: its row (little-endian, without the pointer), then its stored bytes.

    ``row``: mode, width, height, label, source_width, source_height, named as in ``Beton``.
    """
    digest = hashlib.sha256(struct.pack("<BHHqqq", *row))
    digest.update(stored)
    return digest.digest()
