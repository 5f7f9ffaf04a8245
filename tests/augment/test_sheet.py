"""The contact sheet: where each view lies, and that its colors are those of the image."""

import torch

from fastproj.augment.draw import View
from fastproj.augment.sheet import GAP, contact_sheet
from fastproj.augment.views import Augmentation

PLAIN = View(flip_prob=0, jitter_prob=0, gray_prob=0, blur_prob=0, solarize_prob=0)


def test_rows_are_samples_and_columns_views():
    large = torch.arange(4).view(2, 2, 1, 1, 1).expand(2, 2, 3, 6, 6) / 255
    small = torch.full((1, 2, 3, 4, 4), 100 / 255)
    sheet = contact_sheet([large, small])
    step = 6 + GAP
    assert sheet.dtype == torch.uint8 and sheet.shape == (3, 2 * step + GAP, 3 * step + GAP)
    for row in range(2):
        for column in range(2):
            top, left = row * step + GAP, column * step + GAP
            assert (sheet[:, top : top + 6, left : left + 6] == 2 * column + row).all()
        top, left = row * step + GAP, 2 * step + GAP
        assert (sheet[:, top : top + 4, left : left + 4] == 100).all()
        assert (sheet[:, top + 4 : top + 6, left : left + 6] == 255).all()
    assert (sheet[:, :GAP] == 255).all()


def test_denormalizing_gives_the_pixels_back():
    crops = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    augmentation = Augmentation([PLAIN], (0.4, 0.5, 0.6), (0.2, 0.3, 0.1))
    views = augmentation(crops, augmentation.sample(4, torch.Generator()))
    pixels = augmentation.denormalize(views) * 255
    torch.testing.assert_close(pixels, crops.float(), rtol=0, atol=0.01)
