"""SimCLR from images to accuracy, beside lightly: same images, weights, head and optimizer."""

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from statistics import mean, stdev
from typing import Any

import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

from fastproj.augment.draw import PRESETS
from fastproj.augment.views import Augmentation
from fastproj.bench import Engine, Plan, Role, Row, rates
from fastproj.bench.images import drawn
from fastproj.core.device import choose_precision
from fastproj.data.beton import Beton
from fastproj.data.layout import RAW
from fastproj.data.subset import subset
from fastproj.evaluation.features import Features, features
from fastproj.evaluation.fold import folded
from fastproj.evaluation.probes.common import stratified_split
from fastproj.evaluation.probes.neighbors import knn
from fastproj.evaluation.probes.regression import logistic
from fastproj.loaders import Center, Crop, open_loader
from fastproj.models.encoders import build_encoder, num_features
from fastproj.models.projector import Projector, build_projector
from fastproj.objective import build_objective
from fastproj.training.learner import Learner
from fastproj.training.optim import build_optimizer, parameter_groups, probe_group, set_rates
from fastproj.training.trainer import Trainer

TEMPERATURE, RATE, DECAY = 0.2, 2e-3, 1e-4  # AdamW's as in rcfg/cifar10_cpu.yaml
WARMUP_EPOCHS, WARMUP_RATE = 0.3, 3e-5
Scores = dict[str, float]  # probe -> top-1 in per cent


@dataclass(frozen=True)
class Job:
    """What every engine trains: SimCLR for ``epochs`` on crops of ``size`` pixels."""

    train: Beton
    epochs: int
    batch: int
    size: int
    encoder: str
    plan: Plan

    def build(self, seed: int) -> tuple[nn.Module, Projector]:
        """Encoder and projector with the weights of ``seed``."""
        torch.manual_seed(seed)
        encoder = build_encoder(self.encoder, "cifar")
        return encoder, build_projector("mlp", num_features(encoder), hidden=512, out=128)

    def optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return build_optimizer("adamw", groups, RATE * self.batch / 256)


def run(
    plan: Plan,
    images: int = 20_000,
    held_out: int = 5_000,
    epochs: int = 3,
    seeds: int = 5,
    batch: int = 256,
    size: int = 32,
    encoder: str = "resnet_small",
) -> list[Row]:
    """Train with each engine and each seed, in turns; the unit is one image of an epoch.

    ``images`` of ``plan.small`` are trained on and ``held_out`` others are scored, both drawn by
    class (fewer where the beton has fewer). Rates are of training alone, loading included. Notes
    give top-1 in per cent, mean ± standard deviation over the seeds, of our ``logistic`` probe and
    kNN on frozen features, and the differences to lightly's of the same seed with a 95 % t
    interval; with the peer's also those of the weights before training. One seed gives all engines
    the same weights; order, crops and views are drawn by each engine itself.
    """
    if plan.small is None or not (plan.small.mode == RAW).all():
        return []
    train, val = _split(plan.small, images, held_out)
    job = Job(train, epochs, min(batch, len(train)), size, encoder, plan)
    engines = {**_faster(plan.device), **ENGINES}
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    scores: dict[str, list[Scores]] = {name: [] for name in engines}
    fresh: list[Scores] = []
    missing: dict[str, str] = {}
    for seed in range(seeds):
        fresh.append(_score(job.build(seed)[0].to(plan.device), job, val))
        for name, (_, train_once) in engines.items():
            if name in missing:
                continue
            print(f"endtoend: {name}, seed {seed}", file=sys.stderr)
            try:
                trained, took = train_once(job, seed)
            except ImportError as error:
                missing[name] = " ".join(str(error).split())
                continue
            seconds[name].append(took)
            scores[name].append(_score(trained, job, val))
    case = (
        f"{encoder}, SimCLR, {size} px, batch {job.batch}, {epochs} epochs of {len(train):,} images"
    )
    steps = epochs * (len(train) // job.batch)
    rows = []
    for name, (role, _) in engines.items():
        engine = Engine(name, role, steps * job.batch, lambda: lambda: None)
        if name in missing:
            rows.append(Row("endtoend", case, name, role, "images", missing=missing[name]))
            continue
        row = rates("endtoend", case, engine, "images", seconds[name])
        note = _note(scores[name], scores[PEER] if name != PEER else [])
        note += f"; before training {_note(fresh, [])}" if name == PEER else ""
        rows.append(replace(row, note=note))
    return rows


def _split(beton: Beton, images: int, held_out: int) -> tuple[Beton, Beton]:
    """Two disjoint stratified draws of at most ``images`` and ``held_out``."""
    labels = torch.from_numpy(beton.label)
    rest, val = stratified_split(labels, min(0.2, held_out / len(beton)), seed=0)
    return drawn(subset(beton, rest.numpy()), images), subset(beton, val.numpy())


def ours(
    job: Job, seed: int, bn_per_view: bool = False, precision: torch.dtype = torch.float32
) -> tuple[nn.Module, float]:
    """The encoder that our loader, views and trainer trained, and the seconds it took."""
    encoder, projector = job.build(seed)
    objective = build_objective("simclr", projector.out_features, temperature=TEMPERATURE)
    classes = len(job.train.classes)
    learner = Learner(encoder, projector, objective, classes, bn_per_view=bn_per_view)
    groups = [*parameter_groups([encoder, projector], DECAY), probe_group(learner.probe, 0.1)]
    manifest = job.train.manifest
    loader = open_loader(
        job.train, [Crop(job.size, 2)], job.batch, device=job.plan.device,
        workers=job.plan.workers, seed=seed,
    )  # fmt: skip
    with closing(loader):
        trainer = Trainer(
            learner,
            loader,
            job.optimizer(groups),
            [Augmentation(PRESETS["simclr"], manifest.mean, manifest.std)],
            epochs=job.epochs,
            warmup_epochs=WARMUP_EPOCHS,
            warmup_lr=WARMUP_RATE,
            precision=precision,
            seed=seed,
        )
        start = time.perf_counter()
        for _ in range(job.epochs):
            for batch in trainer.epoch():
                trainer.train_step(batch)
        _wait()
        return encoder, time.perf_counter() - start


def lightlys(job: Job, seed: int) -> tuple[nn.Module, float]:
    """The same in float32, as lightly's examples do: its transform and loss, torch's DataLoader."""
    from lightly.loss import NTXentLoss
    from lightly.transforms import SimCLRTransform

    device, manifest = job.plan.device, job.train.manifest
    normalize = {"mean": list(manifest.mean), "std": list(manifest.std)}
    encoder, projector = job.build(seed)
    model = nn.Sequential(encoder, projector).to(device).train()
    loss = NTXentLoss(temperature=TEMPERATURE)
    optimizer = job.optimizer(parameter_groups([model], DECAY))
    torch.manual_seed(seed)  # of the order and of the workers' views
    loader = DataLoader(
        RawImages(job.train, SimCLRTransform(input_size=job.size, normalize=normalize)),
        batch_size=job.batch,
        shuffle=True,
        drop_last=True,
        num_workers=job.plan.workers,
        persistent_workers=True,
        pin_memory=device.type == "cuda",
    )
    step, total = 0, job.epochs * len(loader)
    start = time.perf_counter()
    for _ in range(job.epochs):
        for (first, second), _ in loader:
            set_rates(optimizer, step, total, WARMUP_EPOCHS * len(loader), WARMUP_RATE)
            views = (view.to(device, non_blocking=True) for view in (first, second))
            loss(*(model(view) for view in views)).backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
    _wait()
    return encoder, time.perf_counter() - start


class RawImages(Dataset[Any]):
    """A raw beton's images through ``transform``, and labels; no file is opened or decoded."""

    def __init__(self, beton: Beton, transform: Callable[[Image.Image], Any]) -> None:
        self.beton, self.transform = beton, transform

    def __len__(self) -> int:
        return len(self.beton)

    def __getitem__(self, position: int) -> Any:
        shape = int(self.beton.height[position]), int(self.beton.width[position]), 3
        image = Image.fromarray(self.beton.stored(position).reshape(shape))
        return self.transform(image), int(self.beton.label[position])


PEER = "lightly, torch DataLoader"
ENGINES: dict[str, tuple[Role, Callable[[Job, int], tuple[nn.Module, float]]]] = {
    "ours, both views in one pass": ("ours", ours),
    "ours, batch norm per view": ("ours", partial(ours, bn_per_view=True)),
    PEER: ("peer", lightlys),
}
"""Name -> role, function of job and seed that trains an encoder, in float32."""


def _faster(device: torch.device) -> dict[str, tuple[Role, Callable[..., tuple[nn.Module, float]]]]:
    """Ours in the precision that ``train`` would choose, where that is another one."""
    precision = choose_precision("auto", device)
    if precision == torch.float32:
        return {}
    name = f"ours, both views in one pass, {str(precision).removeprefix('torch.')}"
    return {name: ("ours", partial(ours, precision=precision))}


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _score(encoder: nn.Module, job: Job, val: Beton) -> Scores:
    """Top-1 in per cent of both probes on center crops."""
    encoder = folded(encoder).to(memory_format=torch.channels_last)

    def embed(beton: Beton) -> Features:
        manifest = job.train.manifest
        loader = open_loader(
            beton, [Center(job.size)], min(512, len(beton)), device=job.plan.device,
            workers=job.plan.workers, shuffle=False, drop_last=False,
        )  # fmt: skip
        with closing(loader):
            return features(encoder, loader, mean=manifest.mean, std=manifest.std)

    train, held_out, classes = embed(job.train), embed(val), len(val.classes)
    return {
        "linear": 100 * logistic(train, held_out, classes).metrics["top1"],
        "kNN": 100 * knn(train, held_out, classes, k=min(20, len(train))).metrics["top1"],
    }


def _note(scores: Sequence[Scores], peer: Sequence[Scores]) -> str:
    """Mean ± standard deviation of each probe, and the paired difference to the peer."""
    parts = []
    for probe in ("linear", "kNN"):
        values = [score[probe] for score in scores]
        text = f"{probe} {mean(values):.2f}"
        if len(values) > 1:
            text += f" ± {stdev(values):.2f}"
        if peer:
            text += f" ({paired(values, [score[probe] for score in peer])})"
        parts.append(text)
    return "; ".join(parts)


def paired(values: Sequence[float], others: Sequence[float]) -> str:
    """The mean of ``values`` minus ``others``, seed by seed, with a 95 % t interval from n > 1."""
    gains = [value - other for value, other in zip(values, others, strict=True)]
    text = f"minus {PEER.partition(',')[0]} {mean(gains):+.2f}"
    if len(gains) > 1:
        from scipy.stats import t

        half = float(t.ppf(0.975, len(gains) - 1)) * stdev(gains) / len(gains) ** 0.5
        text += f", 95 % {mean(gains) - half:+.2f} to {mean(gains) + half:+.2f}"
    return text
