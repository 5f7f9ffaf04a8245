"""Images listed in tables: csv files of paths and labels, parquet files of Hugging Face's form."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastproj.core.errors import InputError
from fastproj.prepare.sources import FOLDERS, Lazy, Source, by_name, same_classes, split_of


def csv_files(root: Path, split: str, download: bool) -> list[Source]:
    """``path,label`` with a line of column names; paths are relative to the file's folder.

    ``root`` is the file, or a folder with ``train.csv`` and ``val.csv``. A label is a class's name
    or a whole number; an empty one, or no column ``label``, means none.
    """
    sources = []
    for path in _files(root, ".csv"):
        try:
            with path.open(newline="", encoding="utf-8-sig") as file:
                table = csv.DictReader(file)
                rows = list(table)
        except (UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"{path}: no csv in UTF-8 ({error}): save it as that") from None
        if "path" not in (table.fieldnames or ()):
            raise InputError(f"{path}: has no column path; its first line must be path,label")
        if not rows:
            raise InputError(f"{path}: lists no image")
        images = [str(path.parent / (row["path"] or "")) for row in rows]
        classes, labels = by_name([(row.get("label") or "").strip() for row in rows])
        names = [row["path"] for row in rows]
        sources.append(Source(split_of(path.name) or "all", classes, images, labels, names))
    return same_classes(root, sources)


def parquet(root: Path, split: str, download: bool) -> list[Source]:
    """Parquet files as Hugging Face's ``datasets`` writes them, below ``root`` or ``root`` itself.

    The image column holds ``{bytes, path}``, or bytes; the label column whole numbers, whose class
    names are in the file's metadata. Files of a split begin with its name
    (``train-00000-of-00017.parquet``).
    """
    files: dict[str, list[Path]] = {}
    for path in _files(root, ".parquet"):
        named = split_of(path.name) or FOLDERS.get(path.parent.name, "all")
        files.setdefault(named, []).append(path)
    return same_classes(root, [_of_parquet(ours, paths) for ours, paths in files.items()])


def from_hub(name: str, root: Path, split: str, download: bool) -> list[Source]:
    """The parquet files of the data set ``NAME`` on Hugging Face's hub, kept in ``root``."""
    if download:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        try:
            snapshot_download(
                name, repo_type="dataset", local_dir=root, allow_patterns=["*.parquet"]
            )
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            why = " ".join(str(error).split())
            raise InputError(f"data.dataset hf:{name} cannot be fetched ({why})") from None
    if not any(root.rglob("*.parquet")):
        fetch = "it has none on the hub" if download else "fetch it with --data.download true"
        raise InputError(f"{root}: no parquet file of hf:{name}; {fetch}")
    return parquet(root, split, download)


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
    labels: list[int] = []
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
            column = file.read([label])[label].to_pylist() if label else []
        except ArrowException as error:
            raise InputError(f"{path}: damaged or no parquet file ({error})") from None
        rows = file.metadata.num_rows
        labels += [-1 if x is None else x for x in column] if label else [-1] * rows
    values = np.array(labels, np.int64)
    if not classes and (values >= 0).any():
        classes = tuple(map(str, range(values.max() + 1)))
    kept: dict[int, list[Any]] = {}  # the last row group that was read

    def read(position: int) -> bytes:
        number = int(np.searchsorted(starts, position, "right")) - 1
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
    return Source(split, classes, Lazy(read, range(len(labels))), values, names)


def _columns(path: Path, schema: Any) -> tuple[str, str, tuple[str, ...]]:
    """The image column, the label column (empty: none), and the class names that the file says."""
    from pyarrow import types

    about = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = about.get("info", {}).get("features", {})
    images = [
        field.name
        for field in schema
        if types.is_binary(field.type)
        or types.is_large_binary(field.type)
        or (types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0)
    ]
    labels = [name for name, kind in features.items() if kind.get("_type") == "ClassLabel"]
    if not labels:
        labels = [field.name for field in schema if types.is_integer(field.type)]
    image = "image" if "image" in images else images[0] if len(images) == 1 else None
    label = "label" if "label" in labels else labels[0] if len(labels) == 1 else None
    if image is None or (label is None and labels):
        raise InputError(
            f"{path}: which column is the image, which the label? Its columns are "
            f"{', '.join(schema.names)}; call them image and label"
        )
    return image, label or "", tuple(features.get(label, {}).get("names") or ())
