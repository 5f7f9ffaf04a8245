"""A linear classifier of pixels on the last feature map of a frozen encoder, and its scores."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastproj.models.architectures import IMAGENET
from fastproj.models.maps import FeatureMaps
from fastproj.models.norm import synchronize
from fastproj.training.optim import parameter_groups
from fastproj.transfer.pixels import VOID

STEP = 2 / 3  # of a window's side, from one window to the next


class Segmenter(nn.Module):
    """Images to the class of each pixel: the encoder's last map, a batch norm, a 1x1 convolution.

    The convolution's logits are scaled up bilinearly [Oquab et al. 2024, arXiv 2304.07193, section
    7.4; the batch norm is of its code]. The encoder is frozen; batch statistics are over all ranks.

    In training mode, images (a list of (3, h, w) of one size, float in [0, 1]) and targets
    ({"mask": uint8 (h, w)}) give ``{"loss_pixels"}``: cross-entropy, its mean over all pixels,
    those of class 255 counted as 0, as mmsegmentation's. In eval mode, images of any sizes give the
    class of each pixel, int64 (h, w): an image is resized to the shorter side ``size``, and the
    logits of windows of ``size`` pixels a side, a third of which overlap, are averaged.

    Raises ``InputError`` where the encoder gives no feature maps.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        classes: int,
        size: int,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.maps = FeatureMaps(encoder).requires_grad_(False)
        width = self.maps.channels[-1]
        self.head = nn.Sequential(nn.BatchNorm2d(width), nn.Conv2d(width, classes, 1))
        nn.init.normal_(self.head[1].weight, std=0.01)  # type: ignore[arg-type]
        nn.init.zeros_(self.head[1].bias)  # type: ignore[arg-type]
        synchronize(self.head)
        self.classes, self.size = classes, size
        self.divisor = math.lcm(*self.maps.strides)
        for name, values in (("mean", mean or IMAGENET[0]), ("std", std or IMAGENET[1])):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    def forward(
        self, images: Sequence[Tensor], targets: Sequence[dict[str, Tensor]] | None = None
    ) -> dict[str, Tensor] | list[Tensor]:
        if not self.training:
            return [self._classes(image) for image in images]
        assert targets is not None
        logits = self.logits(torch.stack([*images])).float()
        truth = torch.stack([target["mask"] for target in targets]).long()
        losses = functional.cross_entropy(logits, truth, ignore_index=VOID, reduction="none")
        return {"loss_pixels": losses.mean()}

    def logits(self, images: Tensor) -> Tensor:
        """(B, 3, h, w) in [0, 1] -> (B, classes, h, w)."""
        h, w = images.shape[-2:]
        with torch.no_grad():
            normal = (images - self.mean) / self.std
            # ViTs take whole patches.
            normal = functional.pad(normal, (0, -w % self.divisor, 0, -h % self.divisor))
            last = next(reversed(self.maps(normal).values()))
        return _scaled(self.head(last), normal.shape[-2:])[..., :h, :w]

    def _classes(self, image: Tensor) -> Tensor:
        """The class of each pixel of (3, h, w), int64 (h, w)."""
        h, w = image.shape[-2:]
        ratio = self.size / min(h, w)
        sides = (max(self.size, round(h * ratio)), max(self.size, round(w * ratio)))
        resized = functional.interpolate(
            image[None], sides, mode="bilinear", align_corners=False, antialias=True
        )
        total = image.new_zeros(self.classes, *sides)
        count = image.new_zeros(sides)
        for rows in _windows(sides[0], self.size):
            for columns in _windows(sides[1], self.size):
                total[:, rows, columns] += self.logits(resized[..., rows, columns])[0]
                count[rows, columns] += 1
        return _scaled((total / count)[None], (h, w))[0].argmax(0)


def _scaled(maps: Tensor, sides: Sequence[int]) -> Tensor:
    return functional.interpolate(maps, tuple(sides), mode="bilinear", align_corners=False)


def _windows(side: int, size: int) -> Iterator[slice]:
    """Windows of ``size`` that cover ``side`` (at least as large), the last one at its end."""
    step = int(STEP * size)
    for number in range(max(0, -(-(side - size) // step)) + 1):
        end = min(number * step + size, side)
        yield slice(end - size, end)


@dataclass(frozen=True)
class LinearPlan:
    """``steps`` updates by AdamW: a linear rise to ``lr``, then a linear fall to 0."""

    steps: int
    lr: float
    warmup_steps: int = 0
    weight_decay: float = 1e-4

    def rate(self, step: int) -> float:
        """The learning rate of ``step``, counted from 0; during the rise, a share of the fall."""
        rise = min(1.0, step / self.warmup_steps) if self.warmup_steps else 1.0
        return self.lr * rise * (1 - step / self.steps)

    def optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        """AdamW of the module's trainable parameters."""
        return torch.optim.AdamW(parameter_groups([module], self.weight_decay), self.lr)


def confusion(truth: Tensor, found: Tensor, classes: int) -> Tensor:
    """How many pixels of each class (rows) were found to be of each (columns), int64 (C, C).

    ``truth``: any integers, those of ``VOID`` do not count; ``found``: int64, of the same shape.
    """
    counted = truth != VOID
    pairs = truth[counted].long() * classes + found[counted]
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def mask_scores(counts: Tensor) -> dict[str, float]:
    """Scores in [0, 1] from ``confusion`` over all images [Long et al. 2015, arXiv 1411.4038].

    ``miou``: the mean over classes of the intersection over union; ``mean_accuracy``: of the share
    of a class's pixels that were found; ``pixel_accuracy``: of all pixels. A class that neither
    occurs nor was found has no share in the first, one that does not occur none in the second.
    """
    counts = counts.double()
    right, truth, found = counts.diagonal(), counts.sum(1), counts.sum(0)
    union = truth + found - right
    return {
        "miou": float((right / union)[union > 0].mean()),
        "mean_accuracy": float((right / truth)[truth > 0].mean()),
        "pixel_accuracy": float(right.sum() / counts.sum()),
    }
