"""What a journal says, as curves: of every measure, of the logged steps, and of the time."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

PER_CENT = 100.0
STD = "_std"  # ends the name of a curve's standard deviation, which is drawn as a band
PENALTY = "penalty."  # before the name of a term of the loss: a diagnostic may be its namesake
POINTS = 400  # drawn of one curve over steps, at most

Curve = tuple[list[int], list[float]]


class Panel(NamedTuple):
    """Curves that share a measure: their names, and what each is called in the legend.

    ``how``: one sentence that says how to read them. ``factor``: from what is logged to the unit of
    ``axis``. ``group``: the part of the report that shows them.
    """

    title: str
    axis: str
    curves: dict[str, str]
    how: str
    factor: float = 1.0
    group: str = "diagnostics"


def _both(measure: str) -> dict[str, str]:
    return {f"{measure}_features": "features", f"{measure}_projections": "projections"}


PANELS = [
    Panel(
        "Loss per epoch",
        "loss",
        {"loss": "all terms, weighted", PENALTY + "objective": "objective"},
        "Mean over the steps of each epoch; it should fall. Where penalties are on, all terms are "
        "the objective and the weighted sum of the penalties.",
        group="training",
    ),
    Panel(
        "Online probe on training views",
        "right on training views (%)",
        {"online_probe": ""},
        "Share of augmented training views that the linear probe trained beside the encoder gets "
        "right; higher is better, and it is no accuracy on val.",
        PER_CENT,
        "training",
    ),
    Panel(
        "Online accuracy on val",
        "right on val images (%)",
        {"online_top1": "probe top-1", "online_top5": "probe top-5", "online_knn_top1": "kNN"},
        "Share of val images that the online probe and kNN get right while the run goes on; higher "
        "is better, and it is not the offline accuracy of fastproj evaluate.",
        PER_CENT,
        "training",
    ),
    Panel(
        "Matrix information",
        "I₂(h; z) (nats)",
        {"matrix_information": ""},
        "What features h and projections z share; lower means that the head passes on less of the "
        "features. Mean over the epoch's steps, the band is ± one standard deviation.",
    ),
    Panel(
        "Loss and matrix entropy of features",
        "mean over steps ± std (nats)",
        {
            "matrix_entropy_features": "S₂(h)",
            "log_n_minus_nce_features": "log N − NCE(h)",
            "negative_loss_features": "−loss(h)",
        },
        "S₂(h) says how spread out the features are; the others say how well two views of an image "
        "find each other among all others: higher is better, and log N − NCE(h) is 0 by chance.",
    ),
    Panel(
        "Authors' curves",
        "mean over steps ± std (nats)",
        {
            "entropy_minus_information": "S₂(h) − I₂(h; z)",
            "negative_loss_minus_information": "−loss(h) − I₂(h; z)",
        },
        "What the ICLR 2025 paper plots, without the terms of labels in its theorems: only trends "
        "mean something, not values.",
    ),
    Panel(
        "Alignment",
        "squared distance of views",
        _both("alignment"),
        "Mean squared distance between two views of an image on the unit sphere, from 0 to 4; "
        "lower means more invariant.",
    ),
    Panel(
        "Uniformity",
        "log mean exp(−2 · distance²)",
        _both("uniformity"),
        "How evenly images cover the unit sphere, from −8 to 0; lower is more even, and 0 means "
        "that all are one point.",
    ),
    Panel(
        "RankMe",
        "effective rank (dimensions)",
        _both("rankme"),
        "How many directions features and projections really use; a fall towards 1 is a collapse.",
    ),
    Panel(
        "Dead latents",
        "never kept (% of latents)",
        {"dead_latents": ""},
        "Share of the sparse layer's latents that no view of the epoch's last ones kept; 0 means "
        "that all take part.",
        PER_CENT,
    ),
    Panel(
        "Used codes",
        "occurring (% of levels)",
        {"used_codes": ""},
        "Share of a coordinate's levels that occur at all; close to 100 means that the "
        "discretization is used.",
        PER_CENT,
    ),
    Panel(
        "Near-zero groups",
        "first weight (% of groups)",
        {"near_zero_groups": ""},
        "Share of the groups of the head's first weight that are almost zero: what group sparsity "
        "is to raise.",
        PER_CENT,
    ),
]  # fmt: skip

SPECTRA = Panel(
    "Singular values, last measured epoch",
    "fraction of their sum",
    _both("spectrum"),
    "A steep fall means that few directions carry everything; a flat line means that all "
    "directions are used.",
)


def leftover(name: str) -> Panel:
    """The panel of a curve that no other one names."""
    title = name.replace(".", ": ").replace("_", " ")
    if name.startswith(PENALTY):
        how = "Mean over the steps of each epoch, before its weight: a treatment pushes it down."
        return Panel(title.capitalize(), "value", {name: ""}, how, group="training")
    return Panel(title.capitalize(), "value", {name: ""}, "As the journal holds it, by epoch.")


def panels(names: Iterable[str]) -> list[Panel]:
    """The panels of the curves ``names``, in the order of ``PANELS``; each curve is in one."""
    names = set(names)
    there = [panel for panel in PANELS if panel.curves.keys() & names]
    named = {name for panel in PANELS for name in panel.curves} | {name + STD for name in names}
    return there + [leftover(name) for name in sorted(names - named)]


def _last(events: Iterable[Mapping[str, Any]], kind: str) -> list[tuple[int, Mapping[str, Any]]]:
    """(epoch, event) of one kind of event; for a resumed epoch only the last event counts."""
    return sorted({e["epoch"]: e for e in events if e.get("event") == kind}.items())


def curves(events: Sequence[Mapping[str, Any]]) -> dict[str, Curve]:
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


def spectra(events: Sequence[Mapping[str, Any]]) -> dict[str, Curve]:
    """The spectra of the last epoch that has them: name -> (places, from 1; fractions)."""
    for _, event in reversed(_last(events, "epoch")):
        diagnostics = event.get("diagnostics", {})
        if SPECTRA.curves.keys() <= diagnostics.keys():
            return {
                name: ([k for k, _ in diagnostics[name]], [value for _, value in diagnostics[name]])
                for name in SPECTRA.curves
            }
    return {}


def steps(events: Iterable[Mapping[str, Any]], name: str) -> Curve:
    """What the logged steps say of ``name``: (steps done, from 1; values), empty where nothing.

    Of more than ``POINTS`` logged steps, equal numbers of neighbors become one point, their mean at
    the last one's step.
    """
    return _thinned((e["step"], e[name]) for e in events if e["event"] == "step" and name in e)


def terms(events: Sequence[Mapping[str, Any]]) -> dict[str, Curve]:
    """The loss's terms at the logged steps, before their weights: name -> as of ``steps``."""
    found: dict[str, list[tuple[int, float]]] = {}
    for event in events:
        for name, value in event.get("terms", {}).items():
            found.setdefault(name, []).append((event["step"], value))
    return {name: _thinned(points) for name, points in found.items()}


def _thinned(points: Iterable[tuple[int, float]]) -> Curve:
    found = list(points)
    width = -(-len(found) // POINTS) or 1
    bins = [found[at : at + width] for at in range(0, len(found), width)]
    return (
        [part[-1][0] for part in bins],
        [sum(value for _, value in part) / len(part) for part in bins],
    )


def times(events: Iterable[Mapping[str, Any]]) -> dict[str, Curve]:
    """Seconds of each part of an epoch: part -> (epochs, from 1; seconds).

    The parts of an epoch that was interrupted and resumed are added.
    """
    total: dict[int, dict[str, float]] = {}
    for event in events:
        if event.get("event") == "epoch":
            mine = total.setdefault(event["epoch"], {})
            for part, seconds in event.get("seconds", {}).items():
                mine[part] = mine.get(part, 0.0) + seconds
    names = dict.fromkeys(part for mine in total.values() for part in mine)
    return {
        name: ([e + 1 for e in sorted(total)], [total[e].get(name, 0.0) for e in sorted(total)])
        for name in names
    }
