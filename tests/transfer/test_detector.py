"""Detectors on an encoder's maps: whose weights they have, and what of them is trained."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from fastproj.evaluation.load import LoadedEncoder, load_encoder
from fastproj.models.encoders import build_encoder
from fastproj.models.maps import FeatureMaps
from fastproj.transfer.detector import StepPlan, Trunk, build_detector
from fastproj.transfer.run import weights_line
from fastproj.transfer.training import Trainer, train_mode

SMALL = {"proposals": 20, "rois": 8, "min_size": 64, "max_size": 96}
TARGET = {"boxes": torch.tensor([[8.0, 8, 40, 40]]), "labels": torch.tensor([2]),
          "masks": torch.ones(1, 64, 80, dtype=torch.uint8)}  # fmt: skip
BATCH = [(torch.randint(0, 256, (3, 64, 80), dtype=torch.uint8), TARGET)] * 2


def encoder(name: str = "resnet_small", stem: str = "imagenet") -> nn.Module:
    torch.manual_seed(0)
    return build_encoder(name, stem, 224 if ":" in name else None)


@pytest.mark.parametrize(
    ("name", "stem", "options"),
    [
        ("resnet_small", "imagenet", {"head": "fpn", "masks": True}),
        ("resnet_small", "imagenet", {"head": "c4", "masks": True, "sync_bn": True}),
        ("resnet_small", "imagenet", {"head": "c4", "frozen": True}),
        pytest.param("timm:convnext_atto", "", {"head": "fpn"}, marks=pytest.mark.slow),
        pytest.param(
            "timm:vit_tiny_patch16_224", "", {"head": "fpn", "frozen": True}, marks=pytest.mark.slow
        ),
    ],
)
def test_a_step_trains_all_but_a_frozen_encoder(name: str, stem: str, options: dict) -> None:
    own = encoder(name, stem)
    detector = build_detector(own, 3, **SMALL, **options)
    trainer = Trainer(detector, StepPlan(4, 1e-3), torch.device("cpu"))
    before = copy.deepcopy(detector.state_dict())
    losses = trainer.train_step(BATCH)
    assert losses["loss"].isfinite() and ("loss_mask" in losses) == ("masks" in options)
    trainer.train_step(BATCH)  # the first reaches zero-initialized layers
    after = detector.state_dict()
    moved = {key for key, tensor in after.items() if not torch.equal(tensor, before[key])}
    maps = detector.backbone.maps
    pointers = {t.data_ptr() for part in (maps, maps.rest) if part
                for t in part.state_dict().values() if t.numel()}  # fmt: skip
    inside = {key for key, tensor in after.items() if tensor.data_ptr() in pointers}
    assert inside
    if options.get("frozen"):
        assert not moved & inside
        assert moved >= {key for key in after if "bbox_pred.weight" in key or "cls_score" in key}
    else:
        for key, weight in detector.named_parameters():
            assert trainer.optimizer.state[weight]["momentum_buffer"].any(), key
    detector.eval()
    with torch.no_grad():
        (found,) = detector([torch.rand(3, 64, 80)])
    assert found["boxes"].shape[1] == 4 and ("masks" in found) == ("masks" in options)


def test_a_c4_head_is_layer4_with_a_batch_norm_and_both_heads_share_it() -> None:
    own = encoder()
    detector = build_detector(own, 3, head="c4", masks=True, **SMALL)
    layer4, norm, _ = detector.roi_heads.box_head
    assert layer4 is own.layer4 and isinstance(norm, nn.BatchNorm2d) and norm.num_features == 256
    assert list(detector.roi_heads.mask_head) == [layer4, norm]
    assert detector.rpn._pre_nms_top_n == {"training": 12000, "testing": 6000}


def test_the_trunk_gives_the_encoders_maps_cut_to_whole_strides() -> None:
    own = encoder("resnet_small", "cifar").eval()
    trunk = Trunk(FeatureMaps(own), None)
    images = torch.rand(1, 3, 64, 72)
    whole = FeatureMaps(encoder("resnet_small", "cifar")).eval()(images)
    found = trunk.eval()(images)
    assert found.shape[-2:] == (8, 9)
    assert torch.allclose(found, whole["3"][..., :8, :9], atol=1e-5)


def test_frozen_batch_norms_keep_their_statistics_also_when_calibrated() -> None:
    detector = build_detector(encoder(), 3, frozen=True, **SMALL)
    trainer = Trainer(detector, StepPlan(1, 1e-3), torch.device("cpu"))
    maps = copy.deepcopy(detector.backbone.maps.state_dict())
    trainer.calibrate([BATCH])
    assert all(torch.equal(maps[k], t) for k, t in detector.backbone.maps.state_dict().items())
    train_mode(detector)
    assert detector.backbone.neck.training and not detector.backbone.maps.body.bn1.training


def test_calibrated_statistics_are_the_mean_over_the_batches() -> None:
    detector = build_detector(encoder(), 3, **SMALL)
    trainer = Trainer(detector, StepPlan(1, 1e-3), torch.device("cpu"))
    seen: list[torch.Tensor] = []
    norm = detector.backbone.maps.body.bn1
    norm.register_forward_pre_hook(lambda _, x: seen.append(x[0].mean((0, 2, 3))))
    other = [(torch.randint(0, 99, (3, 64, 80), dtype=torch.uint8), TARGET)] * 2
    trainer.calibrate([BATCH, other])
    assert torch.allclose(norm.running_mean, torch.stack(seen).mean(0), atol=1e-5)
    assert norm.momentum == 0.1


def test_one_line_says_which_tensors_arrived(tmp_path: Path) -> None:
    """A MoCo-style file, and a ViT whose last norm no map needs."""
    file = tmp_path / "moco.pth.tar"
    state = {f"module.encoder_q.{k}": v for k, v in build_encoder("resnet18", "imagenet")
             .state_dict().items()}  # fmt: skip
    torch.save({"state_dict": state | {"module.queue": torch.zeros(3)}}, file)
    loaded = load_encoder(file)
    detector = build_detector(loaded.module, 3, **SMALL)
    line = weights_line(loaded, detector)
    new = len(detector.state_dict()) - 120  # nothing is shared
    assert "120 of 120 weights match (key 'state_dict', prefix 'module.encoder_q.')" in line
    assert "1 not used: module.queue" in line
    assert "normalized by mean 0.485, 0.456, 0.406 and std 0.229, 0.224, 0.225; " in line
    assert line.endswith(f"120 of its 120 tensors are in the model; {new} others are new")
    vit = encoder("timm:vit_tiny_patch16_224")
    named = LoadedEncoder(vit, {"name": "timm:vit"}, "FILE", lambda: vit)
    line = weights_line(named, build_detector(vit, 3, **SMALL))
    assert "148 of its 150 tensors" in line and "2 are left out: norm.weight, norm.bias" in line


def test_the_rate_rises_and_steps_down() -> None:
    plan = StepPlan(100, 0.02, [60, 80], 10)
    assert plan.rate(0) == pytest.approx(2e-5) and plan.rate(5) == pytest.approx(0.01001)
    rates = [plan.rate(step) for step in (10, 59, 60, 79, 80, 99)]
    assert rates == pytest.approx([0.02, 0.02, 0.002, 0.002, 2e-4, 2e-4])
