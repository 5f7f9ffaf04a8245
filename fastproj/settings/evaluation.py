"""What evaluate reads of a run: features and probes."""

from dataclasses import dataclass

from fastproj.settings.checkers import (
    Bool,
    Choice,
    File,
    Float,
    Floats,
    Int,
    Ints,
    Keys,
    OrNull,
    Text,
    Texts,
)
from fastproj.settings.schema import Declared, Options, options, setting

Numbers = tuple[float, ...]

_positive = Float(above=0)
_not_negative = Float(low=0)
_count = Int(low=1)
_area = Float(above=0, high=1)
_above_zero = Floats(above=0)
_part = Float(above=0, high=0.9)

_path = "L2 strengths, the best on the holdout is taken; one: fixed, no holdout"
_held = "share of train that chooses"


def _decades(first: int) -> Numbers:
    """Sixteen strengths from 10**first, three per decade."""
    return tuple(float(f"{10 ** (n / 3 + first):.4g}") for n in range(16))


_milestones = Declared(Ints(low=1), "epochs from which the rate is a tenth of before", (60, 80))
_rise = Declared(_not_negative, "linear rise of the learning rate, epochs", 10.0)


def _published(
    protocol: str, rates: Numbers, epochs: int, **schedule: Declared
) -> dict[str, Declared]:
    """Settings of a published linear probe on new crops."""
    declared = {
        "learning_rates": Declared(
            _above_zero, "for a batch of 256; the first, the published one, is the score", rates
        ),
        "epochs": Declared(_count, "passes over the images", epochs),
        **schedule,
    }
    return {f"published_{protocol}_{name}": setting for name, setting in declared.items()}


@dataclass(frozen=True)
class Eval:
    """frozen features and their probes"""

    checkpoint: str = setting(
        File(), "checkpoint file, also of another library; last: the run's newest", "last"
    )
    encoder: str | None = setting(
        OrNull(Text()),
        "architecture: timm:NAME, torchvision:NAME or package.module:function; null: what the"
        " checkpoint says, or a ResNet that its weights show",
    )
    normalize: str = setting(
        Choice("encoder", "data", "imagenet"),
        "mean and std of images; encoder: what it expects, or data's where it does not say",
        "encoder",
    )
    depths: tuple[str, ...] = setting(
        Texts(), "features probed: layer1 to layer4, h, hidden1 and so on, z; or all", ("h",)
    )
    sets: tuple[str, ...] | None = setting(
        OrNull(Texts()), "further folders of train.beton and val.beton, for transfer"
    )
    out: str | None = setting(
        OrNull(File()), "folder of the results; null: the run folder, needed without one"
    )
    cache: bool = setting(Bool(), "keep features on the disk, in features/ of that folder", True)
    size: int | None = setting(
        OrNull(Int(8)),
        "side of a crop, pixels; null: the encoder's own, unless the command line gives views.size",
    )
    crops: str = setting(
        Choice("center", "five", "ten"),
        "per image; five: corners and center, ten: mirrored too; their features are averaged",
        "center",
    )
    crop_fraction: float = setting(_area, "side of a crop, fraction of the shorter side", 1.0)
    baselines: bool = setting(Bool(), "probe raw pixels and a random encoder as well", False)
    batch_size: int = setting(_count, "images in one forward pass", 512)
    probes: tuple[str, ...] = setting(
        Keys("fastproj.evaluation:PROBES"), "what scores the features", ("logistic", "knn")
    )
    options: Options = options(
        "probes",
        given=("num_classes", "mean", "std", "precision", "seed", "device"),
        logistic_strengths=Declared(_above_zero, _path, _decades(-5)),
        logistic_holdout=Declared(_part, _held, 0.1),
        knn_k=Declared(Ints(low=1), "neighbors that vote; the first is the score", (20,)),
        knn_temperature=Declared(
            _above_zero, "a vote weighs exp(cosine / this); the first is the score", (0.07,)
        ),
        sgd_learning_rates=Declared(_above_zero, "grid", (0.01, 0.03, 0.1, 0.3)),
        sgd_weight_decays=Declared(Floats(low=0), "grid", (1e-4, 1e-3, 1e-2, 1e-1)),
        sgd_epochs=Declared(_count, "passes over the features", 100),
        sgd_batch_size=Declared(_count, "samples per step", 256),
        sgd_holdout=Declared(_part, _held, 0.1),
        ridge_strengths=Declared(_above_zero, _path, _decades(-4)),
        ridge_holdout=Declared(_part, _held, 0.1),
        mlp_hidden=Declared(_count, "hidden units", 512),
        mlp_learning_rate=Declared(_positive, "of AdamW", 1e-3),
        mlp_weight_decay=Declared(_not_negative, "of AdamW", 0.05),
        mlp_epochs=Declared(_count, "passes over the features", 30),
        mlp_batch_size=Declared(_count, "samples per step", 256),
        few_shot_labels=Declared(
            _above_zero, "of each class: a fraction below 1, or images", (0.01, 0.1)
        ),
        few_shot_draws=Declared(_count, "draws that a score averages", 5),
        few_shot_strength=Declared(_positive, "L2 strength, fixed", 0.01),
        **_published("in100_simclr", (1.0, 0.1, 0.3, 3.0), 100, milestones=_milestones),
        **_published("in100_barlow", (0.1, 0.3, 1.0, 3.0), 100, milestones=_milestones),
        **_published("cifar_simclr", (0.4, 0.1, 1.0), 200, warmup_epochs=_rise),
        **_published("cifar_barlow", (0.3, 0.1, 1.0), 50, warmup_epochs=_rise),
        solo_method=Declared(Text(), "whose learning rate solo-learn's protocol takes", "simclr"),
        solo_epochs=Declared(_count, "passes over the images", 100),
        solo_milestones=_milestones,
        finetune_labels=Declared(
            Float(above=0, high=1), "fraction of train's labels that is used", 1.0
        ),
        finetune_encoder_rate=Declared(_positive, "learning rate for a batch of 256", 0.05),
        finetune_head_rate=Declared(_positive, "learning rate for a batch of 256", 0.05),
        finetune_momentum=Declared(Float(low=0, high=1), "of SGD", 0.9),
        finetune_weight_decay=Declared(_not_negative, "of SGD", 0.0),
        finetune_epochs=Declared(_count, "passes over the images", 30),
        finetune_warmup_epochs=Declared(
            _not_negative, "linear rise of the learning rate, epochs", 0.0
        ),
        corruptions_names=Declared(
            OrNull(Texts()), "of ImageNet-C, such as fog,snow; null: all 15", None
        ),
        corruptions_severities=Declared(Ints(low=1, high=5), "of each corruption", (1, 2, 3, 4, 5)),
        corruptions_strengths=Declared(_above_zero, _path, _decades(-5)),
        corruptions_holdout=Declared(_part, _held, 0.1),
    )
