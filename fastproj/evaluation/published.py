"""Linear probes by the published protocols, each with its own optimizer and schedule.

The authors' and solo-learn's code crop (area 0.08 to 1, bilinear) and flip the training images in
each epoch, train one linear layer on the encoder's raw features in eval mode, multiply the
configured learning rate by batch size / 256, and score center crops of val. They print val's
accuracy after each epoch; here it is computed once, after the last one. The authors' code trains
the encoder as well, except for Barlow Twins on CIFAR; here it is frozen. solo-learn's crops are
DALI's and bicubic, except for Barlow Twins; here they are bilinear. Open ``train`` with the batch
size of ``BATCH_SIZES``.

Sources: PKU-ML/Projector_Theory (commit 5c2e7d1), ``scripts/linear``, ``methods/linear.py`` and
``solo/args/linear.py``; vturrisi/solo-learn (commit 9187ea3), ``scripts/linear/imagenet-100`` and
``solo/methods/linear.py``. Their mixed precision is float16; ``evaluate`` takes that of
pre-training. [derived] marks what we added: learning rates beside the published one.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn

from fastproj.core.errors import InputError
from fastproj.evaluation.crops import crops_probe
from fastproj.evaluation.features import Features
from fastproj.evaluation.probes.common import ProbeResult
from fastproj.loaders import Loader

BATCH_SIZES = {
    "published_in100_simclr": 512,
    "published_in100_barlow": 256,
    "published_cifar_simclr": 256,
    "published_cifar_barlow": 256,
    "solo": 256,
}
SOLO = {
    "barlow": 0.1, "byol": 0.3, "deepclusterv2": 0.15, "dino": 0.3, "mocov2plus": 3.0,
    "mocov3": 0.3, "nnclr": 0.3, "ressl": 3.0, "simclr": 1.0, "simsiam": 30.0, "swav": 0.15,
    "vibcreg": 0.3, "vicreg": 0.3,
}  # fmt: skip
"""solo-learn's learning rate for each method, of ResNet-18 on ImageNet-100."""


def published_in100_simclr(
    encoder: nn.Module,
    train: Loader,
    val: Features | Loader,
    num_classes: int | None = None,
    *,
    learning_rates: Sequence[float] = (1.0, 0.1, 0.3, 3.0),
    epochs: int = 100,
    milestones: Sequence[int] = (60, 80),
    **given: Any,
) -> ProbeResult:
    """The authors' ImageNet-100 probe for SimCLR: SGD, rate 1.0 (2.0 at their batch of 512).

    Momentum 0.9, no decay, 100 epochs, a tenth of the rate at 60 and 80 [repo:
    scripts/linear/imagenet-100/simclr.yaml]. The further learning rates are [derived]. ``given``:
    ``mean``, ``std``, ``precision`` and ``seed`` of ``crops_probe``, which raises the errors.
    """
    return crops_probe(
        encoder, train, val, num_classes,
        learning_rates=learning_rates, epochs=epochs, milestones=milestones, **given,
    )  # fmt: skip


def published_in100_barlow(
    encoder: nn.Module,
    train: Loader,
    val: Features | Loader,
    num_classes: int | None = None,
    *,
    learning_rates: Sequence[float] = (0.1, 0.3, 1.0, 3.0),
    epochs: int = 100,
    milestones: Sequence[int] = (60, 80),
    **given: Any,
) -> ProbeResult:
    """The authors' ImageNet-100 probe for Barlow Twins: as for SimCLR, rate 0.1, batch 256.

    [repo: scripts/linear/imagenet-100/barlow.yaml]
    """
    return crops_probe(
        encoder, train, val, num_classes,
        learning_rates=learning_rates, epochs=epochs, milestones=milestones, **given,
    )  # fmt: skip


def published_cifar_simclr(
    encoder: nn.Module,
    train: Loader,
    val: Features | Loader,
    num_classes: int | None = None,
    *,
    learning_rates: Sequence[float] = (0.4, 0.1, 1.0),
    epochs: int = 200,
    warmup_epochs: float = 10.0,
    **given: Any,
) -> ProbeResult:
    """The authors' CIFAR probe for SimCLR with a frozen encoder: LARS, rate 0.4, batch 256.

    Momentum 0.9, trust coefficient 0.02, clipped, decay 1e-4, the bias neither decayed nor scaled,
    200 epochs, 10 of them warm-up from 3e-5, then a half cosine per step [repo:
    scripts/linear/cifar/simclr.yaml]. Their script also trains the encoder: it does not set
    ``finetune``, which is true by default in their ``methods/linear.py``. Here it is frozen, so
    that the probe measures the pre-trained encoder [derived]; ``finetune`` trains it.
    """
    return _cifar(encoder, train, val, num_classes, learning_rates, epochs, warmup_epochs, given)


def published_cifar_barlow(
    encoder: nn.Module,
    train: Loader,
    val: Features | Loader,
    num_classes: int | None = None,
    *,
    learning_rates: Sequence[float] = (0.3, 0.1, 1.0),
    epochs: int = 50,
    warmup_epochs: float = 10.0,
    **given: Any,
) -> ProbeResult:
    """The authors' CIFAR probe for Barlow Twins: as for SimCLR, rate 0.3, 50 epochs, frozen.

    [repo: scripts/linear/cifar/barlow_twins.yaml]
    """
    return _cifar(encoder, train, val, num_classes, learning_rates, epochs, warmup_epochs, given)


def _cifar(
    encoder: nn.Module,
    train: Loader,
    val: Features | Loader,
    num_classes: int | None,
    learning_rates: Sequence[float],
    epochs: int,
    warmup_epochs: float,
    given: dict[str, Any],
) -> ProbeResult:
    return crops_probe(
        encoder, train, val, num_classes,
        learning_rates=learning_rates, optimizer="lars", weight_decay=1e-4, epochs=epochs,
        milestones=None, warmup_epochs=warmup_epochs, **given,
    )  # fmt: skip


def solo(
    encoder: nn.Module,
    train: Loader,
    val: Features | Loader,
    num_classes: int | None = None,
    *,
    method: str = "simclr",
    epochs: int = 100,
    milestones: Sequence[int] = (60, 80),
    **given: Any,
) -> ProbeResult:
    """solo-learn's offline probe for ResNet-18 on ImageNet-100: SGD at the rate of ``method``.

    Momentum 0.9, no decay, batch 256, 100 epochs, a tenth of the rate at 60 and 80
    [scripts/linear/imagenet-100]. The rates of the other methods in ``SOLO`` are trained beside it.
    solo-learn has no offline script for CIFAR.
    Raises ``InputError`` for a method that is not in ``SOLO``.
    """
    if method not in SOLO:
        raise InputError(f"solo-learn has no probe for {method!r}: choose one of {', '.join(SOLO)}")
    others = sorted(set(SOLO.values()) - {SOLO[method]})
    result = crops_probe(
        encoder, train, val, num_classes,
        learning_rates=(SOLO[method], *others), epochs=epochs, milestones=milestones, **given,
    )  # fmt: skip
    result.protocol["method"] = method
    return result
