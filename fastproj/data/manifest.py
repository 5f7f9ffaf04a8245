"""The manifest: the JSON file beside a beton that says what the beton must hold."""

import base64
import hashlib
import json
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from fastproj.core.errors import InputError
from fastproj.core.files import replacing
from fastproj.data.layout import HASH_BYTES

FORMAT = 1  # of the manifest


@dataclass(frozen=True)
class Adopted:
    """Of an FFCV file that another program wrote: the names of the fields that are used.

    ``tables``: SHA-256 of its header, descriptors, rows and allocation table.
    """

    image: str
    label: str
    tables: str


@dataclass(frozen=True)
class Shard:
    """Of a file that is one of several of a set: what the statistics of all of them follow from.

    File ``number`` (from 0) of ``of``. ``set``: SHA-256 of what all files of the set share: names
    and labels of all its images, and the settings. Packed: ``histogram``, int64 (3, 256), how often
    each channel has each value; ``digests``, uint8 (N, 32), each sample's SHA-256.
    """

    number: int
    of: int
    set: str
    histogram: str
    digests: str

    def counts(self) -> np.ndarray:
        """``histogram``, unpacked."""
        packed = base64.b64decode(self.histogram, validate=True)
        return np.frombuffer(packed, "<i8").reshape(3, 256)

    def sample_digests(self) -> bytes:
        """``digests``, unpacked."""
        return base64.b64decode(self.digests, validate=True)


@dataclass(frozen=True)
class Manifest:
    """The JSON beside a beton.

    ``mean`` and ``std`` are per channel over all pixels of the split, in [0, 1]; a JPEG store's
    are computed before compression. ``content`` is the SHA-256 of all samples' digests
    (``sample_digest``) in order, ``sha256`` that of the whole file. ``hashes`` and ``sources`` are
    packed; ``sample_hashes()`` and ``source_names()`` unpack them. ``adopted``: None for a file
    that fastproj wrote. ``shard``: None for a whole set. That of a set of several files is made
    from theirs (``fastproj.data.shards``) and equals that of one file, except for ``file_bytes``,
    their sum, and ``sha256``, the SHA-256 of theirs.
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
    adopted: Adopted | None = None
    shard: Shard | None = None

    def sample_hashes(self) -> np.ndarray:
        """The first bytes of each sample's SHA-256: (N, HASH_BYTES) uint8."""
        packed = base64.b64decode(self.hashes, validate=True)
        return np.frombuffer(packed, np.uint8).reshape(self.samples, HASH_BYTES)

    def source_names(self) -> list[str]:
        """Where each sample came from: N paths below the dataset's root, or names like test[3]."""
        names = [
            name
            for packed in self.sources.split(" ")  # of each file
            for name in zlib.decompress(base64.b64decode(packed, validate=True))
            .decode("utf-8", "surrogateescape")
            .split("\0")
        ]
        if len(names) != self.samples:
            raise ValueError(f"{len(names)} source names for {self.samples} samples")
        return names


def mean_and_std(histogram: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Per channel, in [0, 1], from pixel counts (3, 256), so exact in any order of images."""
    values = np.arange(256) / 255
    density = histogram / histogram.sum(axis=1, keepdims=True)
    mean = density @ values
    std = np.sqrt((density * (values - mean[:, None]) ** 2).sum(axis=1))
    return tuple(mean.tolist()), tuple(std.tolist())


def _whole(low: int, high: int = 2**63 - 1) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and low <= value <= high


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _digest(value: Any) -> bool:
    return _text(value) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _or_null(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)


def _shares(value: Any) -> bool:
    """Three numbers from 0 to 1; a comparison also refuses what is no number that JSON has."""
    return (
        isinstance(value, list)
        and len(value) == 3
        and all(type(x) in (int, float) and 0 <= x <= 1 for x in value)
    )


def _record(checks: dict[str, Callable[[Any], bool]]) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, dict)
        and set(value) == set(checks)
        and all(check(value[name]) for name, check in checks.items())
    )


# What each value must be, and how to say it.
VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "format": (lambda value: value == FORMAT, f"{FORMAT}, the format that this version reads"),
    **dict.fromkeys(
        ("fastproj", "command", "dataset", "split", "hashes", "sources"), (_text, "text")
    ),
    "samples": (_whole(1), "a whole number above 0"),
    "classes": (lambda x: isinstance(x, list) and all(map(_text, x)), "a list of names"),
    "store": (lambda x: x in ("raw", "jpeg", "square", "mixed"), "raw, jpeg, square or mixed"),
    "quality": (_or_null(_whole(1, 100)), "null or from 1 to 100"),
    "max_resolution": (_or_null(_whole(1)), "null or a whole number above 0"),
    "side": (_or_null(_whole(1)), "null or a whole number above 0"),
    "mean": (_shares, "three numbers from 0 to 1"),
    "std": (_shares, "three numbers from 0 to 1"),  # 0: a channel of one value
    "file_bytes": (_whole(1), "a whole number above 0"),
    "sha256": (_digest, "64 hexadecimal digits"),
    "content": (_digest, "64 hexadecimal digits"),
    "skipped": (
        lambda x: (
            isinstance(x, list)
            and all(isinstance(y, dict) and all(map(_text, y.values())) for y in x)
        ),
        "a list of sources and reasons",
    ),
    "adopted": (
        _or_null(_record(dict.fromkeys(("image", "label", "tables"), _text))),
        "null or the names of an FFCV file's fields",
    ),
    "shard": (
        _or_null(
            _record(
                {"number": _whole(0), "of": _whole(1), "set": _digest}
                | dict.fromkeys(("histogram", "digests"), _text)
            )
        ),
        "null or the number of a shard and what it says of its set",
    ),
}


def pack_names(names: Sequence[str]) -> str:
    """Source names as the manifest stores them: joined, compressed, base64."""
    joined = "\0".join(names).encode("utf-8", "surrogateescape")
    return base64.b64encode(zlib.compress(joined)).decode()


def pack_hashes(hashes: bytes) -> str:
    """The samples' truncated hashes as the manifest stores them: base64."""
    return base64.b64encode(hashes).decode()


def waiting_manifest(path: Path, content: str) -> Path:
    """Where the manifest of a beton with this content waits until the beton is in its place."""
    return path.with_name(f"{path.name}.{content[:16]}.tmp")


def write_manifest(manifest: Manifest, path: Path) -> None:
    """Write ``manifest`` to ``path`` as JSON, atomically."""
    with replacing(path) as file:
        file.write(json.dumps(asdict(manifest), indent=1).encode() + b"\n")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice} stands in it twice")
    return content


def is_manifest(path: Path) -> bool:
    """Whether the file is a manifest, of this version or another."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return False
    return isinstance(content, dict) and {"format", "content"} <= content.keys()


def read_manifest(path: Path) -> Manifest:
    """Read the manifest at ``path`` and check every value.

    Raises ``InputError`` if it is missing, damaged or of another format.
    """
    again = "write the beton again with fastproj prepare"
    try:
        content = json.loads(path.read_bytes(), object_pairs_hook=_without_duplicates)
    except FileNotFoundError:
        raise InputError(f"{path}: no manifest beside the beton; {again}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a manifest ({error}); {again}") from None
    wanted = {field.name for field in fields(Manifest)}
    if not isinstance(content, dict) or set(content) | {"adopted", "shard"} != wanted:
        raise InputError(f"{path}: not a fastproj manifest, its keys differ; {again}")
    for name in ("adopted", "shard"):  # an older version's lacks them
        content.setdefault(name, None)
    for name, (is_right, words) in VALUES.items():
        if not is_right(content[name]):
            shown = json.dumps(content[name])[:40]
            raise InputError(f"{path}: {name} is {shown}, not {words}; {again}")
    for name in ("classes", "mean", "std", "skipped"):
        content[name] = tuple(content[name])
    if content["adopted"]:
        content["adopted"] = Adopted(**content["adopted"])
    if content["shard"]:
        content["shard"] = Shard(**content["shard"])
    manifest, what = Manifest(**content), "its hashes"
    try:
        manifest.sample_hashes()
        what = "what it says of its set"
        if manifest.shard:
            _check_shard(manifest, manifest.shard)
    except ValueError as error:
        raise InputError(f"{path}: {what} is damaged ({error}); {again}") from None
    return manifest


def _check_shard(manifest: Manifest, shard: Shard) -> None:
    """Raises ``ValueError`` unless its digests and counts are those of the file's own figures."""
    if hashlib.sha256(shard.sample_digests()).hexdigest() != manifest.content:
        raise ValueError("digests of other samples")
    if not np.allclose(mean_and_std(shard.counts()), (manifest.mean, manifest.std), 0, 1e-9):
        raise ValueError("counts of other pixels")
