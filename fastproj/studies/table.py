"""The table of a study: for the terminal, as CSV, Markdown and LaTeX, from ``results.report``."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

Report = Mapping[str, Any]

HEAD = (
    "set", "arm", "n", "{primary} (%)", "gain", "95 % interval", "p (Holm)", "published", "acted",
)  # fmt: skip
CSV_COLUMNS = (
    "set", "arm", "control", "n", "mean", "std", "pairs", "gain_mean", "gain_std", "gain_low",
    "gain_high", "p", "p_holm", "p_permutation", "p_mcnemar", "images_low", "images_high",
    "published", "seeds_needed", "acted", "conclusion",
)  # fmt: skip
METRIC_COLUMNS = (
    "set", "arm", "metric", "n", "mean", "std", "gain_mean", "gain_low", "gain_high",
)  # fmt: skip


def rows(report: Report) -> list[dict[str, Any]]:
    """The rows of all sets."""
    return [row for part in report["sets"] for row in part["rows"]]


def cells(row: Mapping[str, Any], dash: str = "–", plus_minus: str = "±") -> list[str]:
    """One row as text: points with two decimals, empty where there is nothing to say."""

    def signed(name: str) -> str:
        value = row.get(name)
        return "" if value is None else f"{value:+.2f}".replace("-", "−" if dash == "–" else "-")

    mean = "" if row["mean"] is None else f"{row['mean']:.2f}"
    if row["std"] is not None:
        mean += f" {plus_minus} {row['std']:.2f}"
    interval = ""
    if row.get("gain_low") is not None:
        interval = f"{signed('gain_low')} to {signed('gain_high')}"
    p = row.get("p_holm")
    acted = {True: "yes", False: "no", None: "?" if row["check"] else ""}[row["acted"]]
    return [
        row["set"], row["arm"], str(row["n"]), mean, signed("gain_mean"), interval,
        "" if p is None else f"{p:.2g}", signed("published"), acted,
    ]  # fmt: skip


def _head(report: Report) -> list[str]:
    return [name.format(primary=report["primary"]) for name in HEAD]


def conclusions(report: Report) -> list[str]:
    """One sentence per arm and set, the baseline's left out."""
    return [
        f"{row['set']}, {row['arm']}: {row['conclusion']}."
        for row in rows(report)
        if row["arm"] != report["baseline"]
    ]


def settings(values: Mapping[str, str]) -> str:
    """``optim.lr 1e-3, projector.k 41``."""
    return ", ".join(f"{name} {text}" for name, text in values.items())


def notes(report: Report) -> list[str]:
    """What the table rests on: spread, sweeps, and what ran where."""
    found = []
    for part in report["sets"]:
        if part["pooled_std"] is not None:
            found.append(
                f"{part['set']}: standard deviation over seeds, pooled over the arms, "
                f"{part['pooled_std']:.2f} points."
            )
    for sweep in report["sweeps"]:
        chosen = sweep["chosen"]
        words = "no try has a result" if chosen is None else settings(chosen)
        edge = f"; {' and '.join(sweep['edge'])} at the end of the list" if sweep["edge"] else ""
        found.append(
            f"{sweep['set']}, {sweep['arm']}: best of {len(sweep['tries'])} tries on the holdout "
            f"of train: {words}{edge}."
        )
    return [*found, *_origin(report)]


def _origin(report: Report) -> list[str]:
    environment = report["environment"]
    commits = [
        "no commit" if git is None
        else git["commit"][:10] + (" with uncommitted changes" if git["dirty"] else "")
        for git in environment.get("git", ())
    ]  # fmt: skip
    versions = sorted(
        {f"{name} {packages[name]}" for packages in environment.get("packages", ())
         for name in ("fastproj", "torch")}
    )  # fmt: skip
    hardware = [", ".join(gpus) for gpus in environment.get("gpus", ()) if gpus]
    machines = hardware or environment.get("cpu", [])
    where = "; ".join([*versions, *(f"commit {commit}" for commit in commits), *machines])
    return [f"{where}."] if where else []


def hours(report: Report) -> str:
    """The one line that differs from start to start."""
    unit = "GPU" if any(report["environment"].get("gpus", ())) else "CPU"
    return f"{report['hours']:.2f} hours of {unit} runs ({len(report['runs'])} runs)."


def text(report: Report) -> str:
    """For the terminal: the table, the sentences, the notes."""
    table = [_head(report), *map(cells, rows(report))]
    if len(report["sets"]) == 1:  # its name is in each sentence
        table = [line[1:] for line in table]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
        for line in table
    ]
    return "\n".join([*lines, "", *conclusions(report), "", *notes(report), hours(report)])


def as_csv(report: Report) -> str:
    """Every number of the rows, to six digits; one line per set and arm."""
    return _csv(CSV_COLUMNS, rows(report))


def metrics_csv(report: Report) -> str:
    """Every metric of every probe, depth and set; one line per set, arm and metric."""
    return _csv(METRIC_COLUMNS, report["metrics"])


def _csv(columns: Sequence[str], lines: Sequence[Mapping[str, Any]]) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns)
    for line in lines:
        writer.writerow([_cell(line.get(name)) for name in columns])
    return file.getvalue()


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def as_markdown(report: Report) -> str:
    """A table, then the sentences and the notes as lists."""

    def line(values: Sequence[str]) -> str:
        return "| " + " | ".join(value.replace("|", "\\|") for value in values) + " |"

    head = _head(report)
    table = [line(head), line(["---"] * len(head)), *(line(cells(row)) for row in rows(report))]
    lists = [f"- {words}" for words in [*conclusions(report), *notes(report)]]
    return "\n".join([*table, "", *lists, f"- {hours(report)}", ""])


ESCAPES = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
           **{mark: f"\\{mark}" for mark in "&%$#_{}"}}  # fmt: skip


def _latex(value: str) -> str:
    """Text for LaTeX; a signed number in math, so that its minus is one."""
    if value[:1] in ("+", "-") and " " not in value:
        return f"${value}$"
    return "".join(ESCAPES.get(mark, mark) for mark in value)


def as_latex(report: Report) -> str:
    r"""A ``tabular`` with booktabs' rules (``\usepackage{booktabs}``), a rule between sets."""

    def line(values: Sequence[str]) -> str:
        return " & ".join(values) + r" \\"

    lines = [r"\begin{tabular}{llrlrllrl}", r"\toprule", line([*map(_latex, _head(report))])]
    for part in report["sets"]:
        lines.append(r"\midrule")
        for row in part["rows"]:
            values = cells(row, dash="--", plus_minus=r"$\pm$")
            interval = " to ".join(map(_latex, values[5].split(" to ")))
            texts = [values[3] if at == 3 else _latex(v) for at, v in enumerate(values)]
            lines.append(line([*texts[:5], interval, *texts[6:]]))
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])
