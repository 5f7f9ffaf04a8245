"""Probes on new crops in every epoch, against plain torch loops on the same crops."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import MultiStepLR

from fastproj.core.errors import InputError
from fastproj.data.beton import Beton
from fastproj.evaluation import published
from fastproj.evaluation.crops import Views, crops_probe
from fastproj.evaluation.features import Features, features
from fastproj.evaluation.finetune import finetune, labeled_fraction
from fastproj.evaluation.heads import Heads, multistep
from fastproj.evaluation.probes.common import ProbeResult
from fastproj.loaders import Center, Crop, Loader, open_loader
from fastproj.prepare.encode import Store
from fastproj.prepare.sources import Source
from fastproj.training.optim import Lars, warmup_cosine
from tests.support import betons

COUNT, SIDE, CLASSES, BATCH = 40, 16, 4, 8
MEAN, STD = (0.3, 0.4, 0.5), (0.2, 0.25, 0.3)


@pytest.fixture(scope="module")
def beton(tmp_path_factory: pytest.TempPathFactory) -> Beton:
    """Images whose class shows in their color, so that a probe on crops learns it."""
    rng, labels = np.random.default_rng(0), np.arange(COUNT) % CLASSES
    images = rng.integers(0, 150, (COUNT, SIDE, SIDE, 3), dtype=np.uint8)
    colors = np.array([[90, 0, 0], [0, 90, 0], [0, 0, 90], [0, 0, 0]], np.uint8)
    images += colors[labels][:, None, None]
    names = tuple(f"c{i}" for i in range(CLASSES))
    source = Source("train", names, images, labels, [f"image {i}" for i in range(COUNT)])
    return betons.write(source, Path(tmp_path_factory.mktemp("beton")), Store("raw"))


@pytest.fixture
def stacks(monkeypatch: pytest.MonkeyPatch) -> list[Heads]:
    """The heads of every probe that runs, in order."""
    made: list[Heads] = []

    class Recorded(Heads):
        def __init__(self, *args: Any, **given: Any) -> None:
            super().__init__(*args, **given)
            made.append(self)

    monkeypatch.setattr("fastproj.evaluation.crops.Heads", Recorded)
    return made


class Encoder(nn.Sequential):
    """A few layers whose batch-norm statistics are not the initial ones."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(
            nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
        )  # fmt: skip
        self(torch.randn(8, 3, SIDE, SIDE) * 2 + 1)


def crops(beton: Beton, batch: int = BATCH, **how: Any) -> Loader:
    return open_loader(beton, [Crop(SIDE)], batch, workers=1, **how)


def center(beton: Beton) -> Loader:
    return open_loader(beton, [Center(SIDE)], 16, workers=1, shuffle=False, drop_last=False)


def val_features(beton: Beton, encoder: nn.Module) -> Features:
    return features(encoder, center(beton), mean=MEAN, std=STD)


def seen(encoder: nn.Module, call: Any) -> tuple[ProbeResult, list[Tensor]]:
    """What ``call(encoder)`` returns, and every batch of images that went into the encoder."""
    images: list[Tensor] = []
    hook = encoder.register_forward_pre_hook(lambda _, given: images.append(given[0].clone()))
    try:
        return call(encoder), images
    finally:
        hook.remove()


def first_head(features: int, seed: int = 0) -> nn.Linear:
    """A linear layer with the heads' first weights."""
    start = Heads(1, CLASSES, features, momentum=0, weight_decay=0, seed=seed).weights[0]
    head = nn.Linear(features, CLASSES)
    head.load_state_dict({"weight": start[:, :-1], "bias": start[:, -1]})
    return head


def plain_loop(
    inputs: list[Tensor], labels: list[Tensor], optimizer: str, rates: list[float]
) -> nn.Linear:
    """One head, one learning rate per step, by torch's own modules and autograd."""
    head = first_head(inputs[0].shape[1])
    if optimizer == "sgd":
        made: torch.optim.Optimizer = torch.optim.SGD(head.parameters(), lr=1.0, momentum=0.9)
    else:
        groups = [
            {"params": [head.weight], "weight_decay": 1e-4, "adapt": True},
            {"params": [head.bias], "weight_decay": 0.0, "adapt": False},
        ]
        made = Lars(groups, 1.0, momentum=0.9, trust_coefficient=0.02)
    for x, y, rate in zip(inputs, labels, rates, strict=True):
        for group in made.param_groups:
            group["lr"] = rate
        made.zero_grad()
        F.cross_entropy(head(x), y).backward()
        made.step()
    return head


def plain_features(encoder: nn.Module, images: list[Tensor]) -> list[Tensor]:
    encoder.eval()
    with torch.no_grad():
        return [encoder(x) for x in images]


@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
def test_a_probe_equals_a_plain_loop_on_the_same_crops(
    beton: Beton, optimizer: str, stacks: list[Heads]
) -> None:
    encoder, epochs, rates = Encoder(), 4, (8.0, 0.5, 40.0)  # for a batch of 256; here 8
    val = val_features(beton, encoder)
    how: dict[str, Any] = {"epochs": epochs, "mean": MEAN, "std": STD, "optimizer": optimizer}
    how |= {"milestones": (2, 3)} if optimizer == "sgd" else {
        "milestones": None, "warmup_epochs": 1.0, "weight_decay": 1e-4
    }  # fmt: skip
    result, images = seen(
        encoder, lambda e: crops_probe(e, crops(beton), val, learning_rates=rates, **how)
    )
    steps = COUNT // BATCH
    assert len(images) == epochs * steps
    loader = crops(beton)
    labels = [batch.labels for _ in range(epochs) for batch in loader]
    inputs = plain_features(encoder, images)
    for number, rate in enumerate(rates):
        peak = rate * BATCH / 256
        if optimizer == "sgd":
            made = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=peak)
            schedule, per_step = MultiStepLR(made, [2, 3], gamma=0.1), []
            for _ in range(epochs):
                per_step += schedule.get_last_lr() * steps
                made.step()
                schedule.step()
        else:
            total = epochs * steps
            per_step = [warmup_cosine(s, total, steps, peak, 3e-5) for s in range(total)]
        head = plain_loop(inputs, labels, optimizer, per_step)
        expected = torch.cat([head.weight, head.bias.unsqueeze(1)], 1)
        torch.testing.assert_close(stacks[0].weights[number], expected, rtol=1e-4, atol=1e-5)
        hits = (head(val.features).argmax(1) == val.labels).float().mean().item()
        name = "top1" if number == 0 else f"top1_lr={rate:g}"
        assert result.metrics[name] == pytest.approx(hits, abs=1e-6)
        if number == 0:
            assert torch.equal(result.predictions, head(val.features).argmax(1))
    assert result.metrics["top1"] > 1.5 / CLASSES  # it has learned something to compare
    alone = crops_probe(encoder, crops(beton), val, learning_rates=rates[:1], **how)
    assert torch.equal(alone.predictions, result.predictions)
    torch.testing.assert_close(stacks[1].weights[0], stacks[0].weights[0], rtol=1e-4, atol=1e-5)
    assert alone.metrics == {n: result.metrics[n] for n in ("top1", "top5")}
    json.dumps(result.protocol)


def test_the_encoders_precision_moves_the_heads_by_rounding(
    beton: Beton, stacks: list[Heads]
) -> None:
    encoder = Encoder()
    val = val_features(beton, encoder)
    for precision in (torch.float32, torch.bfloat16):
        result = crops_probe(
            encoder, crops(beton), val, learning_rates=[8.0], epochs=3, mean=MEAN, std=STD,
            precision=precision,
        )  # fmt: skip
    assert result.protocol["encoder"] == "frozen, eval mode, bfloat16 in training"
    whole, rounded = (heads.weights for heads in stacks)
    assert 1e-5 < (rounded - whole).norm() / whole.norm() < 0.02  # bfloat16 rounds by up to 0.4 %


@pytest.mark.parametrize("trust", [None, 0.02])
def test_stacked_heads_equal_single_layers_in_float64(trust: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(8, 5, generator=generator, dtype=torch.float64) for _ in range(12)]
    labels = [torch.randint(0, CLASSES, (8,), generator=generator) for _ in range(12)]
    peaks, decay = [0.03, 0.4, 2.0], 1e-2
    heads = Heads(3, CLASSES, 5, momentum=0.9, weight_decay=decay, trust_coefficient=trust, seed=7,
                  dtype=torch.float64)  # fmt: skip
    start = heads.weights[0].clone()
    bound = 5**-0.5
    assert torch.equal(heads.weights[2], start) and 0.5 * bound < start.abs().max() <= bound
    for step, (x, y) in enumerate(zip(inputs, labels, strict=True)):
        heads.step(x, y, torch.tensor(peaks, dtype=torch.float64) / (1 + step))
    for peak, found in zip(peaks, heads.weights, strict=True):
        layer = nn.Linear(5, CLASSES, dtype=torch.float64)
        layer.load_state_dict({"weight": start[:, :-1], "bias": start[:, -1]})
        groups = [{"params": [layer.weight], "weight_decay": decay},
                  {"params": [layer.bias], "weight_decay": 0.0}]  # fmt: skip
        if trust is None:
            optimizer: torch.optim.Optimizer = torch.optim.SGD(groups, lr=peak, momentum=0.9)
        else:
            groups[1]["adapt"] = False
            optimizer = Lars(groups, peak, momentum=0.9, trust_coefficient=trust)
        for step, (x, y) in enumerate(zip(inputs, labels, strict=True)):
            for group in optimizer.param_groups:
                group["lr"] = peak / (1 + step)
            optimizer.zero_grad()
            F.cross_entropy(layer(x), y).backward()
            optimizer.step()
        plain = torch.cat([layer.weight, layer.bias.unsqueeze(1)], 1)
        torch.testing.assert_close(found, plain, rtol=1e-11, atol=1e-12)


def test_the_steps_of_the_rate_are_torchs() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    schedule = MultiStepLR(optimizer, [60, 80], gamma=0.1)
    for epoch in range(100):
        assert multistep([0.3], epoch, (60, 80)) == pytest.approx(schedule.get_last_lr())
        optimizer.step()
        schedule.step()


def test_views_are_normalized_crops_and_about_half_of_them_flipped(beton: Beton) -> None:
    views, flips = Views(crops(beton), MEAN, STD, seed=3), []
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    loader = crops(beton)
    for epoch in range(3):
        found = list(views.epoch(epoch))
        again = list(Views(crops(beton), MEAN, STD, seed=3).epoch(epoch))
        for (images, labels), (same, _), batch in zip(found, again, loader, strict=True):
            assert torch.equal(images, same) and torch.equal(labels, batch.labels)
            plain = (batch.crops[0] / 255 - mean) / std
            for image, crop in zip(images, plain, strict=True):
                straight, mirrored = ((image - x).abs().max() for x in (crop, crop.flip(2)))
                assert min(straight, mirrored) < 1e-5
                flips.append(bool(mirrored < straight))
    assert 0.3 < np.mean(flips) < 0.7 and len(flips) == 3 * COUNT


def test_the_encoder_is_left_as_it_was(beton: Beton) -> None:
    encoder = Encoder().train()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    val = val_features(beton, encoder)
    crops_probe(encoder, crops(beton), val, epochs=1)
    finetune(encoder, crops(beton), center(beton), epochs=1, mean=MEAN, std=STD)
    assert all(torch.equal(value, before[n]) for n, value in encoder.state_dict().items())
    assert all(part.training for part in encoder.modules())
    assert all(p.grad is None for p in encoder.parameters())


PUBLISHED = {
    "published_in100_simclr": ("sgd", 512, 1.0, 0.0, 100, [60, 80]),
    "published_in100_barlow": ("sgd", 256, 0.1, 0.0, 100, [60, 80]),
    "published_cifar_simclr": ("lars", 256, 0.4, 1e-4, 200, []),
    "published_cifar_barlow": ("lars", 256, 0.3, 1e-4, 50, []),
    "solo": ("sgd", 256, 1.0, 0.0, 100, [60, 80]),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_protocols_are_as_published(
    name: str, beton: Beton, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer, batch, rate, decay, epochs, milestones = PUBLISHED[name]
    assert published.BATCH_SIZES[name] == batch
    encoder = Encoder()
    val = val_features(beton, encoder)
    probe = getattr(published, name)
    full: dict[str, Any] = {}

    def record(*args: Any, **given: Any) -> ProbeResult:
        full.update(given)
        return crops_probe(*args, **{**given, "epochs": 1})

    monkeypatch.setattr(published, "crops_probe", record)
    protocol = probe(encoder, crops(beton), val).protocol
    assert full["epochs"] == epochs and protocol["milestones"] == milestones
    assert (protocol["optimizer"], protocol["momentum"], protocol["weight_decay"]) == (
        optimizer, 0.9, decay
    )  # fmt: skip
    assert protocol["learning_rates"][0] == rate and len(protocol["learning_rates"]) >= 3
    assert protocol["learning_rate_of_the_first"] == pytest.approx(rate * BATCH / 256)
    assert protocol.get("trust_coefficient") == (0.02 if optimizer == "lars" else None)
    assert protocol["warmup_epochs"] == (10 if optimizer == "lars" else 0)
    assert protocol["crop"]["scale"] == [0.08, 1.0] and protocol["crop"]["flip_prob"] == 0.5


def test_solos_rate_is_the_methods(beton: Beton) -> None:
    encoder = Encoder()
    val = val_features(beton, encoder)
    result = published.solo(encoder, crops(beton), val, method="byol", epochs=1)
    assert result.protocol["learning_rates"] == [0.3, 0.1, 0.15, 1.0, 3.0, 30.0]
    assert result.protocol["method"] == "byol" and "top1_lr=30" in result.metrics
    with pytest.raises(InputError, match="no probe for 'nnbyol': choose one of barlow"):
        published.solo(encoder, crops(beton), val, method="nnbyol")


def test_a_rate_that_diverges_leaves_the_others_alone(beton: Beton) -> None:
    encoder = Encoder()
    val = val_features(beton, encoder)
    how: dict[str, Any] = {"epochs": 1, "mean": MEAN, "std": STD}
    good = crops_probe(encoder, crops(beton), val, learning_rates=[1.0], **how)
    both = crops_probe(encoder, crops(beton), val, learning_rates=[1.0, 1e40], **how)
    assert both.protocol["chosen"] == {"not_finite": [1e40]}
    assert good.protocol["chosen"] == {"not_finite": []}
    assert both.metrics["top1"] == good.metrics["top1"] and both.metrics["top1_lr=1e+40"] == 0


def test_what_cannot_be_probed_is_named(beton: Beton) -> None:
    encoder = Encoder()
    val = val_features(beton, encoder)
    two = open_loader(beton, [Crop(SIDE, 2)], BATCH, workers=1)
    for loader, given, how, says in (
        (two, val, {}, "one crop per image"),
        (crops(beton), val, {"optimizer": "adam"}, "no optimizer 'adam'"),
        (crops(beton), val, {"num_classes": 3}, "outside 0..2"),
        (crops(beton), Features(val.features[:, :5], val.labels), {}, "use one encoder"),
    ):
        with pytest.raises(InputError, match=says):
            crops_probe(encoder, loader, given, epochs=1, **how)
    with pytest.raises(ValueError, match="both mean and std"):
        crops_probe(encoder, crops(beton), val, mean=MEAN)


@pytest.mark.parametrize("frozen_too", [False, True])
def test_finetuning_equals_a_plain_loop_on_the_same_crops(beton: Beton, frozen_too: bool) -> None:
    encoder, epochs = Encoder(), 2
    rates = (0.0 if frozen_too else 1.0, 4.0)  # for a batch of 256; here 8
    result = finetune(
        encoder, crops(beton), center(beton), encoder_rate=rates[0], head_rate=rates[1],
        epochs=epochs, weight_decay=1e-3, mean=MEAN, std=STD, seed=5,
    )  # fmt: skip
    views = Views(crops(beton), MEAN, STD, seed=5)
    plain = Encoder()
    torch.manual_seed(5)
    head = nn.Linear(24, CLASSES)
    model = nn.Sequential(plain, head).train()
    optimizer = torch.optim.SGD(
        [{"params": plain.parameters(), "lr": rates[0] * BATCH / 256},
         {"params": head.parameters(), "lr": rates[1] * BATCH / 256}],
        momentum=0.9, weight_decay=1e-3,
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * COUNT // BATCH)
    for epoch in range(epochs):
        for images, labels in views.epoch(epoch):
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            schedule.step()
    model.eval()
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    images = torch.cat([batch.crops[0] for batch in center(beton)])
    with torch.no_grad():
        logits = model((images / 255 - mean) / std)
    assert torch.equal(result.predictions, logits.argmax(1))
    labels = torch.from_numpy(beton.label)
    assert result.metrics["top1"] == pytest.approx(
        (logits.argmax(1) == labels).double().mean().item()
    )
    assert logits.argmax(1).unique().numel() > 1
    json.dumps(result.protocol)


def test_a_fraction_of_the_labels_is_stratified_and_seeded(beton: Beton) -> None:
    some = labeled_fraction(beton, 0.3, seed=1)
    assert np.bincount(some.label).tolist() == [3] * CLASSES
    assert some.index.tolist() == list(range(12)) and len(some.manifest.source_names()) == 12
    whole = beton.manifest.source_names()
    for position, name in enumerate(some.manifest.source_names()):
        original = whole.index(name)
        assert np.array_equal(some.stored(position), beton.stored(original))
        assert some.label[position] == beton.label[original]
        assert np.array_equal(
            some.manifest.sample_hashes()[position], beton.manifest.sample_hashes()[original]
        )
    assert np.array_equal(labeled_fraction(beton, 0.3, 1).pointer, some.pointer)
    assert not np.array_equal(labeled_fraction(beton, 0.3, 2).pointer, some.pointer)
    assert labeled_fraction(beton, 1.0) is beton
    assert len(labeled_fraction(beton, 0.001)) == CLASSES
    with pytest.raises(InputError, match="above 0 and at most 1"):
        labeled_fraction(beton, 0)
    result = finetune(Encoder(), crops(some, 6), center(beton), epochs=1)
    assert result.protocol["images"] == 12 and len(result.predictions) == COUNT
