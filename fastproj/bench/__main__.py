"""``python -m fastproj.bench STAGE``: print a table, write a JSON file and a picture beside it."""

if __name__ == "__main__":  # before torch is imported, so that --help answers at once
    from fastproj.__main__ import main as run

    run("bench")

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fastproj.bench import (
    Plan,
    Row,
    chain,
    decode,
    detection,
    encoders,
    endtoend,
    features,
    growth,
    heads,
    imagenet1k,
    loaders,
    logistic,
    neighbors,
    probe,
    published,
    start,
    step,
    views,
)
from fastproj.bench.gpu import command as gpu
from fastproj.bench.images import describe
from fastproj.core.device import choose_device, prepare_device
from fastproj.core.errors import SettingError
from fastproj.core.machine import cores
from fastproj.data.beton import open_beton
from fastproj.runs.environment import environment, installed
from fastproj.settings import BENCH, BenchSettings, load

STAGES: dict[str, Callable[[Plan], list[Row]]] = {
    "decode": decode.run,
    "loaders": loaders.run,
    "chain": chain.run,
    "views": views.run,
    "heads": heads.run,
    "step": step.run,
    "features": features.run,
    "logistic": logistic.run,
    "probe": probe.run,
    "neighbors": neighbors.run,
    "published": published.run,
    "start": start.run,
    "growth": growth.run,
    "detection": detection.run,
    "encoders": encoders.run,
    "imagenet1k": imagenet1k.run,
    "endtoend": endtoend.run,
}
ALONE = ("logistic", "encoders", "imagenet1k", "endtoend")  # take long, so ``all`` leaves them out
SETS = ("photos", "squares", "small")
PEERS = {"dali": "nvidia-dali-cuda120", "faiss": "faiss-cpu", "spdl": "spdl", "kornia": "kornia",
         "lightly": "lightly", "simplejpeg": "simplejpeg",
         "scikit-learn": "scikit-learn"}  # fmt: skip


def bench(stage: str, settings: BenchSettings) -> Iterator[dict[str, Any]]:
    """Measure one stage, or ``all`` except ``ALONE``; yield the JSON's content after each stage.

    The content has no paths of this machine.
    """
    given = settings.bench
    betons = {name: getattr(given, name) and open_beton(getattr(given, name)) for name in SETS}
    device = prepare_device(choose_device(given.device), tf32=True)  # as train; the peers' too
    plan = Plan(**betons, device=device, workers=min(given.workers or cores(), cores()),
                repeats=given.repeats)  # fmt: skip
    missing = [name for name in SETS if betons[name] is None]
    if missing:
        print(f"not measured: stages that need {', '.join(missing)} (give --bench.NAME BETON)")
    described = environment()
    del described["command"]  # it has paths of this machine; "settings" has the rest
    described["packages"] |= {name: installed(package) for name, package in PEERS.items()}
    result: dict[str, Any] = {
        "stage": stage,
        "time": time.time(),
        "threads": torch.get_num_threads(),
        "environment": described,
        "settings": {
            "device": device.type,
            "workers": plan.workers,
            "repeats": plan.repeats,
            **{name: beton and describe(beton) for name, beton in betons.items()},
        },
        "rows": [],
    }
    for name, run in STAGES.items():
        if stage == name or (stage == "all" and name not in ALONE):
            result["rows"] += [asdict(row) for row in run(plan)]
            yield result


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as an aligned text table."""
    head = ("stage", "case", "engine", "", "rate", "slowest", "fastest", "unit", "n", "share",
            "peak", "note")  # fmt: skip
    cells = [head, *(_cells(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    left = (0, 1, 2, 3, 7, 11)
    return "\n".join(
        "  ".join(c.ljust(w) if i in left else c.rjust(w)
                  for i, (c, w) in enumerate(zip(line, widths, strict=True))).rstrip()
        for line in cells
    )  # fmt: skip


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    what = (row["stage"], row["case"], row["engine"], row["role"])
    if row["missing"]:
        return (*what, "–", "", "", "", "", "", "", f"missing: {row['missing']}")
    rates = tuple(number(row[name]) for name in ("rate", "slowest", "fastest"))
    share = "" if row["share"] is None else f"{row['share']:.0%}"
    peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.2f} GB"
    return (*what, *rates, f"{row['unit']}/s", str(row["repeats"]), share, peak, row["note"])


def number(rate: float) -> str:
    """Three significant digits, or a whole number from 100: 0.0421, 12.3, 25,389."""
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def main(argv: Sequence[str]) -> None:
    """Measure the stage that the first argument names; settings follow it."""
    names = (*STAGES, "all", "gpu")
    stage, *rest = argv or ["all"]
    if stage.startswith("-"):
        stage, rest = "all", list(argv)
    if stage not in names:
        raise SettingError(f"no stage {stage!r} to measure: one of {', '.join(names)}")
    settings = load(
        BENCH, rest, f"python -m fastproj.bench {'|'.join(names)}", "Rates of each stage."
    )
    if stage == "gpu":
        return gpu.run(settings.bench)
    out = Path(settings.bench.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    for result in bench(stage, settings):
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(result["rows"]))
    try:
        from fastproj.bench.picture import draw
    except ModuleNotFoundError as error:
        print(f"written: {out}; no picture: {error.name} is not installed", file=sys.stderr)
        return
    draw(result["rows"], out.with_suffix(".svg"))
    print(f"written: {out} and {out.with_suffix('.svg')}", file=sys.stderr)
