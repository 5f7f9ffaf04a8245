"""The manifest: the JSON file beside a beton that says what the beton must hold."""

import base64
import json
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from fastproj.core.errors import InputError
from fastproj.core.files import replacing
from fastproj.data.layout import HASH_BYTES

FORMAT = 1  # of the manifest


@dataclass(frozen=True)
class Manifest:
    """The JSON beside a beton.

    ``mean`` and ``std`` are per channel over all pixels of the split, in [0, 1]; a JPEG store's
    are computed before compression. ``content`` is the SHA-256 of all samples' digests
    (``sample_digest``) in order, ``sha256`` that of the whole file. ``hashes`` and ``sources`` are
    packed; ``sample_hashes()`` and ``source_names()`` unpack them.
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
        """Where each sample came from: N paths below the dataset's root, or names like test[3]."""
        packed = zlib.decompress(base64.b64decode(self.sources, validate=True))
        names = packed.decode("utf-8", "surrogateescape").split("\0")
        if len(names) != self.samples:
            raise ValueError(f"{len(names)} source names for {self.samples} samples")
        return names


def pack_names(names: Sequence[str]) -> str:
    """Source names as the manifest stores them: joined, compressed, base64."""
    joined = "\0".join(names).encode("utf-8", "surrogateescape")
    return base64.b64encode(zlib.compress(joined)).decode()


def pack_hashes(hashes: bytes) -> str:
    """The samples' truncated hashes as the manifest stores them: base64."""
    return base64.b64encode(hashes).decode()


def write_manifest(manifest: Manifest, path: Path) -> None:
    """Write ``manifest`` to ``path`` as JSON, atomically."""
    with replacing(path) as file:
        file.write(json.dumps(asdict(manifest), indent=1).encode() + b"\n")


def read_manifest(path: Path) -> Manifest:
    """Read the manifest at ``path``; ``InputError`` if it is missing, damaged or another format."""
    again = "write the beton again with fastproj prepare"
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path}: no manifest beside the beton; {again}") from None
    except ValueError as error:
        raise InputError(f"{path}: not a manifest ({error}); {again}") from None
    wanted = {field.name for field in fields(Manifest)}
    if not isinstance(content, dict) or set(content) != wanted:
        raise InputError(f"{path}: not a fastproj manifest, its keys differ; {again}")
    if content["format"] != FORMAT:
        raise InputError(f"{path}: manifest format {content['format']}, expected {FORMAT}; {again}")
    for name in ("classes", "mean", "std", "skipped"):
        if not isinstance(content[name], list):
            raise InputError(f"{path}: {name} is not a list; {again}")
        content[name] = tuple(content[name])
    return Manifest(**content)
