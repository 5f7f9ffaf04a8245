"""The page of several runs, over one another."""

from collections.abc import Sequence

from fastproj.reporting import curves
from fastproj.reporting.curves import Curve, Panel
from fastproj.reporting.figures import LEGEND, Picture, legend, lines, slug
from fastproj.reporting.page import Block, Missing, Page, Section, Table
from fastproj.reporting.read import Reported
from fastproj.reporting.run import ENCODER, of_steps, spectrum_picture

# Settings that differ from run to run and say nothing about what was done.
ASIDE = ("run.name", "run.dir", "run.resume")
NOTHING: Curve = ([], [])  # of a run without a curve: it still takes its color


def labels(runs: Sequence[Reported]) -> list[str]:
    """What each run is called: its folder's name, or as much of its path as tells it apart."""
    paths = [run.folder.path.resolve() for run in runs]
    for parts in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(names)) == len(set(paths)):
            break
    return names


def differing(runs: Sequence[Reported]) -> dict[str, list[str]]:
    """The settings that are not the same in all runs: name -> the value of each."""
    values = [{setting.name: setting.value for setting in run.settings} for run in runs]
    names = dict.fromkeys(name for mine in values for name in mine if name not in ASIDE)
    found = {name: [mine.get(name, "not read") for mine in values] for name in names}
    return {name: column for name, column in found.items() if len(set(column)) > 1}


def comparison_page(runs: Sequence[Reported], title: str, notes: Sequence[str] = ()) -> Page:
    """The settings that differ, the scores of the probes, and every curve of every run."""
    names = labels(runs)
    about = f"{len(runs)} runs, {sum(run.over for run in runs)} of them over."
    sections = [
        Section("Runs", _runs(runs, names)),
        Section("Probes", _probes(runs, names)),
        *curve_sections(runs, names),
    ]
    return Page(title, about, sections, notes)


def curve_sections(runs: Sequence[Reported], names: Sequence[str]) -> list[Section]:
    """Every curve, those of all runs in one figure."""
    found = [curves.curves(run.events) for run in runs]
    seen = dict.fromkeys(name for mine in found for name in mine)
    training: list[Block] = [legend(names)] if len(runs) > LEGEND else []
    training += [*filter(None, (_steps(runs, names, name) for name in ("loss", "lr")))]
    diagnostics: list[Block] = []
    for panel in curves.panels(seen):
        blocks = training if panel.group == "training" else diagnostics
        blocks += [_of_runs(panel, curve, names, found) for curve in panel.curves if curve in seen]
    spectra = [curves.spectra(run.events) for run in runs]
    for curve, text in curves.SPECTRA.curves.items() if any(spectra) else ():
        panel = curves.SPECTRA._replace(title=f"Singular values of {text}, last measured epoch")
        there = {n: mine.get(curve, NOTHING) for n, mine in zip(names, spectra, strict=True)}
        diagnostics.append(spectrum_picture(slug(curve), panel, there))
    rates = [*filter(None, (_steps(runs, names, name) for name in ("images_per_second",)))]
    if not seen and not any(isinstance(block, Picture) for block in training):
        training.append(Missing("curves", "no step was logged yet"))
    return [
        Section("Training", training),
        Section("Diagnostics", diagnostics),
        Section("Throughput", [*rates]),
    ]


def _of_runs(
    panel: Panel, curve: str, names: Sequence[str], found: Sequence[dict[str, Curve]]
) -> Picture:
    """One curve of all runs that have it; the others keep their colors."""
    text = panel.curves[curve]
    title = f"{panel.title}: {text}" if text else panel.title
    there = {name: mine.get(curve, NOTHING) for name, mine in zip(names, found, strict=True)}
    return lines(slug(curve), panel._replace(title=title), there)


def _steps(runs: Sequence[Reported], names: Sequence[str], name: str) -> Picture | None:
    found = {n: curves.steps(run.events, name) for n, run in zip(names, runs, strict=True)}
    return of_steps(name, found)


def _runs(runs: Sequence[Reported], names: Sequence[str]) -> list[Block]:
    rows = []
    for name, run in zip(names, runs, strict=True):
        about = run.environment or {}
        commit = (about.get("git") or {}).get("commit", "")[:10]
        machine = ", ".join(about.get("gpus", ())) or about.get("cpu", "")
        rate = next((e["images_per_second"] for e in reversed(run.events) if e["event"] == "end"
                     and "images_per_second" in e), None)  # fmt: skip
        rows.append((name, run.status(), "" if rate is None else f"{rate:,.0f}", commit, machine))
    blocks: list[Block] = [
        Table("", ("run", "how far it came", "images/s", "commit", "machine"), rows)
    ]
    if found := differing(runs):
        columns = zip(*found.values(), strict=True)
        each = [(name, *values) for name, values in zip(names, columns, strict=True)]
        how = "Every setting that is not the same in all runs, names and folders aside."
        blocks.append(Table("Settings that differ", ("run", *found), each, how=how))
    else:
        blocks.append(Missing("settings that differ", "none, names and folders aside"))
    return blocks


def _probes(runs: Sequence[Reported], names: Sequence[str]) -> list[Block]:
    blocks: list[Block] = []
    rows = [(n, row) for n, run in zip(names, runs, strict=True) if run.evaluation
            for row in run.evaluation.rows]  # fmt: skip
    how = (
        "Accuracy on val of probes on frozen features (finetune trains the encoder too); a "
        "difference between single runs may be the noise of their seeds, which fastproj study "
        "tells apart."
    )
    for title, own in (("Scores", True), ("Scores of baselines and other depths", False)):
        found: dict[str, dict[str, float]] = {}  # column -> run -> per cent
        for name, row in rows:
            if own == (row.encoder == ENCODER):
                of = f"{row.probe}, {row.data}" + (f", {row.encoder}" if not own else "")
                for metric, value in row.metrics.items():
                    column = found.setdefault(f"{of}: {metric} (% of val)", {})
                    column[name] = curves.PER_CENT * value
        if found:
            table = [
                (name, *(f"{column[name]:.2f}" if name in column else ""
                         for column in found.values()))
                for name in names if any(name in column for column in found.values())
            ]  # fmt: skip
            blocks.append(Table(title, ("run", *found), table, folded=not own, how=how))
    for data, probe in dict.fromkeys((row.data, row.probe) for _, row in rows):
        contents = {
            row.protocol.get("data", {}).get("val", {}).get("content")
            for _, row in rows
            if (row.data, row.probe) == (data, probe)
        }
        if len(contents) > 1:
            blocks.append(
                Missing(f"{data}, {probe}", "the runs were scored on different val images: their "
                        "scores cannot be compared")
            )  # fmt: skip
    blocks += [
        Missing(name, run.missing["eval.json"])
        for name, run in zip(names, runs, strict=True)
        if run.evaluation is None
    ]
    return blocks
