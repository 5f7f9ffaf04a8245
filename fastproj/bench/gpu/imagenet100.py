"""Part 3: ImageNet-100 on a device: two ways to load it, and what is dear at that size."""

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastproj.bench.gpu.measure import (
    FULL,
    TINY,
    ceilings,
    parts_of_a_step,
    peak_memory,
    seconds_of,
    training,
    wait,
)
from fastproj.bench.gpu.record import Figure, Item, Record, figure
from fastproj.bench.gpu.runs import Sets, options, settings_of, trainer_of
from fastproj.bench.heads import HEADS, PAPER, stepper
from fastproj.bench.images import several_times
from fastproj.core.device import exact_float32
from fastproj.data.beton import Beton
from fastproj.evaluation.features import features
from fastproj.evaluation.probes.common import ProbeResult
from fastproj.evaluation.probes.neighbors import knn
from fastproj.evaluation.probes.regression import logistic
from fastproj.loaders import Center, Crop, open_loader
from fastproj.loaders.boxes import draw
from fastproj.loaders.crop import compiled_crop_batch, crop_batch
from fastproj.loaders.fill import Fill
from fastproj.loaders.stream import CROPPING_THREADS
from fastproj.training.build import build_learner

IMAGES = 126_689  # of ImageNet-100's training set
READ = 32_768  # of them: enough that no cache holds them
CORES = (1, 4, 8, 16)
ON_GPU = "stream cropped on the GPU"  # with as many threads as still leave it the crops


def items(sets: Sets, record: Record, folder: Path) -> dict[str, Item]:
    batches = (4,) if sets.tiny else (256, 1024)
    found: dict[str, Item] = {}
    for batch in batches:
        for engine in ("stream", "resident", ON_GPU):
            found[f"steps {engine} batch {batch}"] = partial(steps, sets, engine, batch)
    found |= {
        "parts of a step": partial(parts, sets, batches[0]),
        "decoding": partial(decoding, sets),
        "crops": partial(crops, sets, batches),
        "sparse head": partial(sparse, sets),
        "the sparse head's step": partial(sparse_step, sets, batches[0]),
        "evaluation": partial(evaluation, sets),
    }
    return found


def repeated(sets: Sets, beton: Beton) -> Beton:
    """The set, so often that steps can be timed on it."""
    return several_times(beton, 64 if sets.tiny else READ)


def given(
    sets: Sets,
    batch: int,
    engine: str,
    more: Mapping[str, Any] | None = None,
    recipe: str = "in100",
) -> dict[str, Any]:
    """The settings of a run of ``recipe``, and ``more``."""
    beton = sets.squares if engine == "resident" else sets.photos
    found = options(sets, recipe, batch, 100)
    if engine == ON_GPU:
        found["data.workers"] = min(sets.workers, CROPPING_THREADS - 1)
    return found | {
        "data.train": beton.path, "data.engine": "stream" if engine == ON_GPU else engine,
        "train.compile": "true", "views.size": sets.size, **(more or {}),
    }  # fmt: skip


def steps(sets: Sets, engine: str, batch: int) -> Iterator[Figure]:
    """Steps of the recipe, whose two views go through batch norm one by one, and in one pass."""
    sizes = TINY if sets.tiny else FULL
    best = ceilings(sets.device, sizes)[0].product
    beton = repeated(sets, sets.squares if engine == "resident" else sets.photos)
    for per_view in (False, True):
        how = "batch norm per view" if per_view else "one pass"
        trainer = trainer_of(
            sets, given(sets, batch, engine, {"model.bn_per_view": per_view}), beton
        )
        name = f"ImageNet-100, {engine}, batch {batch}, {how}"
        yield from training(name, trainer, sizes, best, IMAGES)


def parts(sets: Sets, batch: int) -> Iterator[Figure]:
    trainer = trainer_of(
        sets,
        given(sets, batch, "resident", {"model.bn_per_view": False}),
        several_times(sets.squares, 2 * batch),
    )
    name = f"ImageNet-100, a step of batch {batch}"
    yield from parts_of_a_step(name, trainer, 2 if sets.tiny else 10)


def decoding(sets: Sets) -> Iterator[Figure]:
    """Images/s that threads decode, for a device to crop, and decode and crop themselves."""
    beton = several_times(sets.photos, 64 if sets.tiny else 8192)
    for threads in [count for count in CORES if count <= sets.workers]:
        for crop in (False, True):
            rates = [
                len(beton) / _decoded(sets, beton, threads, crop)
                for _ in range(1 if sets.tiny else 3)
            ]
            what = "decoded and cropped twice" if crop else "decoded"
            yield figure(f"ImageNet-100, {what} by {threads} threads", "images/s", rates)


def _decoded(sets: Sets, beton: Beton, threads: int, crop: bool) -> float:
    """Seconds that ``threads`` take for all images, without a step around it."""
    if crop:  # the engine itself on a CPU
        loader = open_loader(
            beton, [Crop(sets.size, 2)], min(256, len(beton)), engine="stream", workers=threads
        )
        with closing(loader):
            start = time.perf_counter()
            for _ in loader:
                pass
            return time.perf_counter() - start
    positions = np.arange(min(256, len(beton)))
    boxes = draw([Crop(sets.size, 2)], beton, positions, 0, 0)
    shape = (len(positions), int(beton.height.max()), int(beton.width.max()), 3)
    padded = torch.empty(shape, dtype=torch.uint8, pin_memory=sets.device.type == "cuda")
    times = -(-len(beton) // len(positions))
    start = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(times):
            fill = Fill(beton, positions, boxes, padded=padded)
            for job in [pool.submit(fill.run) for _ in range(threads)]:
                job.result()
    return (time.perf_counter() - start) * len(beton) / (times * len(positions))


def crops(sets: Sets, batches: tuple[int, ...]) -> Iterator[Figure]:
    """Milliseconds that a device takes to crop a batch: of photographs, and of squares."""
    longest, side = (48, 32) if sets.tiny else (400, 160)
    for batch in batches:
        for name, (height, width) in {
            "photographs": (longest, longest),
            "squares": (side, side),
        }.items():
            if name == "photographs" and batch > 256:
                continue
            images = torch.randint(
                0, 256, (batch, height, width, 3), dtype=torch.uint8, device=sets.device
            ).movedim(-1, 1)
            boxes = torch.tensor([height // 8, width // 8, height // 2, width // 2])
            boxes = boxes.expand(2, batch, 4).contiguous().to(sets.device)
            for way in ("eager", "compiled"):
                torch.compiler.reset()  # other sizes before would make this one's code dynamic
                crop = compiled_crop_batch() if way == "compiled" else crop_batch
                call: Callable[[], object] = partial(crop, images, boxes, sets.size)
                with peak_memory(sets.device) as peak:
                    taken = seconds_of(call, sets.device, 2 if sets.tiny else 20)
                what = f"ImageNet-100, cropping {batch} {name}, {way}"
                yield figure(what, "ms", [1e3 * s for s in taken], peak_bytes=peak.bytes)


def sparse(sets: Sets) -> Iterator[Figure]:
    """Forward, backward and a LARS step of the sparse layer alone, ours and plain torch."""
    sizes = (16, 64, 16, 4) if sets.tiny else PAPER
    for name in HEADS:
        with peak_memory(sets.device) as peak:
            step = stepper(name, 8 if sets.tiny else 512, sizes, sets.device)
            taken = seconds_of(step, sets.device, 2 if sets.tiny else 20)
        what = f"sparse head at the paper's size, {name}"
        yield figure(what, "ms", [1e3 * s for s in taken], peak_bytes=peak.bytes)


def sparse_step(sets: Sets, batch: int) -> Iterator[Figure]:
    """A whole step with the sparse projector, to be set beside the default one's."""
    sizes = TINY if sets.tiny else FULL
    more: dict[str, Any] = {"model.bn_per_view": False}
    if sets.tiny:
        more |= {"projector.latents": 64, "projector.k": 4}
    wanted = given(sets, batch, "resident", more, "in100_sparse")
    if sets.tiny:  # the recipe's projector has no hidden layer
        wanted = {k: v for k, v in wanted.items() if k not in ("projector.hidden", "projector.out")}
    trainer = trainer_of(sets, wanted, repeated(sets, sets.squares))
    best = ceilings(sets.device, sizes)[0].product
    yield from training(f"ImageNet-100, sparse head, batch {batch}", trainer, sizes, best, IMAGES)


def evaluation(sets: Sets) -> Iterator[Figure]:
    """Seconds of features of ImageNet-100's size, of kNN and of logistic regression on them."""
    images, held = (64, 16) if sets.tiny else (IMAGES, 5_000)
    settings = settings_of(given(sets, 4, "resident"))
    encoder = build_learner(settings, 100).encoder.to(sets.device)
    encoder.to(memory_format=torch.channels_last)
    found = []
    for count in (images, held):
        beton = several_times(sets.squares, count)
        loader = open_loader(
            beton, [Center(sets.size, 0.875)], min(512, len(beton)), device=sets.device,
            shuffle=False, drop_last=False, workers=sets.workers,
        )  # fmt: skip
        with closing(loader), exact_float32(), peak_memory(sets.device) as peak:
            start = time.perf_counter()
            found.append(features(encoder, loader))
            wait(sets.device)
            taken = time.perf_counter() - start
        name = f"ImageNet-100, features of {len(beton):,} images"
        yield figure(name, "s", [taken], peak_bytes=peak.bytes)
    train, val = found
    probes: dict[str, Callable[..., ProbeResult]] = {"kNN": knn, "logistic regression": logistic}
    for name, probe in probes.items():
        with exact_float32(), peak_memory(sets.device) as peak:
            result = probe(train, val, len(sets.squares.classes))
        yield figure(f"ImageNet-100, {name}", "s", [result.seconds], peak_bytes=peak.bytes)
