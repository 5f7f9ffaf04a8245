"""Every operation of the views against torchvision's functional, sample by sample."""

import dataclasses
import itertools

import pytest
import torch
from torchvision.transforms.v2 import functional as tv

from fastproj.augment.draw import PRESETS, Params, View
from fastproj.augment.views import Augmentation
from fastproj.core.errors import InputError
from tests.support.images import MEAN, STD, images

# A CPU's way, and the chain of other devices, which runs on a CPU as well.
WAYS = {"augment": Augmentation.forward, "chain": Augmentation.chain}
OPERATIONS = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)


def neutral(n):
    return Params(
        flip=torch.zeros(n, dtype=torch.bool),
        place=torch.arange(4).repeat(n, 1),
        brightness=torch.ones(n),
        contrast=torch.ones(n),
        saturation=torch.ones(n),
        hue=torch.zeros(n),
        gray=torch.zeros(n, dtype=torch.bool),
        sigma=torch.zeros(n),
        solarize=torch.zeros(n, dtype=torch.bool),
    )


def plain(reach=6):
    """Views that do not normalize, so that pixels stay in 0 to 1."""
    return Augmentation((View(sigma=(0.1, reach / 3)),), (0.0,) * 3, (1.0,) * 3)


def by_torchvision(crops, params, mean, std, taps=13):
    """The whole chain, one sample and one operation after the other."""
    out = []
    for i, crop in enumerate(crops):
        image = crop.float() / 255
        if params.flip[i]:
            image = tv.horizontal_flip(image)
        factors = [getattr(params, name)[i].item() for name in Params._fields[2:6]]
        for operation in params.place[i].argsort().tolist():
            image = OPERATIONS[operation](image, factors[operation])
        if params.gray[i]:
            image = tv.rgb_to_grayscale(image, 3)
        if params.sigma[i] > 0:
            image = tv.gaussian_blur(image, taps, params.sigma[i].item())
        if params.solarize[i]:
            image = tv.solarize(image, 0.5)
        out.append(tv.normalize(image, mean, std))
    return torch.stack(out)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("brightness", [0.0, 0.2, 1.0, 1.8]),
        ("contrast", [0.0, 0.2, 1.0, 1.8]),
        ("saturation", [0.0, 0.2, 1.0, 1.8]),
        ("hue", [-0.5, -0.2, 0.07, 0.5]),
        ("flip", [False, True, True, False]),
        ("gray", [False, True, True, False]),
        ("solarize", [False, True, True, False]),
        ("sigma", [0.0, 0.1, 0.9, 2.0]),
    ],
)
@pytest.mark.parametrize("size", [8, 16, 33])
def test_each_operation_is_torchvisions(way, name, values, size):
    crops = images(4, size)
    params = neutral(4)._replace(**{name: torch.tensor(values)})
    expected = by_torchvision(crops, params, (0.0,) * 3, (1.0,) * 3)
    torch.testing.assert_close(way(plain(), crops, params), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_normalize_is_torchvisions(way):
    crops = images(4)
    expected = by_torchvision(crops, neutral(4), MEAN, STD)
    out = way(Augmentation((View(),), MEAN, STD), crops, neutral(4))
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_every_order_of_the_jitter_is_torchvisions(way):
    orders = list(itertools.permutations(range(4)))
    crops = images(len(orders))
    generator = torch.Generator().manual_seed(1)
    strong = 0.3 + 1.4 * torch.rand(3, len(orders), generator=generator)
    params = neutral(len(orders))._replace(
        place=torch.tensor(orders),
        brightness=strong[0],
        contrast=strong[1],
        saturation=strong[2],
        hue=torch.linspace(-0.5, 0.5, len(orders)),
    )
    expected = by_torchvision(crops, params, (0.0,) * 3, (1.0,) * 3)
    torch.testing.assert_close(way(plain(), crops, params), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("shape", [(16, 16), (24, 15)])
def test_whole_chain_is_torchvisions(way, preset, shape):
    n = 64
    views = Augmentation(PRESETS[preset], MEAN, STD)
    crops = images(2 * n, 24)[:, :, : shape[0], : shape[1]]
    params = views.sample(n, torch.Generator().manual_seed(2))
    out = way(views, crops, params)
    difference = (out - by_torchvision(crops, params, MEAN, STD)).abs()
    # Solarize jumps at 0.5 and hue where two channels tie: single pixels may differ, so the mean
    # is held tighter than the maximum.
    assert difference.max() < 4e-4
    assert difference.mean() < 1e-6


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_output_layout_and_dtype(way):
    for dtype in (torch.float32, torch.bfloat16):
        out = way(Augmentation((View(),), MEAN, STD, dtype), images(4), neutral(4))
        assert out.dtype == dtype
        assert out.shape == (4, 3, 16, 16)
        assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_planar_input_gives_the_same(way):
    crops = images(4)
    params = neutral(4)._replace(hue=torch.full((4,), 0.2))
    planar = way(plain(), crops.contiguous(), params)
    assert torch.equal(way(plain(), crops, params), planar)


def test_frequencies_are_the_probabilities():
    n = 40_000
    view = View(flip_prob=0.3, jitter_prob=0.6, gray_prob=0.25, blur_prob=0.4, solarize_prob=0.15)
    params = Augmentation((view,), MEAN, STD).sample(n, torch.Generator().manual_seed(3))
    drawn = {
        "flip": params.flip,
        "jitter": params.hue != 0,
        "gray": params.gray,
        "blur": params.sigma > 0,
        "solarize": params.solarize,
    }
    for name, happened in drawn.items():
        probability = getattr(view, f"{name}_prob")
        error = (probability * (1 - probability) / n) ** 0.5
        assert abs(happened.float().mean().item() - probability) < 4 * error, name
    # Drawn independently of one another: no pair is correlated.
    correlation = torch.corrcoef(torch.stack([d.float() for d in drawn.values()]))
    assert (correlation - torch.eye(5)).abs().max() < 0.03


def test_orders_are_uniform():
    n = 48_000
    place = Augmentation((View(),), MEAN, STD).sample(n, torch.Generator().manual_seed(4)).place
    assert torch.equal(place.sort(1).values, torch.arange(4).expand(n, 4))
    counts = torch.bincount((place * torch.tensor([64, 16, 4, 1])).sum(1))
    counts = counts[counts > 0]
    assert len(counts) == 24
    assert (counts - n / 24).abs().max() < 5 * (n / 24) ** 0.5


def test_factors_fill_their_ranges():
    view = View(
        jitter_prob=1.0, brightness=0.4, contrast=1.3, saturation=0.2, hue=0.1, blur_prob=1.0
    )
    params = Augmentation((view,), MEAN, STD).sample(20_000, torch.Generator().manual_seed(5))
    for name, low, high in (
        ("brightness", 0.6, 1.4),
        ("contrast", 0.0, 2.3),  # torchvision's: 1 - 1.3 is cut at 0
        ("saturation", 0.8, 1.2),
        ("hue", -0.1, 0.1),
        ("sigma", 0.1, 2.0),
    ):
        values = getattr(params, name)
        span = high - low
        assert low <= values.min() < low + 0.01 * span, name
        assert high - 0.01 * span < values.max() <= high, name
        assert abs(values.mean().item() - (low + high) / 2) < 0.01 * span, name


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_nothing_drawn_changes_nothing(way):
    off = View(flip_prob=0, jitter_prob=0, gray_prob=0, blur_prob=0, solarize_prob=0)
    views = Augmentation((off, off), (0.0,) * 3, (1.0,) * 3)
    crops = images(8)
    out = way(views, crops, views.sample(4, torch.Generator().manual_seed(6)))
    assert torch.equal((out * 255).round().to(torch.uint8), crops)
    torch.testing.assert_close(out, crops.float() / 255, atol=1e-6, rtol=0)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_view_major_and_asymmetric(way):
    first = View(flip_prob=1, jitter_prob=0, gray_prob=0, blur_prob=0, solarize_prob=0)
    second = View(flip_prob=0, jitter_prob=0, gray_prob=1, blur_prob=0, solarize_prob=1)
    views = Augmentation((first, second), (0.0,) * 3, (1.0,) * 3)
    params = views.sample(5, torch.Generator().manual_seed(7))
    assert params.flip.tolist() == [True] * 5 + [False] * 5
    assert params.gray.tolist() == params.solarize.tolist() == [False] * 5 + [True] * 5
    crops = images(10)
    out = way(views, crops, params)
    torch.testing.assert_close(out[:5], crops[:5].float().flip(3) / 255, atol=1e-6, rtol=0)
    assert torch.equal(out[5:, 0], out[5:, 2])


@pytest.mark.parametrize("preset", ["barlow", "byol"])
def test_second_view_alone_is_solarized(preset):
    params = Augmentation(PRESETS[preset], MEAN, STD).sample(500, torch.Generator().manual_seed(8))
    assert not params.solarize[:500].any()
    assert params.solarize[500:].any()
    assert (params.sigma[:500] > 0).all()


def test_same_seed_same_parameters():
    views = Augmentation(PRESETS["simclr"], MEAN, STD)
    one, same, other = (views.sample(9, torch.Generator().manual_seed(seed)) for seed in (9, 9, 10))
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not torch.equal(one.place, other.place)
    half = 9
    assert not torch.equal(one.brightness[:half], one.brightness[half:])  # views differ


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_sample_does_not_see_its_neighbors(way):
    views = Augmentation(PRESETS["byol"], MEAN, STD)
    crops = images(12)
    params = views.sample(6, torch.Generator().manual_seed(11))
    together = way(views, crops, params)
    for i in (0, 7):
        alone = way(views, crops[i : i + 1], Params(*(p[i : i + 1] for p in params)))
        torch.testing.assert_close(alone[0], together[i], atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_equals_eager_without_recompiling(dtype):
    torch._dynamo.reset()
    views = Augmentation(PRESETS["byol"], MEAN, STD, dtype)
    compiled = Augmentation(PRESETS["byol"], MEAN, STD, dtype)
    compiled.compile()
    generator = torch.Generator().manual_seed(12)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in range(3):
            crops = images(32, seed=batch)
            params = views.sample(16, generator)
            eager, out = views.chain(crops, params), compiled.chain(crops, params)
            assert out.is_contiguous(memory_format=torch.channels_last)
            tolerance = 2e-4 if dtype == torch.float32 else 0.02
            torch.testing.assert_close(out, eager, atol=tolerance, rtol=0)
            assert (out - eager).float().abs().mean() < tolerance / 10


def test_crops_too_small_for_the_blur_are_named():
    with pytest.raises(InputError, match="6 x 9 .* lower sigma"):
        plain()(images(1, 9)[:, :, :6], neutral(1))
    no_blur = Augmentation((View(blur_prob=0),), MEAN, STD)
    assert no_blur(images(1, 9)[:, :, :6], neutral(1)).shape == (1, 3, 6, 9)


@pytest.mark.parametrize(
    "wrong",
    [
        {"flip_prob": 1.2},
        {"jitter_prob": -0.1},
        {"hue": 0.6},
        {"contrast": -1.0},
        {"sigma": (0.0, 2.0)},
        {"sigma": (2.0, 1.0)},
        {"gray_prob": float("nan")},
    ],
)
def test_values_out_of_range_are_named(wrong):
    with pytest.raises(InputError, match=f"views: {next(iter(wrong))} is"):
        dataclasses.replace(View(), **wrong)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_gpu_never_waits_and_equals_the_cpu(compiled):
    views = Augmentation(PRESETS["byol"], MEAN, STD).cuda()
    if compiled:
        views.compile()
    crops = images(64).cuda()
    generator = torch.Generator("cuda").manual_seed(13)
    views(crops, views.sample(32, generator))  # compile and warm up
    torch.cuda.set_sync_debug_mode("error")
    try:
        params = views.sample(32, generator)
        out = views(crops, params)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    on_cpu = Augmentation(PRESETS["byol"], MEAN, STD)(
        crops.cpu(), Params(*(p.cpu() for p in params))
    )
    assert (out.cpu() - on_cpu).abs().mean() < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_views_in_half_precision_are_what_autocast_makes_of_float32(dtype: torch.dtype) -> None:
    """So a step on a GPU, which takes them, computes the bits that it did with float32 views."""
    crops = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    full, half = (
        Augmentation(PRESETS["simclr"], (0.5,) * 3, (0.25,) * 3, kind)
        for kind in (torch.float32, dtype)
    )
    params = full.sample(2, torch.Generator().manual_seed(0))
    full.reach = half.reach = 3
    there, here = full.chain(crops, params), half.chain(crops, params)
    assert here.dtype == dtype and torch.equal(here, there.to(dtype))
    layer = torch.nn.Conv2d(3, 4, 3)
    with torch.autocast("cpu", dtype):
        assert torch.equal(layer(there), layer(here))


def test_a_deviation_of_zero_is_refused() -> None:
    with pytest.raises(InputError, match="a channel that all have one value cannot be normalized"):
        Augmentation([View()], (0.5, 0.5, 0.5), (0.2, 0.0, 0.2))
