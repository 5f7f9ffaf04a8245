"""Sets of several files: written by several processes, killed, mixed up, opened as one."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastproj.core.errors import InputError, SettingError
from fastproj.data.beton import Beton, open_beton
from fastproj.data.manifest import read_manifest
from fastproj.data.verify import verify
from fastproj.prepare.command import main
from fastproj.prepare.encode import Store
from fastproj.prepare.sources import Source
from tests.support.betons import digit_like, photographs, write, write_shards

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "data_prep/write_ffcv.py"]
STORE = Store("raw")


def source(count: int = 40, seed: int = 0) -> Source:
    return digit_like(np.random.default_rng(seed), count, 12, 5)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Beton:
    return write(source(), tmp_path_factory.mktemp("whole"), STORE)


@pytest.fixture(scope="module")
def in_three(tmp_path_factory: pytest.TempPathFactory) -> Beton:
    return write_shards(source(), tmp_path_factory.mktemp("three"), STORE, 3)


@pytest.fixture
def three(in_three: Beton, tmp_path: Path) -> Beton:
    """A copy, to be damaged."""
    folder = shutil.copytree(in_three.path.parent, tmp_path / "three")
    return open_beton(folder / in_three.path.name)


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def assert_one(several: Beton, one: Beton) -> None:
    """Both hold the same set: every sample, and all that their manifests say of it."""
    for name in ("mode", "width", "height", "length", "label", "index", "source_width"):
        np.testing.assert_array_equal(getattr(several, name), getattr(one, name))
    for sample in range(len(one)):
        np.testing.assert_array_equal(several.stored(sample), one.stored(sample))
    sources = several.manifest.source_names()
    assert sources == one.manifest.source_names()
    same = {"sources": "", "file_bytes": 0, "sha256": "", "command": ""}
    assert replace(several.manifest, **same) == replace(one.manifest, **same)


# --- the whole of them ---------------------------------------------------------------------------


@pytest.mark.parametrize("of", [3, 16])
def test_statistics_and_digest_are_those_of_one_file(whole: Beton, tmp_path: Path, of: int) -> None:
    several = write_shards(source(), tmp_path, STORE, of)
    assert_one(several, whole)
    counts = np.bincount(several.label, minlength=5)
    assert counts.tolist() == [8] * 5 and several.classes == whole.classes
    assert verify(several.path) == []
    assert several.manifest.file_bytes == sum(file.path.stat().st_size for file in several.files)


def test_one_shard_is_the_plain_file(tmp_path: Path) -> None:
    for name, more in (("a", []), ("b", ["--shards", 1]), ("c", ["--shard", "0/1"])):
        main(["--dataset", "digits", "--split", "val", "--workers", "1", "--out",
              str(tmp_path / name), *map(str, more)])  # fmt: skip
        assert sorted(os.listdir(tmp_path / name)) == ["val.beton", "val.json"]
    first, *others = ((tmp_path / name / "val.beton").read_bytes() for name in "abc")
    assert others == [first] * 2
    assert read_manifest(tmp_path / "c" / "val.json").shard is None


def test_processes_write_one_shard_each(tmp_path: Path) -> None:
    """Photographs of which one is broken, in JPEG: statistics before compression, one left out."""
    photos = photographs(np.random.default_rng(1), tmp_path / "images" / "a", 14)
    (tmp_path / "images" / "b").mkdir()
    for path in photos.images[::2]:
        shutil.move(path, tmp_path / "images" / "b")
    os.truncate(tmp_path / "images" / "b" / "4.jpg", 700)
    given = ["--dataset", "folder", "--root", tmp_path / "images", "--on_error", "skip",
             "--workers", 1]  # fmt: skip
    assert run(*given, "--out", tmp_path / "one").returncode == 0
    jobs = [
        subprocess.Popen(
            [*COMMAND, *map(str, given), "--out", tmp_path / "three", f"--data.shard={i}/3"],
            cwd=ROOT, stdout=subprocess.PIPE, text=True,
        )
        for i in range(3)
    ]  # fmt: skip
    for number, job in enumerate(jobs):
        told = job.communicate(timeout=120)[0]
        assert job.returncode == 0 and f"all-{number:05d}.beton: " in told
    several = open_beton(tmp_path / "three" / "all-{00000..00002}.beton")
    assert len(several) == 13 and len(several.manifest.skipped) == 1
    assert_one(several, open_beton(tmp_path / "one" / "all.beton"))


# --- one writer is killed ------------------------------------------------------------------------


def test_a_killed_writer_leaves_the_others_whole(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (600, 800, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "large.jpg")
    for name in ("ant", "bee"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(60):
            os.link(tmp_path / "large.jpg", tmp_path / "images" / name / f"{i}.jpg")
    out = tmp_path / "out"
    given = ["--dataset", "folder", "--root", tmp_path / "images", "--out", out, "--store", "raw",
             "--workers", 1]  # fmt: skip
    write_shard = [*COMMAND, *map(str, given), "--shard"]
    jobs = {i: subprocess.Popen([*write_shard, f"{i}/3"], cwd=ROOT) for i in (1, 0, 2)}
    end = time.monotonic() + 120
    while not any(path.stat().st_size > 10_000_000 for path in out.glob("all-00001.beton.*.tmp")):
        assert time.monotonic() < end and jobs[1].poll() is None
        time.sleep(0.01)
    jobs[1].send_signal(signal.SIGKILL)
    assert [jobs[i].wait(120) for i in range(3)] == [0, -signal.SIGKILL, 0]

    path = out / "all-{00000..00002}.beton"
    for number in (0, 2):
        assert verify(out / f"all-{number:05d}.beton") == []
    with pytest.raises(InputError, match=r"all-00001.beton: shard is missing: .*--data.shard 1/3"):
        open_beton(path)
    before = {file: file.stat().st_mtime_ns for file in out.glob("all-0000[02].*")}
    assert run(*given, "--shard", "1/3").returncode == 0
    assert before == {file: file.stat().st_mtime_ns for file in before}
    several = open_beton(path)
    assert len(several) == 120 and verify(path) == []
    assert several.label.tolist() == [0] * 60 + [1] * 60


def test_a_writer_killed_between_its_two_renames_is_named(three: Beton, tmp_path: Path) -> None:
    other = write_shards(source(seed=1), tmp_path / "other", STORE, 3)
    shutil.copy(other.files[1].path.with_suffix(".json"), three.path.parent)  # the new manifest
    with pytest.raises(InputError, match="train-00001.beton: its content digest .* differs"):
        open_beton(three.path)


# --- shards that are missing, foreign or left behind ---------------------------------------------


def replaced_by(other: Callable[[Path], Beton]) -> Callable[[Beton, Path], None]:
    """Shard 1 becomes that of another set."""

    def change(three: Beton, tmp_path: Path) -> None:
        found = other(tmp_path / "other").files[1].path
        for suffix in (".beton", ".json"):
            shutil.copy(found.with_suffix(suffix), three.files[1].path.with_suffix(suffix))

    return change


def of_square(folder: Path) -> Beton:
    return write_shards(source(), folder, Store("square", side=12), 3)


def with_one_more(folder: Path) -> Beton:
    return write_shards(source(41), folder, STORE, 3)


def of_four(folder: Path) -> Beton:
    return write_shards(source(), folder, STORE, 4)


def relabeled(folder: Path) -> Beton:
    return write_shards(replace(source(), labels=(source().labels + 1) % 5), folder, STORE, 3)


def plain(folder: Path) -> Beton:
    one = write(source(), folder, STORE)
    return replace(one, files=one.files * 2)


def remove(*numbers: int) -> Callable[[Beton, Path], None]:
    return lambda three, _: [three.files[i].path.unlink() for i in numbers]


def swap(three: Beton, _: Path) -> None:
    for suffix in (".beton", ".json"):
        one, two = (three.files[i].path.with_suffix(suffix) for i in (1, 2))
        aside = one.rename(one.with_name("aside"))
        two.rename(one)
        aside.rename(two)


@pytest.mark.parametrize(
    "change, words",
    [
        (remove(1), r"train-00001.beton: shard is missing: write it with .*--data.shard 1/3 "),
        (remove(0, 2), r"train-00000.beton: shard is missing \(2 of 3 are\): .*--data.shard 0/3"),
        (replaced_by(of_square), r"train-00001.beton .*different sets: they differ in store, side"),
        (replaced_by(with_one_more), r"train-00001.beton .*different sets: .* in images"),
        (replaced_by(relabeled), r"train-00001.beton .*different sets: .* in images"),
        (replaced_by(of_four), r"train-00001.beton \(shard 1 of 4\) and .* differ in shards;"),
        (replaced_by(plain), r"train-00001.beton: no shard: it was written as .* one file"),
        (swap, r"train-00001.beton: shard 2 of its set, not 1: a file was renamed"),
    ],
    ids=[
        *["missing", "two missing", "store", "images", "labels", "number", "plain"],
        "renamed",
    ],
)  # fmt: skip
def test_a_shard_that_does_not_belong_is_named(
    three: Beton, tmp_path: Path, change: Callable[[Beton, Path], None], words: str
) -> None:
    change(three, tmp_path)
    with pytest.raises(InputError, match=words) as refused:
        open_beton(three.path)
    assert "\n" not in str(refused.value)


def test_a_name_that_is_not_the_sets_is_refused(three: Beton) -> None:
    folder = three.path.parent
    for name, words in (
        ("train-00001.beton", r"shard 1 of 3, not the whole set: .*'.*{00000..00002}.beton' \(in"),
        ("train-{00000..00001}.beton", r"shard 0 of 3, but 2 files are named: .*{00000..00002}"),
        ("train-{00000..00003}.beton", r"shard 0 of 3, but 4 files are named: .*{00000..00002}"),
        ("train-{00001..00002}.beton", r"train-00001.beton: shard 1 of 3, but 2 files"),
        ("train-{00002..00000}.beton", r"names no file: give {FIRST..LAST}"),
    ):
        with pytest.raises(InputError, match=words) as refused:
            open_beton(folder / name)
        assert "\n" not in str(refused.value)


def test_fewer_shards_over_more_leave_files_that_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def prepare(*more: str) -> str:
        given = ["--dataset", "digits", "--split", "val", "--workers", "1"]
        assert main([*given, "--out", str(tmp_path), *more]) == 0
        return "".join(line for line in capsys.readouterr().err.splitlines() if "note" in line)

    assert prepare("--shards", "5") == ""
    note = prepare("--shards", "3")
    left = r"note: of a set of more files 2 are left, from .*val-00003.beton on, .*remove them"
    assert re.fullmatch(left, note)
    assert len(open_beton(tmp_path / "val-{00000..00002}.beton")) == 360
    with pytest.raises(InputError, match=r"shard 0 of 3, but 5 files are named"):
        open_beton(tmp_path / "val-{00000..00004}.beton")

    note = prepare()  # one file over several
    left = r"note: .* 5 are left, from .*val-00000.beton on, and no part of val.beton: remove them"
    assert re.fullmatch(left, note)
    assert len(open_beton(tmp_path / "val.beton")) == 360

    prepare("--shard", "0/5")  # more over fewer, half done
    with pytest.raises(InputError, match=r"val-00001.beton \(shard 1 of 3\) and .*\(shard 0 of 5"):
        open_beton(tmp_path / "val-{00000..00004}.beton")
    for number in (1, 2):
        prepare("--shard", f"{number}/5")
    assert len(open_beton(tmp_path / "val-{00000..00004}.beton")) == 360


@pytest.mark.parametrize("text", ["3/3", "-1/3", "1", "a/b", "0/0", "1/2/3", "0/100001"])
def test_a_shard_that_cannot_be_is_refused(text: str) -> None:
    with pytest.raises(SettingError, match=r"data.shard must be i/N with 0 <= i < N"):
        main(["--dataset", "digits", "--out", "x", f"--shard={text}"])


def test_both_settings_and_too_many_shards_are_refused(tmp_path: Path) -> None:
    given = ["--dataset", "digits", "--split", "val", "--out", str(tmp_path)]
    with pytest.raises(SettingError, match="data.shards is read only where data.shard is null"):
        main([*given, "--shard", "0/2", "--shards", "2"])
    with pytest.raises(InputError, match="360 images, too few for 361 shards: .*--data.shards 360"):
        main([*given, "--shards", "361"])
    assert not list(tmp_path.iterdir())


def test_verify_names_a_sample_of_a_shard(three: Beton) -> None:
    file = three.files[2]
    with file.path.open("r+b") as opened:
        opened.seek(int(three.pointer[30]) - file.start)
        opened.write(b"damage")
    number = 30 - int((three.file_of(np.arange(40)) < 2).sum())
    for path in (three.path, file.path):
        done = run("--verify", path)
        assert done.returncode == 1
        assert f"train-00002.beton: sample {number} (image 30): " in done.stdout
        assert done.stdout.rstrip().endswith("1 damaged")


def test_what_a_shards_manifest_says_of_the_set_is_checked(three: Beton) -> None:
    path = three.files[1].path.with_suffix(".json")
    text = path.read_text()
    manifest = read_manifest(path)
    assert manifest.shard
    digests, counts = manifest.shard.digests, manifest.shard.histogram
    for old, new, words in (
        (digests, digests[:-8], "damaged"),
        (digests, "A" + digests[1:], "digests of other samples|damaged"),
        (counts, counts[:-8], "damaged"),
        (counts, "AAAA" * 200 + counts[800:], "damaged"),
        ('"number": 1', '"number": -1', "shard is .*not null or the number"),
        ('"number": 1', '"nummer": 1', "shard is .*not null or the number"),
        (manifest.shard.set, "x", "shard is .*not null or the number"),
    ):
        path.write_text(text.replace(old, new))
        assert path.read_text() != text
        with pytest.raises(InputError, match=rf"train-00001.json: .*({words}).*write the beton"):
            open_beton(three.path)
