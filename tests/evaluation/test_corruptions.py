"""Corrupted features, with a stand-in for the package and, where it is installed, with itself."""

import json
import sys
from contextlib import closing
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fastproj.core.errors import InputError
from fastproj.data.beton import Beton
from fastproj.evaluation.corruptions import CORRUPTIONS, corrupted_features, corruption_probe
from fastproj.evaluation.features import Features
from fastproj.evaluation.probes.common import ProbeResult
from fastproj.loaders import Center, Loader, open_loader
from fastproj.prepare.encode import Store
from fastproj.prepare.workers import Workers
from tests.support import betons

COUNT, SIDE, CLASSES = 10, 32, 2


@pytest.fixture(scope="module")
def beton(tmp_path_factory: pytest.TempPathFactory) -> Beton:
    source = betons.digit_like(np.random.default_rng(0), COUNT, SIDE, CLASSES)
    return betons.write(source, Path(tmp_path_factory.mktemp("beton")), Store("raw"))


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package whose "fog" adds ten times the severity, and whose others add noise."""

    def corrupt(image: np.ndarray, severity: int, corruption_name: str) -> np.ndarray:
        assert image.dtype == np.uint8 and image.shape == (SIDE, SIDE, 3)
        shift = 10 * severity if corruption_name == "fog" else np.random.randint(0, 50, image.shape)
        return np.uint8(np.minimum(image.astype(int) + shift, 255))

    package: Any = ModuleType("imagecorruptions")
    package.corrupt = corrupt
    monkeypatch.setitem(sys.modules, "imagecorruptions", package)


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
    other = corrupted_features(nn.Flatten(), center(beton), "snow", 1, seed=1).features
    assert not torch.equal(one, other)
    clean = flat(stored(beton), beton)
    noise = (one - clean).view(COUNT, -1)
    assert not torch.equal(noise[0], noise[1])


def test_one_probe_is_trained_once_and_scored_on_every_corruption(
    beton: Beton, stand_in: None
) -> None:
    train = Features(torch.randn(6, 3 * SIDE * SIDE), torch.arange(6) % CLASSES)
    calls: list[tuple[Features, Features]] = []

    def probe(train: Features, val: Features, num_classes: int | None) -> ProbeResult:
        calls.append((train, val))
        right = torch.arange(len(val)) % 7 != 0  # wrong for every seventh row
        return ProbeResult({}, {"name": "x"}, 0.0, torch.where(right, val.labels, 1 - val.labels))

    result = corruption_probe(
        nn.Flatten(), train, center(beton), CLASSES, probe=probe, corruptions=("fog", "snow"),
        severities=(1, 5), workers=1,
    )  # fmt: skip
    ((given, val),) = calls
    assert given is train and len(val) == 5 * COUNT
    clean = flat(stored(beton), beton)
    torch.testing.assert_close(val.features[:COUNT], clean, rtol=1e-5, atol=1e-5)
    foggy = flat(np.minimum(stored(beton).astype(int) + 50, 255), beton)
    torch.testing.assert_close(val.features[2 * COUNT : 3 * COUNT], foggy, rtol=1e-5, atol=1e-5)
    right = (np.arange(5 * COUNT) % 7 != 0).reshape(5, COUNT).mean(1)
    assert result.metrics == {
        "top1": pytest.approx(right[1:].mean()),
        "clean_top1": pytest.approx(right[0]),
        "top1_fog": pytest.approx(right[1:3].mean()),
        "top1_snow": pytest.approx(right[3:].mean()),
    }
    assert result.protocol["accuracies"]["snow 5"] == pytest.approx(right[4])
    assert len(result.predictions) == COUNT and result.protocol["probe"] == {"name": "x"}
    json.dumps(result.protocol)


def test_what_cannot_be_corrupted_is_named(
    beton: Beton, stand_in: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for loader, name, says in (
        (center(beton), "rain", "no corruption 'rain': choose one of gaussian_noise"),
        (center(beton, 16), "fog", "need 32 or more"),
        (center(beton, drop_last=True), "fog", "drop_last=False"),
        (center(beton, shuffle=True), "fog", "shuffle=False"),
    ):
        with pytest.raises(InputError, match=says):
            corrupted_features(nn.Flatten(), loader, name, 1)
    train = Features(torch.zeros(2, 3), torch.arange(2))
    with pytest.raises(InputError, match="severity 6: choose from 1 to 5"):
        corruption_probe(nn.Flatten(), train, center(beton), probe=print, severities=(6,))  # type: ignore[arg-type]
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


@pytest.mark.slow  # a process each, and the package's own imports
def test_the_package_itself_corrupts_in_processes(beton: Beton) -> None:
    package = pytest.importorskip("imagecorruptions")
    assert tuple(package.get_corruption_names()) == CORRUPTIONS
    np.random.seed(np.random.SeedSequence([0, 3]).generate_state(4))
    expected = package.corrupt(stored(beton)[3], severity=2, corruption_name="gaussian_noise")
    with closing(Workers(2)) as pool:
        found = corrupted_features(nn.Flatten(), center(beton), "gaussian_noise", 2, pool=pool)
    images = np.zeros_like(stored(beton))
    images[3] = expected
    torch.testing.assert_close(found.features[3], flat(images, beton)[3], rtol=1e-5, atol=1e-5)
