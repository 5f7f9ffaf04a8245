"""Fine-tuning: encoder and a linear head train together, on all labels or a fraction of them."""

import copy
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional as F

from fastproj.core.errors import InputError
from fastproj.core.progress import Progress
from fastproj.data.beton import Beton
from fastproj.data.subset import subset
from fastproj.evaluation.crops import Views, accuracies, check_labels
from fastproj.evaluation.features import Features, features
from fastproj.evaluation.probes.common import ProbeResult, stratified_split
from fastproj.loaders import Loader
from fastproj.models.frozen import frozen
from fastproj.training.optim import set_rates


def labeled_fraction(beton: Beton, fraction: float, seed: int = 0) -> Beton:
    """A stratified random ``fraction`` of each class as a beton; 1 is ``beton`` itself.

    At least one image of each class that has two, and none of a class of one image. Other seeds
    draw other images. Raises ``InputError`` for a fraction outside (0, 1].
    """
    if not 0 < fraction <= 1:
        raise InputError(f"a fraction of {fraction} of the labels: give one above 0 and at most 1")
    if fraction == 1:
        return beton
    _, drawn = stratified_split(torch.from_numpy(beton.label), fraction, seed)
    return subset(beton, drawn.numpy())


def finetune(
    encoder: nn.Module,
    train: Loader,
    val: Loader,
    num_classes: int | None = None,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    labels: float = 1.0,
    encoder_rate: float = 0.05,
    head_rate: float = 0.05,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    epochs: int = 30,
    warmup_epochs: float = 0.0,
    precision: torch.dtype = torch.float32,
    seed: int = 0,
) -> ProbeResult:
    """Accuracy of an encoder that is trained on labels, from its weights, with a linear head.

    Cross-entropy, SGD with momentum, half a cosine per step, crops and flips; batch norm trains.
    ``train``: a loader with one random ``Crop`` per image; ``labels``: the fraction of its images
    that is used, drawn by ``labeled_fraction``; ``val``: a loader of every image's ``Center``,
    scored once, after the last epoch, in eval mode and float32. ``encoder_rate`` and ``head_rate``
    are for a batch of 256 and used in proportion to the batch size. ``mean`` and ``std``, per
    channel of pixels in [0, 1]: None are those of the training loader's beton. The head starts as
    ``nn.Linear`` does, from ``seed``, as do the flips. ``precision`` is autocast's in training.

    ``encoder`` itself is left as it was: a copy is trained. The defaults are those of SimCLR's
    semi-supervised fine-tuning [Chen et al. 2020, arXiv 2002.05709, appendix B.5: rate
    0.05 · batch / 256, momentum 0.9, no decay, no warm-up, 30 epochs on 10 % of the labels and 60
    on 1 %, crop and flip]; the cosine is ours [derived], and momentum is torch's, not Nesterov's.

    Raises ``InputError`` as ``crops_probe`` does, and for features of val as ``features`` does.
    """
    begun = time.perf_counter()
    targets = torch.from_numpy(val.beton.label)
    num_classes = check_labels(train, Features(torch.empty(len(targets), 0), targets), num_classes)
    train = _drawn(train, labels, seed)
    device, total = train.device, epochs * len(train)
    views = Views(train, mean, std, seed)
    scale = train.order.batch_size / 256
    tuned = copy.deepcopy(encoder)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        head = nn.Linear(_width(tuned, views), num_classes).to(device)
        optimizer = torch.optim.SGD(
            [
                {"params": list(part.parameters()), "peak": rate * scale}
                for part, rate in ((tuned, encoder_rate), (head, head_rate))
            ],
            lr=0.0,  # set_rates sets it before each step
            momentum=momentum,
            weight_decay=weight_decay,
        )
        tuned.train()
        with Progress(total, "finetune", "steps") as bar:
            for epoch in range(epochs):
                for images, targets in views.epoch(epoch):
                    set_rates(optimizer, bar.done, total, warmup_epochs * len(train), start=0.0)
                    with torch.autocast(device.type, precision, enabled=precision != torch.float32):
                        logits = head(tuned(images))
                    F.cross_entropy(logits.float(), targets).backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    bar.update()
    found = features(tuned, val, mean=views.mean, std=views.std, device=device)
    with torch.no_grad():
        metrics, predictions = accuracies(head(found.features), found.labels)
    protocol = {
        **views.protocol(),
        "optimizer": "sgd",
        "momentum": momentum,
        "weight_decay": weight_decay,
        "labels": labels,
        "encoder_rate": encoder_rate,
        "head_rate": head_rate,
        "rates": "for a batch of 256, in proportion to the batch size",
        "epochs": epochs,
        "warmup_epochs": warmup_epochs,
        "schedule": "warm-up and half cosine, per step",
        "encoder": f"trained, {str(precision).removeprefix('torch.')}; scored in float32",
        "scored": "val once, after the last epoch",
        "seed": seed,
    }
    return ProbeResult(metrics, protocol, time.perf_counter() - begun, predictions)


def _drawn(train: Loader, fraction: float, seed: int) -> Loader:
    """The same loader of a ``labeled_fraction`` of its images, in batches that these fill."""
    part = labeled_fraction(train.beton, fraction, seed)
    if part is train.beton:
        return train
    batch_size = min(train.order.batch_size, len(part))
    order = replace(train.order, samples=len(part), batch_size=batch_size)
    return type(train)(part, train.crops, order, train.device, train.workers)


def _width(encoder: nn.Module, views: Views) -> int:
    """The number of features, from one image; nothing in the encoder changes."""
    images, _ = next(iter(views.epoch(0)))
    views.loader.close()
    with frozen(encoder), torch.no_grad():
        found = encoder(images[:1])
    if found.ndim != 2:
        raise InputError(
            f"one image became features of shape {tuple(found.shape)}: the encoder must give "
            "(B, d); pool and flatten in it"
        )
    return found.shape[1]
