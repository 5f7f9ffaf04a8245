"""The views of a CPU beside the chain of other devices. What each operation is: test_views.py."""

import ctypes
import os
import subprocess
from pathlib import Path

import pytest
import torch

from fastproj.augment import native as augment
from fastproj.augment.draw import Params, View
from fastproj.augment.views import Augmentation
from tests.support.images import MEAN, STD, images

EVERYTHING = View(jitter_prob=1, gray_prob=0.3, blur_prob=0.7, solarize_prob=0.3)


def drawn(n: int, view: View = EVERYTHING) -> tuple[Augmentation, Params]:
    views = Augmentation((view,), MEAN, STD)
    return views, views.sample(n, torch.Generator().manual_seed(n))


def check(views: Augmentation, crops: torch.Tensor, params: Params) -> None:
    """As in test_views: single pixels may jump where solarize and hue do."""
    difference = (views(crops, params) - views.chain(crops, params)).abs()
    assert difference.max() < 4e-4
    assert difference.mean() < 1e-6


@pytest.mark.parametrize(
    "shape", [(7, 7), (7, 40), (40, 7), (8, 8), (15, 17), (16, 31), (33, 33), (65, 70)]
)
def test_any_shape_is_the_chains(shape: tuple[int, int]) -> None:
    crops = images(40, 70)[:, :, : shape[0], : shape[1]]
    views, params = drawn(40)
    check(views, crops, params)


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (3, 1), (2, 300)])
def test_without_blur_any_shape_will_do(shape: tuple[int, int]) -> None:
    crops = torch.randint(0, 256, (12, 3, *shape), dtype=torch.uint8)
    views, params = drawn(12, View(blur_prob=0))
    check(views, crops, params)


@pytest.mark.parametrize("widest", [0.2, 1.0, 4.7])
def test_any_reach_is_the_chains(widest: float) -> None:
    views, params = drawn(24, View(blur_prob=1, sigma=(0.05, widest)))
    assert views.reach in (1, 3, 15)
    check(views, images(24, 20), params)


def test_the_mean_of_many_pixels_is_exact() -> None:
    """Contrast uses it: over 10^6 pixels a sum in single precision would drift."""
    crops = torch.full((1, 3, 1000, 1000), 77, dtype=torch.uint8)
    views, params = drawn(
        1, View(jitter_prob=1, brightness=0, saturation=0, hue=0, gray_prob=0, blur_prob=0)
    )
    factor = params.contrast.double()
    assert abs(factor - 1) > 0.1
    luma = (0.2989 + 0.587 + 0.114) * 77 / 255
    pixel = factor * 77 / 255 + (1 - factor) * luma
    expected = (pixel - torch.tensor(MEAN).double()) / torch.tensor(STD).double()
    out = views(crops, params)[0].double()
    assert (out - expected[:, None, None]).abs().max() < 1e-6


def test_threads_change_no_bit() -> None:
    views, params = drawn(50)
    crops, threads = images(50), torch.get_num_threads()
    outs = []
    try:
        for n in (1, 2, 3, 60):
            torch.set_num_threads(n)
            outs.append(views(crops, params))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(out, outs[0]) for out in outs)


def test_no_samples_are_no_work() -> None:
    views, params = drawn(0)
    assert views(torch.empty(0, 3, 16, 16, dtype=torch.uint8), params).shape == (0, 3, 16, 16)


def test_a_forked_process_has_threads_of_its_own() -> None:
    views, params = drawn(8)
    crops = images(8)
    here = views(crops, params)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(views(crops, params), here) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_any_processor_computes_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, built = Path(augment.__file__).with_name("augment.c"), tmp_path / "plain.so"
    flags = ["-O1", "-DPLAIN", "-shared", "-fPIC", "-o", built]
    subprocess.run(["gcc", *flags, source, "-lm"], check=True)
    views, params = drawn(40)
    crops = images(40)
    fast = views(crops, params)
    monkeypatch.setattr(augment, "library", lambda: ctypes.CDLL(str(built)))
    difference = (views(crops, params) - fast).abs()
    assert difference.max() < 4e-4
    assert difference.mean() < 1e-6
