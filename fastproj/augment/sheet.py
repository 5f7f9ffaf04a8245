"""A contact sheet: what the augmentation makes of some samples, as one picture."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad
from torchvision.utils import make_grid

GAP = 2  # pixels between views


def contact_sheet(views: Sequence[Tensor]) -> Tensor:
    """A row per sample, a column per view, on white: uint8 (3, H, W).

    ``views``: a float tensor (V, n, 3, h, w) in [0, 1] per crop size, of n samples. Smaller crops
    lie in the upper left corner of their place.
    """
    side = max(part.shape[-1] for part in views)
    padded = [
        pad(part, (0, side - part.shape[-1], 0, side - part.shape[-2]), value=1.0) for part in views
    ]
    cells = torch.cat(padded).transpose(0, 1)  # (n, V, 3, side, side)
    sheet = make_grid(cells.flatten(0, 1), nrow=cells.shape[1], padding=GAP, pad_value=1.0)
    return (sheet * 255).round().to(torch.uint8)
