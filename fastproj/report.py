"""Command: draw a run's curves. ``python -m fastproj.report runs/NAME``

``metrics.jsonl`` -> ``diagnostics.png`` in the run folder: one small panel per measure, epoch by
epoch. A run still under way can be drawn as well.
"""

if __name__ == "__main__":  # before torch is imported, so that --help answers at once
    from fastproj.__main__ import main as run_as_script

    run_as_script("report")

from collections.abc import Iterable, Mapping, Sequence
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
STYLES = ("o-", "o--", "o:")  # so that none of several equal curves hides another
PER_CENT = 100.0
STD = "_std"  # ends the name of a curve's standard deviation, which is drawn as a band
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
    Panel(
        "online accuracy",
        "right on val images (%)",
        {"online_top1": "probe top-1", "online_top5": "probe top-5", "online_knn_top1": "kNN"},
        PER_CENT,
    ),
    Panel("matrix information", "I₂(h; z) (nats)", {"matrix_information": ""}),
    Panel(
        "loss and matrix entropy of features",
        "mean over steps ± std (nats)",
        {
            "matrix_entropy_features": "S₂(h)",
            "log_n_minus_nce_features": "log N − NCE(h)",
            "negative_loss_features": "−loss(h)",
        },
    ),
    Panel(
        "authors' curves (trends only)",
        "mean over steps ± std (nats)",
        {
            "entropy_minus_information": "S₂(h) − I₂(h; z)",
            "negative_loss_minus_information": "−loss(h) − I₂(h; z)",
        },
    ),
    Panel("alignment", "squared distance of views", _both("alignment")),
    Panel("uniformity", "log mean exp(-2 · distance²)", _both("uniformity")),
    Panel("RankMe", "effective rank (dimensions)", _both("rankme")),
    Panel("dead latents", "never kept (% of latents)", {"dead_latents": ""}, PER_CENT),
    Panel("used codes", "occurring (% of levels)", {"used_codes": ""}, PER_CENT),
    Panel("near-zero groups", "first weight (% of groups)", {"near_zero_groups": ""}, PER_CENT),
]

SPECTRA = Panel("singular values, last measured epoch", "fraction of their sum", _both("spectrum"))

Curve = tuple[list[int], list[float]]


def _last(events: Iterable[dict[str, Any]], kind: str) -> list[tuple[int, dict[str, Any]]]:
    """(epoch, event) of one kind of event; for a resumed epoch only the last event counts."""
    return sorted({event["epoch"]: event for event in events if event["event"] == kind}.items())


def curves(events: Sequence[dict[str, Any]]) -> dict[str, Curve]:
    """What the ``epoch`` and ``probe`` events hold: name -> (epochs, from 1; values).

    The loss, the online probe and its scores on val, the terms of the loss (named ``penalty.…``)
    and the diagnostics. For a resumed epoch only the last event counts.
    """
    found: dict[str, Curve] = {}

    def add(epoch: int, metrics: Mapping[str, Any]) -> None:
        for name, value in metrics.items():
            if isinstance(value, float):
                numbers, values = found.setdefault(name, ([], []))
                numbers.append(epoch + 1)
                values.append(value)

    for epoch, event in _last(events, "epoch"):
        own = ("loss", "online_probe")
        add(epoch, {n if n in own else PENALTY + n: v for n, v in event.items() if n != "time"})
        add(epoch, event.get("diagnostics", {}))
    for epoch, event in _last(events, "probe"):
        add(epoch, {name: x for name, x in event.items() if name.startswith("online_")})
    return found


def spectra(events: Sequence[dict[str, Any]]) -> dict[str, Curve]:
    """The spectra of the last epoch that has them: name -> (places, from 1; fractions)."""
    for _, event in reversed(_last(events, "epoch")):
        diagnostics = event.get("diagnostics", {})
        if SPECTRA.curves.keys() <= diagnostics.keys():
            return {
                name: ([k for k, _ in diagnostics[name]], [value for _, value in diagnostics[name]])
                for name in SPECTRA.curves
            }
    return {}


def draw(
    title: str, found: Mapping[str, Curve], spectrum: Mapping[str, Curve] | None = None
) -> "Figure":
    """A figure with one panel per measure that ``found`` holds, in the order of ``PANELS``.

    A curve that no panel names gets its own panel; the standard deviation of a curve is a band
    around it. ``spectrum``: what ``spectra`` returns, for a last panel. A line's label is the name
    of its curve. Raises ``InputError`` without matplotlib.
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
    named |= {name + STD for name in found}
    panels = [panel for panel in PANELS if panel.curves.keys() & found.keys()]
    panels += [
        Panel(name.replace(".", ": ").replace("_", " "), "value", {name: ""})
        for name in sorted(found.keys() - named)
    ]
    drawn = [(panel, found) for panel in panels]
    if spectrum:
        drawn.append((SPECTRA, spectrum))
    rows = -(-len(drawn) // COLUMNS)
    figure = Figure((COLUMNS * PANEL[0], rows * PANEL[1] + 0.4), layout="constrained")
    figure.suptitle(title, fontsize="x-large")
    for number, (panel, its) in enumerate(drawn, start=1):
        axes = figure.add_subplot(rows, COLUMNS, number)
        axes.set(title=panel.title, xlabel="epoch", ylabel=panel.axis)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        there = [name for name in panel.curves if name in its]
        for name, style in zip(there, STYLES, strict=False):
            x, values = its[name]
            (line,) = axes.plot(
                x, [panel.factor * v for v in values], style, label=name, markersize=3
            )
            if name + STD in its:
                band = list(zip(values, its[name + STD][1], strict=True))
                axes.fill_between(
                    x, [v - std for v, std in band], [v + std for v, std in band],
                    color=line.get_color(), alpha=0.2, linewidth=0,
                )  # fmt: skip
        if panel.factor == PER_CENT:
            axes.set_ylim(bottom=0)
        if panel is SPECTRA:
            axes.set(xlabel="singular value, from the largest", yscale="log")
        if len(there) > 1:
            axes.legend(axes.get_lines(), [panel.curves[name] for name in there])
    return figure


def report(run: RunFolder) -> Path:
    """Draw the run's ``diagnostics.png``; returns its path.

    Raises ``InputError`` for a run without a journal or without an epoch in it, and without
    matplotlib.
    """
    events = read(run.metrics)
    found = curves(events)
    if not found:
        raise InputError(
            f"{run.metrics} holds no epoch yet: train for one first, or give another run folder"
        )
    figure = draw(run.name, found, spectra(events))
    with replacing(run.curves) as file:
        figure.savefig(file, format="png", dpi=110)
    return run.curves


def main(argv: Sequence[str]) -> None:
    run, _ = open_run(argv, "python -m fastproj.report", "Draw the curves of a run.")
    print(f"written: {report(run)}")
