"""What a beton must hold, and the check before anything reads one.

A beton is FFCV's container, version 2 (``ffcv.types``, ``ffcv.fields.rgb_image``)::

    header | field descriptors | one row a sample | page-aligned sample bytes | allocation table

Its layout is declared here again, because importing FFCV takes seconds and the check before a
run should take milliseconds; the tests compare every type with FFCV's own. FFCV checks nothing it
reads, so a manifest ``<stem>.json`` lies beside ``<stem>.beton``: ``open_beton`` compares sizes,
header, rows and table with it, ``verify`` reads every byte.
"""

import base64
import hashlib
import json
import os
import secrets
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from io import BufferedRandom
from pathlib import Path
from typing import Any

import numpy as np

from fastproj.errors import InputError
from fastproj.machine import cores

FORMAT = 1  # of the manifest
VERSION = 2  # of FFCV's container
JPEG, RAW = 0, 1  # ffcv.fields.rgb_image.IMAGE_MODES
HASH_BYTES = 4  # of each sample's SHA-256 kept: names the damage, the full digests prove it
CHUNK = 256  # samples that one thread verifies at a time

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
# A descriptor's arguments are unused by FFCV's image and int fields: the image's first 32 bytes
# hold the content digest here, so that a manifest of another file is noticed without reading it.
DESCRIPTOR = np.dtype([("type_id", "<u1"), ("name", "<u1", 16), ("arguments", "<u1", 1024)])
IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
TABLE = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
IMAGE_TYPE, INT_TYPE = 2, 1  # ffcv.types.TYPE_ID_HANDLER
FIELDS = ("image", "label", "index", "width", "height")  # the last two in a square store only


def row_type(square: bool) -> np.dtype:
    """The structured dtype of a sample's row: image, label, index (and original width, height)."""
    names = FIELDS if square else FIELDS[:3]
    return np.dtype([(n, IMAGE if n == "image" else np.dtype("<i8")) for n in names], align=True)


def sample_digest(stored: bytes | memoryview, *row: int) -> bytes:
    """SHA-256 of a sample: its row (little-endian, without the pointer), then its stored bytes.

    ``row``: mode, width, height, label, source_width, source_height, named as in ``Beton``.
    """
    digest = hashlib.sha256(struct.pack("<BHHqqq", *row))
    digest.update(stored)
    return digest.digest()


@dataclass(frozen=True)
class Manifest:
    """The JSON beside a beton.

    ``mean`` and ``std`` are per channel over all pixels of the split, in [0, 1]; for a JPEG store
    those of the images just before compression. ``content`` is the SHA-256 over all samples'
    digests (``sample_digest``) in order, ``sha256`` that of the whole file. ``hashes`` and
    ``sources`` are packed; ``sample_hashes()`` and ``source_names()`` unpack them.
    """

    format: int
    fastproj: str
    command: str
    dataset: str
    split: str
    samples: int
    classes: tuple[str, ...]
    store: str
    quality: int | None
    max_resolution: int | None
    side: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    file_bytes: int
    sha256: str
    content: str
    skipped: tuple[dict[str, str], ...]
    hashes: str
    sources: str

    def sample_hashes(self) -> np.ndarray:
        """The first bytes of each sample's SHA-256: (N, HASH_BYTES) uint8."""
        packed = base64.b64decode(self.hashes, validate=True)
        return np.frombuffer(packed, np.uint8).reshape(self.samples, HASH_BYTES)

    def source_names(self) -> list[str]:
        """Where each sample came from: N file paths below the dataset's root, or places in it."""
        packed = zlib.decompress(base64.b64decode(self.sources, validate=True))
        names = packed.decode("utf-8", "surrogateescape").split("\0")
        if len(names) != self.samples:
            raise ValueError(f"{len(names)} source names for {self.samples} samples")
        return names


def pack_names(names: Sequence[str]) -> str:
    """Source names as they lie in the manifest: joined, compressed, base64."""
    joined = "\0".join(names).encode("utf-8", "surrogateescape")
    return base64.b64encode(zlib.compress(joined)).decode()


def pack_hashes(hashes: bytes) -> str:
    """The samples' truncated hashes as they lie in the manifest: base64."""
    return base64.b64encode(hashes).decode()


@contextmanager
def replacing(path: Path) -> Iterator[BufferedRandom]:
    """A new file under a temporary name, which takes ``path``'s place when the block ends well.

    It is synced, renamed, and its folder synced; after an exception it is removed and what was at
    ``path`` stays. Raises ``InputError`` when the operating system refuses.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("x+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_manifest(manifest: Manifest, path: Path) -> None:
    """Write ``manifest`` to ``path`` as JSON, by way of a temporary file."""
    with replacing(path) as file:
        file.write(json.dumps(asdict(manifest), indent=1).encode() + b"\n")


def read_manifest(path: Path) -> Manifest:
    """Read the manifest at ``path``; ``InputError`` if it is missing, damaged or too new."""
    again = "write the beton again with data_prep/write_ffcv.py"
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path}: no manifest beside the beton; {again}") from None
    except ValueError as error:
        raise InputError(f"{path}: not a manifest ({error}); {again}") from None
    wanted = {field.name for field in fields(Manifest)}
    if not isinstance(content, dict) or set(content) != wanted:
        raise InputError(f"{path}: not a fastproj manifest, its entries differ; {again}")
    if content["format"] != FORMAT:
        raise InputError(f"{path}: manifest format {content['format']}, expected {FORMAT}; {again}")
    for name in ("classes", "mean", "std", "skipped"):
        if not isinstance(content[name], list):
            raise InputError(f"{path}: {name} is not a list; {again}")
        content[name] = tuple(content[name])
    return Manifest(**content)


@dataclass(frozen=True)
class Beton:
    """An opened, checked beton. Arrays have N entries in sample order.

    ``data``: the whole file, uint8, read-only memory map. ``mode``: uint8, JPEG or RAW.
    The rest int64: ``width``, ``height`` as stored (pixels); ``pointer``, ``length`` (bytes into
    ``data``); ``label`` (-1: none); ``index`` (0 … N-1); ``source_width``, ``source_height`` the
    original size for a square store, the stored one otherwise.
    """

    path: Path
    manifest: Manifest
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

    def stored(self, sample: int) -> np.ndarray:
        """The stored bytes of one sample: uint8 (length,), a view into ``data``."""
        start = self.pointer[sample]
        return self.data[start : start + self.length[sample]]

    def digest(self, sample: int, stored: bytes | memoryview) -> bytes:
        """``sample_digest`` of these bytes with this sample's row."""
        image = (self.mode, self.width, self.height)
        row = (*image, self.label, self.source_width, self.source_height)
        return sample_digest(stored, *(int(column[sample]) for column in row))


def open_beton(path: str | os.PathLike) -> Beton:
    """Open a beton after checking size, header, rows, table and manifest (no sample is read).

    Raises ``InputError``, one line that says what is wrong and where.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such beton; write it with data_prep/write_ffcv.py")
    size = path.stat().st_size
    if size < HEADER.itemsize:
        raise InputError(f"{path}: {size} bytes, too short for a beton; write it again")
    data = np.memmap(path, np.uint8, mode="r")
    rows, table, content = _read_tables(path, data)
    manifest = read_manifest(path.with_suffix(".json"))
    for what, here, there in (
        ("samples", len(rows), manifest.samples),
        ("bytes", size, manifest.file_bytes),
        ("content digest", content, manifest.content),
    ):
        if here != there:
            raise InputError(
                f"{path}: its {what} ({here}) differs from the manifest's ({there}): the manifest "
                "is of another file, or the beton is damaged; write both again"
            )
    beton = _beton(path, manifest, data, rows, table)
    _check_rows(beton, rows, table)
    return beton


def _read_tables(path: Path, data: np.ndarray) -> tuple[np.ndarray, np.ndarray, str]:
    """Rows (N,), allocation table (N,) in sample order, and the content digest, sizes checked."""
    header = np.frombuffer(data, HEADER, 1)[0]
    square = header["num_fields"] == len(FIELDS)
    row = row_type(square)
    samples, table_at = int(header["num_samples"]), int(header["alloc_table_ptr"])
    names = row.names or ()
    rows_at = HEADER.itemsize + len(names) * DESCRIPTOR.itemsize
    if header["version"] != VERSION or header["num_fields"] != len(names):
        raise InputError(f"{path}: not a beton (FFCV version {VERSION} header expected)")
    wanted = table_at + samples * TABLE.itemsize
    if samples == 0 or wanted != len(data) or rows_at + samples * row.itemsize > table_at:
        raise InputError(
            f"{path}: {len(data)} bytes, but its header promises {samples} samples and {wanted} "
            "bytes: cut, damaged or half written; write it again"
        )
    descriptors = np.frombuffer(data, DESCRIPTOR, len(names), HEADER.itemsize)
    found = [
        (int(d["type_id"]), d["name"].tobytes().rstrip(b"\0").decode("latin1")) for d in descriptors
    ]
    if found != [(IMAGE_TYPE if n == "image" else INT_TYPE, n) for n in names]:
        raise InputError(f"{path}: fields {found}, expected {list(names)}; write it again")
    rows = np.frombuffer(data, row, samples, rows_at)
    table = np.frombuffer(data, TABLE, samples, table_at)
    order = np.argsort(table["sample_id"], kind="stable")
    return rows, table[order], descriptors[0]["arguments"][:32].tobytes().hex()


def _beton(
    path: Path, manifest: Manifest, data: np.ndarray, rows: np.ndarray, table: np.ndarray
) -> Beton:
    image = rows["image"]
    width, height = image["width"].astype(np.int64), image["height"].astype(np.int64)
    square = "width" in (rows.dtype.names or ())
    return Beton(
        path=path,
        manifest=manifest,
        data=data,
        mode=image["mode"].copy(),
        width=width,
        height=height,
        pointer=table["ptr"].astype(np.int64),
        length=table["size"].astype(np.int64),
        label=rows["label"].astype(np.int64),
        index=rows["index"].astype(np.int64),
        source_width=rows["width"].astype(np.int64) if square else width,
        source_height=rows["height"].astype(np.int64) if square else height,
    )


def _check_rows(beton: Beton, rows: np.ndarray, table: np.ndarray) -> None:
    """Every row and every table entry against what it can be; ``InputError`` names the first."""
    number = np.arange(len(beton))
    rows_end = HEADER.itemsize + len(rows.dtype.names or ()) * DESCRIPTOR.itemsize + rows.nbytes
    table_at = len(beton.data) - table.nbytes
    pixels = beton.width * beton.height
    for what, good in (
        ("sample ids do not cover the samples", table["sample_id"] == number),
        ("pointers of row and table differ", table["ptr"] == rows["image"]["data_ptr"]),
        ("stored bytes lie outside the data", (beton.pointer >= rows_end) & (beton.length > 0)),
        ("stored bytes reach past the data", beton.length <= table_at - beton.pointer),
        ("no such image mode", beton.mode <= RAW),
        ("no pixels", (pixels > 0) & (beton.source_width > 0) & (beton.source_height > 0)),
        ("raw size is not 3·w·h", (beton.mode != RAW) | (beton.length == 3 * pixels)),
        ("label outside the classes", (beton.label >= -1) & (beton.label < len(beton.classes))),
        ("index is not the sample's number", beton.index == number),
    ):
        if not good.all():
            first = int(np.argmin(good))
            raise InputError(
                f"{beton.path}: {what} ({int((~good).sum())} of {len(good)} samples, the first is "
                f"sample {first}): header or table is damaged; write it again"
            )


@dataclass(frozen=True)
class Damage:
    """One finding of ``verify``; ``index`` is None where the damage lies outside the samples."""

    index: int | None
    source: str
    reason: str


def verify(
    path: str | os.PathLike, progress: Callable[[int], Any] = lambda samples: None
) -> list[Damage]:
    """Read the whole beton and compare it with its manifest; every damaged sample is named.

    Threads read the samples while one hashes the file as a whole. ``progress`` is called with the
    number of samples just read. Raises ``InputError`` where the file does not even open.
    """
    beton = open_beton(path)
    manifest = beton.manifest
    try:
        hashes, sources = manifest.sample_hashes(), manifest.source_names()
    except (ValueError, zlib.error) as error:
        raise InputError(
            f"{beton.path.with_suffix('.json')}: damaged ({error}); write the beton again"
        ) from None
    found: list[Damage] = []
    digests = hashlib.sha256()
    with ThreadPoolExecutor(cores() + 1) as pool:
        whole = pool.submit(_file_digest, beton.path)
        chunks = [range(i, min(i + CHUNK, len(beton))) for i in range(0, len(beton), CHUNK)]
        for chunk, results in zip(
            chunks, pool.map(lambda chunk: _chunk_digests(beton, chunk), chunks), strict=True
        ):
            for sample, result in zip(chunk, results, strict=True):
                if isinstance(result, str):
                    found.append(Damage(sample, sources[sample], result))
                    continue
                digests.update(result)
                if result[:HASH_BYTES] != hashes[sample].tobytes():
                    reason = "stored bytes, size or label differ from what was written"
                    found.append(Damage(sample, sources[sample], reason))
            progress(len(chunk))
        intact = whole.result() == manifest.sha256
    if found and intact and digests.hexdigest() == manifest.content:
        raise InputError(
            f"{beton.path.with_suffix('.json')}: damaged, the beton itself is intact; write again"
        )
    if not found and not intact:
        found.append(Damage(None, "", "bytes outside the samples differ: header, rows or padding"))
    return found


def _chunk_digests(beton: Beton, chunk: range) -> list[bytes | str]:
    """Each sample's digest, or why it cannot be read.

    With pread, because a disk error under a memory map is a SIGBUS.
    """
    results: list[bytes | str] = []
    with beton.path.open("rb") as file:
        for i in chunk:
            try:
                stored = os.pread(file.fileno(), int(beton.length[i]), int(beton.pointer[i]))
            except OSError as error:
                results.append(f"cannot be read: {error.strerror}")
                continue
            results.append(beton.digest(i, stored))
    return results


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
