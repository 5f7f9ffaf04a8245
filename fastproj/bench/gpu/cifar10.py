"""Part 2: CIFAR-10 on a device: what it does at best, what a run does of that, and where to."""

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from fastproj.bench.gpu.measure import (
    FULL,
    TINY,
    Ceilings,
    ceilings,
    flops,
    parts_of_a_step,
    peak_memory,
    profile,
    training,
)
from fastproj.bench.gpu.record import Figure, Item, NotMeasuredError, Record, figure
from fastproj.bench.gpu.runs import Sets, options, train_run, trainer_of
from fastproj.evaluate import evaluate
from fastproj.runs import journal
from fastproj.runs.folder import RunFolder
from fastproj.settings import RUN, load

EPOCHS = 4  # of a timed run; the first compiles and is not counted
ACCURACY_SEEDS, ACCURACY_EPOCHS = 5, 100  # seeds at most: those that fit


def items(sets: Sets, record: Record, folder: Path) -> dict[str, Item]:
    """What explains the most comes first: a part that is cut has it. No name has a comma."""
    found: dict[str, Item] = {"ceilings": partial(at_best, sets)}
    batches = (4,) if sets.tiny else (256, 1024, 512)
    for batch in batches:
        found[f"steps batch {batch}"] = partial(steps, sets, batch)
    found["parts of a step"] = partial(parts, sets, batches[0])
    found["profile"] = partial(slowest, sets, batches[0])
    ways = ("true",) if sets.device.type == "cpu" else ("true", "graphs")
    for batch in batches:
        for way in ways:
            for saving in (True, False):
                name = run_name(batch, way, saving)
                found[name.replace(",", "")] = partial(epochs, sets, folder, batch, way, saving)
    found["accuracy"] = partial(accuracy, sets, record, folder)
    return found


def run_name(batch: int, way: str, saving: bool) -> str:
    how = {"true": "compiled", "graphs": "CUDA graphs"}[way]
    return f"CIFAR-10, batch {batch}, {how}, checkpoints {'on' if saving else 'off'}"


def at_best(sets: Sets) -> Iterator[Figure]:
    yield from ceilings(sets.device, TINY if sets.tiny else FULL)[1]


def steps(sets: Sets, batch: int) -> Iterator[Figure]:
    """Steps without a run around them, eager too, as shares of the product's FLOP/s."""
    sizes = TINY if sets.tiny else FULL
    best: Ceilings = ceilings(sets.device, sizes)[0]
    for way in ("true", "false"):
        trainer = trainer_of(sets, options(sets, "cifar10", batch, 200) | {"train.compile": way})
        how = "compiled" if way == "true" else "eager"
        yield from training(
            f"CIFAR-10, steps of batch {batch}, {how}", trainer, sizes, best.product
        )


def parts(sets: Sets, batch: int) -> Iterator[Figure]:
    given = options(sets, "cifar10", batch, 200) | {"train.compile": "true"}
    name = f"CIFAR-10, a step of batch {batch}"
    yield from parts_of_a_step(name, trainer_of(sets, given), 3 if sets.tiny else 20)


def slowest(sets: Sets, batch: int) -> Iterator[dict[str, Any]]:
    given = options(sets, "cifar10", batch, 200) | {"train.compile": "true"}
    name = f"CIFAR-10, a step of batch {batch}, compiled"
    yield profile(name, trainer_of(sets, given), 2 if sets.tiny else 10)


def epochs(sets: Sets, folder: Path, batch: int, way: str, saving: bool) -> Iterator[Figure]:
    """A run by the command itself: seconds from one epoch's end to the next one's."""
    name = run_name(batch, way, saving)
    given = options(sets, "cifar10", batch, EPOCHS) | {
        "train.compile": way,
        "train.checkpoint_every": 1 if saving else EPOCHS,
        "run.name": name.replace(", ", "-").replace(" ", "-"),
    }
    with peak_memory(sets.device) as peak:
        run = train_run(sets, folder, given)
    events = journal.read(RunFolder(run).metrics)
    ends = [event for event in events if event["event"] == "epoch"]
    whole = [b["time"] - a["time"] for a, b in zip(ends, ends[1:], strict=False)]
    spent = ends[-1]["seconds"]
    wait = spent["data_wait"] / max(spent["data_wait"] + spent["step"], 1e-9)
    best = ceilings(sets.device, TINY if sets.tiny else FULL)[0].product
    share = flops(trainer_of(sets, given)) * ends[-1]["steps"] / median(whole) / best
    yield figure(
        f"{name}, an epoch", "s", whole, peak_bytes=peak.bytes, data_wait=wait, share=share,
        note=f"{ends[-1]['steps']} steps, end to end with logging, diagnostics and checkpoints",
    )  # fmt: skip


def accuracy(sets: Sets, record: Record, folder: Path) -> Iterator[Figure]:
    """``cifar10_fast`` from start to score, as many seeds as the time allows."""
    if not sets.real:
        raise NotMeasuredError(
            "it needs CIFAR-10 itself: give --bench.small TRAIN with val.beton beside it"
        )
    scores: list[float] = []
    minutes: list[float] = []
    for seed in range(1 if sets.tiny else ACCURACY_SEEDS):
        if minutes and record.left < 60 * max(minutes):
            break
        start = time.perf_counter()
        batch, epochs = (8, 2) if sets.tiny else (1024, ACCURACY_EPOCHS)
        given = options(sets, "cifar10_fast", batch, epochs)
        given |= {"run.name": f"accuracy-{seed}", "run.seed": seed, "data.engine": "auto"}
        run = RunFolder(train_run(sets, folder, given))
        minutes.append((time.perf_counter() - start) / 60)
        scores.append(score(sets, run))
        done = f"{len(scores)} of at most {ACCURACY_SEEDS} seeds; {given['optim.epochs']} epochs"
        yield figure("CIFAR-10 fast, linear top-1", "%", scores, note=done)
        yield figure("CIFAR-10 fast, training", "min", minutes, note=done)


def score(sets: Sets, run: RunFolder) -> float:
    """Top-1 of logistic regression on the run's frozen features, per cent."""
    argv = ["--run.device", sets.device.type, "--eval.probes", "logistic", "--eval.cache", "false"]
    settings = load(RUN, argv, "python -m fastproj.evaluate", "", config=run.config)
    evaluation, _ = evaluate(run, settings)
    (row,) = (row for row in evaluation.rows if row.probe == "logistic")
    return 100 * row.metrics["top1"]
