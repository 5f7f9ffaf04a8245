"""Features against a plain loop over the images, through a real beton and loader."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fastproj.core.errors import InputError
from fastproj.data.beton import Beton
from fastproj.evaluation.features import Features, features, frozen, pixels
from fastproj.loaders import Center, Crop, Loader, open_loader
from fastproj.models.encoders import build_encoder
from fastproj.prepare.encode import Store
from tests.support import betons

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


def center(beton: Beton, batch_size: int = 16, **how) -> Loader:
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
    found = features(encoder, center(beton), mean=MEAN, std=STD)
    assert found.features.dtype == torch.float32 and len(found) == COUNT
    torch.testing.assert_close(found.features, plain, rtol=1e-4, atol=1e-5)
    assert torch.equal(found.labels, torch.arange(COUNT) % 5)


def test_a_shuffled_loader_gives_the_same_rows(beton, encoder):
    straight = features(encoder, center(beton), mean=MEAN, std=STD)
    shuffled = features(
        encoder, center(beton, batch_size=7, shuffle=True, seed=3), mean=MEAN, std=STD
    )
    torch.testing.assert_close(shuffled.features, straight.features, rtol=1e-4, atol=1e-5)
    assert torch.equal(shuffled.labels, straight.labels)


def test_pixels_are_the_images_in_zero_to_one(beton):
    found = pixels(center(beton))
    assert found.features.shape == (COUNT, 3 * SIDE * SIDE)
    torch.testing.assert_close(found.features, images(beton).flatten(1) / 255)


def test_training_flags_come_back_and_nothing_is_learnt(beton, encoder):
    encoder.train()
    first = next(m for m in encoder.modules() if isinstance(m, nn.BatchNorm2d))
    first.eval()  # as somebody does who trains with part of the statistics frozen
    flags = [m.training for m in encoder.modules()]
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    features(encoder, center(beton), mean=MEAN, std=STD)
    assert [m.training for m in encoder.modules()] == flags
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())
    with pytest.raises(RuntimeError), frozen(encoder):
        raise RuntimeError
    assert [m.training for m in encoder.modules()] == flags


@pytest.mark.parametrize(
    "loader",
    [
        pytest.param(lambda b: center(b, drop_last=True), id="the last batch dropped"),
        pytest.param(lambda b: _from_second_step(b), id="from the middle of an epoch"),
        pytest.param(lambda b: center(_with_one_twice(b)), id="one index twice"),
    ],
)
def test_every_image_must_come_exactly_once(beton, encoder, loader):
    with pytest.raises(InputError, match="each once") as caught:
        features(encoder, loader(beton), mean=MEAN, std=STD)
    assert str(beton.path) in str(caught.value)


def _from_second_step(beton: Beton) -> Loader:
    loader = center(beton)
    loader.seek(0, 1)
    return loader


def _with_one_twice(beton: Beton) -> Beton:
    return replace(beton, index=np.r_[beton.index[:-1], beton.index[0]])


def test_an_encoder_that_has_diverged_is_said(beton, encoder):
    broken = nn.Sequential(encoder, nn.Linear(encoder.num_features, 4))
    nn.init.constant_(broken[1].bias, torch.nan)
    with pytest.raises(InputError, match="diverged"):
        features(broken, center(beton), mean=MEAN, std=STD)


def test_one_crop_per_image_is_asked_for(beton, encoder):
    views = open_loader(beton, [Crop(SIDE, num_views=2)], 10, shuffle=False)
    with pytest.raises(InputError, match="one crop per image"):
        features(encoder, views, mean=MEAN, std=STD)


def pairs(beton: Beton, batch_size: int = 16, scale: float = 1 / 255) -> DataLoader:
    """The same images in torch's own loader, float in [0, 1] unless ``scale`` says otherwise."""
    both = TensorDataset(images(beton) * scale, torch.from_numpy(beton.label))
    return DataLoader(both, batch_size=batch_size)


def test_torchs_loader_gives_what_ours_gives(beton, encoder):
    ours = features(encoder, center(beton), mean=MEAN, std=STD)
    theirs = features(encoder, pairs(beton), mean=MEAN, std=STD)
    torch.testing.assert_close(theirs.features, ours.features, rtol=1e-4, atol=1e-5)
    assert torch.equal(theirs.labels, ours.labels)
    in_bytes = features(encoder, pairs(beton, scale=1), mean=MEAN, std=STD)
    torch.testing.assert_close(in_bytes.features, ours.features, rtol=1e-4, atol=1e-5)


def test_any_module_and_any_iterable_of_pairs(beton):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, 5), nn.Dropout())
    x = images(beton) / 255
    found = features(module, [(x[:30], list(beton.label[:30])), (x[30:], beton.label[30:])])
    torch.testing.assert_close(found.features, module[1](x.flatten(1)).detach())
    assert torch.equal(found.labels, torch.from_numpy(beton.label))
    found.features @ torch.ones(5, 1, requires_grad=True)  # autograd takes them


def test_the_default_normalization_is_the_betons(beton, encoder):
    its = {"mean": beton.manifest.mean, "std": beton.manifest.std}
    ours, same = features(encoder, center(beton)), features(encoder, center(beton), **its)
    assert torch.equal(ours.features, same.features)
    plain = features(nn.Flatten(), pairs(beton))  # another loader's images stay as they are
    assert torch.equal(plain.features, (images(beton) * (1 / 255)).flatten(1))


@pytest.mark.parametrize(
    "batches, error, words",
    [
        ([], InputError, "no batch"),
        ([torch.ones(2, 3, 4, 4)[0, 0, 0]], TypeError, r"must give \(images, labels\)"),
        ([(torch.ones(2, 3, 4, 4), torch.ones(3))], InputError, r"labels \(3,\)"),
        ([(torch.ones(2, 48), torch.ones(2))], InputError, r"images \(2, 48\)"),
    ],
)
def test_other_batches_are_refused(batches, error, words):
    with pytest.raises(error, match=words):
        features(nn.Flatten(), batches)


def test_a_module_that_gives_maps_is_told_to_flatten(beton):
    with pytest.raises(InputError, match=r"\(16, 4, 16, 16\).*flatten"):
        features(nn.Conv2d(3, 4, 1), center(beton))


def test_features_are_made_of_plain_tensors():
    found = Features(torch.ones(2, 3, dtype=torch.float64), torch.tensor([0, 1], dtype=torch.int32))
    assert (found.features.dtype, found.labels.dtype) == (torch.float32, torch.int64)
    with pytest.raises(InputError, match=r"\(2, 3\) and labels of shape \(3,\)"):
        Features(torch.ones(2, 3), torch.ones(3))
