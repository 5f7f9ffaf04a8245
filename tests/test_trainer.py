"""The trainer: one rank equals two, penalties weigh what they should, all parts are kept."""

import functools
import math
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from betons import digit_like, photographs, write
from ranks import on_ranks
from torch import nn
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel

import fastproj.trainer
from data_prep.encode import Store
from fastproj import checkpoint, dist, journal
from fastproj.build import build_crops, build_learner, crop_size
from fastproj.errors import InputError, SettingError
from fastproj.learner import Learner
from fastproj.loaders import Batch
from fastproj.loaders.boxes import draw
from fastproj.loaders.stream import StreamLoader
from fastproj.machine import cores
from fastproj.manifest import Beton
from fastproj.objective import OBJECTIVES
from fastproj.settings import RUN, Settings, load
from fastproj.train import train
from fastproj.trainer import Trainer
from fastproj.views import Views

BASE = {
    "run.device": "cpu", "model.encoder": "resnet_small", "views.size": 8,
    # Nothing is drawn but the crops, which are the same on any number of ranks.
    "views.flip": 0, "views.jitter": 0, "views.gray": 0, "views.blur": 0, "views.solarise": 0,
    "projector.hidden": 32, "projector.out": 16, "projector.batch_norm": "true",
    "objective.predictor_hidden": 16, "objective.prototypes": 6, "objective.queue": 24,
    "objective.queue_epoch": 1, "objective.momentum": 0.9, "optim.batch_size": 16,
    "optim.optimiser": "sgd", "optim.lr": 0.1, "optim.epochs": 2, "optim.warmup_epochs": 0,
    "model.sync_bn": "true", "train.log_every": 1,
}  # fmt: skip
STEPS = 6  # of 10: the second epoch has begun, SwAV's prototypes move and its queue is used


@pytest.fixture(scope="module")
def beton(tmp_path_factory: pytest.TempPathFactory) -> Beton:
    source = digit_like(np.random.default_rng(0), 83, 12, 4)
    return write(source, tmp_path_factory.mktemp("data"), Store("raw"))


def settings(beton: str | Path, folder: str | Path = "nowhere", **changes: object) -> Settings:
    given = {"data.train": beton, "run.dir": folder, "run.name": "r", **BASE}
    given |= {name.replace("__", "."): value for name, value in changes.items()}
    argv = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    return load(RUN, argv, "test", "")


def six_steps(beton: Path, changes: dict[str, object]) -> dict[str, torch.Tensor]:
    """The mean loss over ranks of each step, and all that was learned, in float64."""
    rank = dist.Rank(dist.rank(), dist.world(), dist.rank())
    # In float64 from the start: DDP takes the parameters as it finds them. Where it compiles, only
    # the graphs matter, not the machine code.
    with (
        mock.patch.object(
            fastproj.trainer, "build_learner", lambda *given: build_learner(*given).double()
        ),
        mock.patch.object(
            Learner, "compile", lambda self, **_: nn.Module.compile(self, backend="aot_eager")
        ),
        mock.patch.object(Views, "compile", lambda self: None),
    ):
        trainer = Trainer(settings(beton, **changes), rank, torch.device("cpu"))
    for views in trainer.views:
        views.dtype = torch.float64
    losses = []
    while len(losses) < STEPS:
        trainer.begin_epoch(trainer.loader.cursor[0])
        for batch in trainer.loader:
            losses.append(dist.mean(trainer.train_step(batch)["loss"]))
            if len(losses) == STEPS:
                break
    trainer.loader.close()
    learned = {f"weights {name}": x for name, x in trainer.learner.state_dict().items()}
    return {"losses": torch.stack(losses), **learned}


VARIANTS = {
    **{name: {"objective__name": name} for name in OBJECTIVES},
    "swav with small crops": {
        "objective__name": "swav", "views__local_crops": 2, "views__local_size": 8,
    },
    "crops that grow": {"views__size_start": 8, "views__size": 16},
    "discretised sparse": {"projector__latents": 64, "projector__levels": 30},
    "sparsehead": {"sparsehead__weight": 0.1},
    "sparsehead, proximal": {"sparsehead__weight": 0.1, "sparsehead__proximal": "true"},
    "sparsehead of activations": {
        "sparsehead__weight": 0.1, "sparsehead__groups": "activations",
    },
    "simclr compiled": {"train__compile": "true", "superfluous__noise": "learned",
                        "superfluous__sigma": 1e-12},
    "mocov3 compiled": {"train__compile": "true", "objective__name": "mocov3"},
}  # fmt: skip


def read_in_an_epoch(beton: Path) -> dict[str, torch.Tensor]:
    """The samples that this rank's trainer reads in its second epoch."""
    rank = dist.Rank(dist.rank(), dist.world(), dist.rank())
    trainer = Trainer(settings(beton), rank, torch.device("cpu"))
    trainer.loader.seek(1, 0)
    return {"index": torch.cat([batch.index for batch in trainer.loader])}


def every_variant(beton: Path) -> dict[str, dict[str, torch.Tensor]]:
    seen = {name: six_steps(beton, changes) for name, changes in VARIANTS.items()}
    seen["in parts"] = six_steps(beton, {"optim__accumulate": 2})
    with mock.patch.object(DistributedDataParallel, "no_sync", lambda self: nullcontext()):
        seen["in parts, each summed over ranks"] = six_steps(beton, {"optim__accumulate": 2})
    return seen | {"read": read_in_an_epoch(beton)}


@pytest.fixture(scope="module")
def two_ranks(beton: Beton, tmp_path_factory: pytest.TempPathFactory) -> list:
    function = functools.partial(every_variant, beton.path)
    return on_ranks(2, function, tmp_path_factory.mktemp("ranks"), seconds=300)


@pytest.mark.parametrize("name", VARIANTS)
def test_two_ranks_equal_one(beton: Beton, two_ranks: list, name: str) -> None:
    """Six steps of everything: gathered samples, synchronised batch norm, queues, teachers."""
    alone = six_steps(beton.path, {**VARIANTS[name], "train__compile": "false"})
    assert len(set(alone["losses"].tolist())) == STEPS
    for seen in two_ranks:
        for key, value in alone.items():
            close = {"rtol": 1e-6, "atol": 1e-8}
            torch.testing.assert_close(
                seen[name][key], value, **close, msg=lambda m, key=key: f"{key}: {m}"
            )


def test_ranks_of_one_machine_share_its_cores(beton: Beton) -> None:
    for ranks, workers, threads in ((2, 0, max(1, cores() // 2)), (1000, 0, 1), (2, 1, 1)):
        given = settings(beton.path, data__workers=workers, data__engine="stream")
        trainer = Trainer(given, dist.Rank(0, 1, 0, ranks), torch.device("cpu"))
        assert isinstance(trainer.loader, StreamLoader) and trainer.loader.workers == threads


def test_ranks_sum_gradients_once_for_all_parts(two_ranks: list) -> None:
    right = two_ranks[0]["in parts, each summed over ranks"]
    for seen in two_ranks:
        for key, value in right.items():
            torch.testing.assert_close(seen["in parts"][key], value, rtol=1e-6, atol=1e-8)


def test_each_sample_is_read_once_by_one_of_two_ranks(beton: Beton, two_ranks: list) -> None:
    shares = [seen["read"]["index"].tolist() for seen in two_ranks]
    assert [len(share) for share in shares] == [40, 40]  # 5 steps of 8 on each; 3 of 83 left over
    alone = read_in_an_epoch(beton.path)["index"].tolist()
    assert len(set(alone)) == 80 and sorted(sum(shares, [])) == sorted(alone)


@pytest.mark.parametrize("name", ["byol", "mocov2plus", "swav"])
def test_accumulation_moves_queues_and_teachers_once_a_step(beton: Beton, name: str) -> None:
    if name != "byol":
        learned = six_steps(beton.path, {"objective__name": name, "optim__accumulate": 4})
        assert learned["weights objective.seen"] == STEPS * 16
    if name != "swav":
        # A tensor that training leaves alone tells how often the average was taken.
        trainer = Trainer(
            settings(beton.path, objective__name=name, optim__accumulate=4),
            dist.Rank(0, 1, 0),
            torch.device("cpu"),
        )
        momenta: list[float] = []
        trainer.learner.update_teacher = momenta.append  # type: ignore[method-assign]
        for batch in trainer.loader:
            trainer.train_step(batch)
        # base 0.9 to 1 along a cosine of 10 steps, one value an optimiser step
        wanted = [1 - 0.1 * (math.cos(math.pi * step / 10) + 1) / 2 for step in range(5)]
        assert momenta == pytest.approx(wanted)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_broken_run_with_every_kind_of_part_is_an_unbroken_one(
    beton: Beton, tmp_path: Path, name: str
) -> None:
    changes = {
        "objective__name": name, "superfluous__noise": "learned", "superfluous__lambda_a": 0.1,
        "matrix_information__weight": "0,0.1", "sparsehead__weight": 0.1,
        "projector__dropout": 0.2, "projector__levels": 4, "model__sync_bn": "false",
    }  # fmt: skip
    whole = train(settings(beton.path, tmp_path / "a", **changes))
    train(settings(beton.path, tmp_path / "b", **changes, train__stop_after=7))
    broken = train(settings(beton.path, tmp_path / "b", **changes, run__resume="true"))
    ours, theirs = (checkpoint.load(checkpoint.latest(r / "checkpoints")) for r in (whole, broken))
    for part in ("encoder", "projector", "objective", "noise", "probe"):
        assert ours[part].keys() == theirs[part].keys()
        for key, value in ours[part].items():
            assert torch.equal(value, theirs[part][key]), f"{part}.{key}"
    assert ("teacher" in ours) == (name in ("byol", "mocov2plus", "mocov3"))
    steps = [
        [e["loss"] for e in journal.read(r / "metrics.jsonl") if e["event"] == "step"]
        for r in (whole, broken)
    ]
    assert len(steps[0]) == 10 and steps[0] == steps[1]


def test_a_run_broken_while_the_queue_fills_is_an_unbroken_one(
    beton: Beton, tmp_path: Path
) -> None:
    """SwAV's queue of 40 is full, and used, within the first epoch: on resuming there as well."""
    changes = {
        "objective__name": "swav", "objective__queue": 40, "objective__queue_epoch": 0,
        "model__sync_bn": "false",
    }  # fmt: skip
    whole = train(settings(beton.path, tmp_path / "a", **changes))
    for stop in (2, 1, 1):
        resume = "false" if stop == 2 else "true"
        changes |= {"train__stop_after": stop, "run__resume": resume}
        broken = train(settings(beton.path, tmp_path / "b", **changes))
    changes["train__stop_after"] = "null"
    train(settings(beton.path, tmp_path / "b", **changes))
    steps = [
        [e["loss"] for e in journal.read(r / "metrics.jsonl") if e["event"] == "step"]
        for r in (whole, broken)
    ]
    assert len(steps[0]) == 10 and steps[0] == steps[1]


def test_penalties_are_weighed_by_their_schedule_and_told_unweighted(beton: Beton) -> None:
    changes = {
        "matrix_information__weight": "0,1", "sparsehead__weight": 2,
        "superfluous__noise": "fixed", "superfluous__lambda_a": -0.5,
    }  # fmt: skip
    trainer = Trainer(settings(beton.path, **changes), dist.Rank(0, 1, 0), torch.device("cpu"))
    for step, batch in enumerate(trainer.loader):
        told = {name: x.item() for name, x in trainer.train_step(batch).items()}
        assert set(told) == {"loss", "online_probe", "objective", "matrix_information",
                             "sparsehead", "superfluous_a"}  # fmt: skip
        weighed = told["objective"] + step / 10 * told["matrix_information"]
        weighed += 2 * told["sparsehead"] - 0.5 * told["superfluous_a"]
        assert told["loss"] == pytest.approx(weighed, rel=1e-5)


def test_the_proximal_step_makes_exact_zeros_where_the_gradient_does_not(beton: Beton) -> None:
    zeros = {}
    for proximal in ("true", "false"):
        learned = six_steps(
            beton.path, {"sparsehead__weight": 8, "sparsehead__proximal": proximal}
        )
        columns = learned["weights projector.trunk.0.weight"].norm(dim=0)
        zeros[proximal] = int((columns == 0).sum())
    assert zeros["true"] > 0 and zeros["false"] == 0


@pytest.mark.parametrize("name", OBJECTIVES)
def test_mixed_precision_learns_the_same(beton: Beton, tmp_path: Path, name: str) -> None:
    """bfloat16 has three digits: the loss before and after an update is float32's within 10 %."""
    changes = {
        "objective__name": name, "projector__latents": 64, "matrix_information__weight": 0.1,
        "sparsehead__weight": 0.1, "superfluous__noise": "learned", "superfluous__lambda_a": 0.01,
        "train__stop_after": 2, "optim__lr": 0.01,
    }  # fmt: skip
    losses = []
    for precision in ("float32", "bfloat16"):
        changes["train__precision"] = precision
        run = train(settings(beton.path, tmp_path / precision, **changes))
        events = journal.read(run / "metrics.jsonl")
        losses.append([e["loss"] for e in events if e["event"] == "step"])
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.1, abs=0.05)


def test_noise_without_divergences_is_the_control(beton: Beton) -> None:
    plain, noisy = (
        six_steps(beton.path, {"superfluous__noise": noise})["losses"]
        for noise in ("none", "fixed")
    )
    assert not torch.equal(plain, noisy)
    torch.testing.assert_close(plain[0], noisy[0], rtol=0.2, atol=0)


GROWING = {  # stem, first and last size, epochs: the size of each epoch
    ("cifar", 16, 32, 8): [16, 16, 20, 20, 28, 28, 32, 32],
    ("cifar", 24, 32, 5): [24, 28, 28, 32, 32],
    ("imagenet", 128, 224, 4): [128, 160, 192, 224],
    ("imagenet", 150, 170, 4): [150, 160, 160, 170],
    ("imagenet", 200, 220, 4): [200, 200, 220, 220],  # 192 and 224 are no sizes between
    ("cifar", 16, 32, 1): [32],
    ("cifar", 16, 32, 2): [20, 32],
    ("cifar", 16, 32, 3): [20, 28, 32],
    ("cifar", 32, 32, 2): [32, 32],
    ("cifar", "null", 32, 2): [32, 32],
}


@pytest.mark.parametrize(("stem", "first", "last", "epochs"), GROWING)
def test_crops_grow_in_four_parts_of_the_run(
    stem: str, first: int, last: int, epochs: int
) -> None:
    given = settings(
        "x", model__stem=stem, views__size_start=first, views__size=last, optim__epochs=epochs
    )
    sizes = [crop_size(given, epoch) for epoch in range(epochs)]
    assert sizes == GROWING[stem, first, last, epochs]


@pytest.mark.parametrize("engine", ["resident", "stream", "reference", "dali"])
def test_an_epochs_crops_have_its_size_and_lie_where_they_lay(
    beton: Beton, engine: str, tmp_path: Path
) -> None:
    if engine == "dali":
        pytest.importorskip("nvidia.dali")
    if engine != "resident":  # photographs: no engine crops those in the way of small images
        source = photographs(np.random.default_rng(0), tmp_path / "files", 24)
        beton = write(source, tmp_path / "beton", Store("jpeg", quality=90))
    changes = {"views__size_start": 8, "views__size": 16, "optim__epochs": 4, "data__workers": 1}
    given = settings(beton.path, **changes, data__engine=engine)
    trainer = Trainer(given, dist.Rank(0, 1, 0), torch.device("cpu"))
    sides = []
    with trainer.loader:
        for epoch in range(4):
            trainer.begin_epoch(epoch)
            sides.append({batch.crops[0].shape[2:] for batch in trainer.loader})
    assert sides == [{(side, side)} for side in (8, 12, 12, 16)]
    where = np.arange(len(beton))
    small, large = (draw(build_crops(given, epoch), beton, where, 0, 1) for epoch in (0, 3))
    assert np.array_equal(small, large)


def test_a_run_of_growing_crops_goes_on_where_it_was_broken(beton: Beton, tmp_path: Path) -> None:
    changes = {"views__size_start": 8, "views__size": 16, "optim__epochs": 4}
    whole = train(settings(beton.path, tmp_path / "a", **changes))
    for stop, resume in ((8, "false"), (7, "true"), ("null", "true")):  # inside epochs 1, 3
        more = {"train__stop_after": stop, "run__resume": resume}
        broken = train(settings(beton.path, tmp_path / "b", **changes, **more))
    ours, theirs = (checkpoint.load(checkpoint.latest(r / "checkpoints")) for r in (whole, broken))
    for key, value in ours["encoder"].items():
        assert torch.equal(value, theirs["encoder"][key]), key
    steps = [
        [e["loss"] for e in journal.read(r / "metrics.jsonl") if e["event"] == "step"]
        for r in (whole, broken)
    ]
    assert len(steps[0]) == 20 and steps[0] == steps[1]


def on_gpu(beton: Path, **changes: object) -> tuple[Trainer, list[Batch]]:
    """A trainer of a run on the GPU, and the batches of its first epoch."""
    given = settings(beton, run__device="cuda", data__engine="resident", **changes)
    trainer = Trainer(given, dist.Rank(0, 1, 0), torch.device("cuda", 0))
    trainer.begin_epoch(0)
    return trainer, list(trainer.loader)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("wish", ["true", "graphs"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_compiled_and_graphed_steps_on_a_gpu_equal_eager_ones(
    beton: Beton, name: str, wish: str
) -> None:
    """Ten steps: a graph is warmed up, recorded, and then replayed over its own memory."""
    changes = {"objective__name": name, "train__precision": "float32"}
    losses = {}
    counters.clear()
    for compile_ in ("false", wish):
        trainer, batches = on_gpu(beton.path, train__compile=compile_, **changes)
        told = [trainer.train_step(batch) for batch in batches * 2]
        losses[compile_] = torch.stack([t["loss"] for t in told]).tolist()
        assert all(math.isfinite(x) for x in trainer.diagnostics.report().values())
    assert losses[wish] == pytest.approx(losses["false"], rel=1e-2)
    assert counters["inductor"]["cudagraph_skips"] == 0  # or a graph would be none


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_on_a_gpu_waits_for_nothing(beton: Beton, name: str, precision: str) -> None:
    """Data, views, forward, backward, update: once warm, none makes the host wait."""
    changes = {
        "objective__name": name, "train__precision": precision, "train__compile": "false",
        "superfluous__noise": "learned", "superfluous__lambda_a": 0.1,
        "matrix_information__weight": "0,0.1", "sparsehead__weight": 0.1,
        "sparsehead__proximal": "true", "projector__dropout": 0.2, "projector__levels": 4,
        "views__flip": 0.5, "views__jitter": 0.8, "views__gray": 0.2, "optim__optimiser": "lars",
    }  # fmt: skip
    trainer, batches = on_gpu(beton.path, **changes)
    for batch in batches:
        trainer.train_step(batch)
    trainer.begin_epoch(1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in trainer.loader:
            trainer.train_step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


BAD = {
    "graphs without a GPU": (
        {"train__compile": "graphs"}, InputError, r"for one GPU, not 1 rank\(s\) on cpu"),
    "crops that shrink": (
        {"views__size_start": 16}, InputError, "views.size_start 16 is above views.size 8"),
    "divergences without noise": (
        {"superfluous__lambda_b": 0.1}, SettingError, "give --superfluous.noise fixed or learned"),
    "small crops for two views": (
        {"views__local_crops": 2}, InputError, "simclr compares two crops"),
    "small crops' range": (
        {"objective__name": "swav", "views__local_crops": 2, "views__local_scale_min": 0.5},
        InputError, "views.local_scale_min 0.5 is above views.local_scale_max 0.14"),
    "a penalty of weights that are not there": (
        {"projector__kind": "none", "sparsehead__weight": 1}, InputError, "no weight"),
    "a proximal step of activations": (
        {"sparsehead__weight": 1, "sparsehead__groups": "activations",
         "sparsehead__proximal": "true"},
        SettingError, "give --sparsehead.groups columns or rows"),
    "activations of no hidden layer": (
        {"projector__kind": "none", "projector__latents": 64, "sparsehead__weight": 1,
         "sparsehead__groups": "activations"},
        SettingError, "no hidden activations"),
    "moco without a queue": (
        {"objective__name": "mocov2plus", "objective__queue": 0}, SettingError, "needs one"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_go_together_is_one_line(beton: Beton, tmp_path: Path, name: str) -> None:
    changes, kind, message = BAD[name]
    with pytest.raises(kind, match=message):
        train(settings(beton.path, tmp_path, **changes))
    assert not (tmp_path / "r").exists()
