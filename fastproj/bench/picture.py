"""One picture of a benchmark's JSON: each case's rates, and how cost grows."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
matplotlib.rcParams.update(
    {"svg.fonttype": "none", "svg.hashsalt": "fastproj", "font.size": 8, "axes.titlesize": 8}
)
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

COLOURS = {"ours": "#2b6cb0", "peer": "#b0b0b0", "limit": "#e0a030"}
Rows = list[dict[str, Any]]


def cases(rows: Iterable[dict[str, Any]]) -> dict[tuple[str, str], Rows]:
    """Rows by stage and case, in the order in which they came."""
    found: dict[tuple[str, str], Rows] = {}
    for row in rows:
        found.setdefault((row["stage"], row["case"]), []).append(row)
    return found


def draw(rows: Rows, path: str | Path) -> None:
    """Write the picture as SVG; the same rows give the same bytes with the same matplotlib."""
    panels = cases(row for row in rows if row["rate"] is not None)
    columns = 2
    lines = max(1, -(-len(panels) // columns))
    figure, axes = plt.subplots(
        lines, columns, figsize=(10, 1.9 * lines), squeeze=False, layout="constrained"
    )
    for place, (stage, case) in zip(axes.flat, panels, strict=False):
        (_grow if stage == "growth" else _bars)(place, stage, case, panels[stage, case])
    for place in axes.flat[len(panels) :]:
        place.axis("off")
    figure.savefig(path, format="svg", metadata={"Date": None})
    plt.close(figure)


def _bars(axes: Axes, stage: str, case: str, rows: Rows) -> None:
    """A bar an engine, its whisker from the slowest to the fastest call."""
    rows = rows[::-1]
    rates = [row["rate"] for row in rows]
    spread = [[r["rate"] - r["slowest"] for r in rows], [r["fastest"] - r["rate"] for r in rows]]
    bars = axes.barh(
        [row["engine"] for row in rows], rates, xerr=spread,
        color=[COLOURS[row["role"]] for row in rows], error_kw={"lw": 0.7},
    )  # fmt: skip
    axes.bar_label(bars, [f" {rate:,.3g}" if rate < 100 else f" {rate:,.0f}" for rate in rates])
    axes.set_title(f"{stage}: {case}", loc="left")
    axes.set_xlabel(f"{rows[0]['unit']}/s")
    axes.margins(x=0.15)


def _grow(axes: Axes, stage: str, case: str, rows: Rows) -> None:
    """Rates over an axis, and on the right the peak of memory."""
    axis, _, what = case.partition(": ")
    x = list(range(len(rows)))
    axes.errorbar(
        x, [row["rate"] for row in rows],
        yerr=[[r["rate"] - r["slowest"] for r in rows], [r["fastest"] - r["rate"] for r in rows]],
        color=COLOURS["ours"], marker="o", markersize=3,
    )  # fmt: skip
    axes.set_xticks(x, [row["engine"] for row in rows])
    axes.set_ylim(bottom=0)
    axes.set_title(f"{axis}: {what}", loc="left")
    axes.set_xlabel(axis)
    axes.set_ylabel(f"{rows[0]['unit']}/s", color=COLOURS["ours"])
    right = axes.twinx()
    right.plot(x, [row["peak_bytes"] / 1e9 for row in rows], color="#444444", ls="--", marker=".")
    right.set_ylim(bottom=0)
    right.set_ylabel("GB (dashed)")
