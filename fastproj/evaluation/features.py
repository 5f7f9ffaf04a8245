"""Frozen encoder + loader -> features: what every probe sees, computed once."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from fastproj.core import dist
from fastproj.core.errors import InputError, memory_shortage
from fastproj.core.fit import first_that_fits, halves
from fastproj.core.progress import Progress, write_line
from fastproj.loaders import Batch, Center, Loader
from fastproj.models.frozen import frozen

# Images in one forward pass on a CPU, so that activations stay in its caches: see ``fold``.
CACHED_IMAGES = 64


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
    mirror: bool = False,
    progress: str = "",
) -> Features:
    """Features of one epoch of ``loader`` under the frozen ``module``, in float32 (N, d).

    ``module`` maps images (B, c, h, w) to features (B, d). ``loader`` is a fastproj loader of
    ``Center`` or ``Five`` crops without ``drop_last``, or any iterable of (images, labels), for
    example torch's DataLoader: images float, or uint8, which are divided by 255; labels int64 (B,).
    Rows come in the order of the set for a fastproj loader, else in the order in which they arrive.
    On several ranks, each embeds the part that its loader gives, and all get all rows.

    An image's features are the mean over its crops and, with ``mirror``, over the crops' mirror
    images too: ``Five`` and ``mirror`` are ten-crop evaluation.

    ``progress``, unless empty, is the name under which progress is shown.

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

    def embed(images: Tensor) -> Tensor:
        images = (images - shift) / scale
        return (module(images) + module(images.flip(-1))) / 2 if mirror else module(images)

    with frozen(module):
        return _collect(loader, embed, device, progress)


def pixels(loader: Loader | Iterable[Any], device: torch.device | str = "cpu") -> Features:
    """The images themselves as features, a baseline: float32 (N, 3·h·w), uint8 divided by 255."""
    return _collect(loader, lambda images: images.flatten(1), torch.device(device))


def _device(module: nn.Module) -> torch.device:
    first = next(chain(module.parameters(), module.buffers()), torch.empty(0))
    return first.device


@torch.no_grad()
def _collect(
    loader: Loader | Iterable[Any],
    embed: Callable[[Tensor], Tensor],
    device: torch.device,
    name: str = "",
) -> Features:
    """One epoch of ``embed(images)``, checked: each image once, all values finite."""
    store: _InOrder | _AsTheyCome = _AsTheyCome()
    bar = None
    if isinstance(loader, Loader):
        if not (len(loader.crops) == 1 and isinstance(loader.crops[0], Center)):
            raise InputError("features take one crop per image: open the loader with one Center")
        store = _InOrder(loader, device)
        if name and dist.is_main():
            bar = Progress(len(loader.beton) // loader.order.world_size, name)
    with bar or nullcontext():
        for batch in loader:
            images, labels = _images_and_labels(batch)
            if not len(labels):
                continue  # this rank's part of the last step may be empty
            values = _embedded(images, len(labels), device, embed)
            if values.ndim != 2 or len(values) != len(images):
                raise InputError(
                    f"{len(images)} images became features of shape {tuple(values.shape)}: the "
                    "module must give (B, d); pool and flatten in it"
                )
            values = values.float().unflatten(0, (-1, len(labels))).mean(0)  # over the crops
            store.add(values, labels.to(device), batch.index if isinstance(batch, Batch) else None)
            if bar:
                bar.update(len(labels))
    found = store.features()
    if not found.features.isfinite().all():
        raise InputError("the features hold NaN or infinity: the encoder has diverged")
    return found


def _embedded(
    crops: Tensor, images: int, device: torch.device, embed: Callable[[Tensor], Tensor]
) -> Tensor:
    """The features of the crops of so many images; ``InputError`` says how many fit into memory."""
    parts = crops.unflatten(0, (-1, images))

    def embed_first(count: int) -> Tensor:
        some = parts[:, :count].flatten(0, 1)
        return torch.cat([_as_float(part, device, embed) for part in _parts(some, device)])

    try:
        return embed_first(images)
    except (MemoryError, RuntimeError) as error:
        shortage = memory_shortage(error)
        if not shortage or dist.world_size() > 1:
            raise
    said = f"out of memory with the features of {images} images at once ({shortage})"
    write_line(f"{said}; trying what fits")
    fitting = first_that_fits(halves(images, 1), embed_first)
    if fitting:
        raise InputError(f"{said}: --eval.batch_size {fitting} fits (tried)")
    raise InputError(
        f"{said}: nothing smaller fitted into this process, down to 1 image: start with far fewer, "
        "or take smaller crops or another encoder"
    )


def _parts(images: Tensor, device: torch.device) -> tuple[Tensor, ...]:
    return images.split(CACHED_IMAGES) if device.type == "cpu" else (images,)


def _as_float(images: Tensor, device: torch.device, embed: Callable[[Tensor], Tensor]) -> Tensor:
    in_bytes = images.dtype == torch.uint8
    images = images.to(device, torch.float32, memory_format=torch.channels_last)
    return embed(images.div_(255) if in_bytes else images)


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
        self._world_size = loader.order.world_size
        self._labels = torch.zeros(images, dtype=torch.int64, device=device)
        self._seen = torch.zeros(images, dtype=torch.int64, device=device)

    def add(self, rows: Tensor, labels: Tensor, index: Tensor | None) -> None:
        assert index is not None  # a fastproj loader gives one
        if self._rows is None:
            self._rows = torch.zeros(len(self._seen), rows.shape[1], device=rows.device)
        index = index.to(rows.device)
        self._rows[index], self._labels[index] = rows, labels
        self._seen.index_add_(0, index, torch.ones_like(index))

    def features(self) -> Features:
        if self._world_size > 1:
            self._gather()
        if self._rows is None or not (self._seen == 1).all():
            raise InputError(
                f"{self._path}: {int((self._seen != 1).sum())} of {len(self._seen)} images did not "
                "come exactly once; features need each once: a whole epoch, without drop_last"
            )
        return Features(self._rows, self._labels)

    def _gather(self) -> None:
        """Every rank's rows: those that are not its own are zero, so that a sum is exact."""
        none = torch.empty(0, 0, device=self._labels.device)
        rows = none if self._rows is None else self._rows
        width = int(dist.gather(torch.tensor([rows.shape[1]], device=rows.device)).max())
        if self._rows is None:  # this rank had no image
            rows = torch.zeros(len(self._seen), width, device=rows.device)
        self._rows = dist.total(rows)
        self._labels, self._seen = dist.total(self._labels), dist.total(self._seen)


def _images_and_labels(batch: Any) -> tuple[Tensor, Tensor]:
    """Images (B, c, h, w), of a ``Batch`` (views·B, c, h, w), and labels (B,)."""
    if isinstance(batch, Batch):
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
