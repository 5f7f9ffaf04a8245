"""Images of a beton -> features of a frozen encoder, at any depth, computed once and kept."""

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import torch

from fastproj.core import dist
from fastproj.core.errors import InputError
from fastproj.data.beton import Beton
from fastproj.evaluation.cache import Cache, digest
from fastproj.evaluation.depths import AtDepths
from fastproj.evaluation.features import Features, features, pixels
from fastproj.evaluation.fold import folded
from fastproj.evaluation.load import LoadedEncoder
from fastproj.loaders import Center, Crop, Five, Loader, open_loader
from fastproj.runs.environment import versions

PIXELS = 32  # largest side of the raw-pixel baseline: 224 would be 150,528 features per image
CROPS = {
    "center": "1 center crop",
    "five": "mean of the features of 4 corner crops and the center crop",
    "ten": "mean of the features of 4 corner crops, the center crop and their mirror images",
}


@dataclass(frozen=True)
class Extractor:
    """How features are computed.

    ``size``: side of a crop, pixels; ``crop_fraction``: of the shorter side; ``crops``: a key of
    ``CROPS``. ``batch_size``: images per batch. ``loader``: further arguments of ``open_loader``.
    ``cache``: where features are kept; None keeps none. With several ranks each computes its part,
    and every rank gets all rows.
    """

    size: int
    device: torch.device
    crop_fraction: float = 1.0
    crops: str = "center"
    batch_size: int = 512
    loader: Mapping[str, Any] | None = None
    cache: Cache | None = None

    def __post_init__(self) -> None:
        if self.crops not in CROPS:
            raise InputError(f"eval.crops: no {self.crops!r}; choose one of {', '.join(CROPS)}")
        if self.crops != "center" and self.crop_fraction == 1:
            raise InputError(
                f"eval.crops {self.crops} of whole images are all the same: give "
                "--eval.crop_fraction below 1, such as 0.875"
            )

    def encode(
        self, beton: Beton, encoder: LoadedEncoder, depths: Sequence[str], norm: Sequence[Any]
    ) -> dict[str, Features]:
        """Depth -> features of every image, in the set's order; ``norm`` is (mean, std).

        Where they were kept, ranks other than the first get {}. Raises ``InputError`` as
        ``features`` does, and for a depth that the encoder does not have.
        """
        module = AtDepths(folded(encoder.module), depths, encoder.projector).eval()
        weights = digest(module)
        keys = {
            depth: {
                "weights": weights,
                "source": encoder.about.get("source_sha256"),
                "depth": depth,
                "data": beton.manifest.content,
                "device": self.device.type,
                **self._engine(),
                **self.about(),
                "mean": list(norm[0]),
                "std": list(norm[1]),
                "versions": versions(),
            }
            for depth in depths
        }
        kept = self._kept(keys)
        if dist.exchange(bool(kept))[0]:
            return kept
        module.to(memory_format=torch.channels_last).to(self.device)
        with closing(self.open(beton, dist.rank(), dist.world_size())) as loader:
            found = features(
                module,
                loader,
                mean=norm[0],
                std=norm[1],
                device=self.device,
                mirror=self.crops == "ten",
                progress=f"features of {beton.path.name}",
            )
        # A rank without an image ran no forward pass, and has no widths.
        widths = next(filter(None, dist.exchange(module.widths)))
        parts = found.features.split(widths, 1)
        split = {d: Features(x, found.labels) for d, x in zip(depths, parts, strict=True)}
        if self.cache and dist.is_main():
            for depth, one in split.items():
                self.cache.store(keys[depth], one)
        return split

    def _engine(self) -> dict[str, str]:
        """The engine, where its pixels are its own: on a CPU all but two give the same ones."""
        engine = (self.loader or {}).get("engine", "auto")
        same = self.device.type == "cpu" and engine not in ("dali", "resident")
        return {} if same else {"engine": engine}

    def raw(self, beton: Beton) -> Features:
        """The pixels themselves as features, of one center crop of at most ``PIXELS`` a side."""
        with closing(self._raw().open(beton)) as loader:
            return pixels(loader, self.device)

    def raw_about(self) -> dict[str, Any]:
        """What the protocol says of the pixels."""
        return {"crop": self._raw().about()["crop"]}

    def _raw(self) -> "Extractor":
        return replace(self, size=min(self.size, PIXELS), crops="center")

    def about(self) -> dict[str, Any]:
        """What the protocol says of the crops and the arithmetic."""
        return {
            "crop": {"kind": self.crops, "size": self.size, "crop_fraction": self.crop_fraction},
            "mode": f"frozen, eval mode, float32, batch norm folded, {CROPS[self.crops]}",
        }

    def _kept(self, keys: Mapping[str, Mapping[str, Any]]) -> dict[str, Features]:
        """Every depth's features where all were kept, else {}; only the first rank looks."""
        if self.cache is None or not dist.is_main():
            return {}
        found = {}
        for depth, key in keys.items():
            one = self.cache.load(key)
            if one is None:
                return {}
            found[depth] = Features(one.features.to(self.device), one.labels.to(self.device))
        return found

    def draw(self, beton: Beton, batch_size: int, seed: int) -> Loader:
        """A loader of one random crop per image, shuffled, in batches that the set fills."""
        return open_loader(
            beton,
            [Crop(self.size)],
            min(batch_size, len(beton)),
            device=self.device,
            seed=seed,
            **(self.loader or {}),
        )

    def open(self, beton: Beton, rank: int = 0, world_size: int = 1) -> Loader:
        """A loader of this rank's part of the crops, each image once and in order."""
        kind = Center if self.crops == "center" else Five
        return open_loader(
            beton,
            [kind(self.size, self.crop_fraction)],
            min(self.batch_size, -(-len(beton) // world_size)),
            device=self.device,
            shuffle=False,
            drop_last=False,
            rank=rank,
            world_size=world_size,
            **(self.loader or {}),
        )
