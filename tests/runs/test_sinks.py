"""Sinks beside the journal: what reaches TensorBoard and W&B, and what of theirs ends no run."""

import json
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastproj.core.errors import InputError
from fastproj.prepare.encode import Store
from fastproj.runs import SINKS, journal
from fastproj.runs.folder import RunFolder
from fastproj.runs.journal import Journal
from fastproj.runs.sinks import Sinks, TensorBoard, WandB, check_sinks, open_sinks
from fastproj.settings import RUN, load
from fastproj.train import train
from tests.support.betons import digit_like, write

SETTINGS = {"optim.lr": 0.1, "data.val": None, "views.flip_prob": (0.5, 0.0)}


class Kept:
    """A sink that keeps what it gets, and fails at the step ``at``."""

    opened: list["Kept"] = []

    def __init__(self, run: RunFolder, settings: Any = None, step: int = 0, at: int = -1) -> None:
        self.run, self.settings, self.step, self.at = run, settings, step, at
        self.got: list[tuple[dict[str, float], int]] = []
        self.pictures: list[tuple[str, torch.Tensor, int]] = []
        self.closed: list[bool] = []
        Kept.opened.append(self)

    @staticmethod
    def check() -> None: ...

    def scalars(self, values: dict[str, float], step: int) -> None:
        if step == self.at:
            raise OSError("the server went away\nand more")
        self.got.append((dict(values), step))

    def picture(self, name: str, image: torch.Tensor, step: int) -> None:
        self.pictures.append((name, image, step))

    def close(self, failed: bool) -> None:
        self.closed.append(failed)


def test_a_sink_gets_the_numbers_of_each_event_under_the_journals_names(tmp_path):
    sink = Kept(RunFolder(tmp_path))
    with Journal(tmp_path / "m.jsonl", True, 20, sinks=Sinks({"kept": sink})) as book:
        book.event("start", loader="stream")
        book.event("step", step=10, epoch=0, loss=1.5)
        book.event("checkpoint", step=10, file="x.pt")
        book.event("epoch", step=10, epoch=0, seconds={"step": 2.0}, diagnostics={
            "rankme_features": 3.5, "spectrum_features": [[1, 0.5]]})  # fmt: skip
        book.event("probe", step=10, online_top1=0.5, protocol={"crop": {"size": 32}})
    assert sink.got == [
        ({"step/epoch": 0, "step/loss": 1.5}, 10),
        ({"epoch/epoch": 0, "epoch/seconds.step": 2.0, "epoch/diagnostics.rankme_features": 3.5},
         10),
        ({"probe/online_top1": 0.5}, 10),
    ]  # fmt: skip
    assert sink.closed == [False]


def test_only_the_main_process_gives_to_sinks(tmp_path):
    sink = Kept(RunFolder(tmp_path))
    with Journal(tmp_path / "m.jsonl", False, 20, sinks=Sinks({"kept": sink})) as book:
        book.event("step", step=10, loss=1.5)
        book.picture("views", lambda: torch.zeros(3, 2, 2, dtype=torch.uint8), 0)
    assert sink.got == [] and sink.pictures == []


def test_a_sink_that_fails_is_left_out_and_the_run_goes_on(tmp_path, capsys):
    bad, good = Kept(RunFolder(tmp_path), at=2), Kept(RunFolder(tmp_path))
    sinks = Sinks({"bad": bad, "good": good})
    with Journal(tmp_path / "m.jsonl", True, 3, sinks=sinks) as book:
        for step in (1, 2, 3):
            book.event("step", step=step, loss=0.5)
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note")]
    assert notes == [
        "note: bad failed (OSError: the server went away) and gets nothing more of this run, "
        "which goes on; metrics.jsonl has it all"
    ]
    assert [step for _, step in bad.got] == [1] and [step for _, step in good.got] == [1, 2, 3]
    assert [event["step"] for event in journal.read(tmp_path / "m.jsonl")] == [1, 2, 3]
    assert bad.closed == [] and good.closed == [False]


def test_a_run_that_fails_is_closed_as_one(tmp_path):
    sink = Kept(RunFolder(tmp_path))
    with pytest.raises(KeyError), Journal(tmp_path / "m", True, 3, sinks=Sinks({"s": sink})):
        raise KeyError("label")
    assert sink.closed == [True]


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    beton = write(digit_like(np.random.default_rng(0), 32, 12, 4), tmp_path / "data", Store("raw"))
    return {
        "data.train": beton.path, "run.dir": tmp_path, "run.name": "r", "run.device": "cpu",
        "model.encoder": "resnet_small", "views.size": 8, "views.blur_prob": 0,
        "projector.hidden": 16, "projector.out": 8, "optim.batch_size": 8, "optim.epochs": 1,
        "optim.warmup_epochs": 0, "train.log_every": 2, "train.precision": "float32",
    }  # fmt: skip


def run(options: dict[str, Any], **changes: Any) -> Path:
    given = {**options, **{name.replace("__", "."): value for name, value in changes.items()}}
    argv = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    return train(load(RUN, argv, "test", ""))


def losses(path: Path) -> list[float]:
    return [e["loss"] for e in journal.read(path / "metrics.jsonl") if e["event"] == "step"]


def test_training_gives_scalars_and_the_views_and_learns_the_same(options, tmp_path, monkeypatch):
    monkeypatch.setitem(SINKS, "kept", Kept)
    Kept.opened.clear()
    plain = run(options)
    watched = run(options, run__name="w", train__log_to="kept")
    assert losses(plain) == losses(watched) and len(losses(plain)) == 2
    (sink,) = Kept.opened
    assert (sink.step, sink.closed, sink.run.path) == (0, [False], watched)
    assert sink.settings["optim.batch_size"] == 8
    assert [values["step/loss"] for values, _ in sink.got if "step/loss" in values] == losses(plain)
    ((name, image, step),) = sink.pictures
    # 8 samples of 2 views of 8 pixels, 2 pixels between and around.
    assert (name, step, image.dtype, tuple(image.shape)) == (
        "views", 0, torch.uint8, (3, 8 * 10 + 2, 2 * 10 + 2)
    )  # fmt: skip
    assert image.float().std() > 20


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    tags = events.Tags()
    assert tags["images"] in ([], ["views"])
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags["scalars"]}


def test_tensorboard_has_each_step_once_after_a_resume(options, tmp_path):
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    whole = run(options, train__log_to="tensorboard", train__log_every=1)
    found = scalars(whole / "tensorboard")
    wanted = list(enumerate(losses(whole), start=1))
    assert found["step/loss"] == [(step, pytest.approx(loss)) for step, loss in wanted]
    assert {"epoch/loss", "step/images_per_second", "end/images_per_second"} <= found.keys()
    assert list((whole / "tensorboard").glob("events.out.tfevents.*"))

    # A kill after step 3, whose newest checkpoint is that of step 2: step 3 is done twice.
    cut = RunFolder(tmp_path / "cut")
    for start, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        with Journal(tmp_path / "m", True, 4, start, open_sinks(["tensorboard"], cut, SETTINGS,
                     start)) as book:  # fmt: skip
            for step in steps:
                book.event("step", step=step, loss=step + start / 10)
    assert scalars(cut.tensorboard)["step/loss"] == [
        (step, pytest.approx(loss)) for step, loss in ((1, 1.0), (2, 2.0), (3, 3.2), (4, 4.2))
    ]


def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """W&B as on a machine of its own, without a network."""
    for name in ("WANDB_API_KEY", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


def unframed(data: bytes) -> Iterator[bytes]:
    """The records of W&B's file: 7 bytes, then LevelDB's log (blocks of 32 KiB; 4 bytes of CRC, 2
    of length and 1 of type before each piece; types 1 and 4 end a record)."""
    at, record = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


def records(path: Path) -> tuple[list[tuple[int, dict[str, Any]]], list[Any]]:
    """The history (step, values) and the run records of W&B's file of one process."""
    from wandb.proto import wandb_internal_pb2

    history, runs = [], []
    for data in unframed(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            values = {
                ".".join(item.nested_key) or item.key: json.loads(item.value_json)
                for item in record.history.item
            }
            history.append((record.history.step.num, values))
        elif record.WhichOneof("record_type") == "run":
            runs.append(record.run)
    return history, runs


def test_wandb_offline_keeps_scalars_and_the_views_under_one_id(options, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    offline(monkeypatch, tmp_path)
    monkeypatch.setenv("WANDB_API_KEY", key := "5ec2e7" * 6 + "abcd")
    folder = run(options, train__log_to="wandb", train__log_every=1, train__stop_after=2)
    run(options, run__resume=folder, train__log_to="wandb", train__log_every=1)
    found: dict[int, dict[str, Any]] = {}
    ids = set()
    deadline = time.monotonic() + 30
    while 4 not in found and time.monotonic() < deadline:  # W&B's own process writes the files
        files = list(folder.glob("wandb/offline-run-*/*.wandb"))
        assert len(files) == 2
        for path in sorted(files, key=lambda path: path.stat().st_mtime):
            history, runs = records(path)
            ids |= {(one.run_id, one.project, one.display_name) for one in runs}
            for step, values in history:
                found.setdefault(step, {}).update(values)
    assert ids == {((folder / "wandb-id.txt").read_text().strip(), "fastproj", "r")}
    assert [found[step]["step/loss"] for step in range(1, 5)] == losses(folder)
    assert found[0]["views._type"] == "image-file"
    assert len(list(folder.glob("wandb/offline-run-*/files/media/images/views_0_*.png"))) == 1
    assert not (tmp_path / "wandb").exists()
    kept = [path for path in folder.rglob("*") if path.is_file()]  # environment, config, journal, …
    assert len(kept) > 6 and not any(key.encode() in path.read_bytes() for path in kept)


def test_wandb_without_a_key_is_one_line_before_the_run_starts(options, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="the extra wandb is not installed")
    offline(monkeypatch, tmp_path)
    monkeypatch.setenv("WANDB_MODE", "online")
    wandb.teardown()  # it read the environment once
    try:
        with pytest.raises(InputError, match="no API key here: .*WANDB_MODE=offline") as caught:
            run(options, train__log_to="tensorboard,wandb")
        assert "\n" not in str(caught.value) and not (tmp_path / "r").exists()
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        wandb.teardown()
        WandB.check()  # a key is there; whether it is right, the server says
    finally:
        wandb.teardown()


@pytest.mark.parametrize("module", ["tensorboard", "wandb"])
def test_a_missing_package_is_named_before_the_run_starts(options, tmp_path, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    for name in list(sys.modules):
        if name.startswith("torch.utils.tensorboard"):
            monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ModuleNotFoundError) as caught:  # the command makes one line of it
        run(options, train__log_to=module)
    assert caught.value.name == module and not (tmp_path / "r").exists()


def test_an_unknown_sink_and_a_folder_that_cannot_be_written(options, tmp_path):
    with pytest.raises(InputError, match="train.log_to.*tensorbord.*tensorboard"):
        run(options, train__log_to="tensorbord")
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    (tmp_path / "r").mkdir()
    (tmp_path / "r/tensorboard").write_text("a file where the folder goes")
    with pytest.raises(InputError, match="cannot write .*tensorboard"):
        TensorBoard(RunFolder(tmp_path / "r"), SETTINGS, 0)
    check_sinks(["tensorboard"])
