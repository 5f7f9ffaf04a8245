"""The augmentation chain, vectorized over all samples, for any device; eager or compiled.

It has no loop over samples, no data-dependent branch and no host sync.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastproj.augment.draw import Params

Planes = tuple[Tensor, Tensor, Tensor]


class _Jitter(NamedTuple):
    """A sequence of blends, one hue shift (N,) in turns, and blends again.

    Blends are (N, 4 places, 3): x becomes clamp(first x + second luma(x) + third mean(x)).
    """

    before: Tensor
    hue: Tensor
    after: Tensor


def plan(params: Params, reach: int) -> tuple[_Jitter, _Jitter, Tensor]:
    """The jitter up to contrast, the whole jitter, and the blur's taps, for each sample.

    Each sample has its own order of operations. Brightness, contrast and saturation are blends, and
    a blend with factor 1 is the identity. Hue is expensive, so it runs once; blends that a sample
    orders on its other side become identities. Contrast needs the image's mean just before it, so
    the operations up to contrast are planned separately.
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
        gaussian(params.sigma, reach),
    )


def gaussian(sigma: Tensor, reach: int) -> Tensor:
    """(N, 2·reach + 1) taps: torchvision's kernel of that size; sigma 0 is the identity."""
    offset = torch.arange(-reach, reach + 1, device=sigma.device)
    return torch.softmax(-(offset**2) / (2 * sigma[:, None] ** 2).clamp_min(1e-6), dim=1)


def pixels_options() -> dict[str, Any]:
    """Inductor's options for ``pixels``: write each plane in its place.

    Else another kernel, which reads and writes all planes once more, puts them together.
    """
    from torch._inductor import config

    names = ("max_pointwise_cat_inputs", "max_complex_pointwise_cat_inputs")  # torch 2.11 has one
    return {name: 0 for name in names if hasattr(config, name)}


def pixels(
    crops: Tensor,
    flip: Tensor,
    to_contrast: _Jitter,
    whole: _Jitter,
    gray: Tensor,
    taps: Tensor,
    solarize: Tensor,
    scale: Tensor,
    shift: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """All operations on pixels: uint8 (N, 3, h, w) to channels-last ``dtype``."""
    red, green, blue = (
        torch.where(flip, plane.flip(2), plane).float() * (1 / 255) for plane in crops.unbind(1)
    )
    planes: Planes = (red, green, blue)
    # At most two blends come before contrast, so a third place is never used on either side.
    early = _jitter(planes, to_contrast, (0, 1), (1, 2), None)
    mean = _luma(early).mean(dim=(1, 2))
    planes = _jitter(planes, whole, (0, 1, 2), (1, 2, 3), mean)
    luma = _luma(planes)
    done = []
    # Planes meet last, in channels-last memory: compiled code blurs and writes each on its own.
    for channel, plane in enumerate(planes):
        plane = torch.where(gray, luma, plane)
        for axis in (1, 2):
            plane = _blur(plane, taps, axis)
        plane = torch.where((plane >= 0.5) & solarize, 1 - plane, plane)
        done.append((plane * scale[channel] + shift[channel]).to(dtype))
    return torch.cat([plane[..., None] for plane in done], dim=3).permute(0, 3, 1, 2)


def spread(x: Tensor) -> Tensor:
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
    rest = spread(of_luma) * _luma(planes)
    if mean is not None:
        rest = rest + spread(of_mean * mean)
    red, green, blue = ((rest + spread(factor) * plane).clamp(0, 1) for plane in planes)
    return red, green, blue


def _shift_hue(planes: Planes, turns: Tensor) -> Planes:
    """Shift the hue, keep saturation and value: RGB to HSV and back without computing S.

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
    hue = hue + spread(6 * turns)
    hue = hue - 6 * torch.floor(hue * (1 / 6))
    red = ((hue - 3).abs() - 1).clamp(0, 1)
    green = (2 - (hue - 2).abs()).clamp(0, 1)
    blue = (2 - (hue - 4).abs()).clamp(0, 1)
    return low + chroma * red, low + chroma * green, low + chroma * blue


def _blur(plane: Tensor, taps: Tensor, axis: int) -> Tensor:
    """Correlate (N, h, w) along ``axis`` with each sample's own taps, edges reflected.

    A sum of shifted slices. On a CPU, eager, it is 2.5 times as fast as banded matrix products at
    224 pixels (equally fast at 32) and 4 times as fast as a grouped convolution. The kernel is
    symmetric, so two slices share a tap.
    """
    size, reach = plane.shape[axis], taps.shape[1] // 2
    if reach == 0:
        return plane
    place = torch.arange(-reach, size + reach, device=plane.device).abs()
    padded = plane.index_select(axis, size - 1 - (size - 1 - place).abs())
    tap = taps[:, :, None, None].unbind(1)
    blurred = tap[reach] * plane
    for i in range(reach):
        pair = padded.narrow(axis, i, size) + padded.narrow(axis, 2 * reach - i, size)
        blurred = blurred + tap[i] * pair
    return blurred
