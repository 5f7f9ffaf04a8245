"""Loaders: several engines that read a beton and give the same uint8 crops on the device.

Samples, their order and their boxes depend only on (seed, epoch, sample index, view). Hence all
engines draw the same crops, ranks never overlap, a resumed run continues with the next sample and
the number of workers changes nothing, but for a rounding of the pixels where a GPU crops for fewer
than ten of them (``stream``). Crops equal torchvision's antialiased bilinear
``resized_crop`` of the same box within 2/255 on average (measured: at most 0.3/255).
"""

from typing import TYPE_CHECKING

import lazy_loader

from fastproj.core.table import Table

if TYPE_CHECKING:
    from fastproj.loaders.base import Batch, Loader
    from fastproj.loaders.boxes import Center, Crop, Five
    from fastproj.loaders.choose import open_loader

__all__ = ["ENGINES", "Batch", "Center", "Crop", "Five", "Loader", "open_loader"]

ENGINES = Table(
    "data.engine",
    {
        "resident": "fastproj.loaders.resident:ResidentLoader",
        "stream": "fastproj.loaders.stream:StreamLoader",
        "dali": "fastproj.loaders.dali:DaliLoader",
        "ffcv": "fastproj.loaders.ffcv:FfcvLoader",
        "reference": "fastproj.loaders.reference:ReferenceLoader",
    },
)
"""Each a subclass of ``Loader``, made with (beton, crops, order, device, workers)."""

# Imported when first read, as they import torch.
__getattr__, __dir__, _ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "base": ["Batch", "Loader"],
        "boxes": ["Center", "Crop", "Five"],
        "choose": ["open_loader"],
    },
)
