"""Small images on which every operation of the views shows."""

import torch
from torch import Tensor

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def images(n: int, size: int = 16, seed: int = 0) -> Tensor:
    """Smooth color fields, plus pixels that are gray, black, white and saturated."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 4, 4, generator=generator) * 1.4 - 0.2
    image = torch.nn.functional.interpolate(coarse, size, mode="bicubic").clamp(0, 1)
    image = (image * 255).round().to(torch.uint8)
    image[:, :, 0, :4] = torch.tensor([0, 255, 128, 7], dtype=torch.uint8)
    image[:, :, 1, 0] = torch.tensor([255, 0, 0], dtype=torch.uint8)
    image[:, :, 1, 1] = torch.tensor([255, 255, 0], dtype=torch.uint8)
    return image.contiguous(memory_format=torch.channels_last)
