"""The published protocols, typed from their sources and not from the recipes."""

from pathlib import Path

import pytest

from fastproj.settings import TRANSFER, TransferSettings, load

FOLDER = Path(__file__).parents[2] / "rcfg" / "transfer"
NEEDED = ["--data.root", "x", "--detector.checkpoint", "x"]
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


def read(name: str) -> TransferSettings:
    return load(TRANSFER, ["--cfg", f"transfer/{name}", *NEEDED], "fastproj transfer", "")


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_protocol_has_the_published_settings(name: str) -> None:
    flat = {key.partition(".")[2]: value for key, value in read(name).flat().items()}
    wanted = COMMON | PUBLISHED[name]
    assert {key: flat[key] for key in wanted} == wanted
    splits = ("2007_trainval", "2012_trainval") if name == "voc_moco" else ("train2017",)
    assert read(name).data.train == splits


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_loads_and_says_what_it_is(path: Path) -> None:
    read(path.stem)
    comment = [line for line in path.read_text().splitlines() if line.startswith("# ")]
    for label in ("Command: ", "Protocol: ", "Published: ", "Measured: "):
        assert sum(line.startswith(f"# {label}") for line in comment) == 1
