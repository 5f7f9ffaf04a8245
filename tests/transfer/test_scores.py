"""Average precision against pycocotools on files, VOC's definition in loops, and by hand."""

import contextlib
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from pycocotools.mask import encode

from fastproj.transfer.scores import Detections, coco_scores, voc_scores
from fastproj.transfer.sets import Annotated, open_set
from tests.support.detection import images, write_coco


def annotated(boxes: list, labels: list, ignored: list | None = None) -> Annotated:
    corners = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return Annotated(
        Path("a.jpg"), (100, 100), corners, torch.tensor(labels, dtype=torch.int64),
        torch.tensor(ignored or [False] * len(labels), dtype=torch.bool),
        (corners[:, 2:] - corners[:, :2]).prod(1),
    )  # fmt: skip


def found(boxes: list, labels: list, scores: list) -> Detections:
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(labels, dtype=torch.int64),
        "scores": torch.tensor(scores, dtype=torch.float32),
    }


def near(truth: list[Annotated], seed: int, classes: int) -> list[Detections]:
    """Detections about the objects, moved and mislabeled, and some at random."""
    rng = np.random.default_rng(seed)
    result = []
    for image in truth:
        width, height = image.size
        rough = np.repeat(image.boxes.numpy(), 2, 0)
        rough = rough + rng.normal(0, 4, rough.shape)
        anywhere = rng.uniform(0, min(width, height) / 2, (3, 4))
        anywhere[:, 2:] += anywhere[:, :2] + 2
        labels = np.repeat(image.labels.numpy(), 2)
        wrong = rng.random(len(labels)) < 0.2
        labels = np.where(wrong, rng.integers(1, classes + 1, len(labels)), labels)
        boxes = np.concatenate([rough, anywhere])
        boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
        everything = np.concatenate([labels, rng.integers(1, classes + 1, 3)])
        result.append(
            found(boxes.tolist(), everything.tolist(), rng.random(len(boxes)).round(2).tolist())
        )
    return result


def test_by_hand() -> None:
    """Two objects; the best detection finds one, the next nothing, the third the other."""
    truth = [annotated([[0, 0, 10, 10], [50, 50, 60, 60]], [1, 1])]
    seen = [found([[0, 0, 10, 10], [20, 20, 30, 30], [50, 50, 60, 60]], [1] * 3, [0.9, 0.8, 0.7])]
    # Precision 1 up to recall 0.5 (6 of 11 levels, 51 of 101), then 2/3.
    assert voc_scores(truth, ["a"], seen)["voc07_ap50"] == pytest.approx((6 + 5 * 2 / 3) / 11)
    ours = coco_scores(truth, ["a"], seen)
    both = pytest.approx((51 + 50 * 2 / 3) / 101)
    assert (ours["box_ap50"], ours["box_ap"]) == (both, both)
    assert "mask_ap" not in ours and "box_ap_medium" not in ours  # both objects are small


def test_a_difficult_object_is_neither_found_nor_missed() -> None:
    truth = [annotated([[0, 0, 10, 10], [50, 50, 60, 60]], [1, 1], [False, True])]
    with_it = [found([[50, 50, 60, 60], [0, 0, 10, 10]], [1, 1], [0.9, 0.8])]
    assert voc_scores(truth, ["a"], with_it)["voc07_ap50"] == 1
    assert coco_scores(truth, ["a"], with_it)["box_ap50"] == pytest.approx(1)
    without = [found([[0, 0, 10, 10]], [1], [0.8])]
    assert voc_scores(truth, ["a"], without)["voc07_ap"] == 1


def test_nothing_found_is_no_precision() -> None:
    truth = [annotated([[0, 0, 10, 10]], [1])]
    none = [found([], [], [])]
    assert set(voc_scores(truth, ["a", "b"], none).values()) == {0.0}
    assert set(coco_scores(truth, ["a", "b"], none).values()) == {0.0}


@pytest.mark.parametrize("seed", range(3))
def test_cocos_equals_pycocotools_on_the_files(tmp_path: Path, seed: int) -> None:
    """Our sets and lists, against the JSON files read by pycocotools itself: boxes and outlines."""
    file = write_coco(tmp_path, "val2017", images(seed, 12), crowd=(2, 3))
    opened = open_set("coco", tmp_path, ["val2017"], False)
    seen = near(list(opened.images), seed, 3)
    theirs = []
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(file))
        category = dict(enumerate(sorted(truth.getCatIds()), start=1))
        for key, image, here in zip(sorted(truth.imgs), opened.images, seen, strict=True):
            assert image.file.name == truth.imgs[key]["file_name"]
            here["masks"] = []
            columns = [here[name].tolist() for name in ("boxes", "labels", "scores")]
            for box, label, score in zip(*columns, strict=True):
                x1, y1, x2, y2 = box
                outline = [[x1, y1, x2, y1, x2, y2, x1, y2]]
                size = image.size[1], image.size[0]
                mask = truth.annToRLE({"image_id": key, "segmentation": outline})
                assert tuple(mask["size"]) == size
                here["masks"].append(mask)
                theirs.append(
                    {"image_id": key, "category_id": category[label], "score": score,
                     "bbox": [x1, y1, x2 - x1, y2 - y1]}
                    | {"segmentation": {**mask, "counts": mask["counts"].decode()}}
                )  # fmt: skip
        boxes_alone = [{k: v for k, v in one.items() if k != "segmentation"} for one in theirs]
        wanted = {}
        masks_alone = [{k: v for k, v in one.items() if k != "bbox"} for one in theirs]
        for name, kind, results in (("box", "bbox", boxes_alone), ("mask", "segm", masks_alone)):
            path = tmp_path / f"{kind}.json"
            path.write_text(json.dumps(results))
            judge = COCOeval(truth, truth.loadRes(str(path)), kind)
            judge.evaluate()
            judge.accumulate()
            judge.summarize()
            wanted |= {f"{name}_ap": judge.stats[0], f"{name}_ap50": judge.stats[1]}
            wanted |= {f"{name}_ap75": judge.stats[2]}
            sizes = zip(("small", "medium", "large"), judge.stats[3:6].tolist(), strict=True)
            wanted |= {f"{name}_ap_{size}": value for size, value in sizes if value >= 0}
    ours = coco_scores(opened.images, opened.classes, seen)
    assert {name: ours[name] for name in wanted} == pytest.approx(wanted, abs=1e-12)
    assert 0.05 < ours["box_ap"] < 0.95


def test_a_mask_is_as_large_as_itself_and_not_as_its_box() -> None:
    """One small object found; a thin mask in a large box is a false detection of a small one."""
    truth = [annotated([[0, 0, 20, 20]], [1])]
    thin = np.zeros((100, 100), dtype=np.uint8, order="F")
    thin[np.arange(60), np.arange(60)] = 1  # 60 pixels in a box of 3,600
    square = np.zeros_like(thin, order="F")
    square[:20, :20] = 1
    here = found([[0, 0, 60, 60], [0, 0, 20, 20]], [1, 1], [0.9, 0.8])
    here["masks"] = [encode(thin), encode(square)]
    outlined = replace(truth[0], outlines=[[[0, 0, 20, 0, 20, 20, 0, 20]]])
    scores = coco_scores([outlined], ["a"], [here])
    assert scores["mask_ap_small"] == pytest.approx(0.5, abs=0.01)
    assert scores["box_ap_small"] == pytest.approx(1)  # the large box is none of the small ones


def voc_in_loops(truth: list, seen: list, label: int, threshold: float) -> float:
    """PASCAL VOC's development kit, step by step, in float64."""
    counted = sum(
        int(kind == label and not hard)
        for image in truth
        for kind, hard in zip(image.labels.tolist(), image.ignored.tolist(), strict=True)
    )
    rows = []
    for number, here in enumerate(seen):
        for box, kind, score in zip(
            here["boxes"].tolist(), here["labels"].tolist(), here["scores"].tolist(), strict=True
        ):
            if kind == label:
                rows.append((-score, len(rows), number, box))
    taken, right, wrong, recalls, precisions = set(), 0, 0, [], []
    for _, _, number, (x1, y1, x2, y2) in sorted(rows):
        best, which = 0.0, -1
        image = truth[number]
        for place, (a1, b1, a2, b2) in enumerate(image.boxes.tolist()):
            if image.labels[place] != label:
                continue
            inside = max(0.0, min(x2, a2) - max(x1, a1)) * max(0.0, min(y2, b2) - max(y1, b1))
            union = (x2 - x1) * (y2 - y1) + (a2 - a1) * (b2 - b1) - inside
            if inside / union > best:
                best, which = inside / union, place
        if best > threshold:
            if image.ignored[which]:
                continue
            right, wrong = (right, wrong + 1) if (number, which) in taken else (right + 1, wrong)
            taken.add((number, which))
        else:
            wrong += 1
        recalls.append(right / counted)
        precisions.append(right / (right + wrong))
    levels = np.linspace(0, 1, 11)
    best_after = [
        max((p for r, p in zip(recalls, precisions, strict=True) if r >= level), default=0.0)
        for level in levels
    ]
    return float(np.mean(best_after))


@pytest.mark.parametrize("seed", range(4))
def test_vocs_equals_its_definition_in_loops(tmp_path: Path, seed: int) -> None:
    write_coco(tmp_path, "val2017", images(seed, 10), crowd=(1, 4))
    truth = list(open_set("coco", tmp_path, ["val2017"], False).images)
    seen = near(truth, seed, 3)
    ours = voc_scores(truth, ["a", "b", "c"], seen)
    labels = {
        int(label)
        for image in truth
        for label, hard in zip(image.labels, image.ignored, strict=True)
        if not hard
    }
    tables = {
        t: np.mean([voc_in_loops(truth, seen, label, t / 100) for label in labels])
        for t in range(50, 100, 5)
    }
    assert ours["voc07_ap50"] == pytest.approx(tables[50], abs=1e-12)
    assert ours["voc07_ap75"] == pytest.approx(tables[75], abs=1e-12)
    assert ours["voc07_ap"] == pytest.approx(np.mean(list(tables.values())), abs=1e-12)
    assert 0.05 < ours["voc07_ap50"] < 0.95
