"""``eval.json``: one header and one row per encoder, data set and probe."""

import io
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import Tensor

from fastproj.core.errors import InputError
from fastproj.core.files import replacing
from fastproj.runs.folder import RunFolder

SCHEMA = 2  # of eval.json


@dataclass(frozen=True)
class Row:
    """One score: what was probed, how, and what came out.

    ``encoder``: ``pre-trained``, ``random`` (as pre-training found it) or ``pixels`` (none).
    ``data``: name of the data set. ``probe``: its name in ``PROBES``. ``metrics``: name -> score,
    accuracies as fractions in [0, 1]. ``protocol``: everything that repeating the row takes, with
    the parts ``data``, ``features`` and ``probe``. ``seconds``: of ``features`` and ``probe``.
    ``predictions``: a NumPy file, one class per val image, in the smallest unsigned type that holds
    them; its path is relative to the run folder. None where none was kept.
    """

    encoder: str
    data: str
    probe: str
    metrics: dict[str, float]
    protocol: dict[str, Any]
    seconds: dict[str, float]
    predictions: str | None = None


@dataclass(frozen=True)
class Evaluation:
    """What ``eval.json`` holds.

    ``checkpoint``: ``file``, ``sha256``, ``step`` and ``epoch`` of what was evaluated.
    ``versions``: of the packages, of Python, and the device's name. ``missing``: one line for what
    was asked for and could not be scored; a whole evaluation has none, and no such entry.
    """

    checkpoint: dict[str, Any]
    versions: dict[str, str | None]
    rows: tuple[Row, ...]
    missing: tuple[str, ...] = ()


def write_evaluation(
    run: RunFolder, evaluation: Evaluation, predictions: Mapping[str, Tensor]
) -> None:
    """Write ``eval.json``, and before it ``predictions``: path as in the rows -> int64 (N,).

    Raises ``InputError`` where a file cannot be written.
    """
    for path, classes in predictions.items():
        file = run.path / path
        content = io.BytesIO()
        kept = classes.cpu().numpy()
        np.save(content, kept.astype(np.min_scalar_type(kept.max(initial=0))))
        try:
            file.parent.mkdir(exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot write {file}: {error.strerror}") from None
        with replacing(file) as whole:
            whole.write(content.getvalue())
    entries = {"schema": SCHEMA, **asdict(evaluation)}
    if not evaluation.missing:
        del entries["missing"]
    text = json.dumps(entries, indent=2) + "\n"
    with replacing(run.evaluation) as whole:
        whole.write(text.encode())


def read_evaluation(run: RunFolder) -> Evaluation:
    """Read ``eval.json``. Raises ``InputError`` if it is missing, damaged or of another schema."""
    path, again = run.evaluation, "evaluate the run again"
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; evaluate the run first") from None
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}): {again}") from None
    schema = content.pop("schema", 1) if isinstance(content, dict) else None
    if schema != SCHEMA:
        raise InputError(f"{path} has schema {schema}, expected {SCHEMA}: {again}")
    try:
        rows = tuple(Row(**row) for row in content.pop("rows"))
        missing = tuple(content.pop("missing", ()))
        return Evaluation(rows=rows, missing=missing, **content)
    except (KeyError, TypeError):
        raise InputError(
            f"{path} is damaged, its entries differ from schema {SCHEMA}: {again}"
        ) from None


def holds_whole(run: RunFolder) -> bool:
    """Whether ``eval.json`` is there, unless it lacks rows that were asked for."""
    try:
        return run.evaluation.exists() and not read_evaluation(run).missing
    except InputError:  # of another schema, or damaged: whole for all we know
        return True


SHORT = {"learning_rate": "lr", "weight_decay": "decay", "strength": "strength"}  # in the table


def table(evaluation: Evaluation) -> str:
    """One line per row, accuracies in per cent, and below them what should be known about each."""
    lines = [
        f"{'encoder':<11} {'data':<10} {'probe':<8} {'top-1':>7} {'top-5':>7} {'width':>6} "
        f"{'features':>9} {'probe':>8}  chosen"
    ]
    notes = []
    for row in evaluation.rows:
        scores = " ".join(f"{row.metrics[name]:>7.2%}" for name in ("top1", "top5"))
        chosen = row.protocol["probe"].get("chosen", {})
        picked = ", ".join(f"{text} {chosen[name]:g}" for name, text in SHORT.items()
                           if name in chosen)  # fmt: skip
        lines.append(
            f"{row.encoder:<11} {row.data:<10} {row.probe:<8} {scores} "
            f"{row.protocol['features']['width']:>6} {row.seconds['features']:>7.2f} s "
            f"{row.seconds['probe']:>6.2f} s  {picked}".rstrip()
        )
        notes += [f"{row.encoder}, {row.probe}: {note}" for note in _notes(row)]
    return "\n".join([*lines, *notes, *(f"missing: {line}" for line in evaluation.missing)])


def _saw_labels(row: Row) -> bool:
    encoder = row.protocol["features"].get("encoder", {})
    return encoder.get("saw_labels_of_train", False)


def _notes(row: Row) -> Iterator[str]:
    probe = row.protocol["probe"]
    chosen = probe.get("chosen", {})
    more = {name: value for name, value in row.metrics.items() if name.startswith("top1_")}
    if more:
        yield "also " + ", ".join(f"{name} {value:.2%}" for name, value in more.items())
    if edge := chosen.get("edge"):
        yield f"{' and '.join(edge)} chosen at the end of the list: make it longer"
    if "holdout_top1" in chosen and _saw_labels(row):
        yield "chosen on held-out images whose labels the encoder had seen: give one value of each"
    if chosen.get("tie"):
        yield "all entries tie on the held-out images: the choice says nothing"
    if alone := chosen.get("classes_not_held_out"):
        yield f"{alone} classes have one training image each and did not take part in the choice"
    if chosen.get("suboptimality", 0) > probe.get("tolerance", math.inf):
        yield f"solved only to {chosen['suboptimality']:.0e} of the objective"
    if diverged := chosen.get("not_finite"):
        yield f"diverged at learning rate {', '.join(map(str, diverged))}"
