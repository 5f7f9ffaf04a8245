"""Average precision of detections: COCO's, by pycocotools, and PASCAL VOC's of 2007."""

import contextlib
import copy
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision.ops import box_iou

from fastproj.transfer.sets import Annotated, as_coco

THRESHOLDS = np.arange(50, 100, 5) / 100  # of the intersection over union
RECALLS = np.linspace(0, 1, 11)  # where VOC 2007 reads the precision
NAMES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")  # pycocotools' first six

Detections = dict[str, Any]
"""Of one image: ``boxes`` float (n, 4), ``scores`` (n,), ``labels`` int64 (n,), and where there are
masks, ``masks``: a list of pycocotools' run lengths."""


def coco_scores(
    images: Sequence[Annotated], classes: Sequence[str], found: Sequence[Detections]
) -> dict[str, float]:
    """COCO's average precision in [0, 1]: ``box_ap`` (mean over 0.50:0.95), ``box_ap50``, …

    ``found``: the detections in each of ``images``. Where they have masks: ``mask_ap``, … as well.
    What no object counts for (no small ones, for example) is left out. VOC's difficult objects
    count as COCO's crowds: neither found nor missed.
    """
    results = [
        {
            "image_id": number,
            "category_id": label,
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "score": score,
        }
        | ({"segmentation": mask} if mask is not None else {})
        for number, here in enumerate(found, start=1)
        for (x1, y1, x2, y2), label, score, mask in zip(
            here["boxes"].tolist(),
            here["labels"].tolist(),
            here["scores"].tolist(),
            here.get("masks") or [None] * len(here["boxes"]),
            strict=True,
        )
    ]
    kinds = {"box": "bbox"} | ({"mask": "segm"} if any("masks" in here for here in found) else {})
    if not results:
        return {f"{kind}_{name}": 0.0 for kind in kinds for name in NAMES[:3]}
    scores: dict[str, float] = {}
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
        truth = COCO()
        truth.dataset = as_coco(images, classes)
        truth.createIndex()
        for kind, theirs in kinds.items():
            # loadRes takes a detection's area from its box, if that is there.
            other = {"box": "segmentation", "mask": "bbox"}[kind]
            alone = [{name: one[name] for name in one if name != other} for one in results]
            ours = truth.loadRes(copy.deepcopy(alone))
            evaluation = COCOeval(truth, ours, theirs)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            named = zip(NAMES, evaluation.stats.tolist()[: len(NAMES)], strict=True)
            scores |= {f"{kind}_{name}": value for name, value in named if value >= 0}
    return scores


def voc_scores(
    images: Sequence[Annotated], classes: Sequence[str], found: Sequence[Detections]
) -> dict[str, float]:
    """PASCAL VOC's average precision of 2007, in [0, 1], the mean over the classes that occur.

    ``voc07_ap50`` and ``voc07_ap75``: the precision at 11 recalls, where a detection is right if
    its intersection over union with the object that it covers most is above 0.50 or 0.75 and no
    better-scored one was right about it; difficult objects do not count [Everingham et al. 2010,
    section 4.2]. ``voc07_ap``: the mean over 0.50:0.95, as detectron2 gives it and MoCo publishes.
    """
    tables = [
        _precision(images, found, label)
        for label in range(1, len(classes) + 1)
        if any(((here.labels == label) & ~here.ignored).any() for here in images)
    ]
    means = np.mean(tables, axis=0)  # (thresholds,)
    return {
        "voc07_ap": float(means.mean()),
        "voc07_ap50": float(means[0]),
        "voc07_ap75": float(means[5]),
    }


def _precision(images: Sequence[Annotated], found: Sequence[Detections], label: int) -> list[float]:
    """A class's mean precision at ``RECALLS``, for each of ``THRESHOLDS``."""
    scores, overlaps, owners, difficult = [], [], [], []
    objects, counted = 0, 0
    for image, here in zip(images, found, strict=True):
        own = image.labels == label
        chosen = here["labels"] == label
        hard = image.ignored[own]
        iou = box_iou(here["boxes"][chosen].double(), image.boxes[own].double())
        # A column of its own for images without the class: it overlaps nothing.
        best, which = torch.cat([iou, torch.full((len(iou), 1), -1.0).double()], 1).max(1)
        scores.append(here["scores"][chosen])
        overlaps.append(best)
        owners.append(which + objects)
        difficult.append(torch.cat([hard, torch.tensor([False])])[which])
        objects += len(hard) + 1
        counted += int((~hard).sum())
    order = torch.cat(scores).argsort(descending=True, stable=True).numpy()
    overlap, owner, hard_hit = (
        torch.cat(part).numpy()[order] for part in (overlaps, owners, difficult)
    )
    means = []
    for threshold in THRESHOLDS:
        hit = overlap > threshold
        first = np.zeros(len(hit), dtype=bool)  # the best-scored detection of its object
        first[np.flatnonzero(hit)[np.unique(owner[hit], return_index=True)[1]]] = True
        ignored = hit & hard_hit
        right, wrong = np.cumsum(first & ~ignored), np.cumsum(~first & ~ignored)
        recall, precision = right / counted, right / np.maximum(right + wrong, 1)
        at = [precision[recall >= level].max(initial=0.0) for level in RECALLS]
        means.append(float(np.mean(at)))
    return means
