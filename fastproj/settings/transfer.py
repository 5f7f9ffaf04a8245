"""What transfer and segment read: an encoder, a set, what is trained on it, and a schedule."""

from dataclasses import dataclass

from fastproj.settings.checkers import (
    Bool,
    Choice,
    File,
    Float,
    Int,
    Ints,
    Keys,
    OrNull,
    Text,
    Texts,
)
from fastproj.settings.run import Trained
from fastproj.settings.schema import Schema, setting

_count = Int(low=1)
_side = Int(low=32)


@dataclass(frozen=True)
class DetectionData:
    """the detection set"""

    format: str = setting(Choice("voc", "coco"), "whose folders and annotations", "voc")
    root: str = setting(
        File(), "folder that holds VOCdevkit, or COCO's annotations and images", required=True
    )
    train: tuple[str, ...] = setting(
        Texts(), "splits to train on", ("2007_trainval", "2012_trainval")
    )
    val: tuple[str, ...] = setting(Texts(), "splits to score on", ("2007_test",))
    download: bool = setting(Bool(), "fetch VOC's or COCO's own splits into data.root first", False)
    workers: int = setting(Int(0), "processes that read images; 0: this one", 4)


@dataclass(frozen=True)
class Images:
    """their size and augmentation"""

    train_sizes: tuple[float, ...] = setting(
        Ints(low=32), "shorter side in training, pixels, drawn for each image", (800,)
    )
    val_size: int = setting(_side, "shorter side of a scored image, pixels", 800)
    max_size: int = setting(_side, "longest side, pixels, which goes before the shorter", 1333)
    flip_prob: float = setting(Float(low=0, high=1), "probability of a mirror image", 0.5)


@dataclass(frozen=True)
class EncoderChoice:
    """the encoder whose worth is measured"""

    checkpoint: str | None = setting(
        OrNull(File()),
        "a run folder, or a checkpoint or export, also of another library; null: the weights that"
        " the function of encoder.name gives",
    )
    name: str | None = setting(
        OrNull(Text()),
        "architecture: timm:NAME, torchvision:NAME or package.module:function; null: what the"
        " checkpoint says, or a ResNet that its weights show",
    )
    weights: str = setting(
        Choice("pre-trained", "random"), "random: the same encoder as initialized, as a control",
        "pre-trained",
    )  # fmt: skip


@dataclass(frozen=True)
class Detector:
    """the detector"""

    head: str = setting(
        Choice("fpn", "c4"), "feature pyramid, or a ResNet's layer4 after its layer3", "fpn"
    )
    masks: bool = setting(Bool(), "Mask R-CNN, of outlines in COCO's format", False)
    frozen: bool = setting(Bool(), "leave the encoder as it is; false: fine-tune all of it", False)
    sync_bn: bool = setting(Bool(), "batch statistics over all ranks", False)
    proposals: int = setting(_count, "of each image, that the head looks at", 1000)
    rois: int = setting(_count, "of each image's proposals, that train the head", 512)
    precise_bn: int = setting(
        Int(0), "training batches that batch statistics are taken from before scoring; 0: none", 200
    )


@dataclass(frozen=True)
class Schedule:
    """SGD and its schedule"""

    lr: float = setting(Float(above=0), "peak learning rate for the whole batch", 0.02)
    batch_size: int = setting(_count, "images per step, over all ranks", 16)
    steps: int = setting(_count, "updates", 24_000)
    milestones: tuple[float, ...] | None = setting(
        OrNull(Ints(low=1)), "steps from which the rate is a tenth of before"
    )
    warmup_steps: int = setting(Int(0), "linear rise of the rate from a thousandth, steps", 100)
    momentum: float = setting(Float(low=0, high=1), "of SGD", 0.9)
    weight_decay: float = setting(Float(low=0), "on weights, never on biases and norms", 1e-4)


@dataclass(frozen=True)
class Training:
    """precision, logging and checkpoints"""

    precision: str = setting(
        Choice("auto", "float32", "bfloat16", "float16"),
        "auto: bfloat16 where it is faster on this processor or GPU, else float32",
        "float32",
    )
    log_every: int = setting(_count, "steps between logged steps", 20)
    log_to: tuple[str, ...] | None = setting(
        OrNull(Keys("fastproj.runs:SINKS")),
        "where scalars go beside metrics.jsonl; null: nowhere else",
    )
    checkpoint_every: int = setting(_count, "steps between checkpoints", 1000)
    keep: int = setting(_count, "newest checkpoints kept", 2)
    stop_after: int | None = setting(
        OrNull(_count), "leave after this many steps, as if interrupted"
    )


@dataclass(frozen=True)
class TransferSettings(Trained):
    """Settings of ``fastproj transfer``."""

    encoder: EncoderChoice
    data: DetectionData
    images: Images
    detector: Detector
    optim: Schedule
    train: Training


@dataclass(frozen=True)
class PixelData:
    """the set whose pixels have classes"""

    format: str = setting(Choice("ade20k", "voc"), "whose folders and masks", "ade20k")
    root: str = setting(
        File(), "folder that holds ADEChallengeData2016, or VOCdevkit", required=True
    )
    train: tuple[str, ...] = setting(Texts(), "splits to train on", ("training",))
    val: tuple[str, ...] = setting(Texts(), "splits to score on", ("validation",))
    download: bool = setting(Bool(), "fetch ADE20K or VOC's splits into data.root first", False)
    workers: int = setting(Int(0), "processes that read images; 0: this one", 4)


@dataclass(frozen=True)
class Crops:
    """their size and augmentation"""

    size: int = setting(
        _side, "side of a crop to train on, and shorter side of a scored image, pixels", 512
    )
    scale_min: float = setting(
        Float(above=0), "smallest shorter side in training, as a multiple of images.size", 0.5
    )
    scale_max: float = setting(
        Float(above=0), "largest shorter side in training, as a multiple of images.size", 2.0
    )
    flip_prob: float = setting(Float(low=0, high=1), "probability of a mirror image", 0.5)


@dataclass(frozen=True)
class LinearSchedule:
    """AdamW and its schedule"""

    lr: float = setting(Float(above=0), "peak learning rate, which falls linearly to 0", 1e-3)
    batch_size: int = setting(_count, "crops per step, over all ranks", 16)
    steps: int = setting(_count, "updates", 40_000)
    warmup_steps: int = setting(Int(0), "linear rise of the rate from 0, steps", 1500)
    weight_decay: float = setting(Float(low=0), "on weights, never on biases and norms", 1e-4)


@dataclass(frozen=True)
class SegmentSettings(Trained):
    """Settings of ``fastproj segment``."""

    encoder: EncoderChoice
    data: PixelData
    images: Crops
    optim: LinearSchedule
    train: Training


TRANSFER = Schema(TransferSettings)
SEGMENT = Schema(SegmentSettings)
