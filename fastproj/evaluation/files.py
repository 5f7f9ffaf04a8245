"""Features in a file: what ``fastproj embed`` writes, and what other programs have computed.

``.npz``, ``.safetensors`` and ``.pt`` hold ``features`` (N, d) and ``labels`` (N,), ours ``index``
(N,) as well; ``NAME.npy`` holds features, and ``NAME-labels.npy`` beside it the labels. Reading one
runs no code: no pickle is loaded.
"""

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fastproj.core.errors import InputError
from fastproj.core.files import replacing, sha256
from fastproj.evaluation.features import Features
from fastproj.runs import checkpoint

SUFFIXES = (".npy", ".npz", ".safetensors", ".pt")
WRITTEN = (".npz", ".safetensors")
PARTS = ("features", "labels")


@dataclass(frozen=True)
class FeaturesFile:
    """Features that were read from ``path``; ``sha256`` is that of the file's bytes."""

    path: Path
    sha256: str
    features: Features


def is_features_file(path: str | Path) -> bool:
    """Whether the name ends as one of a features file does."""
    return Path(path).suffix in SUFFIXES


def read_features(path: str | Path) -> FeaturesFile:
    """Read a features file.

    Raises ``InputError`` for a file that is missing, damaged, needs pickle, lacks features or
    labels, has other shapes, or holds NaN or infinity.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no features file {path}: write it with fastproj embed")
    try:
        parts = _read(path)
    except FileNotFoundError as error:
        raise InputError(
            f"{path} has no labels beside it: save them as {error.filename}, or both in one .npz"
        ) from None
    except (ValueError, TypeError, zipfile.BadZipFile, SafetensorError, checkpoint.DamagedError,
            EOFError) as error:  # fmt: skip
        raise InputError(
            f"{path} is damaged or no features file ({error}): save plain arrays, no objects"
        ) from None
    if missing := [name for name in PARTS if not isinstance(parts.get(name), Tensor)]:
        raise InputError(
            f"{path} lacks {' and '.join(missing)}: it holds {', '.join(map(str, parts)) or 'none'}"
        )
    if parts["labels"].is_floating_point():
        raise InputError(f"{path}: the labels are {parts['labels'].dtype}: save whole numbers")
    try:
        features = Features(parts["features"], parts["labels"])
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    if not features.features.isfinite().all():
        rows = int((~features.features.isfinite()).any(1).sum())
        raise InputError(f"{path}: {rows} of {len(features)} rows hold NaN or infinity")
    return FeaturesFile(path, sha256(path), features)


def write_features(path: str | Path, features: Features, about: Mapping[str, str]) -> None:
    """Write ``features``, ``labels`` and ``index`` (row 0 is sample 0 of the set) to ``path``.

    ``about`` goes into the metadata of a ``.safetensors``. Whole or not at all. Raises
    ``InputError`` for another suffix, and where the file cannot be written.
    """
    path = Path(path)
    if path.suffix not in WRITTEN:
        raise InputError(f"{path}: features are written to {' or '.join(WRITTEN)}")
    tensors = {
        "features": features.features.cpu().contiguous(),
        "labels": features.labels.cpu(),
        "index": torch.arange(len(features)),
    }
    with replacing(path) as file:
        if path.suffix == ".npz":
            arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in tensors.items()}
            np.savez(file, **arrays)
        else:
            file.write(save(tensors, metadata=dict(about)))


def _read(path: Path) -> dict[str, Any]:
    if path.suffix == ".npy":
        files = {"features": path, "labels": path.with_name(f"{path.stem}-labels.npy")}
        arrays = {name: np.load(file, allow_pickle=False) for name, file in files.items()}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as archive:
            names = [name for name in PARTS if name in archive]
            return dict.fromkeys(archive) | {n: torch.from_numpy(archive[n]) for n in names}
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    content = checkpoint.read(path)
    return content if isinstance(content, dict) else {}
