"""Training steps with a loader beside the same steps on ready data: the cost of loading."""

import time
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from statistics import median
from typing import Any

import torch

from fastproj.augment.draw import PRESETS
from fastproj.augment.views import Augmentation
from fastproj.bench import Engine, Plan, Row, compare
from fastproj.bench.images import several_times
from fastproj.data.beton import Beton
from fastproj.loaders import Crop, Loader, open_loader
from fastproj.loaders.resident import is_uniform
from fastproj.models.encoders import build_encoder, num_features
from fastproj.models.projector import build_projector
from fastproj.objective import build_objective
from fastproj.training.learner import Learner
from fastproj.training.optim import build_optimizer, parameter_groups, probe_group
from fastproj.training.trainer import Trainer

STEPS = {"cpu": 4, "cuda": 80}  # per call; it takes seconds, so the first batch's wait is small
TURNS = 5  # per requested repeat, because a shared host's noise exceeds the difference
CROPS = [Crop(32, 2, (0.08, 1.0))]


def run(
    plan: Plan, batch: int = 256, encoder: str = "resnet_small", steps: int | None = None
) -> list[Row]:
    """SimCLR on crops of 32 pixels: steps with each engine from a new iterator, then the limit.

    The limit repeats the same steps on one batch. All take turns on one trainer, so they share
    model, optimizer and thread pools.
    """
    beton = plan.small
    if beton is None:
        return []
    count = steps or STEPS[plan.device.type]
    if len(beton) < count * batch:  # the steps of one call are of one epoch
        beton = several_times(beton, count * batch)

    def loader(engine: str) -> Loader:
        return open_loader(
            beton, CROPS, batch, device=plan.device, engine=engine, workers=plan.workers
        )

    trainer = simclr(beton, loader("auto"), encoder)
    waits: dict[str, list[float]] = {}
    engines = [
        Engine(name, "ours", count * batch, _trained(trainer, loader, name, count, waits))
        for name in ["resident"] * is_uniform(beton) + ["stream"]
    ]
    ready = Engine("the step on ready data", "limit", count * batch, _ready(trainer, count))
    case = f"{encoder}, SimCLR, 32 px, batch {batch}"
    turns = TURNS * plan.repeats
    rows = compare("step", case, "images", [*engines, ready], 1, turns)
    return [
        replace(row, note=f"data wait {median(waits[row.engine][-turns:]):.1%}")
        if row.engine in waits
        else row
        for row in rows
    ]


def simclr(beton: Beton, loader: Loader, encoder: str, **options: Any) -> Trainer:
    """A trainer of SimCLR with the default projector, LARS and the online probe.

    ``options`` are the trainer's; it compiles on a GPU by default.
    """
    torch.manual_seed(0)
    body = build_encoder(encoder, "cifar")
    head = build_projector("mlp", num_features(body))
    objective = build_objective("simclr", head.out_features)
    learner = Learner(body, head, objective, len(beton.classes)).to(loader.device)
    groups = [*parameter_groups([body, head], 1e-4), probe_group(learner.probe, 0.1)]
    optimizer = build_optimizer("lars", groups, lr=0.4)
    views = Augmentation(PRESETS["simclr"], beton.manifest.mean, beton.manifest.std)
    options = {"compile": loader.device.type == "cuda", **options}
    return Trainer(learner, loader, optimizer, [views], **options)


def _trained(
    trainer: Trainer,
    open_engine: Callable[[str], Loader],
    engine: str,
    count: int,
    waits: dict[str, list[float]],
) -> Callable[[], Callable[[], object]]:
    def prepare() -> Callable[[], object]:
        loader = open_engine(engine)
        waits[engine] = []

        def call() -> None:
            loader.seek(0, 0)
            waited, start = 0.0, time.perf_counter()
            before = start
            for batch in islice(loader, count):
                waited += time.perf_counter() - before
                trainer.train_step(batch)
                before = time.perf_counter()
            loader.close()
            waits[engine].append(waited / (time.perf_counter() - start))

        return call

    return prepare


def _ready(trainer: Trainer, count: int) -> Callable[[], Callable[[], object]]:
    def prepare() -> Callable[[], object]:
        batch = next(iter(trainer.loader))
        trainer.loader.close()

        def call() -> None:
            for _ in range(count):
                trainer.train_step(batch)

        return call

    return prepare
