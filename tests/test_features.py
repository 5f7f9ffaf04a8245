"""Features against a plain loop over the images, through a real beton and loader."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from data_prep.encode import Store
from fastproj.encoder import build_encoder
from fastproj.errors import InputError
from fastproj.features import extract, frozen, pixels
from fastproj.loaders import Center, Crop, Loader, open_loader
from fastproj.manifest import Beton
from tests import betons

CPU = torch.device("cpu")
MEAN, STD = (0.3, 0.4, 0.5), (0.2, 0.25, 0.3)
COUNT, SIDE = 50, 16


@pytest.fixture(scope="module")
def beton(tmp_path_factory) -> Beton:
    source = betons.digit_like(np.random.default_rng(0), COUNT, SIDE, classes=5)
    return betons.write(source, Path(tmp_path_factory.mktemp("beton")), Store("raw"))


def images(beton: Beton) -> torch.Tensor:
    """All images, uint8 (N, 3, h, w), read without any loader."""
    stored = np.stack([beton.stored(i).reshape(SIDE, SIDE, 3) for i in range(COUNT)])
    return torch.from_numpy(stored).permute(0, 3, 1, 2)


def centre(beton: Beton, batch_size: int = 16, **how) -> Loader:
    how = {"shuffle": False, "drop_last": False} | how
    return open_loader(beton, [Center(SIDE)], batch_size, **how)


@pytest.fixture(scope="module")
def encoder() -> nn.Module:
    """A small encoder whose batch-norm statistics are not the initial ones."""
    torch.manual_seed(0)
    encoder = build_encoder("resnet_small", "cifar")
    encoder(torch.randn(8, 3, SIDE, SIDE))
    return encoder


def test_features_equal_a_plain_loop_in_eval_mode(beton, encoder):
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    with frozen(encoder), torch.no_grad():
        plain = torch.cat([encoder(((x / 255 - mean) / std)[None]) for x in images(beton)])
    found = extract(encoder, centre(beton), MEAN, STD, CPU)
    assert found.features.dtype == torch.float32 and len(found) == COUNT
    torch.testing.assert_close(found.features, plain, rtol=1e-4, atol=1e-5)
    assert torch.equal(found.labels, torch.arange(COUNT) % 5)
    assert torch.equal(found.index, torch.arange(COUNT))


def test_a_shuffled_loader_gives_the_same_rows(beton, encoder):
    straight = extract(encoder, centre(beton), MEAN, STD, CPU)
    shuffled = extract(encoder, centre(beton, batch_size=7, shuffle=True, seed=3), MEAN, STD, CPU)
    torch.testing.assert_close(shuffled.features, straight.features, rtol=1e-4, atol=1e-5)
    assert torch.equal(shuffled.labels, straight.labels)
    assert torch.equal(shuffled.index, straight.index)


def test_pixels_are_the_images_in_zero_to_one(beton):
    found = pixels(centre(beton), CPU)
    assert found.features.shape == (COUNT, 3 * SIDE * SIDE)
    torch.testing.assert_close(found.features, images(beton).flatten(1) / 255)


def test_training_flags_come_back_and_nothing_is_learnt(beton, encoder):
    encoder.train()
    first = next(m for m in encoder.modules() if isinstance(m, nn.BatchNorm2d))
    first.eval()  # as somebody does who trains with part of the statistics frozen
    flags = [m.training for m in encoder.modules()]
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    extract(encoder, centre(beton), MEAN, STD, CPU)
    assert [m.training for m in encoder.modules()] == flags
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())
    with pytest.raises(RuntimeError), frozen(encoder):
        raise RuntimeError
    assert [m.training for m in encoder.modules()] == flags


@pytest.mark.parametrize(
    "loader",
    [
        pytest.param(lambda b: centre(b, drop_last=True), id="the last batch dropped"),
        pytest.param(lambda b: _from_second_step(b), id="from the middle of an epoch"),
        pytest.param(lambda b: centre(_with_one_twice(b)), id="one index twice"),
    ],
)
def test_every_image_must_come_exactly_once(beton, encoder, loader):
    with pytest.raises(InputError, match="each once") as caught:
        extract(encoder, loader(beton), MEAN, STD, CPU)
    assert str(beton.path) in str(caught.value)


def _from_second_step(beton: Beton) -> Loader:
    loader = centre(beton)
    loader.seek(0, 1)
    return loader


def _with_one_twice(beton: Beton) -> Beton:
    return replace(beton, index=np.r_[beton.index[:-1], beton.index[0]])


def test_an_encoder_that_has_diverged_is_said(beton, encoder):
    broken = nn.Sequential(encoder, nn.Linear(encoder.features, 4))
    nn.init.constant_(broken[1].bias, torch.nan)
    with pytest.raises(InputError, match="diverged"):
        extract(broken, centre(beton), MEAN, STD, CPU)


def test_one_crop_an_image_is_asked_for(beton, encoder):
    views = open_loader(beton, [Crop(SIDE, views=2)], 10, shuffle=False)
    with pytest.raises(InputError, match="one crop an image"):
        extract(encoder, views, MEAN, STD, CPU)
