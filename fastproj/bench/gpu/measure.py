"""Clocks, memory and ceilings of a device, for the acceptance run; on a CPU they work as well."""

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from statistics import median
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from fastproj.bench.gpu.record import Figure, figure
from fastproj.loaders import Batch
from fastproj.training.trainer import Trainer


class Sizes(NamedTuple):
    """How much is measured: on a GPU, and so little that a CPU does it in a minute."""

    copy: int  # bytes
    product: int  # rows and columns
    convolution: int  # images of 64 x 32 x 32
    repeats: int  # of a timed call
    steps: int  # in one timed window of training
    windows: int


FULL = Sizes(2**31, 8192, 1024, 20, 40, 5)
TINY = Sizes(2**20, 64, 4, 3, 1, 2)


def wait(device: torch.device) -> None:
    """Until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(call: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    """Seconds of each of ``repeats`` calls after two more; the device is done at both ends."""
    taken = []
    for _ in range(2 + repeats):
        wait(device)
        start = time.perf_counter()
        call()
        wait(device)
        taken.append(time.perf_counter() - start)
    return taken[2:]


class Peak:
    """The most device memory that tensors took since ``with`` began; None on a CPU."""

    bytes: int | None = None


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    peak = Peak()
    if device.type == "cuda":
        wait(device)
        torch.cuda.reset_peak_memory_stats(device)
    yield peak
    if device.type == "cuda":
        wait(device)
        peak.bytes = torch.cuda.max_memory_allocated(device)


class Ceilings(NamedTuple):
    """What the device does at best: bytes/s copied (read and written), and bfloat16 FLOP/s."""

    copy: float
    product: float
    convolution: float


def ceilings(device: torch.device, sizes: Sizes) -> tuple[Ceilings, list[Figure]]:
    """Copy a large tensor, multiply two matrices, convolve 64 channels of 32 x 32 with 3 x 3."""
    half = torch.bfloat16
    source = torch.zeros(sizes.copy, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    one, other = (torch.randn(sizes.product, sizes.product, device=device, dtype=half)
                  for _ in range(2))  # fmt: skip
    images = torch.randn(sizes.convolution, 64, 32, 32, device=device, dtype=half)
    images = images.to(memory_format=torch.channels_last)
    weight = torch.randn(64, 64, 3, 3, device=device, dtype=half)
    weight = weight.to(memory_format=torch.channels_last)
    work: dict[str, tuple[Callable[[], object], float, str]] = {
        "copy": (lambda: target.copy_(source), 2.0 * sizes.copy, "GB/s"),
        "bfloat16 product": (lambda: one @ other, 2.0 * sizes.product**3, "TFLOP/s"),
        "64-channel convolution": (
            lambda: torch.conv2d(images, weight, padding=1),
            2.0 * sizes.convolution * 32 * 32 * 64 * 64 * 9, "TFLOP/s",
        ),
    }  # fmt: skip
    figures = []
    for name, (call, amount, unit) in work.items():
        scale = {"GB/s": 1e9, "TFLOP/s": 1e12}[unit]
        taken = seconds_of(call, device, sizes.repeats)
        figures.append(figure(f"ceiling: {name}", unit, [amount / scale / s for s in taken]))
    best = [one.median * {"GB/s": 1e9, "TFLOP/s": 1e12}[one.unit] for one in figures]
    return Ceilings(*best), figures


def flops(trainer: Trainer) -> float:
    """Floating-point operations of the matrix products and convolutions of one step.

    torch counts those of a forward pass; a backward pass has twice as many.
    """
    crop, images = trainer.loader.crops[0], trainer.loader.order.batch_size
    shape = (crop.num_views * images, 3, crop.size, crop.size)
    views = torch.zeros(shape, device=trainer.device).to(memory_format=torch.channels_last)
    labels = torch.zeros(images, dtype=torch.int64, device=trainer.device)
    with FlopCounterMode(display=False) as counter, torch.compiler.set_stance("force_eager"):
        trainer.learner((views,), labels)
    return 3.0 * counter.get_total_flops()


def training(
    name: str, trainer: Trainer, sizes: Sizes, ceiling: float, epoch: int = 50_000
) -> list[Figure]:
    """Images/s of real steps with the trainer's own loader, and seconds an epoch at that rate.

    After a warm-up, ``sizes.windows`` windows of ``sizes.steps`` steps are timed, with one wait for
    the device at the end of each. ``data_wait`` is the host's time in the loader, an upper bound.
    ``ceiling``: FLOP/s of the device at best; ``epoch``: images of the set that is meant.
    """
    device, images = trainer.device, trainer.loader.order.batch_size
    rates, waits = [], []
    work = flops(trainer)
    with peak_memory(device) as peak:
        batches = endless(trainer)
        for batch in islice(batches, 1 + sizes.steps // 2):  # compiles, and fills the loader
            trainer.train_step(batch)
        for _ in range(sizes.windows):
            wait(device)
            start, waited = time.perf_counter(), 0.0
            for _ in range(sizes.steps):
                before = time.perf_counter()
                batch = next(batches)
                waited += time.perf_counter() - before
                trainer.train_step(batch)
            wait(device)
            taken = time.perf_counter() - start
            rates.append(sizes.steps * images / taken)
            waits.append(waited / taken)
        batches.close()
    more: dict[str, Any] = {
        "peak_bytes": peak.bytes,
        "data_wait": median(waits),
        "share": work / images * median(rates) / ceiling,
    }
    return [
        figure(f"{name}, images/s", "images/s", rates, **more),
        figure(f"{name}, an epoch", "s", [epoch / rate for rate in rates],
               note=f"{epoch:,} images at these rates", **more),
    ]  # fmt: skip


def endless(trainer: Trainer) -> Generator[Batch, None, None]:
    """The trainer's batches, epoch after epoch; close it to end the loader's threads."""
    try:
        while True:
            yield from trainer.epoch()
    finally:
        trainer.loader.close()


def parts_of_a_step(name: str, trainer: Trainer, repeats: int) -> Iterator[Figure]:
    """Milliseconds of crop, views, forward, backward and optimizer, each waited for on its own.

    Their sum is more than a step's time, in which the host runs ahead of the device.
    """
    device = trainer.device
    batches = endless(trainer)
    taken: dict[str, list[float]] = {}

    def timed(part: str, call: Callable[[], Any]) -> Any:
        wait(device)
        start = time.perf_counter()
        result = call()
        wait(device)
        taken.setdefault(part, []).append(1e3 * (time.perf_counter() - start))
        return result

    for _ in range(2 + repeats):
        batch = timed("crop", lambda: next(batches))
        views = timed("views", partial(trainer._augment, batch))[0]
        with torch.autocast(device.type, trainer.precision,
                            enabled=trainer.precision is not torch.float32):  # fmt: skip
            step = timed("forward", partial(trainer.model, views, batch.labels))
        loss = step.terms["objective"] + step.probe_loss
        timed("backward", loss.backward)
        timed("optimizer", trainer.optimizer.step)
        trainer.optimizer.zero_grad()
    batches.close()
    for part, milliseconds in taken.items():
        yield figure(f"{name}, {part}", "ms", milliseconds[2:])


def profile(name: str, trainer: Trainer, steps: int, rows: int = 30) -> dict[str, Any]:
    """The operations of ``steps`` steps that took the device (or a CPU) longest."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if trainer.device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    batches = endless(trainer)
    for batch in islice(batches, 3):
        trainer.train_step(batch)
    wait(trainer.device)
    with torch.profiler.profile(activities=kinds) as seen:
        for batch in islice(batches, steps):
            trainer.train_step(batch)
        wait(trainer.device)
    batches.close()
    own, events = "self_cpu_time_total", list(seen.key_averages())
    if len(kinds) == 2:  # kernels alone: an operation's device time is that of its kernels
        own, cuda = "self_device_time_total", torch.autograd.DeviceType.CUDA
        events = [e for e in events if e.device_type == cuda and not e.is_user_annotation]
    found = sorted(events, key=lambda event: -getattr(event, own))[:rows]
    total = sum(getattr(event, own) for event in events)
    return {
        "name": name,
        "steps": steps,
        "milliseconds_per_step": total / 1e3 / steps,
        "profile": [
            {"operation": event.key[:120], "calls": event.count / steps,
             "milliseconds": getattr(event, own) / 1e3 / steps}
            for event in found
        ],
    }  # fmt: skip
