"""A linear classifier of pixels: what of it is trained, what it computes, how it is scored."""

import copy

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, jaccard_score, recall_score
from torch import nn
from torch.nn import functional

from fastproj.models.encoders import build_encoder
from fastproj.models.maps import FeatureMaps
from fastproj.transfer.pixels import VOID
from fastproj.transfer.segmenter import LinearPlan, Segmenter, confusion, mask_scores
from fastproj.transfer.training import Trainer, train_mode


def encoder(name: str = "resnet_small", stem: str = "imagenet", seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build_encoder(name, stem, 224 if ":" in name else None)


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("resnet_small", "imagenet"),
        ("resnet_small", "cifar"),
        pytest.param("timm:vit_tiny_patch16_224", "", marks=pytest.mark.slow),
        pytest.param("timm:convnext_atto", "", marks=pytest.mark.slow),
    ],
)
def test_a_step_trains_the_head_and_nothing_else(name: str, stem: str) -> None:
    segmenter = Segmenter(encoder(name, stem), 4, 72)  # 72 is no multiple of 16
    trainer = Trainer(segmenter, LinearPlan(4, 1e-2), torch.device("cpu"))
    before = copy.deepcopy(segmenter.state_dict())
    mask = torch.randint(0, 4, (72, 72), dtype=torch.uint8)
    batch = [(torch.randint(0, 256, (3, 72, 72), dtype=torch.uint8), {"mask": mask})] * 2
    assert trainer.train_step(batch)["loss"] == pytest.approx(np.log(4), abs=0.2)
    moved = {k for k, t in segmenter.state_dict().items() if not torch.equal(t, before[k])}
    assert moved == {k for k in before if k.startswith("head")}
    segmenter.eval()
    (found,) = segmenter([torch.rand(3, 60, 100)])
    assert found.shape == (60, 100) and found.dtype == torch.int64


def test_the_loss_counts_void_pixels_as_zero_and_gives_them_no_gradient() -> None:
    segmenter = Segmenter(encoder(), 3, 64)
    train_mode(segmenter)
    images = [torch.rand(3, 64, 64) for _ in range(2)]
    masks = torch.randint(0, 3, (2, 64, 64), dtype=torch.uint8)
    masks[:, 32:] = VOID
    loss = segmenter(images, [{"mask": mask} for mask in masks])["loss_pixels"]
    logits = segmenter.logits(torch.stack(images))[:, :, :32].double()
    picked = logits.log_softmax(1).gather(1, masks[:, None, :32].long())
    assert loss.item() == pytest.approx(-picked.sum().item() / (2 * 64 * 64), rel=1e-5)
    void = segmenter(images, [{"mask": torch.full_like(mask, VOID)} for mask in masks])
    assert void["loss_pixels"] == 0


def test_logits_are_those_of_the_last_map_scaled_up() -> None:
    """With the very maps of the encoder, its mean and standard deviation, an explicit head."""
    segmenter = Segmenter(encoder(), 5, 64, [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]).eval()
    norm, convolution = segmenter.head
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    images = torch.rand(2, 3, 64, 96)
    normal = (images - torch.tensor([0.4, 0.5, 0.6])[:, None, None]) / torch.tensor(
        [0.2, 0.3, 0.4]
    )[:, None, None]
    last = FeatureMaps(encoder()).eval()(normal)["3"]
    centered = (last - norm.running_mean[:, None, None]) / (
        norm.running_var[:, None, None] + norm.eps
    ).sqrt()
    cells = torch.einsum("bchw,kc->bkhw", centered, convolution.weight[:, :, 0, 0])
    wanted = functional.interpolate(cells, (64, 96), mode="bilinear", align_corners=False)
    assert torch.allclose(segmenter.logits(images), wanted, atol=1e-5)


def test_windows_cover_an_image_and_their_logits_are_averaged() -> None:
    """Against a loop over pixels that knows only sides and steps."""
    segmenter = Segmenter(encoder(), 4, 48).eval()
    nn.init.normal_(segmenter.head[1].weight, std=5.0)
    image = torch.rand(3, 48, 113)
    starts = [0, 32, 64, 65]  # every 32 pixels, and one that ends with the image
    parts = [segmenter.logits(image[None, :, :, s : s + 48])[0] for s in starts]
    wanted = torch.stack(
        [
            torch.stack(
                [part[:, :, x - s] for s, part in zip(starts, parts, strict=True)
                 if s <= x < s + 48]
            ).mean(0).argmax(0)
            for x in range(113)
        ],
        1,
    )  # fmt: skip
    (found,) = segmenter([image])
    assert len(found.unique()) > 1 and (found == wanted).float().mean() > 0.999


def test_an_image_of_another_size_is_scored_at_its_own() -> None:
    segmenter = Segmenter(encoder(), 4, 64).eval()
    for sides in ((32, 90), (200, 50), (64, 64)):
        (found,) = segmenter([torch.rand(3, *sides)])
        assert found.shape == sides


@pytest.mark.parametrize("classes", [2, 7])
def test_scores_are_scikit_learns(classes: int) -> None:
    """Of a class that only one side has, too; void pixels are in neither."""
    rng = np.random.default_rng(classes)
    truth = rng.integers(0, classes, 5000)
    found = np.where(rng.random(5000) < 0.6, truth, rng.integers(0, classes + 1, 5000))
    void = rng.random(5000) < 0.2
    marked = torch.from_numpy(np.where(void, VOID, truth).astype(np.uint8))
    whole = confusion(marked, torch.from_numpy(found), classes + 3)
    parts = [confusion(marked[s], torch.from_numpy(found)[s], classes + 3)
             for s in (slice(0, 9), slice(9, None))]  # fmt: skip
    assert torch.equal(whole, parts[0] + parts[1]) and whole.sum() == (~void).sum()
    scores, kept = mask_scores(whole), (truth[~void], found[~void])
    present = range(classes)
    assert scores["miou"] == pytest.approx(jaccard_score(*kept, average="macro"))
    recall = recall_score(*kept, average="macro", labels=present, zero_division=0)
    assert scores["mean_accuracy"] == pytest.approx(recall)
    assert scores["pixel_accuracy"] == pytest.approx(accuracy_score(*kept))


def test_the_rate_rises_and_falls_linearly() -> None:
    plan = LinearPlan(100, 2.0, 10)
    assert plan.rate(0) == 0 and plan.rate(5) == pytest.approx(0.95)
    assert plan.rate(10) == pytest.approx(1.8) and plan.rate(55) == pytest.approx(0.9)
    assert plan.rate(99) == pytest.approx(0.02)
    assert LinearPlan(4, 1.0).rate(0) == 1.0
    head = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1))
    decays = {group["weight_decay"]: group["params"]
              for group in LinearPlan(4, 1.0, 0, 0.5).optimizer(head).param_groups}  # fmt: skip
    assert [p.ndim for p in decays[0.5]] == [4] and len(decays[0.0]) == 3
