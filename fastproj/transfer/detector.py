"""Faster and Mask R-CNN of torchvision's parts, on the feature maps of a pre-trained encoder."""

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pycocotools import mask
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from fastproj.core import dist
from fastproj.models.architectures import IMAGENET
from fastproj.models.frozen import frozen as frozen_in_eval
from fastproj.models.maps import FeatureMaps
from fastproj.models.norm import synchronize
from fastproj.training.optim import parameter_groups
from fastproj.transfer.batches import Sample
from fastproj.transfer.objects import read
from fastproj.transfer.scores import Detections
from fastproj.transfer.sets import Annotated
from fastproj.transfer.training import as_float, each

HEADS = ("fpn", "c4")
ANCHOR = 8  # side of an anchor, in cells of its map: 32 pixels at stride 4, as in torchvision
SIZES = 5  # anchor sizes, each twice the one before
WIDTH = 256  # channels of a pyramid and of a mask's deconvolution
RATIOS = (0.5, 1.0, 2.0)  # height / width
START = 1e-3  # of the peak rate, at step 0, as in detectron2


class Trunk(nn.Module):
    """Normalized images -> feature maps, of ``out_channels`` each: torchvision's backbone.

    ``neck``: a feature pyramid, or None for the last map alone.
    """

    def __init__(self, maps: FeatureMaps, neck: FeaturePyramidNetwork | None) -> None:
        super().__init__()
        self.maps, self.neck = maps, neck
        self.out_channels = maps.channels[-1] if neck is None else WIDTH

    def forward(self, images: Tensor) -> Tensor | dict[str, Tensor]:
        h, w = images.shape[-2:]
        # torchvision's anchors want maps of just h / stride cells.
        maps = OrderedDict(
            (name, found[..., : h // stride, : w // stride])
            for (name, found), stride in zip(
                self.maps(images).items(), self.maps.strides, strict=True
            )
        )
        return next(reversed(maps.values())) if self.neck is None else self.neck(maps)


def build_detector(
    encoder: nn.Module,
    classes: int,
    *,
    head: str = "fpn",
    masks: bool = False,
    frozen: bool = False,
    sync_bn: bool = False,
    proposals: int = 1000,
    rois: int = 512,
    min_size: int = 800,
    max_size: int = 1333,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> FasterRCNN:
    """A new detector of ``classes`` classes, the background not counted, on ``encoder``.

    ``head`` is one of ``HEADS``. ``fpn``: a feature pyramid with batch norm on all maps and
    torchvision's two hidden layers [Lin et al. 2017, arXiv 1612.03144]. ``c4``: proposals from
    ``layer3``; the head is ``layer4``, a batch norm after it, and a mean [He et al. 2020, arXiv
    1911.05722, appendix A.3]; with ``masks``, one deconvolution on the same ``layer4``.

    ``frozen``: the encoder's weights and batch statistics stay. ``sync_bn``: batch statistics over
    all ranks, the mean of the ranks' own, as MoCo's "naiveSyncBN" has them. ``proposals`` of each
    image go to the head (C4 trains on twice as many, as detectron2), ``rois`` of them train it, a
    quarter with an object. ``min_size`` and
    ``max_size``, pixels: of an evaluated image's sides; images to train on come at their size.
    ``mean`` and ``std``: of pixels in [0, 1]; None: ImageNet's.

    In training mode, images (a list of (3, h, w), float in [0, 1]) and targets give losses; in eval
    mode, images give detections, as torchvision's ``FasterRCNN`` documents both. Raises
    ``InputError`` where the encoder gives no feature maps.
    """
    maps = FeatureMaps(encoder, until="layer3" if head == "c4" else None)
    options: dict[str, Any] = {
        "image_mean": list(mean or IMAGENET[0]),
        "image_std": list(std or IMAGENET[1]),
        "min_size": min_size,
        "max_size": max_size,
        "rpn_post_nms_top_n_train": proposals * (2 if head == "c4" else 1),
        "rpn_post_nms_top_n_test": proposals,
        "box_batch_size_per_image": rois,
        "size_divisible": math.lcm(*maps.strides),
        "_skip_resize": True,  # torchvision's reference has it too: transforms resize
    }
    detector = (_c4 if head == "c4" else _fpn)(maps, classes, masks, options)
    if frozen:
        for part in (maps, maps.rest):
            if part is not None:
                part.requires_grad_(False)
    if sync_bn:
        synchronize(detector)
    return detector


@dataclass(frozen=True)
class StepPlan:
    """``steps`` updates by SGD: rate ``lr``, a tenth of before from each milestone on."""

    steps: int
    lr: float
    milestones: Sequence[int] = ()
    warmup_steps: int = 0
    momentum: float = 0.9
    weight_decay: float = 1e-4

    def rate(self, step: int) -> float:
        """The learning rate of ``step``, counted from 0: a linear rise, then steps down."""
        rise = min(1.0, step / self.warmup_steps) if self.warmup_steps else 1.0
        down = 0.1 ** sum(step >= milestone for milestone in self.milestones)
        return self.lr * (START + (1 - START) * rise) * down

    def optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        """SGD of the module's trainable parameters."""
        groups = parameter_groups([module], self.weight_decay)
        return torch.optim.SGD(groups, self.lr, momentum=self.momentum)


def detect(
    detector: nn.Module, images: Sequence[Annotated], device: torch.device, **how: Any
) -> list[Detections] | None:
    """What ``detector`` finds in each of ``images``, on every rank; ranks share the images.

    None where it was told to stop. ``how``: as ``each`` takes it.
    """
    own: dict[int, Detections] = {}
    detector.eval()

    def look(number: int, sample: Sample) -> None:
        (found,) = detector([as_float(sample[0], device)])
        own[number] = _plain(found)

    if not each(images, read, look, **how):
        return None
    together = {number: found for part in dist.exchange(own) for number, found in part.items()}
    return [together[number] for number in range(len(images))]


def _plain(found: Mapping[str, Tensor]) -> Detections:
    """An image's detections on the CPU, its masks as run lengths."""
    plain: Detections = {name: found[name].cpu() for name in ("boxes", "scores", "labels")}
    if "masks" in found:
        pixels = (found["masks"][:, 0] > 0.5).to(torch.uint8).permute(1, 2, 0).cpu().numpy()
        plain["masks"] = mask.encode(np.asfortranarray(pixels))
    return plain


def _fpn(maps: FeatureMaps, classes: int, masks: bool, options: dict[str, Any]) -> FasterRCNN:
    several = len(maps.channels) > 1
    neck = FeaturePyramidNetwork(
        maps.channels,
        WIDTH,
        extra_blocks=LastLevelMaxPool() if several else None,
        norm_layer=nn.BatchNorm2d,
    )
    levels = [str(number) for number in range(len(maps.channels))]
    options |= {
        "rpn_anchor_generator": _anchors(maps.strides),
        "box_roi_pool": MultiScaleRoIAlign(levels, 7, 2),
    }
    trunk = Trunk(maps, neck)
    if masks:
        pool = MultiScaleRoIAlign(levels, 14, 2)
        return MaskRCNN(trunk, classes + 1, mask_roi_pool=pool, **options)
    return FasterRCNN(trunk, classes + 1, **options)


def _c4(maps: FeatureMaps, classes: int, masks: bool, options: dict[str, Any]) -> FasterRCNN:
    assert maps.rest is not None
    with frozen_in_eval(maps.rest), torch.no_grad():
        width = maps.rest(torch.zeros(1, maps.channels[-1], 2, 2)).shape[1]
    norm = nn.BatchNorm2d(width)
    options |= {
        "rpn_anchor_generator": _anchors(maps.strides[-1:]),
        "rpn_pre_nms_top_n_train": 12000,
        "rpn_pre_nms_top_n_test": 6000,
        "box_roi_pool": MultiScaleRoIAlign(["0"], 14, 0),
        "box_head": nn.Sequential(maps.rest, norm, nn.AdaptiveAvgPool2d(1)),
        "box_predictor": FastRCNNPredictor(width, classes + 1),
    }
    trunk = Trunk(maps, None)
    if masks:
        return MaskRCNN(
            trunk,
            mask_roi_pool=MultiScaleRoIAlign(["0"], 14, 0),
            mask_head=nn.Sequential(maps.rest, norm),
            mask_predictor=MaskRCNNPredictor(width, WIDTH, classes + 1),
            **options,
        )
    return FasterRCNN(trunk, **options)


def _anchors(strides: Sequence[int]) -> AnchorGenerator:
    """One size for each level of a pyramid, or all of them on a single map."""
    first = ANCHOR * strides[0]
    if len(strides) == 1:
        sizes = [tuple(first // 4 * 2**n for n in range(SIZES))]
    else:
        sizes = [(ANCHOR * stride,) for stride in [*strides, 2 * strides[-1]]]
    return AnchorGenerator(tuple(sizes), (RATIOS,) * len(sizes))
