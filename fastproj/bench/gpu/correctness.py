"""Part 1: what a GPU computes equals what a CPU does, and what a test says of it holds."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastproj.augment.draw import PRESETS
from fastproj.augment.views import Augmentation
from fastproj.bench.gpu.measure import wait
from fastproj.bench.gpu.record import Check, Item, NotMeasuredError, Record
from fastproj.bench.gpu.runs import Sets, options, train_run
from fastproj.bench.logistic import correlated
from fastproj.bench.step import simclr
from fastproj.core.device import exact_float32
from fastproj.core.errors import InputError
from fastproj.evaluation.features import Features
from fastproj.evaluation.probes.neighbors import knn
from fastproj.evaluation.probes.regression import logistic
from fastproj.loaders import Crop, open_loader
from fastproj.loaders.resident import is_uniform
from fastproj.runs import checkpoint, journal
from fastproj.runs.folder import RunFolder

CHECKOUT = Path(__file__).parents[3]
CROPS = {"stream": 2, "resident": 2, "dali": 255}  # gray levels that a pixel may differ by
MEAN_APART = 2.0  # gray levels: the loaders' contract, for every engine


def items(sets: Sets, record: Record, folder: Path) -> dict[str, Item]:
    """The fast tests first, the slow ones last: they may take what time is left."""
    return {
        "tests marked gpu": partial(tests, "gpu and not slow", record, sets.tiny),
        "crops of each engine": partial(crops, sets),
        "views": partial(views, sets),
        "batches in a race": partial(race, sets),
        "compiled steps": partial(compiled, sets),
        "a resumed run": partial(resumed, sets, folder),
        "probes": partial(probes, sets),
        "slow tests marked gpu": partial(tests, "gpu and slow", record, sets.tiny),
    }


def tests(marked: str, record: Record, tiny: bool) -> Iterator[Check | dict[str, Any]]:
    """The suite's own tests of a GPU; those that ran before the time is up are kept."""
    if importlib.util.find_spec("pytest") is None:
        raise NotMeasuredError("pytest is not installed")
    folder = CHECKOUT / "tests"
    if not folder.is_dir():
        raise NotMeasuredError("the tests are in a checkout only")
    files = [str(path) for path in sorted(folder.rglob("test_*.py"))
             if "pytest.mark.gpu" in path.read_text("utf-8")]  # fmt: skip
    if tiny:
        files = [path for path in files if path.endswith("test_crop.py")]
    command = [sys.executable, "-m", "pytest", "-v", "-m", marked, "-p", "no:cacheprovider",
               "--continue-on-collection-errors", *files]  # fmt: skip
    with subprocess.Popen(
        command, cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "4"},
    ) as process:  # fmt: skip
        try:
            text = process.communicate(timeout=max(record.left, 30.0))[0]
            cut = ""
        except subprocess.TimeoutExpired:
            process.kill()
            text, cut = process.communicate()[0], ", cut when the time was spent"
    found = re.findall(r"^(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED)\b", text, re.M)
    count = {word: sum(end == word for _, end in found) for word in ("PASSED", "FAILED", "SKIPPED")}
    wrong = [name for name, end in found if end in ("FAILED", "ERROR")]
    broken = re.findall(r"^(ERROR .*)$", text, re.M)
    seen = ", ".join(f"{number} {word.lower()}" for word, number in count.items()) + cut
    yield Check(f"tests marked {marked}", not wrong and not broken, seen)
    if wrong or broken:
        yield {"name": f"tests marked {marked}: what failed", "tests": wrong + broken,
               "end": text[-6000:]}  # fmt: skip


def crops(sets: Sets) -> Iterator[Check]:
    """Every engine on the device beside the threads on a CPU: the same samples, the same boxes."""
    for kind, beton in {"raw images": sets.small, "JPEGs": sets.photos}.items():
        size, batch = (32, 64) if kind == "raw images" else (sets.size, 16)
        given: dict[str, Any] = dict(
            crops=[Crop(size, 2)], batch_size=min(batch, len(beton)), seed=3
        )
        with closing(open_loader(beton, **given, engine="stream")) as loader:
            wanted = next(iter(loader))
        for name in (
            *("stream", "stream, one thread", "stream, one thread, compiled"),
            *("resident", "resident, compiled", "dali"),
        ):
            engine = name.partition(",")[0]  # one thread leaves the crops to a GPU
            workers = 1 if "one thread" in name else sets.workers
            if engine == "resident" and not is_uniform(beton):
                continue
            try:
                loader = open_loader(
                    beton, **given, engine=engine, device=sets.device, workers=workers
                )
            except InputError:  # DALI is not installed
                continue
            with closing(loader):
                if name.endswith("compiled"):
                    loader.compile()
                batch_there = next(iter(loader))
            there = batch_there.crops[0].cpu()
            apart = (there.int() - wanted.crops[0].int()).abs()
            same = torch.equal(batch_there.index.cpu(), wanted.index) and torch.equal(
                batch_there.labels.cpu(), wanted.labels
            )
            passed = same and apart.max() <= CROPS[engine] and apart.float().mean() <= MEAN_APART
            yield Check(
                f"crops of {name}, {kind}", bool(passed),
                f"at most {apart.max()}, on average {apart.float().mean():.3f} gray levels from "
                f"the CPU's, {'the same' if same else 'OTHER'} samples",
            )  # fmt: skip


def views(sets: Sets) -> Iterator[Check]:
    """The chain, eager and compiled, beside the native code of a CPU, on the same parameters."""
    for preset in ("simclr", "barlow"):
        cpu = Augmentation(PRESETS[preset], (0.5,) * 3, (0.25,) * 3)
        pixels = torch.randint(
            0, 256, (64, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
        ).to(memory_format=torch.channels_last)
        params = cpu.sample(32, torch.Generator().manual_seed(1))
        wanted = cpu(pixels, params)
        there = Augmentation(PRESETS[preset], (0.5,) * 3, (0.25,) * 3).to(sets.device)
        moved = type(params)(*(value.to(sets.device) for value in params))
        for way in ("eager", "compiled"):
            if way == "compiled":
                there.compile()
            found = there.chain(pixels.to(sets.device), moved).cpu()
            apart = (found - wanted).abs() * 0.25 * 255  # hue's branches may turn at a tie
            share = (apart > 0.5).float().mean().item()
            yield Check(
                f"views, {preset}, {way}", share < 1e-4,
                f"at most {apart.max():.3g} gray levels from the CPU's; {share:.1e} of the values "
                "by more than half a level",
            )  # fmt: skip


def race(sets: Sets) -> Iterator[Check]:
    """Batches at full speed equal those of which each is waited for: no memory is used too early.

    A race shows only where the device is behind the host, so each batch is followed by work.
    """
    steps = 3 if sets.tiny else 200
    busy = torch.randn(64 if sets.tiny else 4096, 64 if sets.tiny else 4096, device=sets.device)

    def sums(pause: bool) -> Tensor:
        found: list[Tensor] = []
        given: dict[str, Any] = dict(
            crops=[Crop(sets.size, 2)], batch_size=min(32, len(sets.photos)), seed=5
        )
        with closing(
            open_loader(sets.photos, **given, engine="stream", device=sets.device)
        ) as loader:
            while len(found) < steps:
                for batch in loader:
                    pixels = batch.crops[0].flatten(1).long()
                    place = torch.arange(pixels.shape[1], device=sets.device) % 1009 + 1
                    busy @ busy
                    found.append((pixels * place).sum(1).add(batch.index.repeat(2)).sum())
                    if pause:
                        wait(sets.device)
                    if len(found) == steps:
                        break
        return torch.stack(found).cpu()

    fast, slow = sums(False), sums(True)
    different = int((fast != slow).sum())
    yield Check(
        "stream at full speed equals stream with waits", different == 0,
        f"{different} of {steps} batches differ",
    )  # fmt: skip


def compiled(sets: Sets) -> Iterator[Check]:
    """Ten steps of SimCLR: losses of the compiled and of the graphed ones beside the eager ones.

    Tiny too, they are compiled to the end: on a CPU by its C++ compiler.
    """
    compiler = os.environ.get("CXX", "g++")
    if sets.device.type == "cpu" and shutil.which(compiler) is None:
        raise NotMeasuredError(f"no {compiler}, which compiles what torch.compile writes for a CPU")
    steps, batch = (2, 8) if sets.tiny else (10, 128)
    given: dict[str, Any] = dict(
        crops=[Crop(32, 2)], batch_size=batch, engine="stream", device=sets.device
    )
    ways: dict[str, dict[str, bool]] = {"eager": {}, "compiled": {"compile": True}}
    if sets.device.type == "cuda":
        ways["graphs"] = {"graphs": True}
    losses: dict[str, list[float]] = {}
    for way, more in ways.items():
        with (
            torch.compiler.set_stance("default"),
            closing(open_loader(sets.small, **given)) as loader,
        ):
            trainer = simclr(sets.small, loader, sets.encoder, **{"compile": False, **more})
            found: list[Tensor] = []
            while len(found) < steps:
                for ready in trainer.epoch():
                    found.append(trainer.train_step(ready)["loss"].clone())
                    if len(found) == steps:
                        break
        losses[way] = torch.stack(found).tolist()
        apart = max(abs(a - b) / abs(b) for a, b in zip(losses[way], losses["eager"], strict=True))
        if way != "eager":
            yield Check(
                f"{way} steps equal eager ones", apart < 0.01,
                f"losses of {steps} steps differ by at most {apart:.1e} of their value",
            )  # fmt: skip
    if sets.device.type != "cuda":
        raise NotMeasuredError("CUDA graphs are for a GPU")


def resumed(sets: Sets, folder: Path) -> Iterator[Check]:
    """A run that is stopped in its second epoch and goes on, beside one that is not stopped.

    The first ends with what a whole run ends with, up to 2 % or twice what two of those differ by.
    """
    given = options(sets, "cifar10", batch=16 if sets.tiny else 256, epochs=2)
    given["train.log_every"] = 1
    if not sets.tiny:
        given |= {"model.encoder": "resnet_small"}
    steps = 2 * (len(sets.small) // given["optim.batch_size"])
    stop = {"train.stop_after": steps // 2 + 1, "run.name": "stopped"}
    whole, again = (train_run(sets, folder, given | {"run.name": f"whole-{i}"}) for i in range(2))
    stopped = train_run(sets, folder, given | stop)
    train_run(sets, folder, given | {"run.name": "stopped", "run.resume": str(stopped)})
    ends = [checkpoint.load(_newest(run)) for run in (whole, again, stopped)]
    bits = [
        all(torch.equal(end["encoder"][k], ends[0]["encoder"][k]) for k in ends[0]["encoder"])
        for end in ends[1:]
    ]
    last = [_losses(run)[-1] for run in (whole, again, stopped)]
    runs, apart = (abs(loss - last[0]) / abs(last[0]) for loss in last[1:])
    near = apart <= max(0.02, 2 * runs)
    yield Check(
        "a resumed run ends as a whole one", bits[1] or (not bits[0] and near),
        f"weights equal to the bit: {bits[1]} (two whole runs: {bits[0]}); last losses differ by "
        f"{apart:.1e} (two whole runs: {runs:.1e})",
    )  # fmt: skip


def _newest(run: Path) -> Path:
    found = checkpoint.latest(RunFolder(run).checkpoints)
    assert found is not None
    return found


def _losses(run: Path) -> list[float]:
    return [e["loss"] for e in journal.read(RunFolder(run).metrics) if e["event"] == "step"]


def probes(sets: Sets) -> Iterator[Check]:
    """kNN and logistic regression of the same features on the device and on a CPU."""
    images, width = (300, 16) if sets.tiny else (10_000, 512)
    x, y = correlated(images, width, 10)
    held = images // 5
    functions: dict[str, Callable[..., Any]] = {"kNN": knn, "logistic regression": logistic}
    for name, probe in functions.items():
        found = []
        for device in (torch.device("cpu"), sets.device):
            all_of = Features(x.to(device), y.to(device))
            train = Features(all_of.features[held:], all_of.labels[held:])
            val = Features(all_of.features[:held], all_of.labels[:held])
            with exact_float32():
                found.append(probe(train, val))
        cpu, there = found
        apart = abs(cpu.metrics["top1"] - there.metrics["top1"])
        yield Check(
            f"{name} equals the CPU's", apart < 0.005,
            f"top-1 {there.metrics['top1']:.4f}, the CPU's {cpu.metrics['top1']:.4f}",
        )  # fmt: skip
