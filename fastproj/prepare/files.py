"""Images listed in tables: csv files of paths and labels, parquet files of Hugging Face's form."""

import csv
import json
import re
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastproj.core.errors import InputError
from fastproj.prepare.sources import (
    FOLDERS,
    Lazy,
    Source,
    by_name,
    by_split,
    numbered,
    word_of,
)


def csv_files(root: Path, split: str, download: bool) -> list[Source]:
    """``path,label`` with a line of column names; paths are relative to the file's folder.

    ``root`` is the file, or a folder with files ``train*.csv`` and ``val*.csv``; several of a split
    are one after the other. A label is a class's name or a whole number; an empty one, -1, or no
    column ``label``, means none.
    """
    tables = [(word_of(path.name), path) for path in _files(root, ".csv")]
    sources = []
    for ours, paths in by_split(root, tables, split).items():
        rows = [row for path in paths for row in _rows(path)]
        names, images, found = zip(*rows, strict=True)
        classes, labels = by_name(found)
        sources.append(Source(ours, classes, images, labels, names))
    return sources


def _rows(path: Path) -> list[tuple[str, str, str]]:
    """Of each line of a csv file: the image as it is named there, its path, its label."""
    rows = []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            table = csv.DictReader(file)
            if "path" not in (table.fieldnames or ()):
                raise InputError(f"{path}: has no column path; its first line must be path,label")
            for row in table:
                name, label = row["path"], (row.get("label") or "").strip()
                if not name:
                    raise InputError(f"{path}, line {table.line_num}: names no image: remove it")
                rows.append((name, str(path.parent / name), label))
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: no csv in UTF-8 ({error}): save it as that") from None
    if not rows:
        raise InputError(f"{path}: lists no image")
    return rows


def parquet(root: Path, split: str, download: bool) -> list[Source]:
    """Parquet files as Hugging Face's ``datasets`` writes them, below ``root`` or ``root`` itself.

    The image column holds ``{bytes, path}``, or bytes. The label column is called ``label`` and
    holds whole numbers or names, or is the one that the file's metadata calls a ``ClassLabel``;
    without either, images have no labels. Files of a split begin with its name
    (``train-00000-of-00017.parquet``).
    """
    files = []
    for path in _files(root, ".parquet"):
        folder = path.parent.name
        files.append((word_of(path.name) or (folder if folder in FOLDERS else ""), path))
    found = by_split(root, files, split)
    for paths in found.values():
        of = max((int(n) for path in paths for n in re.findall(r"-of-(\d+)", path.stem)), default=1)
        if root.is_dir() and len(paths) < of:
            raise InputError(
                f"{paths[0]}: one of {of} files, of which {len(paths)} are there: fetch the "
                "others, or name the one to read with --data.root"
            )
    return [_of_parquet(ours, paths) for ours, paths in found.items()]


def from_hub(name: str, root: Path, split: str, download: bool) -> list[Source]:
    """The parquet files of the data set ``OWNER/NAME`` on Hugging Face's hub.

    They are kept in ``root/OWNER--NAME``: where the hub cannot be reached, or knows no such set,
    its own code takes what lies in the folder, which must not be another set.
    """
    folder = root / name.replace("/", "--")
    if download:
        try:
            from huggingface_hub import snapshot_download
            from huggingface_hub.errors import HfHubHTTPError, HFValidationError
        except ImportError:
            raise InputError(
                f"hf:{name} needs huggingface_hub: pip install 'fastproj-ssl[parquet]'"
            ) from None

        try:
            snapshot_download(
                name, repo_type="dataset", local_dir=folder, allow_patterns=["*.parquet"]
            )
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            why = " ".join(str(error).split())
            raise InputError(f"data.dataset hf:{name} cannot be fetched ({why})") from None
    if not any(folder.rglob("*.parquet")):
        fetch = "it has none on the hub" if download else "fetch it with --data.download true"
        raise InputError(f"{folder}: no parquet file of hf:{name}; {fetch}")
    return parquet(folder, split, download)


def _files(root: Path, suffix: str) -> list[Path]:
    if root.is_file():
        return [root]
    found = sorted(root.rglob(f"*{suffix}"))
    if not found:
        raise InputError(f"{root}: no {suffix} file there; --data.root names it, or its folder")
    return found


def _of_parquet(split: str, paths: Sequence[Path]) -> Source:
    try:
        from pyarrow import ArrowException
        from pyarrow import parquet as pq
    except ImportError:
        raise InputError(
            "parquet files need pyarrow: pip install 'fastproj-ssl[parquet]'"
        ) from None

    groups: list[tuple[Any, int]] = []  # of each row group: its open file and its number there
    starts = [0]
    cells: list[Any] = []  # of the label column
    image, label = "", ""  # of the first file; the others must agree
    classes: tuple[str, ...] = ()
    for path in paths:
        try:
            file = pq.ParquetFile(path)
            found = _columns(path, file.schema_arrow)
            if groups and found != (image, label, classes):
                raise InputError(f"{path}: other columns or classes than {paths[0].name}")
            image, label, classes = found
            for group in range(file.num_row_groups):
                groups.append((file, group))
                starts.append(starts[-1] + file.metadata.row_group(group).num_rows)
            rows = file.metadata.num_rows
            cells += file.read([label])[label].to_pylist() if label else [None] * rows
        except ArrowException as error:
            raise InputError(f"{path}: damaged or no parquet file ({error})") from None
    classes, labels = _labeled(paths[0], classes, cells)
    kept: dict[int, list[Any]] = {}  # the last row group that was read

    def read(position: int) -> bytes:
        number = bisect_right(starts, position) - 1
        if number not in kept:
            kept.clear()
            file, group = groups[number]
            kept[number] = file.read_row_group(group, columns=[image])[image].to_pylist()
        cell = kept[number][position - starts[number]]
        content = cell["bytes"] if isinstance(cell, dict) else cell
        if content is None:
            raise InputError(f"{paths[0].parent}: row {position} of split {split} has no image")
        return content

    names = [f"{split}[{i}]" for i in range(len(labels))]
    return Source(split, classes, Lazy(read, range(len(labels))), labels, names)


def _labeled(
    path: Path, classes: tuple[str, ...], cells: Sequence[Any]
) -> tuple[tuple[str, ...], np.ndarray]:
    """Classes and labels from the cells of the label column; ``classes``: those the file names."""
    there = [cell for cell in cells if cell is not None]
    if there and all(isinstance(cell, str) for cell in there):
        return by_name([cell or "" for cell in cells])
    odd = [cell for cell in there if not isinstance(cell, int)]
    if odd:
        raise InputError(
            f"{path}: a label is {odd[0]!r:.40}, and a column label must hold whole numbers or "
            "names: give it another name"
        )
    labels = np.array([-1 if cell is None else cell for cell in cells], np.int64)
    return classes or numbered(labels, path), labels


def _columns(path: Path, schema: Any) -> tuple[str, str, tuple[str, ...]]:
    """The image column, the label column (empty: none), and the class names that the file says."""
    from pyarrow import types

    about = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = about.get("info", {}).get("features", {})
    named = {
        name: tuple(kind.get("names") or ())
        for name, kind in features.items()
        if isinstance(kind, dict) and kind.get("_type") == "ClassLabel" and name in schema.names
    }
    images = [
        field.name
        for field in schema
        if types.is_binary(field.type)
        or types.is_large_binary(field.type)
        or (types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0)
    ]
    image = "image" if "image" in images else images[0] if len(images) == 1 else None
    label = "label" if "label" in schema.names else next(iter(named), "")
    if image is None or (label != "label" and len(named) > 1):
        raise InputError(
            f"{path}: which column is the image, which the label? Its columns are "
            f"{', '.join(schema.names)}; call them image and label"
        )
    return image, label, named.get(label, ())
