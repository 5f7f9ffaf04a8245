"""``python -m fastproj.bench gpu``: the parts of the acceptance run, their sets and their files."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from fastproj.bench.gpu import cifar10, correctness, data, imagenet100
from fastproj.bench.gpu.record import Item, Record
from fastproj.bench.gpu.runs import Sets
from fastproj.bench.images import describe
from fastproj.core.device import choose_device, prepare_device
from fastproj.core.errors import InputError, SettingError
from fastproj.core.machine import cores
from fastproj.data.beton import Beton, open_beton
from fastproj.runs.environment import environment
from fastproj.settings.commands import Bench

PARTS: dict[str, Callable[[Sets, Record, Path], dict[str, Item]]] = {
    "correctness": correctness.items,
    "cifar10": cifar10.items,
    "imagenet100": imagenet100.items,
}


def run(given: Bench) -> None:
    """Run the parts that ``given`` names. Raises ``InputError`` at the end if something failed."""
    out = Path(given.out)
    if out.suffix == ".json":
        raise SettingError("the stage gpu writes several files: give --bench.out FOLDER")
    out.mkdir(parents=True, exist_ok=True)
    problems = []
    # Tiny, what is compiled is traced as ever and then runs eagerly: its C++ would take minutes.
    traced = torch.compiler.set_stance("default", force_backend="aot_eager")
    with traced if given.tiny else nullcontext(), _sets(given) as (sets, folder):
        for part, make in PARTS.items():
            if given.part not in ("all", part):
                continue
            record = Record(out / f"{part}.json", _about(part, sets))
            items = make(sets, record, folder)
            if given.items is not None:
                unknown = set(given.items) - items.keys()
                if unknown:
                    raise SettingError(
                        f"no item {min(unknown)!r} of {part}: one or more of {'; '.join(items)}"
                    )
                items = {name: items[name] for name in given.items}
            record.run(items)
            problems += [f"{part}: {name}" for name in record.problems()]
            print(f"written: {record.path}", file=sys.stderr)
    if problems:
        raise InputError(f"the acceptance run found problems: {'; '.join(problems)}")


def _about(part: str, sets: Sets) -> dict[str, Any]:
    described = environment()
    del described["command"]  # it has paths of this machine
    return {
        "part": part,
        "tiny": sets.tiny,
        "time": time.time(),
        "threads": torch.get_num_threads(),
        "environment": described,
        "settings": {
            "device": sets.device.type,
            "workers": sets.workers,
            **{name: describe(getattr(sets, name)) for name in ("small", "photos", "squares")},
        },
    }


@contextmanager
def _sets(given: Bench) -> Iterator[tuple[Sets, Path]]:
    """The given sets and those that are made here, in a folder that is removed at the end."""
    tiny = given.tiny
    with TemporaryDirectory(prefix="fastproj-gpu-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        small, val = _cifar(given, folder)
        sets = Sets(
            small,
            val,
            open_beton(given.photos)
            if given.photos
            else data.photographs(folder, *((12, 48, 3) if tiny else (300, 400, 100))),
            open_beton(given.squares)
            if given.squares
            else data.squares(
                folder / "squares", "train", *((24, 40, 4) if tiny else (8192, 160, 100))
            ),
            prepare_device(choose_device(given.device), tf32=True),
            min(given.workers or cores(), cores()),
            tiny,
            given.small is not None,
        )
        yield sets, folder


def _cifar(given: Bench, folder: Path) -> tuple[Beton, Beton]:
    """Training and validation images: those of ``bench.small`` and beside it, or noise."""
    if given.small is not None:
        return open_beton(given.small), open_beton(Path(given.small).with_name("val.beton"))
    counts = {"train": 64, "val": 24} if given.tiny else {"train": 50_000, "val": 10_000}
    train, val = (
        data.squares(folder / "small", split, images, 32, 4 if given.tiny else 10)
        for split, images in counts.items()
    )
    return train, val
