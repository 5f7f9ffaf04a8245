"""Plot a benchmark's JSON as one SVG: the rates of each case, and rate and memory for growth."""

from collections.abc import Iterable
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib

matplotlib.use("Agg")
matplotlib.rcParams.update(
    {"svg.fonttype": "none", "svg.hashsalt": "fastproj", "font.size": 8, "axes.titlesize": 8}
)
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.ticker import NullLocator  # noqa: E402

COLORS = {"ours": "#2b6cb0", "peer": "#b0b0b0", "limit": "#e0a030"}
TITLE = 48  # characters per line
Rows = list[dict[str, Any]]


def cases(rows: Iterable[dict[str, Any]]) -> dict[tuple[str, str], Rows]:
    """Rows by (stage, case), in their original order."""
    found: dict[tuple[str, str], Rows] = {}
    for row in rows:
        found.setdefault((row["stage"], row["case"]), []).append(row)
    return found


def draw(rows: Rows, path: str | Path) -> None:
    """Write the SVG. The same rows and matplotlib version give the same bytes."""
    panels = cases(row for row in rows if row["rate"] is not None)
    columns = 2
    counts = list(map(len, panels.values())) or [0]
    pairs = [counts[first : first + columns] for first in range(0, len(counts), columns)]
    heights = [max(2.1, 0.18 * max(pair) + 0.7) for pair in pairs]  # inches
    figure, axes = plt.subplots(
        len(pairs), columns, figsize=(10, sum(heights)), height_ratios=heights, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for place, (stage, case) in zip(axes.flat, panels, strict=False):
        (_grow if stage == "growth" else _compare)(place, stage, case, panels[stage, case])
    for place in axes.flat[len(panels) :]:
        place.axis("off")
    figure.savefig(path, format="svg", metadata={"Date": None})
    plt.close(figure)


def _compare(axes: Axes, stage: str, case: str, rows: Rows) -> None:
    """One point per engine with a whisker from its slowest to its fastest call; log scale."""
    for place, row in enumerate(reversed(rows)):
        axes.errorbar(
            row["rate"], place, xerr=_spread([row]), fmt="o", color=COLORS[row["role"]], ms=5
        )
        text = f"{row['rate']:,.3g}" if row["rate"] < 100 else f"{row['rate']:,.0f}"
        axes.annotate(text, (row["rate"], place), (0, 4), textcoords="offset points", ha="center")
    axes.set_yticks(range(len(rows)), [row["engine"] for row in reversed(rows)])
    axes.set_ylim(-0.5, len(rows))
    axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())  # every point is labeled with its rate
    axes.margins(x=0.15)
    axes.grid(axis="x", lw=0.3)
    axes.set_title(fill(f"{stage}: {case}", TITLE), loc="left")
    axes.set_xlabel(f"{rows[0]['unit']}/s")


def _grow(axes: Axes, stage: str, case: str, rows: Rows) -> None:
    """Rate (left axis) and peak memory (right axis) at each point."""
    axis = case.partition(":")[0]
    x = list(range(len(rows)))
    axes.errorbar(
        x, [row["rate"] for row in rows],
        yerr=_spread(rows), color=COLORS["ours"], marker="o", markersize=3,
    )  # fmt: skip
    axes.set_xticks(x, [row["engine"] for row in rows])
    axes.set_ylim(bottom=0)
    axes.set_title(fill(case, TITLE), loc="left")
    axes.set_xlabel(axis)
    axes.set_ylabel(f"{rows[0]['unit']}/s", color=COLORS["ours"])
    right = axes.twinx()
    right.plot(x, [row["peak_bytes"] / 1e9 for row in rows], color="#444444", ls="--", marker=".")
    right.set_ylim(bottom=0)
    right.set_ylabel("GB (dashed)")


def _spread(rows: Rows) -> list[list[float]]:
    """Error bars: from each row's median down to its slowest and up to its fastest call."""
    return [[r["rate"] - r["slowest"] for r in rows], [r["fastest"] - r["rate"] for r in rows]]
