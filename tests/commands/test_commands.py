"""Bad input to the commands as a user types them: one line, the right exit code, nothing lost."""

import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastproj import evaluate, train
from fastproj.core.errors import run_command
from fastproj.data.beton import open_beton
from fastproj.prepare import command as write_ffcv
from fastproj.prepare.encode import Store
from fastproj.runs import checkpoint
from tests.support.betons import digit_like, photographs, write

Main = Callable[[Sequence[str]], int | None]


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good betons (raw and JPEG), a finished run, and a recipe that made it."""
    house = tmp_path_factory.mktemp("house")
    write(digit_like(np.random.default_rng(0), 60, 10, 3), house / "raw", Store("raw"))
    write(digit_like(np.random.default_rng(1), 60, 10, 3), house / "other", Store("raw"))
    source = photographs(np.random.default_rng(0), house / "files", 20)
    write(source, house / "jpeg", Store("jpeg", quality=90))
    (house / "recipe.yaml").write_text(
        f"""
data: {{train: {house}/raw/train.beton, val: {house}/raw/train.beton}}
run: {{dir: {house}/runs, device: cpu}}
views: {{size: 8, blur_prob: 0}}
model: {{encoder: resnet_small}}
projector: {{hidden: 16, out: 8}}
optim: {{batch_size: 20, epochs: 1, warmup_epochs: 0}}
eval: {{logistic_strengths: [0.01, 0.1]}}
"""
    )
    run_ok(train.main, house, "--run.name", "finished")
    return house


def arguments(house: Path, *more: object) -> list[str]:
    return ["--cfg", str(house / "recipe.yaml"), *map(str, more)]


def run_ok(main: Main, house: Path, *more: object) -> None:
    with pytest.raises(SystemExit) as left:
        run_command(main, arguments(house, *more))
    assert left.value.code == 0


def refused(
    main: Main, argv: Sequence[object], capsys: pytest.CaptureFixture[str], code: int = 1
) -> str:
    """Run a command that must fail; returns its one line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        run_command(main, [str(word) for word in argv])
    error = capsys.readouterr().err
    assert left.value.code == code, error
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in error, error
    return lines[0]


def snapshot(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def copy(beton: Path, folder: Path) -> Path:
    """The beton and its manifest, to be damaged."""
    folder.mkdir(exist_ok=True)
    shutil.copy(beton.with_suffix(".json"), folder)
    return Path(shutil.copy(beton, folder))


def of_run(house: Path, *more: object) -> list[str]:
    return [str(house / "runs" / "finished"), *map(str, more)]


@pytest.mark.parametrize("main, given", [(train.main, arguments), (evaluate.main, of_run)])
def test_settings(
    main: Main, given: Callable[..., list[str]], house: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for option, value, told in (
        ("--optim.lrr", "1", "did you mean --optim.lr?"),
        ("--optim.batch_size", "0.5", "optim.batch_size must be a whole number"),
        ("--model.sync_bn", "perhaps", "model.sync_bn must be true or false"),
        ("--model.encoder", "vgg", "model.encoder must be resnet18"),
    ):
        assert told in refused(main, given(house, option, value), capsys, code=2)


def test_betons_that_are_none(
    house: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.beton").touch()
    (tmp_path / "text.beton").write_text("label,pixels\n" * 500)
    for name, told in (
        ("missing.beton", "no such beton"),
        ("empty.beton", "0 bytes, too short"),
        ("text.beton", "not a beton"),
    ):
        for main, argv in (
            (train.main, arguments(house, "--data.train", tmp_path / name)),
            (evaluate.main, of_run(house, "--data.val", tmp_path / name)),
            (write_ffcv.main, ["--verify", tmp_path / name]),
        ):
            line = refused(main, argv, capsys)
            assert told in line and name in line


@pytest.mark.parametrize("store", ["raw", "jpeg"])
def test_a_beton_cut_at_random_places(
    house: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], store: str
) -> None:
    whole = next((house / store).glob("*.beton"))
    size = whole.stat().st_size
    for cut in random.Random(0).sample(range(1, size), 5):
        beton = copy(whole, tmp_path / "cut")
        with beton.open("r+b") as file:
            file.truncate(cut)
        for main, argv in (
            (train.main, arguments(house, "--data.train", beton)),
            (write_ffcv.main, ["--verify", beton]),
        ):
            assert str(beton) in refused(main, argv, capsys)


def test_flipped_bytes_are_named_by_verify(
    house: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = house / "jpeg" / "all.beton"
    opened = open_beton(whole)
    where = [
        (sample, int(opened.pointer[sample]) + offset)
        for sample, offset in zip([3] * 50 + [11] * 50, range(10, 110), strict=True)
    ]
    beton = copy(whole, tmp_path / "flipped")
    data = bytearray(beton.read_bytes())
    for _, position in where:
        data[position] ^= 0xFF
    beton.write_bytes(data)
    with pytest.raises(SystemExit) as left:
        run_command(write_ffcv.main, ["--verify", str(beton)])
    assert left.value.code == 1
    told = [line for line in capsys.readouterr().out.splitlines() if ": sample " in line]
    sources = opened.manifest.source_names()
    assert len(told) == 2
    assert "sample 3 " in told[0] and sources[3] in told[0]
    assert "sample 11 " in told[1] and sources[11] in told[1]


def test_the_manifest_of_another_file(
    house: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    beton = copy(house / "raw" / "train.beton", tmp_path / "mixed")
    shutil.copy(house / "other" / "train.json", beton.with_suffix(".json"))
    line = refused(train.main, arguments(house, "--data.train", beton), capsys)
    assert "the manifest is of another file" in line


def test_a_checkpoint_cut_in_half(
    house: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = checkpoint.latest(house / "runs" / "finished" / "checkpoints")
    assert newest
    half = tmp_path / newest.name
    half.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    argv = of_run(house, "--eval.checkpoint", half)
    before = snapshot(house / "runs")
    assert f"{half} is damaged" in refused(evaluate.main, argv, capsys)
    assert before == snapshot(house / "runs")


def test_a_finished_run_is_not_written_over(
    house: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(house / "runs")
    line = refused(train.main, arguments(house, "--run.name", "finished"), capsys)
    assert "holds a finished run" in line
    assert before == snapshot(house / "runs")


def test_a_batch_larger_than_the_set(house: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(train.main, arguments(house, "--optim.batch_size", 61), capsys)
    assert "larger than the set of 60 samples: lower optim.batch_size" in line


def test_an_image_folder_with_one_class_or_one_broken_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a/0.jpg", "a/1.jpg", "b/0.jpg"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 30), "red").save(path)
    argv = ["--dataset", "folder", "--root", tmp_path / "images", "--out", tmp_path / "out",
            "--workers", 1]  # fmt: skip
    broken = tmp_path / "images/a/1.jpg"
    broken.write_bytes(broken.read_bytes()[:100])
    line = refused(write_ffcv.main, argv, capsys)
    assert str(broken) in line and "--data.on_error skip" in line
    assert not list((tmp_path / "out").glob("*"))

    shutil.rmtree(tmp_path / "images/b")
    line = refused(write_ffcv.main, argv, capsys)
    assert "1 class" in line and "at least 2" in line


def test_no_write_permission(house: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # /proc takes no files, not even from root, as whom the tests may run.
    line = refused(train.main, arguments(house, "--run.dir", "/proc/fastproj"), capsys)
    assert "/proc/fastproj" in line
    argv = ["--dataset", "digits", "--out", "/proc/fastproj"]
    assert "/proc/fastproj" in refused(write_ffcv.main, argv, capsys)


def test_what_is_no_input_error(capsys: pytest.CaptureFixture[str]) -> None:
    """Ctrl-C leaves quietly; a mistake of our own keeps its traceback."""

    def interrupted(argv: Sequence[str]) -> None:
        raise KeyboardInterrupt

    def mistaken(argv: Sequence[str]) -> None:
        raise ZeroDivisionError

    with pytest.raises(SystemExit) as left:
        run_command(interrupted, [])
    assert left.value.code == 130 and capsys.readouterr().err == "stopped\n"
    with pytest.raises(ZeroDivisionError):
        run_command(mistaken, [])
