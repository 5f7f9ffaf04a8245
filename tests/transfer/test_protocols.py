"""The published protocols, typed from their sources and not from the recipes."""

from pathlib import Path

import pytest

from fastproj.settings import SEGMENT, TRANSFER, SegmentSettings, TransferSettings, load
from fastproj.transfer.segmenter import _windows

FOLDER = Path(__file__).parents[2] / "rcfg" / "transfer"
NEEDED = ["--data.root", "x", "--encoder.checkpoint", "x"]
VOC = {"train_sizes": tuple(range(480, 801, 32)), "steps": 24_000, "warmup_steps": 100,
       "milestones": (18_000, 22_000), "head": "c4", "masks": False}  # fmt: skip
COCO = {"train_sizes": tuple(range(640, 801, 32)), "warmup_steps": 1000, "masks": True}
ONE = {"steps": 90_000, "milestones": (60_000, 80_000)}
TWO = {"steps": 180_000, "milestones": (120_000, 160_000)}
PUBLISHED = {
    "voc_moco": VOC,
    "coco_c4_1x": COCO | ONE | {"head": "c4"},
    "coco_c4_2x": COCO | TWO | {"head": "c4"},
    "coco_fpn_1x": COCO | ONE | {"head": "fpn"},
    "coco_fpn_2x": COCO | TWO | {"head": "fpn"},
}  # [facebookresearch/moco detection/configs; detectron2 configs/Base-RCNN-*.yaml and defaults.py]
COMMON = {"lr": 0.02, "batch_size": 16, "momentum": 0.9, "weight_decay": 1e-4, "max_size": 1333,
          "val_size": 800, "flip_prob": 0.5, "sync_bn": True, "frozen": False, "precise_bn": 200,
          "proposals": 1000, "rois": 512}  # fmt: skip


def read(name: str) -> TransferSettings | SegmentSettings:
    command = "segment" if "linear" in name else "transfer"
    assert f"fastproj {command} --cfg transfer/{name}" in (FOLDER / f"{name}.yaml").read_text()
    words = ["--cfg", f"transfer/{name}", *NEEDED]
    if command == "segment":
        return load(SEGMENT, words, "fastproj segment", "")
    return load(TRANSFER, words, "fastproj transfer", "")


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_protocol_has_the_published_settings(name: str) -> None:
    flat = {key.partition(".")[2]: value for key, value in read(name).flat().items()}
    wanted = COMMON | PUBLISHED[name]
    assert {key: flat[key] for key in wanted} == wanted
    splits = ("2007_trainval", "2012_trainval") if name == "voc_moco" else ("train2017",)
    assert read(name).data.train == splits


@pytest.mark.parametrize("name", ["ade20k_linear", "voc_linear"])
def test_linear_segmentation_has_dinov2s_settings(name: str) -> None:
    """[arXiv 2304.07193; the code's BNHead, its configurations, mmsegmentation's windows]"""
    settings = read(name)
    assert isinstance(settings, SegmentSettings)
    images, optim = settings.images, settings.optim
    assert (images.size, images.scale_min, images.scale_max, images.flip_prob) == (512, 0.5, 2, 0.5)
    assert (optim.lr, optim.weight_decay, optim.batch_size) == (1e-3, 1e-4, 16)
    assert (optim.steps, optim.warmup_steps) == (40_000, 1500)
    assert [(w.start, w.stop) for w in _windows(700, 512)] == [(0, 512), (188, 700)]
    assert [w.start for w in _windows(1300, 512)] == [0, 341, 682, 788]


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_loads_and_says_what_it_is(path: Path) -> None:
    read(path.stem)
    comment = [line for line in path.read_text().splitlines() if line.startswith("# ")]
    for label in ("Command: ", "Protocol: ", "Published: ", "Measured: "):
        assert sum(line.startswith(f"# {label}") for line in comment) == 1
