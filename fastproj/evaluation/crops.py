"""Probes that see new crops in every epoch: a frozen encoder's linear heads.

``linear_probe`` extracts features once. The published protocols flip and crop each image anew in
each epoch, so the encoder runs in each epoch too. All learning rates share that pass.

The encoder is what an epoch costs. On 2 CPU cores beside other programs (n = 5, 32 px) loading,
cropping and flipping alone gave 86,000 images/s (torch's DataLoader with torchvision 4,800), the
small ResNet alone 541 and six learning rates with it 714, within the noise of the same.
"""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastproj.augment.draw import View
from fastproj.augment.views import Augmentation
from fastproj.core.errors import InputError
from fastproj.core.progress import Progress
from fastproj.evaluation.features import Features, features
from fastproj.evaluation.fold import folded
from fastproj.evaluation.fuse import fused
from fastproj.evaluation.heads import Heads, multistep, warmed_up, with_ones
from fastproj.evaluation.probes.common import ProbeResult, check, ranks
from fastproj.loaders import Loader

FLIP = View(flip_prob=0.5, jitter_prob=0, gray_prob=0, blur_prob=0)
TRUST = 0.02  # LARS's trust coefficient in the authors' scripts (PKU-ML/Projector_Theory)


def crops_probe(
    encoder: nn.Module,
    train: Loader,
    val: Features | Loader,
    num_classes: int | None = None,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    learning_rates: Sequence[float] = (1.0, 0.1, 0.3, 3.0),
    optimizer: str = "sgd",
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    epochs: int = 100,
    milestones: Sequence[int] | None = (60, 80),
    warmup_epochs: float = 0.0,
    warmup_lr: float = 3e-5,
    precision: torch.dtype = torch.float32,
    seed: int = 0,
) -> ProbeResult:
    """Accuracy of linear heads on a frozen encoder that sees a new crop and flip in each epoch.

    Args:
        encoder: maps (B, 3, h, w) to (B, d), on the device of ``train``.
        train: a loader with one random ``Crop`` per image; its batch size is the probe's. One
            process trains the heads, so its world size is 1.
        val: features of val's center crops, or a loader of them; scored once, after the last epoch.
        num_classes: None: the highest label of ``train`` and 1.
        mean, std: per channel, of pixels in [0, 1]; None: those of the loader's beton.
        learning_rates: for a batch of 256; used in proportion to the batch size. The first one is
            the protocol's and gives ``top1`` and ``top5``; the others are trained beside it and
            reported as ``top1_lr=RATE``. None is chosen by its score.
        optimizer: ``sgd``, or ``lars`` with the trust coefficient ``TRUST``.
        weight_decay: of the weight matrix, not of the bias.
        milestones: epochs from which the rate is a tenth of what it was. None: a half cosine to 0
            per step, after ``warmup_epochs`` from ``warmup_lr``.
        precision: of the encoder's autocast. Heads are in float32.
        seed: of the flips and of the heads' first weights; crops and order are the loader's.

    A copy of the encoder runs, in eval mode, batch norm folded (``folded``); in bfloat16 on a CPU,
    sums and ReLUs are part of the convolutions before them (``fused``). Features are not
    standardized. ``protocol["chosen"]["not_finite"]`` lists learning rates whose heads diverged.

    Raises ``InputError`` as ``linear_probe`` does, for a loader with another number of crops per
    image, and for an optimizer of another name.
    """
    begun = time.perf_counter()
    if optimizer not in ("sgd", "lars"):
        raise InputError(f"a probe has no optimizer {optimizer!r}: choose sgd or lars")
    views = Views(train, mean, std, seed)
    encoder = folded(encoder).to(memory_format=torch.channels_last)
    if isinstance(val, Loader):
        val = features(encoder, val, mean=views.mean, std=views.std, device=train.device)
    num_classes = check_labels(train, val, num_classes)
    scale = train.order.batch_size / 256
    rates = [rate * scale for rate in learning_rates]
    total, device = epochs * len(train), train.device
    if device.type == "cpu" and precision == torch.bfloat16:
        side = train.crops[0].size
        encoder = fused(encoder, torch.zeros(train.order.batch_size, 3, side, side))
    heads: Heads | None = None
    with torch.no_grad(), Progress(total, "probe", "steps") as bar:
        for epoch in range(epochs):
            steps = range(epoch * len(train), (epoch + 1) * len(train))
            schedule = (
                warmed_up(rates, steps, total, warmup_epochs * len(train), warmup_lr)
                if milestones is None
                else [multistep(rates, epoch, milestones)] * len(steps)
            )
            now = torch.tensor(schedule, device=device)  # one copy to the device per epoch
            for (images, labels), rate in zip(views.epoch(epoch), now, strict=True):
                with torch.autocast(device.type, precision, enabled=precision != torch.float32):
                    found = encoder(images)
                heads = heads or Heads(
                    len(rates),
                    num_classes,
                    same_width(found, val),
                    momentum=momentum,
                    weight_decay=weight_decay,
                    trust_coefficient=TRUST if optimizer == "lars" else None,
                    seed=seed,
                    device=device,
                )
                heads.step(found.float(), labels, rate)
                bar.update()
    assert heads is not None  # a loader has at least one step
    scores = [_score(head, val) for head in heads.weights]
    metrics = scores[0][0] | {
        f"top1_lr={rate:g}": found["top1"]
        for rate, (found, _) in zip(learning_rates[1:], scores[1:], strict=True)
    }
    finite = heads.weights.flatten(1).isfinite().all(1).tolist()
    protocol = {
        **views.protocol(),
        "optimizer": optimizer,
        "momentum": momentum,
        "weight_decay": weight_decay,
        "learning_rates": list(learning_rates),
        "learning_rate_of_the_first": rates[0],
        "epochs": epochs,
        "schedule": "warm-up and half cosine, per step" if milestones is None else "steps of 0.1",
        "milestones": list(milestones or ()),
        "warmup_epochs": warmup_epochs if milestones is None else 0,
        "encoder": f"frozen, eval mode, {str(precision).removeprefix('torch.')} in training",
        "scored": "val once, after the last epoch, the first learning rate",
        "seed": seed,
        "chosen": {
            "not_finite": [
                rate for rate, good in zip(learning_rates, finite, strict=True) if not good
            ]
        },
    }
    if optimizer == "lars":
        protocol["trust_coefficient"] = TRUST
    return ProbeResult(metrics, protocol, time.perf_counter() - begun, scores[0][1])


class Views:
    """Epochs of ``loader`` as normalized images, each flipped with probability 0.5.

    The flips of a step depend on ``seed`` and the step alone. Raises ``InputError`` for a loader
    that does not give one random crop per image, and ``ValueError`` for one of mean and std alone.
    """

    def __init__(
        self,
        loader: Loader,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
        seed: int,
    ) -> None:
        if (mean is None) != (std is None):
            raise ValueError("give both mean and std, or neither")
        if len(loader.crops) != 1 or loader.crops[0].num_views != 1:
            raise InputError("the probe takes one crop per image: open the loader with one Crop")
        self.loader, self.seed = loader, seed
        self.mean = tuple(loader.beton.manifest.mean if mean is None else mean)
        self.std = tuple(loader.beton.manifest.std if std is None else std)
        self.augmentation = Augmentation([FLIP], self.mean, self.std).to(loader.device)
        self.generator = torch.Generator(loader.device)

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Images float32 (B, 3, h, w) in channels-last memory and labels int64 (B,)."""
        self.loader.seek(epoch, 0)
        for step, batch in enumerate(self.loader, epoch * len(self.loader)):
            self.generator.manual_seed(
                int(np.random.SeedSequence([self.seed, step]).generate_state(1)[0])
            )
            params = self.augmentation.sample(len(batch.labels), self.generator)
            yield self.augmentation(batch.crops[0], params), batch.labels

    def protocol(self) -> dict[str, Any]:
        """What repeating the training images takes, as JSON holds it."""
        crop, order = self.loader.crops[0], self.loader.order
        return {
            "crop": {
                "kind": type(crop).__name__,
                "size": crop.size,
                "scale": list(getattr(crop, "scale", ())),
                "flip_prob": FLIP.flip_prob,
            },
            "mean": list(self.mean),
            "std": list(self.std),
            "images": len(self.loader.beton),
            "batch_size": order.batch_size,
            "order_seed": order.seed,
        }


def check_labels(train: Loader, val: Features, num_classes: int | None) -> int:
    """The number of classes. ``InputError`` unless the labels of both sets can be probed."""
    labels = torch.from_numpy(train.beton.label)
    # Without columns, ``check`` compares the labels alone; same_width compares the features.
    empty = Features(torch.empty(len(labels), 0), labels)
    return check(empty, Features(val.features[:, :0], val.labels), num_classes)


def same_width(features: Tensor, val: Features) -> int:
    """The width d of training features (B, d); ``InputError`` unless val's are as wide."""
    if features.ndim != 2 or features.shape[1] != val.features.shape[1]:
        raise InputError(
            f"training features are {tuple(features.shape)}, validation features "
            f"{tuple(val.features.shape)}: use one encoder that gives (B, d)"
        )
    return features.shape[1]


def _score(head: Tensor, val: Features) -> tuple[dict[str, float], Tensor]:
    """Accuracies of a head (classes, d+1) on val, and the predicted classes."""
    return accuracies(with_ones(val.features.to(head)) @ head.T, val.labels.to(head.device))


def accuracies(scores: Tensor, labels: Tensor) -> tuple[dict[str, float], Tensor]:
    """``top1`` and ``top5`` of ``scores`` (N, classes), and the predicted classes (N,)."""
    rank = ranks(scores, labels)
    metrics = {f"top{n}": (rank < n).double().mean().item() for n in (1, 5)}
    return metrics, scores.argmax(1)
