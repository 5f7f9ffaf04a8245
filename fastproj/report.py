"""Command: draw a run's curves. ``python -m fastproj.report runs/NAME``

``metrics.jsonl`` -> ``diagnostics.png`` in the run folder: one small panel per measure, epoch by
epoch. A run still under way can be drawn as well.
"""

if __name__ == "__main__":  # before torch is imported, so that --help answers at once
    from fastproj.__main__ import main as run_as_script

    run_as_script("report")

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fastproj.core.errors import InputError
from fastproj.core.files import replacing
from fastproj.runs.command import open_run
from fastproj.runs.folder import RunFolder
from fastproj.runs.journal import read

if TYPE_CHECKING:  # an extra, and slow to import: only drawing needs it
    from matplotlib.figure import Figure

COLUMNS = 3
PANEL = (4.4, 3.0)  # width and height, inches
STYLES = ("o-", "o--")  # so that neither of two equal curves hides the other
PER_CENT = 100.0
PENALTY = "penalty."  # before the name of a term of the loss: a diagnostic may be its namesake


class Panel(NamedTuple):
    """Curves that share a measure: their names, and what each is called in the legend."""

    title: str
    axis: str
    curves: dict[str, str]
    factor: float = 1.0  # from what is logged to the axis' unit


def _both(measure: str) -> dict[str, str]:
    return {f"{measure}_features": "features", f"{measure}_projections": "projections"}


PANELS = [
    Panel("loss", "loss", {"loss": "all terms, weighed", PENALTY + "objective": "objective"}),
    Panel("online probe", "right on training views (%)", {"online_probe": ""}, PER_CENT),
    Panel("matrix information", "I₂(features; projections) (nats)", {"matrix_information": ""}),
    Panel(
        "bounds on information about labels",
        "surrogate of I(labels; features)",
        {"upper_bound_surrogate": "upper", "lower_bound_surrogate": "lower"},
    ),
    Panel("alignment", "squared distance of views", _both("alignment")),
    Panel("uniformity", "log mean exp(-2 · distance²)", _both("uniformity")),
    Panel("RankMe", "effective rank (dimensions)", _both("rankme")),
    Panel("dead latents", "never kept (% of latents)", {"dead_latents": ""}, PER_CENT),
    Panel("used codes", "occurring (% of levels)", {"used_codes": ""}, PER_CENT),
    Panel("near-zero groups", "first weight (% of groups)", {"near_zero_groups": ""}, PER_CENT),
]

Curve = tuple[list[int], list[float]]


def curves(events: Iterable[dict[str, Any]]) -> dict[str, Curve]:
    """What the ``epoch`` events of a journal hold: name -> (epochs, from 1; values).

    The loss, the online probe, the terms of the loss (named ``penalty.…``) and the diagnostics. For
    a resumed epoch only the last event counts.
    """
    epochs = {event["epoch"]: event for event in events if event["event"] == "epoch"}
    found: dict[str, Curve] = {}
    for epoch, event in sorted(epochs.items()):
        metrics = {
            name if name in ("loss", "online_probe") else PENALTY + name: value
            for name, value in event.items()
            if isinstance(value, float) and name != "time"
        }
        for name, value in (metrics | event.get("diagnostics", {})).items():
            numbers, values = found.setdefault(name, ([], []))
            numbers.append(epoch + 1)
            values.append(value)
    return found


def draw(title: str, found: dict[str, Curve]) -> "Figure":
    """A figure with one panel per measure that ``found`` holds, in the order of ``PANELS``.

    A curve that no panel names gets its own panel. A line's label is the name of its curve. Raises
    ``InputError`` without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise InputError(
            f"the report needs matplotlib ({error}): run ./setup.sh report in a checkout, "
            "elsewhere pip install 'fastproj-ssl[report]'"
        ) from error
    named = {name for panel in PANELS for name in panel.curves}
    panels = [panel for panel in PANELS if panel.curves.keys() & found.keys()]
    panels += [
        Panel(name.replace(".", ": ").replace("_", " "), "value", {name: ""})
        for name in sorted(found.keys() - named)
    ]
    rows = -(-len(panels) // COLUMNS)
    figure = Figure((COLUMNS * PANEL[0], rows * PANEL[1] + 0.4), layout="constrained")
    figure.suptitle(title, fontsize="x-large")
    for number, panel in enumerate(panels, start=1):
        axes = figure.add_subplot(rows, COLUMNS, number)
        axes.set(title=panel.title, xlabel="epoch", ylabel=panel.axis)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        there = [name for name in panel.curves if name in found]
        for name, style in zip(there, STYLES, strict=False):
            epochs, values = found[name]
            axes.plot(epochs, [panel.factor * v for v in values], style, label=name, markersize=3)
        if panel.factor == PER_CENT:
            axes.set_ylim(bottom=0)
        if len(there) > 1:
            axes.legend([panel.curves[name] for name in there])
    return figure


def report(run: RunFolder) -> Path:
    """Draw the run's ``diagnostics.png``; returns its path.

    Raises ``InputError`` for a run without a journal or without an epoch in it, and without
    matplotlib.
    """
    found = curves(read(run.metrics))
    if not found:
        raise InputError(
            f"{run.metrics} holds no epoch yet: train for one first, or give another run folder"
        )
    figure = draw(run.name, found)
    with replacing(run.curves) as file:
        figure.savefig(file, format="png", dpi=110)
    return run.curves


def main(argv: Sequence[str]) -> None:
    run, _ = open_run(argv, "python -m fastproj.report", "Draw the curves of a run.")
    print(f"written: {report(run)}")
