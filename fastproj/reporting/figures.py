"""Figures: matplotlib draws them once, for the page (SVG with its colors) and for files.

Colors are Okabe and Ito's, which the color-blind tell apart, and each line also has a style of its
own. ``page`` replaces them by CSS variables, so that one drawing does for light and dark.
"""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from fastproj.core.files import replacing
from fastproj.reporting.curves import PER_CENT, STD, Curve, Panel

INK, FAINT = "#1c2126", "#c9ced6"  # text and axes; grid
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#77808a")
STYLES = ("-", "--", ":", "-.")
SIZE = (4.4, 3.0)  # width and height of a figure, inches: as wide as a phone at its own font size
LEGEND = 6  # lines that a legend inside the figure can name
WIDTH = 62  # letters of a legend that fit across a figure
ROW = 0.19  # inches: height of a line of a legend
RC: Any = {  # Any: matplotlib types its keys one by one
    "svg.fonttype": "none",  # text stays text: small, and it can be searched
    "font.size": 10,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.formatter.useoffset": False,
}
in_style = matplotlib.rc_context(RC)
"""Decorates what draws: matplotlib takes some colors when a part is made, others when drawn."""


@dataclass(frozen=True)
class Picture:
    """A figure with what belongs to it.

    ``name``: of its files. ``how``: one sentence that says how to read it. ``head`` and ``rows``:
    its numbers.
    """

    name: str
    title: str
    how: str
    figure: Figure
    head: tuple[str, ...]
    rows: Sequence[Sequence[Any]]

    def svg(self) -> str:
        """The figure as SVG, in the colors of a light page, on nothing."""
        file = io.StringIO()
        with matplotlib.rc_context({**RC, "svg.hashsalt": self.name}):
            self.figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
        return file.getvalue()

    def save(self, folder: Path) -> None:
        """Write ``NAME.svg`` and ``NAME.png`` (200 dpi) into ``folder``, on white, with the title.

        Raises ``InputError`` where they cannot be written.
        """
        title = self.figure.suptitle(self.title, fontsize="medium")
        with matplotlib.rc_context({**RC, "svg.hashsalt": self.name}):
            for kind in ("svg", "png"):
                with replacing(folder / f"{self.name}.{kind}") as file:
                    self.figure.savefig(file, format=kind, dpi=200, facecolor="white")
        title.set_text("")


@in_style
def start(height: float = SIZE[1], width: float = SIZE[0]) -> tuple[Figure, Axes]:
    """An empty figure with one pair of axes; sizes in inches."""
    figure = Figure((width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(True)
    axes.set_axisbelow(True)
    return figure, axes


def name_below(figure: Figure, axes: Axes) -> None:
    """Name what is drawn, each name once, in as many columns as the width holds.

    The figure grows by the names' height.
    """
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    if len(handles) > 1:
        columns = max(1, WIDTH // (6 + max(map(len, handles))))
        figure.set_figheight(figure.get_figheight() + ROW * math.ceil(len(handles) / columns))
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns,
                      fontsize="small")  # fmt: skip


def style(number: int) -> dict[str, Any]:
    """Color and dashes of a line: no two of the first 28 are alike."""
    color, dashes = number % len(COLORS), number // len(COLORS)
    return {"color": COLORS[color], "linestyle": STYLES[(dashes + color) % len(STYLES)]}


@in_style
def lines(
    name: str,
    panel: Panel,
    found: Mapping[str, Curve],
    x: str = "epoch",
    bands: Mapping[str, Curve] | None = None,
    **scales: str,
) -> Picture:
    """The curves ``found``: label -> (places, values), all with the unit of ``panel``.

    ``x``: what the places count. ``bands``: label -> the standard deviation around a curve.
    ``scales``: ``xscale`` and ``yscale`` of the axes. A curve without places is not named and keeps
    its color. More than ``LEGEND`` lines have no legend.
    """
    figure, axes = start()
    bands = bands or {}
    columns: dict[str, dict[int, float]] = {}  # of the numbers: head -> place -> value
    for number, (label, (places, values)) in enumerate(found.items()):
        scaled = [panel.factor * value for value in values]
        marker = "o" if len(places) <= 30 else ""
        axes.plot(places, scaled, label=label if places else "_", marker=marker, markersize=3,
                  linewidth=1.4, **style(number))  # fmt: skip
        head = f"{label}: {panel.axis}" if label else panel.axis
        columns[head] = dict(zip(places, scaled, strict=True))
        if label in bands:
            std = [panel.factor * value for value in bands[label][1]]
            columns[f"{head}, standard deviation"] = dict(zip(places, std, strict=True))
            low, high = np.subtract(scaled, std), np.add(scaled, std)
            axes.fill_between(places, low, high, color=COLORS[number % len(COLORS)], alpha=0.2,
                              linewidth=0)  # fmt: skip
    axes.set(xlabel=x, ylabel=panel.axis, **scales)
    if "xscale" not in scales:
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if panel.factor == PER_CENT:  # a little below 0, so that the axis does not hide a line at 0
        axes.set_ylim(bottom=-0.02 * axes.get_ylim()[1])
    if 1 < len(found) <= LEGEND:
        axes.legend(fontsize="small")
    every = sorted({place for column in columns.values() for place in column})
    rows = [(place, *(column.get(place) for column in columns.values())) for place in every]
    return Picture(name, panel.title, panel.how, figure, (x, *columns), rows)


def of_panel(panel: Panel, found: Mapping[str, Curve]) -> Picture:
    """The panel's curves of one run, by epoch, each with its band."""
    there = {name: text for name, text in panel.curves.items() if name in found}
    name = slug(next(iter(there)))
    return lines(
        name,
        panel,
        {text: found[name] for name, text in there.items()},
        bands={text: found[name + STD] for name, text in there.items() if name + STD in found},
    )


@in_style
def stacked(name: str, title: str, how: str, found: Mapping[str, Curve], unit: str) -> Picture:
    """Parts of a whole by epoch, one on the other."""
    figure, axes = start()
    places = next(iter(found.values()))[0]
    bottom = np.zeros(len(places))
    edges = np.arange(len(places) + 1) + places[0] - 0.5
    hatches = ("", "//", "..", "xx")
    for number, (label, (_, values)) in enumerate(found.items()):
        color = COLORS[number % len(COLORS)]
        axes.stairs(bottom + values, edges, baseline=bottom, fill=True, label=label,
                    facecolor=to_rgba(color, 0.75), edgecolor=color, linewidth=0.3,
                    hatch=hatches[number % len(hatches)])  # fmt: skip
        bottom = bottom + values
    axes.set(xlabel="epoch", ylabel=unit)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, 1.17), ncols=3)
    rows = [
        (label, place, value)
        for label, curve in found.items()
        for place, value in zip(*curve, strict=True)
    ]
    return Picture(name, title, how, figure, ("part", "epoch", unit), rows)


@in_style
def legend(labels: Sequence[str]) -> Picture:
    """Which line belongs to which label, for figures with too many lines to name."""
    figure, axes = start(0.3 + ROW * len(labels))
    for number, label in enumerate(labels):
        axes.plot([0, 1], [-number] * 2, linewidth=1.6, **style(number))
        axes.annotate(label, (1.15, -number), va="center", fontsize="small")
    axes.set(xlim=(0, 10), ylim=(-len(labels) + 0.3, 0.7))
    axes.axis("off")
    how = "Color and dashes of each run's line, in all figures of this page."
    rows = [(label, *style(number).values()) for number, label in enumerate(labels)]
    return Picture("legend", "The lines", how, figure, ("run", "color", "dashes"), rows)


@in_style
def confusion(counts: NDArray[np.integer], classes: Sequence[str]) -> Picture:
    """Counts (C, C): rows are true classes, columns the predicted ones."""
    total = counts.sum(1, keepdims=True)
    share = PER_CENT * counts / np.maximum(total, 1)
    few = len(classes) <= 20
    figure, axes = start(4.0)
    axes.grid(False)
    image = axes.imshow(share, cmap="cividis", vmin=0, vmax=PER_CENT)
    if few:
        axes.set_xticks(range(len(classes)), classes, rotation=60, ha="right", fontsize="small")
        axes.set_yticks(range(len(classes)), classes, fontsize="small")
        for at, value in np.ndenumerate(share):
            if counts[at]:
                color = "#000000" if value > 60 else "#ffffff"
                axes.text(at[1], at[0], f"{value:.0f}", ha="center", va="center", color=color,
                          fontsize=7)  # fmt: skip
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set(xlabel="predicted class", ylabel="true class")
    bar = figure.colorbar(image, ax=axes, shrink=0.8)
    bar.set_label("share of the true class (%)")
    rows = [
        (classes[i], classes[j], int(count)) for (i, j), count in np.ndenumerate(counts) if count
    ]
    how = (
        "Each row is a true class, each column what was predicted, in per cent of the row; a "
        "perfect probe fills only the diagonal."
    )
    return Picture(
        "confusion", "Confusion matrix", how, figure, ("true", "predicted", "images"), rows
    )


@in_style
def scatter(
    name: str, title: str, how: str, axes_names: tuple[str, str],
    groups: Mapping[str, tuple[Sequence[float], Sequence[float]]], joined: bool = False,
    size: tuple[float, float] = SIZE,
) -> Picture:  # fmt: skip
    """Points of several groups, each with its color and marker.

    ``joined``: a line through them in their order, and the last one is large.
    """
    figure, axes = start(size[1], size[0])
    markers = "osD^vP*X<>"
    rows: list[Sequence[Any]] = []
    for number, (label, (x, y)) in enumerate(groups.items()):
        axes.plot(x, y, linestyle="-" if joined else "", marker=markers[number % len(markers)],
                  markersize=4 if len(x) < 100 else 3, linewidth=0.8, alpha=0.8,
                  color=COLORS[number % len(COLORS)], label=label)  # fmt: skip
        if joined:  # which end is the last
            axes.plot(x[-1:], y[-1:], markers[number % len(markers)], markersize=9, alpha=0.8,
                      color=COLORS[number % len(COLORS)])  # fmt: skip
        rows += [(label, a, b) for a, b in zip(x, y, strict=True)]
    axes.set(xlabel=axes_names[0], ylabel=axes_names[1])
    name_below(figure, axes)
    return Picture(name, title, how, figure, ("group", *axes_names), rows)


def slug(text: str) -> str:
    """A name for files and anchors: letters, digits and dashes."""
    kept = "".join(mark if mark.isascii() and mark.isalnum() else "-" for mark in text.lower())
    return "-".join(filter(None, kept.split("-"))) or "figure"
