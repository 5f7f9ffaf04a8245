"""Command: ``python -m fastproj.bench loaders|views|heads|all``: a table, and a JSON file."""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastproj.bench import heads, loaders, views
from fastproj.device import choose_device
from fastproj.errors import SettingError, run_command
from fastproj.journal import environment
from fastproj.settings import BENCH, Settings, load

STAGES = ("loaders", "views", "heads", "all")


def bench(stage: str, settings: Settings) -> dict[str, Any]:
    """Measure a stage; returns what the JSON file holds: machine, versions, settings and rows."""
    given = settings.bench
    rows: list[dict[str, Any]] = []
    if stage in ("loaders", "all"):
        for path, size, batch in ((given.photos, 224, 64), (given.squares, 224, 64),
                                  (given.small, 32, 512)):  # fmt: skip
            if path is not None:
                rows += loaders.run(path, size, batch, given.workers, given.repeats)
        missing = [n for n in ("photos", "squares", "small") if getattr(given, n) is None]
        if missing:
            print(f"not measured: loaders on {', '.join(missing)} (give --bench.NAME BETON)")
    if stage in ("views", "all"):
        rows += views.run(str(choose_device(given.device)), repeats=given.repeats)
    if stage in ("heads", "all"):
        rows += heads.run(str(choose_device(given.device)), repeats=given.repeats)
    return {
        "stage": stage,
        "time": time.time(),
        "threads": torch.get_num_threads(),
        "environment": environment(),
        "settings": settings.flat(),
        "rows": rows,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Aligned text: median, slowest and fastest images/s of each engine."""
    head = ("stage", "engine", "px", "batch", "images/s", "slowest", "fastest", "n", "note")
    cells = [head] + [
        (
            row["stage"], row["engine"], str(row["size"]), str(row["batch"]),
            f"{row['images_per_second']:,.0f}", f"{row['min']:,.0f}", f"{row['max']:,.0f}",
            str(row["repeats"]), row["note"],
        )
        for row in rows
    ]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(c.ljust(w) if i in (0, 1, 8) else c.rjust(w)
                  for i, (c, w) in enumerate(zip(line, widths, strict=True))).rstrip()
        for line in cells
    )  # fmt: skip


def main(argv: Sequence[str]) -> None:
    """Measure what the first word names, with the settings that follow it."""
    stage, *rest = argv or ["all"]
    if stage.startswith("-"):
        stage, rest = "all", list(argv)
    if stage not in STAGES:
        raise SettingError(f"no stage {stage!r} to measure: one of {', '.join(STAGES)}")
    settings = load(
        BENCH, rest, f"python -m fastproj.bench {'|'.join(STAGES)}", "Images/s of each stage."
    )
    result = bench(stage, settings)
    print(table(result["rows"]))
    out = Path(settings.bench.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written: {out}", file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
