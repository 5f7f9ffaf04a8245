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
    """One epoch of ``embed(crops in [0, 1])``, sorted by index."""
    rows, labels, index = torch.empty(0, 0), [], []
    filled = 0
    for batch in loader:
        (crops,) = batch.crops
        crops = crops.to(device, torch.float32, memory_format=torch.channels_last).div_(255)
        values = embed(crops)
        if filled == 0:
            rows = torch.empty(len(loader.beton), values.shape[1], device=device)
        rows[filled : filled + len(values)] = values
        filled += len(values)
        labels.append(batch.labels.to(device))
        index.append(batch.index.to(device))
    order, permutation = torch.cat(index).sort()
    expected = torch.from_numpy(loader.beton.index).sort().values
    if not torch.equal(order.cpu(), expected):
        raise InputError(
            f"{loader.beton.path}: the loader gave {filled} of {len(expected)} images or some of "
            "them twice; features need each once, from the start of an epoch without drop_last"
        )
    if not rows.isfinite().all():
        raise InputError("the features hold NaN or infinity: the encoder has diverged")
    if not torch.equal(permutation, torch.arange(filled, device=device)):
        rows = rows[permutation]
    return Features(rows, torch.cat(labels)[permutation], order)
