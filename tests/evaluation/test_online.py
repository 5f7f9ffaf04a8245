"""Online accuracy: its numbers, and that a run does not feel them."""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

from fastproj.core.errors import InputError
from fastproj.data.beton import Beton
from fastproj.evaluation.online import OnlineAccuracy
from fastproj.models.encoders import build_encoder
from fastproj.prepare.encode import Store
from fastproj.runs import checkpoint, journal
from fastproj.settings import RUN, load
from fastproj.train import train
from tests.support.betons import digit_like, write
from tests.support.ranks import on_ranks

CLASSES = 7  # so that top-5 is not 1
RUNS = {
    "run.device": "cpu", "run.name": "r", "model.encoder": "resnet_small", "views.size": 8,
    "projector.hidden": 16, "projector.out": 8, "projector.dropout": 0.2, "optim.batch_size": 16,
    "optim.epochs": 4, "optim.warmup_epochs": 0, "train.log_every": 1,
    "train.precision": "float32", "eval.knn_k": 5,
}  # fmt: skip


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Beton, Beton]:
    """70 training and 53 validation images of 12 pixels; a third of val is labeled at random."""
    folder = tmp_path_factory.mktemp("data")
    train = digit_like(np.random.default_rng(0), 70, 12, CLASSES)
    rng = np.random.default_rng(1)
    val = replace(digit_like(rng, 53, 12, CLASSES), split="val")
    val.labels[::3] = rng.integers(0, CLASSES, len(val.labels[::3]))
    return write(train, folder, Store("raw")), write(val, folder, Store("raw"))


def options(sets: tuple[Beton, Beton], folder: Path, **changes: object) -> list[str]:
    given = {"data.train": sets[0].path, "data.val": sets[1].path, "run.dir": folder, **RUNS}
    given |= {name.replace("__", "."): value for name, value in changes.items()}
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def run(sets: tuple[Beton, Beton], folder: Path, **changes: object) -> Path:
    return train(load(RUN, options(sets, folder, **changes), "test", ""))


def probes(run: Path) -> list[dict]:
    return [e for e in journal.read(run / "metrics.jsonl") if e["event"] == "probe"]


def assert_same_weights(a: Path, b: Path, steps: int = 16) -> None:
    """Everything that a checkpoint holds of what is learned, and every step's loss."""
    ours, theirs = (checkpoint.load(checkpoint.latest(r / "checkpoints")) for r in (a, b))
    for part in ("encoder", "projector", "objective", "probe"):
        assert ours[part].keys() == theirs[part].keys()
        for name, value in ours[part].items():
            assert torch.equal(value, theirs[part][name]), f"{part}.{name}"
    first, second = ([e["loss"] for e in journal.read(r / "metrics.jsonl") if e["event"] == "step"]
                     for r in (a, b))  # fmt: skip
    assert first == second and len(first) == steps


@pytest.fixture(scope="module")
def without(sets: tuple[Beton, Beton], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without online scores, which opens no val."""
    return run(sets, tmp_path_factory.mktemp("without"), data__val="nowhere.beton")


def images(beton: Beton) -> np.ndarray:
    """Its images (N, 12, 12, 3), normalized by hand as the training set says."""
    stored = np.stack([beton.stored(i) for i in range(len(beton))]).reshape(-1, 12, 12, 3)
    return stored / 255


def test_the_scores_are_those_of_loops_and_scikit_learn(sets: tuple[Beton, Beton]) -> None:
    torch.manual_seed(0)
    encoder, probe = build_encoder("resnet_small", "cifar"), nn.Linear(256, CLASSES)
    found = OnlineAccuracy(*sets, size=12, batch_size=20, k=5, temperature=0.1).score(
        encoder, probe
    )

    stored = sets[0].manifest
    encoder.eval().double()
    rows = []
    for beton in sets:
        x = (images(beton) - np.array(stored.mean)) / np.array(stored.std)
        with torch.no_grad():
            rows.append(encoder(torch.from_numpy(x).permute(0, 3, 1, 2)).numpy())
    weight, bias = (p.detach().double().numpy() for p in (probe.weight, probe.bias))
    hits = {1: 0, 5: 0}
    for row, label in zip(rows[1], sets[1].label, strict=True):
        logits = [sum(w * v for w, v in zip(weight[c], row, strict=True)) + bias[c]
                  for c in range(CLASSES)]  # fmt: skip
        best = sorted(range(CLASSES), key=lambda c: -logits[c])
        for n in hits:
            hits[n] += label in best[:n]
    assert 0 < hits[1] < hits[5] < len(sets[1])
    assert found["online_top1"] == pytest.approx(hits[1] / len(sets[1]))
    assert found["online_top5"] == pytest.approx(hits[5] / len(sets[1]))
    assert 0.1 < found["online_knn_top1"] < 0.9
    oracle = KNeighborsClassifier(
        5, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.1)
    ).fit(rows[0], sets[0].label)
    assert found["online_knn_top1"] == pytest.approx(oracle.score(rows[1], sets[1].label))
    protocol = found["protocol"]
    assert protocol["crop"] == {"kind": "center", "size": 12, "crop_fraction": 1.0}
    assert (protocol["knn"]["k"], protocol["knn"]["temperature"]) == ([5], [0.1])
    assert [protocol["data"][name]["images"] for name in ("train", "val")] == [70, 53]
    assert found["seconds"] > 0


class Noise(nn.Module):
    """Draws in eval mode as well, as an encoder of a plugin might."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1e-3 * torch.randn_like(x)


@pytest.mark.parametrize("engine", ["stream", "resident", "reference"])
def test_scoring_leaves_modules_and_random_state_alone(
    sets: tuple[Beton, Beton], engine: str
) -> None:
    encoder = nn.Sequential(build_encoder("resnet_small", "cifar"), Noise())
    probe = nn.Sequential(nn.Dropout(0.9), nn.Linear(256, CLASSES))
    next(m for m in encoder.modules() if isinstance(m, nn.BatchNorm2d)).eval()
    both = nn.ModuleList([encoder, probe])
    before = {name: value.clone() for name, value in both.state_dict().items()}
    flags, state = [m.training for m in both.modules()], torch.get_rng_state()
    online = OnlineAccuracy(*sets, size=8, loader={"engine": engine})
    scores = [online.score(encoder, probe)["online_top1"] for _ in range(2)]
    assert scores[0] == scores[1]  # nothing is dropped
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in both.modules()] == flags
    assert all(torch.equal(value, before[name]) for name, value in both.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in both.parameters())


def test_a_run_with_online_scores_learns_what_one_without_does(
    sets: tuple[Beton, Beton], without: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = run(sets, tmp_path, train__online_every=2)
    assert_same_weights(done, without)
    assert probes(without) == []
    found = probes(done)
    assert [(e["epoch"], e["step"]) for e in found] == [(1, 8), (3, 16)]
    shown = [line for line in capsys.readouterr().err.splitlines() if line.startswith("probe ")]
    for event, line in zip(found, shown, strict=True):
        assert f"online_top1 {event['online_top1']:.4g}" in line
        assert f"online_knn_top1 {event['online_knn_top1']:.4g}" in line
        assert "protocol" not in line
    # The last scores are those of the last checkpoint's encoder and probe.
    state = checkpoint.load(checkpoint.latest(done / "checkpoints"))
    encoder, probe = build_encoder("resnet_small", "cifar"), nn.Linear(256, CLASSES)
    encoder.load_state_dict(state["encoder"])
    probe.load_state_dict(state["probe"])
    again = OnlineAccuracy(*sets, size=8, k=5).score(encoder, probe)
    for name in ("online_top1", "online_top5", "online_knn_top1"):
        assert found[-1][name] == pytest.approx(again[name]), name
    assert not (done / "eval.json").exists()


def test_a_broken_run_with_online_scores_is_an_unbroken_one_without(
    sets: tuple[Beton, Beton], without: Path, tmp_path: Path
) -> None:
    run(sets, tmp_path, train__online_every=1, train__stop_after=4)  # where an epoch ends
    resume = {"run__resume": tmp_path / "r", "train__online_every": 1}
    run(sets, tmp_path, train__stop_after=6, **resume)  # inside the third epoch
    done = run(sets, tmp_path, **resume)
    assert_same_weights(done, without)
    assert [e["epoch"] for e in probes(done)] == [0, 1, 2, 3]


def online_on_a_rank(argv: list[str]) -> torch.Tensor:
    return torch.tensor([len(train(load(RUN, argv, "test", "")).name)])


@pytest.mark.slow
def test_rank_0_scores_while_the_other_waits(sets: tuple[Beton, Beton], tmp_path: Path) -> None:
    for name, every in (("a", 1), ("b", 0)):
        argv = options(sets, tmp_path / name, train__online_every=every, optim__epochs=2)
        on_ranks(2, partial(online_on_a_rank, argv), tmp_path, seconds=300)
    scored, plain = tmp_path / "a/r", tmp_path / "b/r"
    assert_same_weights(scored, plain, steps=8)
    assert [e["epoch"] for e in probes(scored)] == [0, 1]
    assert all(math.isfinite(e["online_top1"]) for e in probes(scored))


def bad(sets: tuple[Beton, Beton], folder: Path, kind: str) -> dict[str, object]:
    """The settings that make a run of this kind impossible."""
    source = digit_like(np.random.default_rng(1), 53, 12, CLASSES)
    if kind == "other classes":
        source = replace(source, classes=(*source.classes[:-1], "other"))
    elif kind == "no labels":
        source = replace(source, labels=np.full(53, -1))
    elif kind == "nothing":
        return {"data__val": "null"}
    elif kind == "neighbors":
        return {"eval__knn_k": 71}
    return {"data__val": write(source, folder / "other", Store("raw")).path}


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("nothing", "data.val is missing: .* or --train.online_every 0"),
        ("other classes", "has class c6 where .* has other"),
        ("no labels", "53 of 53 images of .* have no label: online accuracy needs them"),
        ("neighbors", "kNN with k = 71 needs as many training images, .* has 70"),
    ],
)
def test_what_cannot_be_scored_is_one_line_before_the_run_begins(
    sets: tuple[Beton, Beton], tmp_path: Path, kind: str, words: str
) -> None:
    changes = bad(sets, tmp_path, kind)
    with pytest.raises(InputError, match=words) as caught:
        run(sets, tmp_path, train__online_every=1, **changes)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "r").exists()
