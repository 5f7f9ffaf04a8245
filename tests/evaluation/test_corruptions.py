"""Corrupted features, with a stand-in for the package and, where it is installed, with itself."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fastproj.core.errors import InputError
from fastproj.data.beton import Beton
from fastproj.evaluation.corruptions import corrupted_features, corruptions
from fastproj.evaluation.features import Features
from fastproj.loaders import Center, Loader, open_loader
from fastproj.prepare.encode import Store
from tests.support import betons
from tests.support import corruptions as corruptions_package

COUNT, SIDE, CLASSES = 10, 32, 2


@pytest.fixture(scope="module")
def beton(tmp_path_factory: pytest.TempPathFactory) -> Beton:
    source = betons.digit_like(np.random.default_rng(0), COUNT, SIDE, CLASSES)
    return betons.write(source, Path(tmp_path_factory.mktemp("beton")), Store("raw"))


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "imagecorruptions", corruptions_package.stand_in())


def center(beton: Beton, size: int = SIDE, **how: Any) -> Loader:
    how = {"shuffle": False, "drop_last": False} | how
    return open_loader(beton, [Center(size)], 4, workers=1, **how)


def stored(beton: Beton) -> np.ndarray:
    return np.stack([beton.stored(i).reshape(SIDE, SIDE, 3) for i in range(COUNT)])


def flat(images: np.ndarray, beton: Beton) -> torch.Tensor:
    """Normalized images as rows, without the library."""
    mean, std = np.array(beton.manifest.mean), np.array(beton.manifest.std)
    values = ((images / 255 - mean) / std).transpose(0, 3, 1, 2).reshape(COUNT, -1)
    return torch.from_numpy(values).float()


def test_features_are_those_of_the_corrupted_crops(beton: Beton, stand_in: None) -> None:
    found = corrupted_features(nn.Flatten(), center(beton), "fog", 3)
    expected = flat(np.minimum(stored(beton).astype(int) + 30, 255), beton)
    torch.testing.assert_close(found.features, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(found.labels, torch.arange(COUNT) % CLASSES)


def test_an_images_noise_is_its_own_and_the_callers_numbers_go_on(
    beton: Beton, stand_in: None
) -> None:
    np.random.seed(0)
    expected = np.random.rand(3)
    np.random.seed(0)
    first = np.random.rand(1)
    one = corrupted_features(nn.Flatten(), center(beton), "snow", 1).features
    assert np.array_equal(np.concatenate([first, np.random.rand(2)]), expected)
    loader = open_loader(
        beton, [Center(SIDE)], 7, workers=1, shuffle=False, drop_last=False
    )  # other batches, the same noise
    assert torch.equal(one, corrupted_features(nn.Flatten(), loader, "snow", 1).features)
    clean = flat(stored(beton), beton)
    noise = (one - clean).view(COUNT, -1)
    assert torch.isclose(noise[0], noise[1], atol=1e-3).double().mean() < 0.1


def test_the_accuracies_are_those_of_scikit_learns_model_of_clean_features(
    beton: Beton, stand_in: None
) -> None:
    """Fog at two severities by arithmetic, the scores by scikit-learn's model of the same loss."""
    from sklearn.linear_model import LogisticRegression

    strength, pooled = 0.02, nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten())
    clean = stored(beton).astype(int)

    def embedded(images: np.ndarray) -> np.ndarray:
        return pooled(flat(images, beton).view(COUNT, 3, SIDE, SIDE)).double().numpy()

    light = np.random.default_rng(1).normal(0, 0.06, (30, 1))  # so that fog does not decide alone
    x, y = np.tile(embedded(clean), (3, 1)) + light, np.tile(np.arange(COUNT) % CLASSES, 3)
    train = Features(torch.from_numpy(x), torch.from_numpy(y))
    result = corruptions(
        pooled, train, center(beton), names=("fog", "snow"), severities=(1, 5),
        strengths=[strength],
    )  # fmt: skip
    model = LogisticRegression(C=1 / (strength * 30), tol=1e-8, max_iter=1000)
    model.fit((x - x.mean(0)) / x.std(0), y)

    def predicted(images: np.ndarray) -> np.ndarray:
        return model.predict((embedded(images) - x.mean(0)) / x.std(0))

    labels = np.arange(COUNT) % CLASSES
    assert np.array_equal(result.predictions, predicted(clean))
    found, cells = result.metrics, result.protocol["accuracies"]
    assert found["top1_clean"] == pytest.approx((predicted(clean) == labels).mean())
    for severity in (1, 5):
        foggy = predicted(np.minimum(clean + 10 * severity, 255))
        assert cells[f"fog {severity}"] == pytest.approx((foggy == labels).mean())
    assert found["top1_fog"] == pytest.approx((cells["fog 1"] + cells["fog 5"]) / 2)
    assert found["top1"] == pytest.approx(np.mean(list(cells.values())))
    assert len(set(cells.values())) > 1 and list(cells) == ["fog 1", "fog 5", "snow 1", "snow 5"]
    assert found["top5"] == found["top5_clean"] == 1  # of two classes
    json.dumps(result.protocol)


def test_what_cannot_be_corrupted_is_named(
    beton: Beton, stand_in: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for loader, name, says in (
        (center(beton), "rain", "no corruption 'rain': choose from gaussian_noise"),
        (center(beton, 16), "fog", "need 32 or more"),
        (center(beton, drop_last=True), "fog", "drop_last=False"),
        (center(beton, shuffle=True), "fog", "shuffle=False"),
    ):
        with pytest.raises(InputError, match=says):
            corrupted_features(nn.Flatten(), loader, name, 1)
    train = Features(torch.zeros(2, 3), torch.arange(2))
    with pytest.raises(InputError, match="severity 6: choose from 1 to 5"):
        corruptions(nn.Flatten(), train, center(beton), severities=(6,))
    monkeypatch.setitem(sys.modules, "imagecorruptions", None)
    with pytest.raises(InputError, match=r"pip install 'fastproj-ssl\[corruptions\]'"):
        corrupted_features(nn.Flatten(), center(beton), "fog", 1)


def test_processes_share_the_work(beton: Beton, stand_in: None) -> None:
    """The same rows in the same order from a pool, here one that runs at once."""

    class Pool:
        calls = 0

        def submit(self, function: Any, *args: Any) -> Any:
            self.calls += 1
            result = function(*args)
            return SimpleNamespace(result=lambda: result)

    pool: Any = Pool()
    shared = corrupted_features(nn.Flatten(), center(beton), "snow", 2, pool=pool)
    alone = corrupted_features(nn.Flatten(), center(beton), "snow", 2)
    assert torch.equal(shared.features, alone.features) and pool.calls > 3
    assert torch.equal(shared.labels, alone.labels)
