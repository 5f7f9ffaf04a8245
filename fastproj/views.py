"""Views: uint8 crops become the augmented, normalised floats that an encoder sees.

``Views.sample`` draws every parameter of every sample, calling the module applies them. One
vectorised chain serves all views at once: no loop over samples, no branch on data, no host sync,
so the same code runs on CPU and GPU, eager and compiled. The operations and their order are
torchvision's (flip, colour jitter in a drawn order, gray, Gaussian blur, solarise, normalise),
computed in float32 without rounding to uint8 in between.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastproj.errors import InputError

Planes = tuple[Tensor, Tensor, Tensor]
# How much a core augments at once: little enough for its caches, and for the allocator to keep the
# memory. For 64 images of 224 pixels on one core, parts alone took 1.5 s instead of 2.8 eager, 183
# ms instead of 234 compiled; on four, parts five times as large 32 ms instead of 41 (least of 25).
PIXELS_A_CORE = 8 * 224 * 224


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


class Params(NamedTuple):
    """What is done to each of N = views x samples crops, view-major; (N,) unless said otherwise.

    An operation that was not drawn has its neutral value: factor 1, shift 0, sigma 0.
    """

    flip: Tensor  # bool
    place: Tensor  # int64 (N, 4): when brightness, contrast, saturation, hue happen, 0 first
    brightness: Tensor  # float32 factor
    contrast: Tensor  # float32 factor
    saturation: Tensor  # float32 factor
    hue: Tensor  # float32 shift in turns, -0.5 to 0.5
    gray: Tensor  # bool
    sigma: Tensor  # float32, pixels
    solarise: Tensor  # bool


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
        """Compile what is done per sample, and what is done per pixel. Nothing is dynamic.

        Measured on a CPU: fused into one graph, what is done per sample would be repeated for
        each pixel, the colours would be read from channels-last memory without vector instructions
        (1.7 times slower), and the flip and the last copy would be over 3 times slower.
        Multiplying and adding in one instruction takes a fifth off the jitter, a tenth off the
        blur.
        """
        fuse = {"cpp.enable_floating_point_contract_flag": "fast"}
        options = {"dynamic": False, "fullgraph": True, "options": fuse, **options}
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
        to_contrast, whole, taps = self._plan(params, self.reach)
        gray, solarise = _spread(params.gray), _spread(params.solarise)
        out = torch.empty_like(crops, dtype=self.dtype, memory_format=torch.channels_last)
        for part in _parts(crops):
            out[part] = self._pixels(
                _flip(crops[part], params.flip[part]),
                to_contrast.of(part),
                whole.of(part),
                gray[part],
                taps[part],
                solarise[part],
                self.scale,
                self.shift,
                self.dtype,
            )
        return out


def _parts(crops: Tensor) -> Iterator[slice]:
    """Parts of one size, so that one graph serves all; the last may overlap the one before it.

    A GPU takes all samples at once.
    """
    n, _, h, w = crops.shape
    at_once = PIXELS_A_CORE * torch.get_num_threads()
    count = math.ceil(n * h * w / at_once) if crops.device.type == "cpu" else 1
    size = math.ceil(n / max(1, count))
    for start in range(0, n, max(1, size)):
        start = min(start, n - size)
        yield slice(start, start + size)


class _Jitter(NamedTuple):
    """A sequence of blends, one hue shift (N,) in turns, and blends again.

    Blends are (N, 4 places, 3): x becomes clamp(first x + second luma(x) + third mean(x)).
    """

    before: Tensor
    hue: Tensor
    after: Tensor

    def of(self, part: slice) -> "_Jitter":
        return _Jitter(*(x[part] for x in self))


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


def _flip(crops: Tensor, flip: Tensor) -> Tensor:
    """Planar uint8 crops, mirrored left to right where ``flip`` (N,)."""
    crops = crops.contiguous()
    # Bits: torch.where takes a broadcast condition byte by byte: 2 to 5 times slower on a CPU.
    everywhere = flip.to(torch.uint8)[:, None, None, None] * 255
    return crops ^ ((crops ^ crops.flip(3)) & everywhere)


def _pixels(
    crops: Tensor,
    to_contrast: _Jitter,
    whole: _Jitter,
    gray: Tensor,
    taps: Tensor,
    solarise: Tensor,
    scale: Tensor,
    shift: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """All that is done per pixel: planar uint8 (N, 3, h, w) to planar ``dtype``."""
    red, green, blue = (plane.float() * (1 / 255) for plane in crops.unbind(1))
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
    return (image * scale[:, None, None] + shift[:, None, None]).to(dtype)


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
    red, green, blue = (_clamp(torch.addcmul(rest, _spread(factor), plane)) for plane in planes)
    return red, green, blue


def _shift_hue(planes: Planes, turns: Tensor) -> Planes:
    """Turn the hue, keep saturation and value: HSV there and back without computing S.

    With h in sixths of a turn, each channel is min + (max - min) x a trapezium in h.
    """
    red, green, blue = planes
    high = _larger(_larger(red, green), blue)
    low = -_larger(_larger(-red, -green), -blue)
    chroma = high - low
    inverse = 1 / chroma.clamp_min(1e-12)  # gray pixels: 0 x 1e12, any hue will do
    hue = torch.where(
        high == red,
        (green - blue) * inverse,
        torch.where(high == green, 2 + (blue - red) * inverse, 4 + (red - green) * inverse),
    )
    hue = hue + _spread(6 * turns)
    hue = hue - 6 * torch.floor(hue * (1 / 6))
    red = _clamp((hue - 3).abs() - 1)
    green = _clamp(2 - (hue - 2).abs())
    blue = _clamp(2 - (hue - 4).abs())
    return low + chroma * red, low + chroma * green, low + chroma * blue


def _clamp(x: Tensor) -> Tensor:
    """To 0 and 1. Compiled for a CPU, clamp would pass NaN on, with twice the instructions."""
    return torch.relu(x) - torch.relu(x - 1) if torch.compiler.is_compiling() else x.clamp(0, 1)


def _larger(x: Tensor, y: Tensor) -> Tensor:
    """The maximum; compiled like ``_clamp``."""
    return torch.where(x > y, x, y) if torch.compiler.is_compiling() else torch.maximum(x, y)


def _blur(image: Tensor, taps: Tensor, axis: int) -> Tensor:
    """Correlate (N, 3, h, w) along ``axis`` with each sample's own taps, edges reflected.

    A sum of shifted slices: measured 2.5 times faster than banded matrix products at 224 pixels
    on a CPU (the same at 32), and 4 times faster than a grouped convolution. The kernel is
    symmetric: two slices share a tap.
    """
    size, reach = image.shape[axis], taps.shape[1] // 2
    if reach == 0:
        return image
    if axis == 2:
        # Compiled, rows are read in place: the blur along this axis takes 40 % less time. Columns
        # would be read one by one, 6 times slower than with the copy.
        place = torch.arange(-reach, size + reach, device=image.device).abs()
        padded = image[:, :, size - 1 - (size - 1 - place).abs()]
    else:
        left = image.narrow(axis, 1, reach).flip(axis)
        right = image.narrow(axis, size - 1 - reach, reach).flip(axis)
        padded = torch.cat((left, image, right), dim=axis)
    tap = taps[:, :, None, None, None].unbind(1)
    blurred = tap[reach] * image
    for i in range(reach):
        pair = padded.narrow(axis, i, size) + padded.narrow(axis, 2 * reach - i, size)
        blurred = torch.addcmul(blurred, tap[i], pair)
    return blurred
