"""Writes docs/performance*.md from the committed JSON of ``python -m fastproj.bench``:

    python docs/make_performance.py

CPU figures are in docs/bench-cpu*.json, a GPU's in docs/bench-gpu*.json. What is no figure of the
benchmark stands in docs/performance-notes.md, under the name of the stage it belongs to.
"""

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":  # run as a file: Python then looks beside it, not in the checkout
    sys.path[0] = str(ROOT)

from fastproj.bench.__main__ import STAGES, number  # noqa: E402
from fastproj.bench.picture import Rows, cases, draw  # noqa: E402
from fastproj.errors import run_command  # noqa: E402

DOCS = ROOT / "docs"
NOTES = DOCS / "performance-notes.md"
TITLES = {
    "decode": "Decode, for crops on a device",
    "loaders": "Loaders: stored images to two random resized crops an image",
    "chain": "Chain: stored images to two SimCLR views, blur included, as floats",
    "views": "Views: ready crops to SimCLR views",
    "heads": "Heads: a training step of the sparse projector",
    "step": "Step: training, beside the same step on data that is ready",
    "probe": "Probe: a grid of linear probes",
    "start": "Start: a loader built, to its first batch, in a fresh process (seconds: 1 / rate)",
    "growth": "Growth: workers, pixels, batch, latents, epochs",
}


class Ratio(NamedTuple):
    """Ours over another: ``ours`` and ``other`` begin the engines' names, the fastest counts."""

    what: str
    stage: str
    case: str  # a part of the case's name
    ours: str
    other: str


RATIOS = (
    Ratio("decode for crops on a device", "decode", "jpeg", "", "decode alone"),
    Ratio("decode and two exact crops", "loaders", "224 px, jpeg", "", "decode alone"),
    Ratio("the same", "loaders", "224 px, jpeg", "", "torch DataLoader"),
    Ratio("the same", "loaders", "224 px, jpeg", "", "FFCV"),
    Ratio("the whole two-view SimCLR chain", "chain", "224 px", "", "torch DataLoader + torchv"),
    Ratio("the same", "chain", "224 px", "", "torch DataLoader + lightly"),
    Ratio("views at 32 px, all operations", "views", "32 px", "", "torchvision"),
    Ratio("the same", "views", "32 px", "", "kornia"),
    Ratio("views at 224 px, all operations", "views", "224 px", "", "kornia"),
    Ratio("first batch of a loader", "start", "", "stream", "FFCV"),
    Ratio("training", "step", "", "", "the step on ready data"),
    Ratio("sparse head at the paper's size", "heads", "", "", "relu"),
    Ratio("a grid of linear probes", "probe", "", "", "one by one"),
    Ratio("the same", "probe", "", "", "scikit-learn"),
)

HEAD = """\
# Performance on a {device}

Written by `python docs/make_performance.py` from {sources}; change those. Figures of a
{other} are in [{page}]({page}).

{what}"""

METHOD = """\
Every rate is the median of whole calls after a warm-up. The engines of one table did the same work
in one run and took turns, call by call, so that what else the machine did hit all alike. `limit` is
the one part of the work that cannot be left out, with nothing else; shares are of it. Repeat with

    make bench BENCH="--bench.photos PHOTOS --bench.squares SQUARES --bench.small SMALL"

where each is a beton, PHOTOS with JPEGs, SQUARES with a square store, SMALL raw.
"""

MISSING = """\
Not measured: no {device} was at hand. Where there is one, `make bench` with the three betons and
`--bench.out docs/bench-{kind}.json`, then `python docs/make_performance.py`.
"""


def notes() -> dict[str, str]:
    """The hand-written text of each stage, by the stage's name."""
    parts = NOTES.read_text(encoding="utf-8").split("\n## ")[1:]
    return {name: text.strip() for name, _, text in (part.partition("\n") for part in parts)}


def machine(result: dict[str, Any]) -> str:
    """Where, with what versions and on which images a file was measured."""
    told, given = result["environment"], result["settings"]
    versions = ", ".join(f"{name} {v}" for name, v in told["packages"].items() if v)
    git = told["git"] or {"commit": "no checkout", "dirty": False}
    changed = ", with changes" if git["dirty"] else ""
    sets = "; ".join(
        f"{name}: {given[name]['images']:,} of {given[name]['dataset']}, "
        f"{given[name]['store']} store"
        + (f" of quality {given[name]['quality']}" if given[name]["store"] == "jpeg" else "")
        + f", at most {given[name]['longest_side']} px"
        for name in ("photos", "squares", "small")
        if given[name]
    )
    where = ", ".join(told["gpus"] + [f"{told['cores']} cores of {told['cpu']}"])
    return (
        f"{where}; {told['platform']}, Python {told['python']}; {versions}; commit "
        f"{git['commit'][:12]}{changed}; {given['workers']} loader workers, {result['threads']} "
        f"threads. Images: {sets}."
    )


def best(rows: Rows, names: str, ours: bool) -> dict[str, Any] | None:
    """The fastest of our engines, or of the others, whose name begins with ``names``."""
    found = [
        row
        for row in rows
        if row["engine"].startswith(names) and (row["role"] == "ours") == ours and row["rate"]
    ]
    return max(found, key=lambda row: row["rate"], default=None)


def ratios(rows: Rows) -> list[list[str]]:
    """The cells of the table of ratios; what was not measured says so."""
    cells = [["what", "ours", "rate", "against", "rate", "ratio"]]
    for what, stage, case, ours, other in RATIOS:
        same = [row for row in rows if row["stage"] == stage and case in row["case"]]
        one, two = best(same, ours, True), best(same, other, False)
        if one is None or two is None:
            cells.append([what, ours or "the fastest", "", other, "", "not measured"])
        else:
            cells.append(
                [
                    what, one["engine"], rate(one), two["engine"], rate(two),
                    f"{one['rate'] / two['rate']:.2f}",
                ]
            )  # fmt: skip
    return cells


def rate(row: dict[str, Any]) -> str:
    """A rate with its unit; a start's as seconds."""
    if row["stage"] == "start":
        return f"{number(row['seconds'])} s"
    return f"{number(row['rate'])} {row['unit']}/s"


def stage_cells(rows: Rows) -> list[list[str]]:
    """The cells of one case's table; columns that are empty throughout are left out."""
    unit, growth = rows[0]["unit"], rows[0]["stage"] == "growth"
    first = rows[0]["case"].partition(":")[0] if growth else "engine"
    cells = [[first, "role", f"{unit}/s", "slowest – fastest", "n", "share", "memory", "note"]]
    for row in rows:
        if row["missing"]:
            cells.append([row["engine"], row["role"], *[""] * 5, f"missing: {row['missing']}"])
            continue
        cells.append(
            [
                row["engine"],
                "" if growth else row["role"],
                number(row["rate"]),
                f"{number(row['slowest'])} – {number(row['fastest'])}",
                str(row["repeats"]),
                "" if row["share"] is None else f"{row['share']:.2f}",
                "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.2f} GB",
                row["note"],
            ]
        )
    kept = [i for i in range(len(cells[0])) if any(line[i] for line in cells[1:])]
    return [[line[i] for i in kept] for line in cells]


def table(cells: list[list[str]]) -> str:
    lines = [cells[0], ["---"] * len(cells[0]), *cells[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def load(kind: str) -> dict[str, dict[str, Any]]:
    """The committed results of ``cpu`` or ``gpu`` by file name."""
    found = sorted(DOCS.glob(f"bench-{kind}*.json"))
    return {path.name: json.loads(path.read_text(encoding="utf-8")) for path in found}


def page(kind: str, results: dict[str, dict[str, Any]]) -> str:
    """The text of one page from the results by file name."""
    device, other, there = {
        "cpu": ("CPU", "GPU", "performance-gpu.md"),
        "gpu": ("GPU", "CPU", "performance.md"),
    }[kind]
    sources = ", ".join(f"[{name}]({name})" for name in results) or f"`docs/bench-{kind}.json`"
    told = [f"{name}: {machine(result)}\n" for name, result in results.items()]
    what = "\n".join([METHOD, *told]) if results else MISSING.format(device=device, kind=kind)
    head = HEAD.format(device=device, other=other, page=there, sources=sources, what=what)
    if not results:
        return head
    rows = [row for result in results.values() for row in result["rows"]]
    parts = [
        head,
        "## Ratios\n",
        table(ratios(rows)),
        f"![rates of every case beside peers and limits](bench-{kind}.svg)\n",
    ]
    written = notes() if kind == "cpu" else {}
    found = cases(rows)
    for stage in STAGES:
        if not any(name == stage for name, _ in found):
            continue
        parts.append(f"## {TITLES[stage]}\n")
        for (name, case), lines in found.items():
            if name == stage:
                parts += [f"{case[0].upper()}{case[1:]}:\n", table(stage_cells(lines))]
        if stage in written:
            parts.append(f"{written[stage]}\n")
    parts += [f"## {name}\n\n{text}\n" for name, text in written.items() if name not in STAGES]
    return "\n".join(parts)


PAGES = {"cpu": DOCS / "performance.md", "gpu": DOCS / "performance-gpu.md"}


def main(argv: object) -> None:
    for kind, path in PAGES.items():
        results = load(kind)
        path.write_text(page(kind, results), encoding="utf-8")
        if results:
            rows = [row for result in results.values() for row in result["rows"]]
            draw(rows, DOCS / f"bench-{kind}.svg")
        print(f"{path}: {len(results)} files of figures")


if __name__ == "__main__":
    run_command(main)
