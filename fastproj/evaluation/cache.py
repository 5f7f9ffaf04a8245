"""Features on the disk, found again by what they were computed from."""

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastproj.core.errors import InputError
from fastproj.core.files import replacing, writing
from fastproj.evaluation.features import Features
from fastproj.runs import checkpoint


def digest(module: nn.Module) -> str:
    """SHA-256 of a module's structure and of each tensor's name and bytes, in hexadecimal."""
    found = hashlib.sha256(str(module).encode())
    for name, tensor in sorted(module.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


@dataclass(frozen=True)
class Cache:
    """Features in files of ``folder``, each named after the hash of its key.

    The key is a JSON object with all that the features depend on. A file holds the whole key, which
    is compared when it is read, and a checksum of each tensor (``checkpoint.read``).
    """

    folder: Path

    def load(self, key: Mapping[str, Any]) -> Features | None:
        """The features stored under ``key``; None where there are none.

        A damaged file is named on stderr and counts as missing.
        """
        path, text = self._path(key), _text(key)
        if not path.is_file():
            return None
        try:
            found = checkpoint.read(path)
            if found["key"] == text:
                return Features(found["features"], found["labels"])
            reason = "it holds those of another key"
        except (checkpoint.DamagedError, OSError, KeyError, TypeError, InputError) as error:
            reason = str(error)
        print(f"note: {path} cannot be used ({reason}): computed again", file=sys.stderr)
        return None

    def store(self, key: Mapping[str, Any], features: Features) -> None:
        """Keep ``features`` under ``key``; where they cannot be written, say so on stderr."""
        path = self._path(key)
        content = {
            "key": _text(key),
            "features": features.features.cpu().clone(),
            "labels": features.labels.cpu(),
        }
        try:
            with writing(path):
                self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(path) as file:
                torch.save(content, file)
        except InputError as error:
            print(f"note: features are not kept: {error}", file=sys.stderr)

    def _path(self, key: Mapping[str, Any]) -> Path:
        return self.folder / f"{hashlib.sha256(_text(key).encode()).hexdigest()[:24]}.pt"


def _text(key: Mapping[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)
