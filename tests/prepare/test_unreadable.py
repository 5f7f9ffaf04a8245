"""Sources whose images cannot be read: named, or left out, as a damaged file is."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest

from fastproj.core.errors import InputError, SettingError
from fastproj.data.beton import open_beton
from fastproj.prepare.command import main
from fastproj.prepare.sources import open_sources
from tests.support.betons import photograph
from tests.support.sources import as_parquet

RNG = np.random.default_rng(0)


def zipped(folder: Path) -> Path:
    """Four images; the content of the third is another one than its checksum says."""
    path = folder / "set.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(4):
            file = folder / f"{number}.png"
            photograph(RNG, 20, 20).save(file)
            archive.write(file, f"{'ab'[number % 2]}/{number}.png")
        third = archive.getinfo("a/2.png")
    content = bytearray(path.read_bytes())
    content[third.header_offset + 80] ^= 255
    path.write_bytes(content)
    return path


def given(kind: str, root: Path, out: Path) -> list[str]:
    return ["--dataset", kind, "--root", str(root), "--out", str(out), "--workers", "1"]


def test_a_damaged_member_of_a_zip_stops_or_is_left_out(tmp_path: Path) -> None:
    arguments = given("archive", zipped(tmp_path), tmp_path / "out")
    with pytest.raises(InputError, match=r"cannot read .*a/2.png.*: BadZipFile: Bad CRC") as why:
        main(arguments)
    assert "\n" not in str(why.value)
    assert main([*arguments, "--on_error", "skip"]) == 0
    beton = open_beton(tmp_path / "out" / "all.beton")
    assert len(beton) == 3 and [one["source"] for one in beton.manifest.skipped] == ["a/2.png"]


def test_a_damaged_page_of_a_parquet_file_is_named(tmp_path: Path) -> None:
    for number in range(4):
        folder = tmp_path / "in" / "train" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        photograph(RNG, 60, 60).save(folder / f"{number}.jpg")
    as_parquet(tmp_path / "in", tmp_path)
    path = tmp_path / "data" / "train-00000-of-00002.parquet"
    content = bytearray(path.read_bytes())
    content[4:40] = bytes(36)  # the first page's head
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"cannot read .*train\[0\].*fix it, or leave it out"):
        main(given("parquet", tmp_path, tmp_path / "out"))


def test_a_row_without_an_image_is_left_out(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    content = io.BytesIO()
    photograph(RNG, 20, 20).save(content, "PNG")
    images = [content.getvalue(), None, content.getvalue()]
    parquet.write_table(pa.table({"image": images, "label": [0, 1, 1]}), tmp_path / "a.parquet")
    arguments = given("parquet", tmp_path, tmp_path / "out")
    with pytest.raises(InputError, match=r"cannot read all\[1\]: .*has no image; fix it, or leave"):
        main(arguments)
    assert main([*arguments, "--on_error", "skip"]) == 0
    assert open_beton(tmp_path / "out" / "all.beton").label.tolist() == [0, 1]


class OneOfFloats:
    targets = (0, 1, 0, 1)

    def __len__(self) -> int:
        return 4

    def __getitem__(self, at: int):
        return np.full((8, 8, 3), at, np.float32 if at == 1 else np.uint8), at % 2


def test_an_item_of_other_pixels_is_left_out(tmp_path: Path) -> None:
    arguments = given(f"{__name__}:OneOfFloats", tmp_path, tmp_path / "out")
    with pytest.raises(InputError, match=r"cannot read all\[1\]: .*is float32 .*leave it out with"):
        main(arguments)
    assert main([*arguments, "--on_error", "skip"]) == 0
    assert open_beton(tmp_path / "out" / "all.beton").label.tolist() == [0, 0, 1]


def test_a_function_of_the_users_that_fails_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "failing_sets.py").write_text(
        "import numpy as np\n"
        "class Failing:\n"
        "    def __len__(self):\n        return 3\n"
        "    def __getitem__(self, at):\n"
        "        if at == 1:\n            raise KeyError('the share is gone')\n"
        "        return np.full((8, 8, 3), at, np.uint8), at % 2\n"
        "class Labeled(Failing):\n    targets = [0, 1, 0]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, words in (("Failing", "item 1 cannot be read"), ("Labeled", r"cannot read .*\[1\]")):
        with pytest.raises(InputError, match=f"{words}.*KeyError: 'the share is gone'") as why:
            main(given(f"failing_sets:{name}", tmp_path, tmp_path / "out"))
        assert "\n" not in str(why.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--verify a.beton --adopt b.ffcv", "data.verify does not read data.adopt"),
        ("--adopt b.ffcv --shards 8", "data.adopt does not read data.shards"),
        ("--adopt b.ffcv --labels false", "data.adopt does not read data.labels"),
    ],
)
def test_what_another_task_would_not_read_is_refused(arguments: str, words: str) -> None:
    with pytest.raises(SettingError, match=words):
        main(arguments.split())


@pytest.mark.parametrize("name", ["set.csv", "classes.txt"])
def test_a_table_that_is_not_utf_8_is_one_line(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes("path,label\na.png,café\n".encode("latin-1"))
    with pytest.raises(InputError, match=f"{name}.*UTF-8.*save it as that") as why:
        if name == "set.csv":
            open_sources("csv", tmp_path / name)
        else:
            main([*given("folder", tmp_path, tmp_path), "--classes", str(tmp_path / name)])
    assert "\n" not in str(why.value)
