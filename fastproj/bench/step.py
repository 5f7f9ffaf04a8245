"""Training as it is done, beside the same step on data that is ready: what the loader costs."""

import time
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from statistics import median

from fastproj import dist
from fastproj.bench import Engine, Plan, Row, compare
from fastproj.loaders import open_loader
from fastproj.loaders.resident import is_uniform
from fastproj.settings import RUN, load
from fastproj.trainer import Trainer

STEPS = {"cpu": 4, "cuda": 80}  # a call: seconds, so that the first batch's wait counts as little
TURNS = 5  # for each that was asked for: what is looked for is less than a shared host's noise


def run(
    plan: Plan, batch: int = 256, encoder: str = "resnet_small", steps: int | None = None
) -> list[Row]:
    """SimCLR on crops of 32 pixels: steps through each engine, from a fresh iterator on, and the
    same steps on one batch again and again.

    All take turns on one trainer, so model, optimiser and thread pools are the same.
    """
    if plan.small is None:
        return []
    count = steps or STEPS[plan.device.type]
    given = {"data.train": plan.small.path, "data.workers": plan.workers, "views.size": 32,
             "model.encoder": encoder, "optim.batch_size": batch,
             "run.device": plan.device.type}  # fmt: skip
    settings = load(RUN, [f"--{name}={value}" for name, value in given.items()], "bench", "")
    trainer = Trainer(settings, dist.Rank(0, 1, 0), plan.device)
    waits: dict[str, list[float]] = {}
    engines = [
        Engine(name, "ours", count * batch, _trained(trainer, name, count, waits, plan.workers))
        for name in ["resident"] * is_uniform(plan.small) + ["stream"]
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


def _trained(
    trainer: Trainer, engine: str, count: int, waits: dict[str, list[float]], workers: int
) -> Callable[[], Callable[[], object]]:
    def prepare() -> Callable[[], object]:
        loader = open_loader(
            trainer.beton, trainer.loader.groups, trainer.settings.optim.batch_size,
            device=trainer.device, engine=engine, workers=workers,
        )  # fmt: skip
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
