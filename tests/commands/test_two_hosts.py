"""Two hosts with a real rendezvous: they train as one, outlive a short cut, and name a long one."""

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from fastproj.prepare.encode import Store
from fastproj.runs import checkpoint, journal
from tests.support.betons import digit_like, write
from tests.support.hosts import Hosts, missing, two_hosts

pytestmark = [pytest.mark.slow, pytest.mark.soak]
BASE = {
    "run.device": "cpu", "model.encoder": "resnet_small", "views.size": 8,
    "projector.hidden": 32, "projector.out": 16, "optim.batch_size": 16, "optim.epochs": 150,
    "optim.warmup_epochs": 0.5, "train.log_every": 1, "train.precision": "float32",
    "run.timeout": 40, "train.checkpoint_every": 50,
}  # fmt: skip


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    if lacks := missing():
        pytest.skip(f"no network namespaces: {lacks} is missing")
    with two_hosts() as found:
        yield found


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    source = digit_like(np.random.default_rng(0), 64, 12, 4)
    beton = write(source, tmp_path_factory.mktemp("data"), Store("raw"))
    given = {"data.train": beton.path, **BASE}
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def begin(hosts: Hosts, words: list[str], folder: Path) -> list[subprocess.Popen[str]]:
    """Start a run named r on both hosts, and wait until it has done ten steps."""
    torchruns = hosts.torchrun([*words, "--run.dir", str(folder), "--run.name", "r"], folder)
    metrics = folder / "r" / "metrics.jsonl"
    end = time.monotonic() + 180
    while not (metrics.exists() and metrics.read_bytes().count(b'"event": "step"') >= 10):
        assert time.monotonic() < end and torchruns[0].poll() is None, logs(folder)
        time.sleep(0.05)
    return torchruns


def logs(folder: Path) -> list[str]:
    return [(folder / f"host{number}.log").read_text() for number in (0, 1)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    newest = checkpoint.latest(folder / "r" / "checkpoints")
    assert newest and newest.name == "step-00000600.pt"
    return checkpoint.load(newest)["encoder"]


@pytest.fixture(scope="module")
def whole(
    hosts: Hosts, words: list[str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, torch.Tensor]:
    """The encoder of a run whose link nobody cuts."""
    folder = tmp_path_factory.mktemp("whole")
    for torchrun in begin(hosts, words, folder):
        assert torchrun.wait(300) == 0, logs(folder)
    return weights(folder)


def test_a_link_cut_for_seconds_changes_nothing(
    hosts: Hosts, words: list[str], whole: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    torchruns = begin(hosts, words, tmp_path)
    hosts.link("down")
    time.sleep(1)
    events = journal.read(tmp_path / "r" / "metrics.jsonl")
    time.sleep(4)
    assert len(journal.read(tmp_path / "r" / "metrics.jsonl")) == len(events)  # it stands still
    hosts.link("up")
    for torchrun in torchruns:
        assert torchrun.wait(300) == 0, logs(tmp_path)
    found = weights(tmp_path)
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())


def test_a_link_cut_for_good_ends_both_with_a_line_and_the_run_goes_on(
    hosts: Hosts, words: list[str], whole: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    torchruns = begin(hosts, words, tmp_path)
    hosts.link("down")
    try:
        for torchrun in torchruns:
            assert torchrun.wait(400) != 0
    finally:
        hosts.link("up")
    for number, log in enumerate(logs(tmp_path)):
        lines = [line for line in log.splitlines() if line.startswith("error: ")]
        assert lines and f"rank {number} lost " in lines[-1], log
    again = [*words, "--run.resume", "auto"]
    for torchrun in begin(hosts, again, tmp_path):
        assert torchrun.wait(300) == 0, logs(tmp_path)
    found = weights(tmp_path)
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())
