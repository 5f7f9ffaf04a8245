"""How a view is augmented (``View``), published presets, and sampled parameters (``Params``)."""

from __future__ import annotations  # torch is not imported for the names of the presets

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from fastproj.core.errors import InputError
from fastproj.core.table import Table

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class View:
    """How one view is augmented: probabilities (0 to 1) and strengths.

    Fields that end in ``_prob`` are probabilities. Brightness, contrast and saturation are
    multiplied by a factor in [max(0, 1 - strength), 1 + strength]; hue is shifted by at most
    ``hue`` turns (at most 0.5) in either direction. ``sigma`` is the range of the blur's standard
    deviation in pixels. Solarization inverts values of at least 0.5 (of 1). Raises ``InputError``
    for a value out of range.
    """

    flip_prob: float = 0.5
    jitter_prob: float = 0.8
    brightness: float = 0.8
    contrast: float = 0.8
    saturation: float = 0.8
    hue: float = 0.2
    gray_prob: float = 0.2
    blur_prob: float = 0.5
    sigma: tuple[float, float] = (0.1, 2.0)
    solarize_prob: float = 0.0

    def __post_init__(self) -> None:
        for name in ("flip_prob", "jitter_prob", "gray_prob", "blur_prob", "solarize_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(
                    f"views: {name} is {getattr(self, name)}; give a probability from 0 to 1"
                )
        for name in ("brightness", "contrast", "saturation", "hue"):
            limit = 0.5 if name == "hue" else math.inf
            if not 0 <= getattr(self, name) <= limit:
                raise InputError(
                    f"views: {name} is {getattr(self, name)}; give a strength from 0 to {limit}"
                )
        if not 0 < self.sigma[0] <= self.sigma[1] < math.inf:
            raise InputError(f"views: sigma is {self.sigma}; give 0 < lowest <= highest, in pixels")


_MILD = View(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, blur_prob=1.0)
_RARELY_BLURRED = replace(_MILD, blur_prob=0.1, solarize_prob=0.2)

PRESETS = Table(
    "views.preset",
    {
        # Chen et al. 2020 at the strength Projector_Theory uses, on CIFAR and ImageNet alike.
        "simclr": (View(), View()),
        # Zbontar et al. 2021 as in Projector_Theory on ImageNet; on CIFAR that code does not blur.
        "barlow": (_MILD, _RARELY_BLURRED),
        # Grill et al. 2020, table 6, as in solo-learn: the two methods share these numbers.
        "byol": (_MILD, _RARELY_BLURRED),
    },
)
"""Each a pair of views."""


class Params(NamedTuple):
    """Parameters of N = views × samples crops, view-major; shape (N,) unless said otherwise.

    An operation that was not sampled has its neutral value: factor 1, shift 0, sigma 0.
    """

    flip: Tensor  # bool
    place: Tensor  # int64 (N, 4): place of brightness, contrast, saturation, hue; 0 is first
    brightness: Tensor  # float32 factor
    contrast: Tensor  # float32 factor
    saturation: Tensor  # float32 factor
    hue: Tensor  # float32 shift in turns, -0.5 to 0.5
    gray: Tensor  # bool
    sigma: Tensor  # float32, pixels
    solarize: Tensor  # bool
