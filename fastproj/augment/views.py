"""Views: uint8 crops become the augmented, normalized floats that an encoder sees.

``Augmentation.sample`` draws the parameters of all samples; calling the module applies them. The
operations and their order are torchvision's (flip, color jitter in a random order, gray, Gaussian
blur, solarize, normalize), computed in float32 without rounding to uint8 in between. On a CPU
``native`` processes sample by sample; on other devices ``chain`` processes all views at once.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastproj.augment.chain import pixels, pixels_options, plan, spread
from fastproj.augment.draw import Params, View
from fastproj.augment.native import augment
from fastproj.core.errors import InputError


class Augmentation(nn.Module):
    """The augmentation of all views of a batch.

    ``views``: one ``View`` per view. ``mean``, ``std``: per channel, for pixels in [0, 1].
    ``dtype``: of the output only; the arithmetic is float32.
    """

    probability: Tensor
    low: Tensor
    span: Tensor
    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        views: Sequence[View],
        mean: Sequence[float],
        std: Sequence[float],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.views = tuple(views)
        self.dtype = dtype
        # The blur's kernel reaches 3 sigma to each side, sigma the largest of all views.
        widest = max((v.sigma[1] for v in views if v.blur_prob > 0), default=0.0)
        self.reach = math.ceil(3 * widest)
        low = torch.tensor(
            [
                [max(0.0, 1 - s) for s in (v.brightness, v.contrast, v.saturation)]
                + [-v.hue, v.sigma[0]]
                for v in views
            ]
        )
        high = torch.tensor(
            [[1 + v.brightness, 1 + v.contrast, 1 + v.saturation, v.hue, v.sigma[1]] for v in views]
        )
        chances = torch.tensor(
            [[v.flip_prob, v.jitter_prob, v.gray_prob, v.blur_prob, v.solarize_prob] for v in views]
        )
        if min(std) <= 0:
            raise InputError(
                f"std is {tuple(std)}: pixels of a channel that all have one value cannot be "
                "normalized; give other images"
            )
        deviation = torch.tensor(std, dtype=torch.float32)
        shift = -torch.tensor(mean) / deviation
        for name, value in (("probability", chances), ("low", low), ("span", high - low),
                            ("scale", 1 / deviation), ("shift", shift)):  # fmt: skip
            self.register_buffer(name, value, persistent=False)
        self._plan, self._pixels = plan, pixels

    def compile(self, *args: Any, **options: Any) -> None:
        """Compile the chain as two graphs: computations per sample, and per pixel.

        In a single graph the computations per sample would be repeated for each pixel.
        """
        options = {"dynamic": False, "fullgraph": True, **options}
        self._plan = torch.compile(plan, *args, **options)
        self._pixels = torch.compile(pixels, *args, **{"options": pixels_options(), **options})

    def sample(self, n: int, generator: torch.Generator) -> Params:
        """Draw the parameters of ``n`` samples per view, on the device of ``generator``."""
        draws = torch.rand(len(self.views), n, 14, generator=generator, device=generator.device)
        chance, value, keys = draws.split((5, 5, 4), dim=2)
        flip, jitter, gray, blur, solarize = (
            (chance < self.probability[:, None]).flatten(0, 1).unbind(1)
        )
        value = (self.low[:, None] + value * self.span[:, None]).flatten(0, 1)
        brightness, contrast, saturation, hue, sigma = value.unbind(1)
        return Params(
            flip=flip,
            place=keys.flatten(0, 1).argsort(1),  # sorting four uniform keys permutes uniformly
            brightness=torch.where(jitter, brightness, 1.0),
            contrast=torch.where(jitter, contrast, 1.0),
            saturation=torch.where(jitter, saturation, 1.0),
            hue=torch.where(jitter, hue, 0.0),
            gray=gray,
            sigma=torch.where(blur, sigma, 0.0),
            solarize=solarize,
        )

    def forward(self, crops: Tensor, params: Params) -> Tensor:
        """uint8 (N, 3, h, w) to ``dtype`` (N, 3, h, w) in channels-last memory, normalized.

        Raises ``InputError`` if h or w is too small to reflect the image at its edges for the blur.
        """
        h, w = crops.shape[2:]
        if min(h, w) <= self.reach:
            raise InputError(
                f"views: crops of {h} x {w} pixels are too small for a blur that reaches "
                f"{self.reach}; lower sigma or set blur to 0"
            )
        if crops.device.type == "cpu":
            return augment(crops, params, self.reach, self.scale, self.shift).to(self.dtype)
        return self.chain(crops, params)

    def denormalize(self, images: Tensor) -> Tensor:
        """Normalized images (…, 3, h, w) as pixels in [0, 1], undoing ``mean`` and ``std``."""
        shift, scale = (value.view(-1, 1, 1) for value in (self.shift, self.scale))
        return ((images - shift) / scale).clamp(0, 1)

    def chain(self, crops: Tensor, params: Params) -> Tensor:
        """The same as ``forward``, vectorized, on any device; compiled after ``compile``."""
        to_contrast, whole, taps = self._plan(params, self.reach)
        return self._pixels(
            crops,
            spread(params.flip),
            to_contrast,
            whole,
            spread(params.gray),
            taps,
            spread(params.solarize),
            self.scale,
            self.shift,
            self.dtype,
        )
