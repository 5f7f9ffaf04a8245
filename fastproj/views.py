"""Views: uint8 crops become the augmented, normalised floats that an encoder sees.

``Views.sample`` draws every parameter of every sample, calling the module applies them. The
operations and their order are torchvision's (flip, colour jitter in a drawn order, gray, Gaussian
blur, solarise, normalise), computed in float32 without rounding to uint8 in between. On a CPU
``augment`` does so sample by sample. Elsewhere one vectorised chain serves all views at once: no
loop over samples, no branch on data, no host sync, eager or compiled.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastproj.augment import Params, augment
from fastproj.errors import InputError

Planes = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class View:
    """How one view is augmented: probabilities (0 to 1) and strengths.

    ``flip``, ``jitter``, ``gray``, ``blur`` and ``solarise`` are probabilities. Brightness,
    contrast and saturation are multiplied by a factor in [max(0, 1 - strength), 1 + strength],
    hue is shifted by up to ``hue`` turns (at most 0.5) either way. ``sigma`` is the range of the
    blur's standard deviation in pixels. Solarising inverts what is at least 0.5.
    Raises ``InputError`` for a value out of its range.
    """

    flip: float = 0.5
    jitter: float = 0.8
    brightness: float = 0.8
    contrast: float = 0.8
    saturation: float = 0.8
    hue: float = 0.2
    gray: float = 0.2
    blur: float = 0.5
    sigma: tuple[float, float] = (0.1, 2.0)
    solarise: float = 0.0

    def __post_init__(self) -> None:
        for name in ("flip", "jitter", "gray", "blur", "solarise"):
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


_MILD = View(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, blur=1.0)
_RARELY_BLURRED = replace(_MILD, blur=0.1, solarise=0.2)

PRESETS: dict[str, tuple[View, View]] = {
    # Chen et al. 2020 at the strength Projector_Theory uses, on CIFAR and ImageNet alike.
    "simclr": (View(), View()),
    # Zbontar et al. 2021 as in Projector_Theory on ImageNet; on CIFAR it blurs none (blur 0).
    "barlow": (_MILD, _RARELY_BLURRED),
    # Grill et al. 2020, table 6, as in solo-learn: the two methods share these numbers.
    "byol": (_MILD, _RARELY_BLURRED),
}


class Views(nn.Module):
    """The augmentation of all views of a batch.

    ``views``: one ``View`` a view. ``mean``, ``std``: per channel, for pixels in 0 to 1.
    ``dtype``: of the output only, the arithmetic is float32.
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
        # How far the blur reaches: 3 sigma, the widest of all views.
        widest = max((v.sigma[1] for v in views if v.blur > 0), default=0.0)
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
        chances = torch.tensor([[v.flip, v.jitter, v.gray, v.blur, v.solarise] for v in views])
        deviation = torch.tensor(std, dtype=torch.float32)
        shift = -torch.tensor(mean) / deviation
        for name, value in (("probability", chances), ("low", low), ("span", high - low),
                            ("scale", 1 / deviation), ("shift", shift)):  # fmt: skip
            self.register_buffer(name, value, persistent=False)
        self._plan, self._pixels = _plan, _pixels

    def compile(self, *args: Any, **options: Any) -> None:
        """Compile the chain: what is done per sample, and what is done per pixel.

        In one graph, what is done per sample would be repeated for each pixel.
        """
        options = {"dynamic": False, "fullgraph": True, **options}
        self._plan = torch.compile(_plan, *args, **options)
        self._pixels = torch.compile(_pixels, *args, **options)

    def sample(self, n: int, generator: torch.Generator) -> Params:
        """Draw the parameters of ``n`` samples a view, on ``generator``'s device (the module's)."""
        draws = torch.rand(len(self.views), n, 14, generator=generator, device=generator.device)
        chance, value, keys = draws.split((5, 5, 4), dim=2)
        flip, jitter, gray, blur, solarise = (
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
            solarise=solarise,
        )

    def forward(self, crops: Tensor, params: Params) -> Tensor:
        """uint8 (N, 3, h, w) to ``dtype`` (N, 3, h, w) in channels-last memory, normalised.

        Raises ``InputError`` where h or w is too small to reflect the blur's reach at its edges.
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

    def chain(self, crops: Tensor, params: Params) -> Tensor:
        """The same, of all samples at once, on any device; compiled after ``compile``."""
        to_contrast, whole, taps = self._plan(params, self.reach)
        return self._pixels(
            crops,
            _spread(params.flip),
            to_contrast,
            whole,
            _spread(params.gray),
            taps,
            _spread(params.solarise),
            self.scale,
            self.shift,
            self.dtype,
        )


class _Jitter(NamedTuple):
    """A sequence of blends, one hue shift (N,) in turns, and blends again.

    Blends are (N, 4 places, 3): x becomes clamp(first x + second luma(x) + third mean(x)).
    """

    before: Tensor
    hue: Tensor
    after: Tensor


def _plan(params: Params, reach: int) -> tuple[_Jitter, _Jitter, Tensor]:
    """What leads up to contrast, the whole jitter, each sample in its own order, the blur's taps.

    Brightness, contrast and saturation are blends, and a blend with factor 1 changes nothing. So
    hue, the dear one, is computed once, between blends that are neutral for those samples where
    they come on its other side. Contrast needs the mean of the image at its own place, hence two.
    """
    place = torch.arange(4, device=params.place.device)
    here = params.place[:, :, None] == place
    blends = torch.stack(
        (
            torch.where(here[:, 0], params.brightness[:, None], 1.0)
            + here[:, 1] * (params.contrast[:, None] - 1)
            + here[:, 2] * (params.saturation[:, None] - 1),
            here[:, 2] * (1 - params.saturation[:, None]),
            here[:, 1] * (1 - params.contrast[:, None]),
        ),
        dim=2,
    )
    neutral = torch.zeros_like(blends)
    neutral[:, :, 0] = 1

    def only(active: Tensor) -> Tensor:
        return torch.where(active[:, :, None], blends, neutral)

    before, after = place < params.place[:, 3:], place > params.place[:, 3:]
    early = place < params.place[:, 1:2]
    hue_is_early = params.place[:, 3] < params.place[:, 1]
    return (
        _Jitter(only(before & early), params.hue * hue_is_early, only(after & early)),
        _Jitter(only(before), params.hue, only(after)),
        _gaussian(params.sigma, reach),
    )


def _gaussian(sigma: Tensor, reach: int) -> Tensor:
    """(N, 2 x reach + 1) taps: torchvision's kernel of that size; sigma 0 is the identity."""
    offset = torch.arange(-reach, reach + 1, device=sigma.device)
    return torch.softmax(-(offset**2) / (2 * sigma[:, None] ** 2).clamp_min(1e-6), dim=1)


def _pixels(
    crops: Tensor,
    flip: Tensor,
    to_contrast: _Jitter,
    whole: _Jitter,
    gray: Tensor,
    taps: Tensor,
    solarise: Tensor,
    scale: Tensor,
    shift: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """All that is done per pixel: uint8 (N, 3, h, w) to channels-last ``dtype``."""
    red, green, blue = (
        torch.where(flip, plane.flip(2), plane).float() * (1 / 255) for plane in crops.unbind(1)
    )
    planes: Planes = (red, green, blue)
    # Up to contrast there are two blends at most: a third place is never used on either side.
    early = _jitter(planes, to_contrast, (0, 1), (1, 2), None)
    mean = _luma(early).mean(dim=(1, 2))
    planes = _jitter(planes, whole, (0, 1, 2), (1, 2, 3), mean)
    luma = _luma(planes)
    image = torch.stack([torch.where(gray, luma, plane) for plane in planes], dim=1)
    for axis in (2, 3):
        image = _blur(image, taps, axis)
    image = torch.where((image >= 0.5) & solarise[:, None], 1 - image, image)
    image = image * scale[:, None, None] + shift[:, None, None]
    return image.to(dtype, memory_format=torch.channels_last)


def _spread(x: Tensor) -> Tensor:
    """(N,) to (N, 1, 1)."""
    return x[:, None, None]


def _luma(planes: Planes) -> Tensor:
    """ITU-R 601-2, with torchvision's four digits."""
    red, green, blue = planes
    return 0.2989 * red + 0.587 * green + 0.114 * blue


def _jitter(
    planes: Planes,
    jitter: _Jitter,
    before: tuple[int, ...],
    after: tuple[int, ...],
    mean: Tensor | None,
) -> Planes:
    """Blends at the places ``before``, hue, blends at the places ``after``."""
    for place in before:
        planes = _blend(planes, jitter.before[:, place], mean)
    planes = _shift_hue(planes, jitter.hue)
    for place in after:
        planes = _blend(planes, jitter.after[:, place], mean)
    return planes


def _blend(planes: Planes, blend: Tensor, mean: Tensor | None) -> Planes:
    factor, of_luma, of_mean = blend.unbind(1)
    rest = _spread(of_luma) * _luma(planes)
    if mean is not None:
        rest = rest + _spread(of_mean * mean)
    red, green, blue = ((rest + _spread(factor) * plane).clamp(0, 1) for plane in planes)
    return red, green, blue


def _shift_hue(planes: Planes, turns: Tensor) -> Planes:
    """Turn the hue, keep saturation and value: HSV there and back without computing S.

    With h in sixths of a turn, each channel is min + (max - min) x a trapezium in h.
    """
    red, green, blue = planes
    high = torch.maximum(torch.maximum(red, green), blue)
    low = torch.minimum(torch.minimum(red, green), blue)
    chroma = high - low
    inverse = 1 / chroma.clamp_min(1e-12)  # gray pixels: 0 x 1e12, any hue will do
    hue = torch.where(
        high == red,
        (green - blue) * inverse,
        torch.where(high == green, 2 + (blue - red) * inverse, 4 + (red - green) * inverse),
    )
    hue = hue + _spread(6 * turns)
    hue = hue - 6 * torch.floor(hue * (1 / 6))
    red = ((hue - 3).abs() - 1).clamp(0, 1)
    green = (2 - (hue - 2).abs()).clamp(0, 1)
    blue = (2 - (hue - 4).abs()).clamp(0, 1)
    return low + chroma * red, low + chroma * green, low + chroma * blue


def _blur(image: Tensor, taps: Tensor, axis: int) -> Tensor:
    """Correlate (N, 3, h, w) along ``axis`` with each sample's own taps, edges reflected.

    A sum of shifted slices: on a CPU, eager, 2.5 times faster than banded matrix products at 224
    pixels (the same at 32), and 4 times faster than a grouped convolution. The kernel is
    symmetric: two slices share a tap.
    """
    size, reach = image.shape[axis], taps.shape[1] // 2
    if reach == 0:
        return image
    place = torch.arange(-reach, size + reach, device=image.device).abs()
    padded = image.index_select(axis, size - 1 - (size - 1 - place).abs())
    tap = taps[:, :, None, None, None].unbind(1)
    blurred = tap[reach] * image
    for i in range(reach):
        pair = padded.narrow(axis, i, size) + padded.narrow(axis, 2 * reach - i, size)
        blurred = blurred + tap[i] * pair
    return blurred
