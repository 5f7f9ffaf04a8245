"""A set of ``<split>/<class>/<image>`` written as the other kinds of source hold it."""

import json
import tarfile
import zipfile
from pathlib import Path

import pytest

WORDS = {"train": "train", "val": "validation"}  # the hub's names of the splits


def files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))


def splits(root: Path) -> list[str]:
    return [split for split in WORDS if (root / split).is_dir()]


def class_names(root: Path) -> list[str]:
    return sorted({path.parent.name for path in files(root)})


def as_tar(root: Path, out: Path, prefix: str = "") -> Path:
    with tarfile.open(out / "set.tar", "w") as tar:
        for path in files(root):
            tar.add(path, f"{prefix}{path.relative_to(root)}")
    return out / "set.tar"


def as_zip(root: Path, out: Path) -> Path:
    with zipfile.ZipFile(out / "set.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in files(root):
            archive.write(path, f"photos/{path.relative_to(root)}")
    return out / "set.zip"


def as_archives(root: Path, out: Path) -> Path:
    for split in splits(root):
        as_tar(root / split, out).rename(out / f"{split}.tar")
    return out


def as_csv(root: Path, out: Path) -> Path:
    for split in splits(root):
        lines = [f"{path},{path.parent.name}\n" for path in files(root / split)]
        (out / f"{split}.csv").write_text("path,label\n" + "".join(lines))
    return out


def as_parquet(root: Path, out: Path) -> Path:
    """As ``datasets`` writes it: a struct of bytes and path, class names in the metadata."""
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    names = class_names(root)
    about = {"info": {"features": {
        "image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"},
    }}}  # fmt: skip
    for split in splits(root):
        rows = [{"bytes": path.read_bytes(), "path": path.name} for path in files(root / split)]
        labels = [names.index(path.parent.name) for path in files(root / split)]
        half = len(rows) // 2
        for number, part in enumerate((slice(0, half), slice(half, None))):
            table = pa.table(
                {"image": rows[part], "label": labels[part], "width": [50] * len(labels[part])}
            )
            table = table.replace_schema_metadata({"huggingface": json.dumps(about)})
            (out / "data").mkdir(exist_ok=True)
            name = f"{WORDS[split]}-{number:05}-of-00002.parquet"
            parquet.write_table(table, out / "data" / name, row_group_size=max(len(rows) // 4, 1))
    return out


def as_webdataset(root: Path, out: Path, kind: str = "cls") -> Path:
    """By webdataset's own writer; the labels are whole numbers."""
    webdataset = pytest.importorskip("webdataset")
    names = class_names(root)
    for split in splits(root):
        paths = files(root / split)
        pattern, size = str(out / f"{split}-%04d.tar"), len(paths) // 2 - 1
        with webdataset.ShardWriter(pattern, maxcount=size, verbose=0) as sink:
            for number, path in enumerate(paths):
                label = names.index(path.parent.name)
                sample = {"__key__": f"{number:06}", "jpg": path.read_bytes()}
                sink.write(
                    sample | ({"cls": label} if kind == "cls" else {"json": {"label": label}})
                )
    return out


MAKERS = {
    "csv": as_csv, "parquet": as_parquet, "webdataset": as_webdataset,
    "archive": as_archives,
}  # fmt: skip
