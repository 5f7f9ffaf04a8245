"""Frozen encoder + loader -> features: what every probe sees, computed once."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastproj.errors import InputError
from fastproj.loaders import Loader


@dataclass(frozen=True)
class Features:
    """One row an image, in index order: features float32 (N, d), labels and index int64 (N,)."""

    features: Tensor
    labels: Tensor
    index: Tensor

    def __len__(self) -> int:
        return len(self.features)


def extract(
    encoder: nn.Module,
    loader: Loader,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device,
) -> Features:
    """Features of one epoch of ``loader`` under the frozen ``encoder``, in float32 (N, d) on
    ``device``.

    The encoder, already on ``device``, runs in eval mode (batch-norm statistics as trained) without
    gradients, and gets its training flags back. ``mean`` and ``std`` are per channel in [0, 1].
    Raises ``InputError`` unless every image comes exactly once, and for values not finite.
    """
    shift = torch.tensor(mean, device=device).view(1, -1, 1, 1)
    scale = torch.tensor(std, device=device).view(1, -1, 1, 1)
    with frozen(encoder):
        return _collect(loader, lambda crops: encoder((crops - shift) / scale), device)


def pixels(loader: Loader, device: torch.device) -> Features:
    """The crops themselves as features, the baseline: float32 (N, 3·h·w) in [0, 1]."""
    return _collect(loader, lambda crops: crops.flatten(1), device)


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Put ``module`` in eval mode, then give every submodule its own training flag back."""
    flags = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in flags:
            part.training = training


@torch.inference_mode()
def _collect(loader: Loader, embed: Callable[[Tensor], Tensor], device: torch.device) -> Features:
    """One epoch of ``embed(crops in [0, 1])``, each row at its image's index."""
    images = len(loader.beton)
    seen = torch.zeros(images, dtype=torch.int64, device=device)
    labels = torch.empty(images, dtype=torch.int64, device=device)
    rows: Tensor | None = None
    for batch in loader:
        if len(batch.crops) != 1 or len(batch.crops[0]) != len(batch.index):
            raise InputError("features take one crop an image: open the loader with one Center")
        crops = batch.crops[0].to(device, torch.float32, memory_format=torch.channels_last)
        values, index = embed(crops.div_(255)), batch.index.to(device)
        if rows is None:
            rows = torch.empty(images, values.shape[1], device=device)
        rows[index], labels[index] = values, batch.labels.to(device)
        seen.index_add_(0, index, torch.ones_like(index))
    if rows is None or not (seen == 1).all():
        raise InputError(
            f"{loader.beton.path}: {int((seen != 1).sum())} of {images} images did not come "
            "exactly once; features need each once: a whole epoch, without drop_last"
        )
    if not rows.isfinite().all():
        raise InputError("the features hold NaN or infinity: the encoder has diverged")
    return Features(rows, labels, torch.arange(images, device=device))
