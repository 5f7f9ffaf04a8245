"""Frozen encoder + loader -> features: what every probe sees, computed once."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from fastproj.core.errors import InputError
from fastproj.loaders import Batch, Loader
from fastproj.models.frozen import frozen


@dataclass(frozen=True)
class Features:
    """One row per image: ``features`` float32 (N, d) and ``labels`` int64 (N,), on one device.

    Other number types are converted. Raises ``InputError`` for other shapes.
    """

    features: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "features", self.features.float())
        object.__setattr__(self, "labels", self.labels.long())
        if self.features.ndim != 2 or self.labels.shape != self.features.shape[:1]:
            raise InputError(
                f"features of shape {tuple(self.features.shape)} and labels of shape "
                f"{tuple(self.labels.shape)}: give (N, d) and (N,)"
            )

    def __len__(self) -> int:
        return len(self.features)


def features(
    module: nn.Module,
    loader: Loader | Iterable[Any],
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    device: torch.device | str | None = None,
) -> Features:
    """Features of one epoch of ``loader`` under the frozen ``module``, in float32 (N, d).

    ``module`` maps images (B, c, h, w) to features (B, d). ``loader`` is a fastproj loader with one
    crop per image and without ``drop_last``, or any iterable of (images, labels), for example
    torch's DataLoader: images float, or uint8, which are divided by 255; labels int64 (B,). Rows
    come in the order of the set for a fastproj loader, else in the order in which they arrive.

    ``mean`` and ``std``, one value per channel, normalize the images. None: those of a fastproj
    loader's beton; the images of any other loader stay as they are. ``device`` is where ``module``
    already lies; None: where its first parameter lies.

    The module runs in eval mode (batch-norm statistics as trained), in float32 whatever precision
    it was trained in, without gradients, and each submodule gets its training flag back. Raises
    ``InputError`` where a fastproj loader does not give every image exactly once, for batches and
    features of other shapes, and for features that are not finite.
    """
    if (mean is None) != (std is None):
        raise ValueError("give both mean and std, or neither")
    if mean is None and isinstance(loader, Loader):
        mean, std = loader.beton.manifest.mean, loader.beton.manifest.std
    device = _device(module) if device is None else torch.device(device)
    shift, scale = (
        torch.tensor(values, device=device).view(1, -1, 1, 1)
        for values in ((0.0,) if mean is None else mean, (1.0,) if std is None else std)
    )
    with frozen(module):
        return _collect(loader, lambda images: module((images - shift) / scale), device)


def pixels(loader: Loader | Iterable[Any], device: torch.device | str = "cpu") -> Features:
    """The images themselves as features, a baseline: float32 (N, 3·h·w), uint8 divided by 255."""
    return _collect(loader, lambda images: images.flatten(1), torch.device(device))


def _device(module: nn.Module) -> torch.device:
    first = next(chain(module.parameters(), module.buffers()), torch.empty(0))
    return first.device


@torch.no_grad()
def _collect(
    loader: Loader | Iterable[Any], embed: Callable[[Tensor], Tensor], device: torch.device
) -> Features:
    """One epoch of ``embed(images)``, checked: each image once, all values finite."""
    store = _InOrder(loader, device) if isinstance(loader, Loader) else _AsTheyCome()
    for batch in loader:
        images, labels = _images_and_labels(batch)
        in_bytes = images.dtype == torch.uint8
        images = images.to(device, torch.float32, memory_format=torch.channels_last)
        values = embed(images.div_(255) if in_bytes else images)
        if values.ndim != 2 or len(values) != len(labels):
            raise InputError(
                f"{len(labels)} images became features of shape {tuple(values.shape)}: the module "
                "must give (B, d); pool and flatten in it"
            )
        store.add(
            values.float(), labels.to(device), batch.index if isinstance(batch, Batch) else None
        )
    found = store.features()
    if not found.features.isfinite().all():
        raise InputError("the features hold NaN or infinity: the encoder has diverged")
    return found


class _AsTheyCome:
    """Rows in the order in which they arrive."""

    def __init__(self) -> None:
        self._rows: list[Tensor] = []
        self._labels: list[Tensor] = []

    def add(self, rows: Tensor, labels: Tensor, index: Tensor | None) -> None:
        self._rows.append(rows)
        self._labels.append(labels)

    def features(self) -> Features:
        if not self._rows:
            raise InputError("the loader gave no batch: features need at least one")
        return Features(torch.cat(self._rows), torch.cat(self._labels))


class _InOrder:
    """Rows in the order of the set, written into one tensor: large sets fit only once."""

    def __init__(self, loader: Loader, device: torch.device) -> None:
        self._path, images = loader.beton.path, len(loader.beton)
        self._rows: Tensor | None = None
        self._labels = torch.empty(images, dtype=torch.int64, device=device)
        self._seen = torch.zeros(images, dtype=torch.int64, device=device)

    def add(self, rows: Tensor, labels: Tensor, index: Tensor | None) -> None:
        assert index is not None  # a fastproj loader gives one
        if self._rows is None:
            self._rows = torch.empty(len(self._seen), rows.shape[1], device=rows.device)
        index = index.to(rows.device)
        self._rows[index], self._labels[index] = rows, labels
        self._seen.index_add_(0, index, torch.ones_like(index))

    def features(self) -> Features:
        if self._rows is None or not (self._seen == 1).all():
            raise InputError(
                f"{self._path}: {int((self._seen != 1).sum())} of {len(self._seen)} images did not "
                "come exactly once; features need each once: a whole epoch, without drop_last"
            )
        return Features(self._rows, self._labels)


def _images_and_labels(batch: Any) -> tuple[Tensor, Tensor]:
    """Images (B, c, h, w) and labels (B,) of a ``Batch`` or of a pair."""
    if isinstance(batch, Batch):
        if len(batch.crops) != 1 or len(batch.crops[0]) != len(batch.index):
            raise InputError("features take one crop per image: open the loader with one Center")
        return batch.crops[0], batch.labels
    try:
        images, labels = batch
    except (TypeError, ValueError):
        raise TypeError(
            f"the loader gave a {type(batch).__name__}: it must give (images, labels)"
        ) from None
    labels = torch.as_tensor(labels)
    if not isinstance(images, Tensor) or images.ndim != 4 or labels.shape != images.shape[:1]:
        shape = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise InputError(
            f"the loader gave images {shape} and labels {tuple(labels.shape)}: they must be a "
            "tensor (B, c, h, w) and labels (B,)"
        )
    return images, labels
