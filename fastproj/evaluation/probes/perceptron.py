"""A perceptron with one hidden layer: what a linear probe cannot read."""

import math
import time

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastproj.evaluation.features import Features
from fastproj.evaluation.probes.common import (
    STANDARDIZATION,
    ProbeResult,
    check,
    design,
    statistics,
    top,
)


def mlp(
    train: Features,
    val: Features,
    num_classes: int | None = None,
    *,
    hidden: int = 512,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.05,
    epochs: int = 30,
    batch_size: int = 256,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> ProbeResult:
    """Accuracy of Linear, ReLU, Linear on frozen features, trained by AdamW with fixed settings.

    Features are standardized as in ``linear_probe``; the learning rate falls to zero along a half
    cosine, per step. Nothing is chosen, so nothing is held out. ``num_classes`` None: the highest
    label of ``train`` and 1. ``device`` None: where ``train`` lies. Raises ``InputError`` as
    ``linear_probe`` does, but takes classes of one image.
    """
    start = time.perf_counter()
    num_classes = check(train, val, num_classes)
    device = train.features.device if device is None else torch.device(device)
    mean, std = statistics(train.features)
    x, y = design(train.features, mean, std, device)[:, :-1], train.labels.to(device)
    model = train_mlp(
        x, y, num_classes, hidden, learning_rate, weight_decay, epochs, batch_size, seed
    )
    with torch.no_grad():
        scores = model(design(val.features, mean, std, device)[:, :-1])
    protocol = {
        "standardization": STANDARDIZATION,
        "model": f"Linear, ReLU, Linear; {hidden} hidden units",
        "optimizer": "AdamW, half cosine per step",
        "selection": "none: fixed settings",
        "hidden": hidden,
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
        "epochs": epochs,
        "batch_size": batch_size,
        "seed": seed,
    }
    seconds = time.perf_counter() - start
    return ProbeResult(top(scores, val.labels.to(device)), protocol, seconds, scores.argmax(-1))


def train_mlp(
    x: Tensor,
    y: Tensor,
    classes: int,
    hidden: int,
    learning_rate: float,
    weight_decay: float,
    epochs: int,
    batch_size: int,
    seed: int,
) -> nn.Sequential:
    """The trained model; ``x`` float32 (N, d), ``y`` int64 (N,).

    The seed fixes torch's default initialization, drawn on the CPU, and the order of each epoch,
    whose last partial batch is dropped. The global random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(x.shape[1], hidden), nn.ReLU(), nn.Linear(hidden, classes))
    model.to(x.device)
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=weight_decay)
    batch_size = min(batch_size, len(x))
    steps = epochs * (len(x) // batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.enable_grad():
        for _ in range(epochs):
            order = torch.randperm(len(x), generator=generator).to(x.device)
            for rows in order[: len(x) // batch_size * batch_size].split(batch_size):
                optimizer.zero_grad()
                functional.cross_entropy(model(x[rows]), y[rows]).backward()
                optimizer.step()
                schedule.step()
    return model
