"""The trainer: one rank equals two, penalties weigh what they should, all parts are kept."""

import functools
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from fastproj.augment.draw import View
from fastproj.core import dist
from fastproj.core.errors import InputError, SettingError
from fastproj.core.machine import cores
from fastproj.core.table import hyperparameters
from fastproj.data.beton import Beton, open_beton
from fastproj.loaders import Batch
from fastproj.loaders.boxes import draw
from fastproj.loaders.stream import StreamLoader
from fastproj.models import PROJECTORS
from fastproj.objective import OBJECTIVES, barlow_twins, nt_xent
from fastproj.prepare.encode import Store
from fastproj.runs import checkpoint, journal
from fastproj.settings import RUN, Settings, load
from fastproj.train import train
from fastproj.training.build import build_diagnostics, build_learner, build_trainer
from fastproj.training.crops import crop_size, misfit
from fastproj.training.learner import score
from fastproj.training.trainer import Trainer
from tests.support.betons import digit_like, photographs, write
from tests.support.ranks import on_ranks
from tests.support.trainers import small_trainer

BASE = {
    "run.device": "cpu", "model.encoder": "resnet_small", "views.size": 8,
    # Nothing is drawn but the crops, which are the same on any number of ranks.
    "views.flip_prob": 0, "views.jitter_prob": 0, "views.gray_prob": 0, "views.blur_prob": 0,
    "views.solarize_prob": 0,
    "optim.batch_size": 16, "optim.optimizer": "sgd", "optim.lr": 0.1, "optim.epochs": 2,
    "optim.warmup_epochs": 0, "model.sync_bn": "true", "train.log_every": 1,
    "train.precision": "float32",
}  # fmt: skip
HEAD = {"hidden": 32, "out": 16, "batch_norm": "true"}  # both: given to what names them
LOSS = {"predictor_hidden": 16, "prototypes": 6, "queue": 24, "queue_epoch": 1, "momentum": 0.9}
STEPS = 6  # of 10: the second epoch has begun, SwAV's prototypes move and its queue is used


@pytest.fixture(scope="module")
def beton(tmp_path_factory: pytest.TempPathFactory) -> Beton:
    source = digit_like(np.random.default_rng(0), 83, 12, 4)
    return write(source, tmp_path_factory.mktemp("data"), Store("raw"))


def settings(beton: str | Path, folder: str | Path = "nowhere", **changes: object) -> Settings:
    given = {"data.train": beton, "run.dir": folder, "run.name": "r", **BASE}
    loss = hyperparameters(OBJECTIVES[str(changes.get("objective__name", "simclr"))])
    head = hyperparameters(PROJECTORS[str(changes.get("projector__kind", "mlp"))])
    given |= {f"objective.{name}": value for name, value in LOSS.items() if name in loss}
    given |= {f"projector.{name}": value for name, value in HEAD.items() if name in head}
    given |= {name.replace("__", "."): value for name, value in changes.items()}
    argv = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    return load(RUN, argv, "test", "")


def six_steps(path: Path, changes: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The mean loss over ranks of each step, and all that was learned, in float64."""
    trainer = small_trainer(open_beton(path), dtype=torch.float64, **changes)
    losses = []
    while len(losses) < STEPS:
        for batch in trainer.epoch():
            losses.append(dist.mean(trainer.train_step(batch)["loss"]))
            if len(losses) == STEPS:
                break
    trainer.loader.close()
    learned = {f"weights {name}": x for name, x in trainer.learner.state_dict().items()}
    return {"losses": torch.stack(losses), **learned}


SPARSE: dict[str, Any] = {"penalties": {"sparsehead": (0.1,)}}
# Where it compiles, only the graphs matter, not the machine code.
VARIANTS: dict[str, dict[str, Any]] = {
    **{name: {"objective": name} for name in OBJECTIVES},
    "swav with small crops": {"objective": "swav", "local_crops": 2},
    "crops that grow": {"sizes": (12, 16)},
    "discretized sparse": {"head": {"latents": 64, "levels": 30}},
    "sparsehead": SPARSE,
    "sparsehead, proximal": SPARSE | {"proximal": True},
    "sparsehead of activations": SPARSE | {"groups": "activations"},
    "batch norm per view": {"objective": "mocov3", "bn_per_view": True,
                            "head": {"output_norm": True}},
    "batch norm per view, small crops": {
        "objective": "swav", "bn_per_view": True, "local_crops": 2, "loss": {"weight_norm": True},
    },
    "batch norm per view, compiled": {
        "bn_per_view": True, "backend": "aot_eager", "noise": "learned", "sigma": 1e-12,
    },
    "mocov3 compiled": {"backend": "aot_eager", "objective": "mocov3"},
}  # fmt: skip


IN_PARTS: dict[str, dict[str, Any]] = {
    "in parts": {"accumulate": 2},
    "in parts, batch norm per view": {"accumulate": 2, "bn_per_view": True},
}


def read_in_an_epoch(path: Path) -> dict[str, torch.Tensor]:
    """The samples that this rank's trainer reads in its second epoch."""
    trainer = small_trainer(open_beton(path))
    trainer.loader.seek(1, 0)
    return {"index": torch.cat([batch.index for batch in trainer.epoch()])}


def every_variant(beton: Path) -> dict[str, dict[str, torch.Tensor]]:
    seen = {name: six_steps(beton, changes) for name, changes in VARIANTS.items()}
    for name, changes in IN_PARTS.items():
        seen[name] = six_steps(beton, changes)
        with mock.patch.object(DistributedDataParallel, "no_sync", lambda self: nullcontext()):
            seen[f"{name}, each summed over ranks"] = six_steps(beton, changes)
    return seen | {"read": read_in_an_epoch(beton)}


@pytest.fixture(scope="module")
def two_ranks(beton: Beton, tmp_path_factory: pytest.TempPathFactory) -> list:
    function = functools.partial(every_variant, beton.path)
    return on_ranks(2, function, tmp_path_factory.mktemp("ranks"), seconds=300)


@pytest.mark.parametrize("name", VARIANTS)
def test_two_ranks_equal_one(beton: Beton, two_ranks: list, name: str) -> None:
    """Six steps of everything: gathered samples, synchronized batch norm, queues, teachers."""
    alone = six_steps(beton.path, VARIANTS[name] | {"backend": None})
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
        trainer = build_trainer(given, dist.Rank(0, 1, 0, ranks), torch.device("cpu"))
        assert isinstance(trainer.loader, StreamLoader) and trainer.loader.workers == threads


@pytest.mark.parametrize("name", IN_PARTS)
def test_ranks_sum_gradients_once_for_all_parts(two_ranks: list, name: str) -> None:
    right = two_ranks[0][f"{name}, each summed over ranks"]
    for seen in two_ranks:
        for key, value in right.items():
            torch.testing.assert_close(seen[name][key], value, rtol=1e-6, atol=1e-8)


def test_each_sample_is_read_once_by_one_of_two_ranks(beton: Beton, two_ranks: list) -> None:
    shares = [seen["read"]["index"].tolist() for seen in two_ranks]
    assert [len(share) for share in shares] == [40, 40]  # 5 steps of 8 on each; 3 of 83 left over
    alone = read_in_an_epoch(beton.path)["index"].tolist()
    assert len(set(alone)) == 80 and sorted(sum(shares, [])) == sorted(alone)


@pytest.mark.parametrize("name", ["byol", "mocov2plus", "swav"])
def test_accumulation_moves_queues_and_teachers_once_a_step(beton: Beton, name: str) -> None:
    if name != "byol":
        learned = six_steps(beton.path, {"objective": name, "accumulate": 4})
        assert learned["weights objective.seen"] == STEPS * 16
    if name != "swav":
        # A tensor that training leaves alone tells how often the average was taken.
        trainer = small_trainer(beton, name, accumulate=4)
        momenta: list[float] = []
        trainer.learner.update_teacher = momenta.append  # type: ignore[method-assign]
        for batch in trainer.loader:
            trainer.train_step(batch)
        # base 0.9 to 1 along a cosine of 10 steps, one value an optimizer step
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
    broken = train(settings(beton.path, tmp_path / "b", **changes, run__resume=tmp_path / "b/r"))
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
        resume = "null" if stop == 2 else tmp_path / "b/r"
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
    weights = {"matrix_information": (0, 1), "sparsehead": (2,), "superfluous_a": (-0.5,)}
    trainer = small_trainer(beton, noise="fixed", penalties=weights)
    for step, batch in enumerate(trainer.epoch()):
        metrics = {name: x.item() for name, x in trainer.train_step(batch).items()}
        assert set(metrics) == {"loss", "online_probe", "objective", *weights}
        weighed = metrics["objective"] + step / 10 * metrics["matrix_information"]
        weighed += 2 * metrics["sparsehead"] - 0.5 * metrics["superfluous_a"]
        assert metrics["loss"] == pytest.approx(weighed, rel=1e-5)


def test_the_proximal_step_makes_exact_zeros_where_the_gradient_does_not(beton: Beton) -> None:
    zeros = {}
    for proximal in (True, False):
        changes = {"penalties": {"sparsehead": (8,)}, "proximal": proximal}
        columns = six_steps(beton.path, changes)["weights projector.trunk.0.weight"].norm(dim=0)
        zeros[proximal] = int((columns == 0).sum())
    assert zeros[True] > 0 and zeros[False] == 0


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
    plain, noisy = (six_steps(beton.path, {"noise": n})["losses"] for n in (None, "fixed"))
    assert not torch.equal(plain, noisy)
    torch.testing.assert_close(plain[0], noisy[0], rtol=0.2, atol=0)


def test_a_state_of_one_trainer_goes_on_in_another(beton: Beton) -> None:
    """From a notebook: torch's own optimizer, no groups of ours, no command and no folder."""

    def trainer() -> Trainer:
        parts = small_trainer(beton, "byol")
        optimizer = torch.optim.SGD(parts.learner.parameters(), lr=0.01, momentum=0.9)
        return Trainer(parts.learner, parts.loader, optimizer, parts.augmentations, epochs=2,
                       precision=torch.float32)  # fmt: skip

    def losses(trainer: Trainer, steps: int) -> list[float]:
        seen: list[float] = []
        while len(seen) < steps:
            for batch in trainer.epoch():
                seen.append(trainer.train_step(batch)["loss"].item())
                if len(seen) == steps:
                    break
        trainer.loader.close()
        return seen

    whole = losses(trainer(), 10)
    first, second = trainer(), trainer()
    broken = losses(first, 7)
    second.load_state_dict(first.state_dict())
    assert second.step == 7 and broken + losses(second, 3) == whole


def test_arguments_that_do_not_go_together_are_a_value_error(beton: Beton) -> None:
    for changes, message in (
        ({"accumulate": 3}, "cannot be split into 3 parts"),
        ({"graphs": True}, r"for one GPU, not 1 rank\(s\) on cpu"),
    ):
        with pytest.raises(ValueError, match=message):
            small_trainer(beton, **changes)
    parts = small_trainer(beton, penalties={"matrix_information": (1,)})
    given = parts.learner, parts.loader, parts.optimizer
    with pytest.raises(ValueError, match="penalty_weights lacks matrix_information"):
        Trainer(*given, parts.augmentations)
    with pytest.raises(ValueError, match=r"0 augmentation\(s\) for 1 crop size"):
        Trainer(*given, [], penalty_weights={"matrix_information": (1,)})


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
    ("cifar", None, 32, 2): [32, 32],
}


@pytest.mark.parametrize(("stem", "first", "last", "epochs"), GROWING)
def test_crops_grow_in_four_parts_of_the_run(
    stem: str, first: int | None, last: int, epochs: int
) -> None:
    sizes = [crop_size(epoch, epochs, first, last, stem) for epoch in range(epochs)]
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
    trainer = small_trainer(beton, sizes=(8, 12, 12, 16), engine=engine)
    sides = []
    with trainer.loader:
        for _ in range(4):
            sides.append({batch.crops[0].shape[2:] for batch in trainer.epoch()})
    assert sides == [{(side, side)} for side in (8, 12, 12, 16)]
    where = np.arange(len(beton))
    assert trainer.crops
    small, large = (draw(trainer.crops(epoch), beton, where, 0, 1) for epoch in (0, 3))
    assert np.array_equal(small, large)


def test_a_run_of_growing_crops_goes_on_where_it_was_broken(beton: Beton, tmp_path: Path) -> None:
    changes = {"views__size_start": 8, "views__size": 16, "optim__epochs": 4}
    whole = train(settings(beton.path, tmp_path / "a", **changes))
    for stop, resume in ((8, False), (7, True), ("null", True)):  # inside epochs 1, 3
        folder = tmp_path / "b/r" if resume else "null"
        more = {"train__stop_after": stop, "run__resume": folder}
        broken = train(settings(beton.path, tmp_path / "b", **changes, **more))
    ours, theirs = (checkpoint.load(checkpoint.latest(r / "checkpoints")) for r in (whole, broken))
    for key, value in ours["encoder"].items():
        assert torch.equal(value, theirs["encoder"][key]), key
    steps = [
        [e["loss"] for e in journal.read(r / "metrics.jsonl") if e["event"] == "step"]
        for r in (whole, broken)
    ]
    assert len(steps[0]) == 20 and steps[0] == steps[1]


def on_gpu(beton: Beton, **changes: Any) -> tuple[Trainer, list[Batch]]:
    """A trainer of a run on the GPU, and the batches of its first epoch."""
    trainer = small_trainer(beton, device="cuda:0", engine="resident", **changes)
    return trainer, list(trainer.epoch())


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("wish", ["compile", "graphs"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_compiled_and_graphed_steps_on_a_gpu_equal_eager_ones(
    beton: Beton, name: str, wish: str
) -> None:
    """Ten steps: a graph is warmed up, recorded, and then replayed over its own memory."""
    losses = {}
    counters.clear()
    for on in (False, True):
        trainer, batches = on_gpu(beton, objective=name, **{wish: on})
        metrics = [trainer.train_step(batch) for batch in batches * 2]
        losses[on] = torch.stack([m["loss"] for m in metrics]).tolist()
        report = trainer.diagnostics.report()
        assert all(math.isfinite(x) for x in report.values() if isinstance(x, float))
    assert losses[True] == pytest.approx(losses[False], rel=1e-2)
    assert counters["inductor"]["cudagraph_skips"] == 0  # or a graph would be none


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_on_a_gpu_waits_for_nothing(beton: Beton, name: str) -> None:
    """Data, views, forward, backward, update: once warm, none makes the host wait.

    With float16 it waits for the scaler, which says whether the step was taken.
    """
    trainer, batches = on_gpu(
        beton, objective=name, precision=torch.bfloat16, noise="learned", proximal=True,
        penalties={"superfluous_a": (0.1,), "matrix_information": (0, 0.1), "sparsehead": (0.1,)},
        head={"dropout": 0.2, "levels": 4}, view=View(blur_prob=0), optimizer="lars",
    )  # fmt: skip
    for batch in batches:
        trainer.train_step(batch)
    more = trainer.epoch()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in more:
            trainer.train_step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


BAD = {
    "graphs without a GPU": (
        {"train__compile": "graphs"}, InputError, r"for one GPU, not 1 rank\(s\) on cpu"),
    "crops that shrink": (
        {"views__size_start": 16}, InputError, "views.size_start 16 is above views.size 8"),
    "divergences without noise": (
        {"superfluous__lambda_b": 0.1}, SettingError, "read only where superfluous.noise is"),
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


def test_an_objective_that_needs_labels_refuses_a_set_without(beton: Beton, tmp_path: Path) -> None:
    source = digit_like(np.random.default_rng(0), 83, 12, 4)
    source.labels[:3] = -1
    bare = write(source, tmp_path / "bare", Store("raw"))
    with pytest.raises(InputError, match="supcon needs labels, and 3 of 83 images of .*bare"):
        train(settings(bare.path, tmp_path, objective__name="supcon"))
    assert not (tmp_path / "r").exists()


def test_the_diagnostics_take_the_objectives_own_loss(beton: Beton) -> None:
    one, other = torch.randn(2, 8, 6, generator=torch.Generator().manual_seed(0))
    for changes, wanted, contrastive in (
        ({"objective__name": "barlow"}, barlow_twins(one, other, 0.0051, 0.1), False),
        ({"objective__name": "barlow", "objective__off_diagonal": 0.5, "objective__scale": 2},
         barlow_twins(one, other, 0.5, 2.0), False),
        ({"objective__temperature": 0.9}, nt_xent(one, other, 0.9), True),
        ({"objective__name": "vicreg"}, nt_xent(one, other, 0.2), True),
    ):  # fmt: skip
        given = settings(beton.path, **changes)
        kept = build_diagnostics(given, build_learner(given, len(beton.classes)).projector)
        torch.testing.assert_close(kept.loss(one, other), wanted)
        assert kept.contrastive == contrastive


@pytest.mark.parametrize(("every", "measured"), [(1, [0, 1, 2, 3]), (2, [1, 3]), (3, [2]), (0, [])])
def test_diagnostics_are_of_every_nth_epochs_own_steps(
    beton: Beton, every: int, measured: list[int]
) -> None:
    trainer = small_trainer(beton, epochs=4, diagnostics_every=every)
    with mock.patch.object(trainer.diagnostics, "watch", wraps=trainer.diagnostics.watch) as watch:
        for epoch in range(4):
            for batch in trainer.epoch():
                trainer.train_step(batch)
            assert watch.call_count == (5 if epoch in measured else 0)
            watch.reset_mock()
            if epoch != 1:  # nobody asks about the second epoch, and the third is not mixed with it
                assert bool(trainer.diagnostics.report()) == (epoch in measured)
            else:
                kept = len(trainer.diagnostics._steps)
                assert kept == (5 if epoch in measured else 0)


def test_diagnostics_do_not_change_what_is_learned(beton: Beton) -> None:
    with_them, without = (six_steps(beton.path, {"diagnostics_every": every}) for every in (1, 0))
    for name, value in with_them.items():
        assert torch.equal(value, without[name]), name


# Median shorter side of the images, crop size, stem: what the notice proposes, if anything.
FITS = {
    (400, 32, "cifar"): "--views.size 224 --model.stem imagenet",
    (160, 32, "cifar"): "--views.size 128 --model.stem imagenet",
    (400, 224, "cifar"): "--views.size 224 --model.stem imagenet",
    (32, 224, "imagenet"): "--views.size 32 --model.stem cifar",
    (32, 32, "imagenet"): "--views.size 32 --model.stem cifar",
    (96, 32, "cifar"): "--views.size 64 --model.stem cifar",
    (8, 16, "cifar"): None,  # the demo's digits
    (32, 32, "cifar"): None,
    (96, 64, "cifar"): None,
    (400, 224, "imagenet"): None,
    (160, 224, "imagenet"): None,  # a square store
    (160, 128, "imagenet"): None,
}


@pytest.mark.parametrize(("side", "size", "stem"), FITS)
def test_crops_and_stem_that_do_not_fit_are_told_with_what_would(
    side: int, size: int, stem: str
) -> None:
    width, height = np.full(5, side), np.array([side, side, side, 2 * side, 9 * side])
    said, wanted = misfit(width, height, size, stem), FITS[side, size, stem]
    if wanted is None:
        assert said is None
    else:
        assert said and said.endswith(wanted) and f"images of {side} pixels" in said
        proposed = wanted.split()
        assert misfit(width, height, int(proposed[1]), proposed[3]) is None


def test_a_step_that_the_scaler_skips_moves_nothing(beton: Beton) -> None:
    """As in float16 on a GPU, where a scaled gradient overflowed."""
    trainer = small_trainer(
        beton, "byol", penalties={"sparsehead": (0.1, 0.1)}, proximal=True, batch_size=16
    )
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    weight = trainer.learner.probe.weight
    batches = trainer.epoch()
    hook = weight.register_hook(lambda gradient: gradient.fill_(torch.inf))
    before = {name: x.clone() for name, x in trainer.learner.named_parameters()}
    trainer.train_step(next(batches))
    assert trainer.step == 1 and trainer.scaler.get_scale() == 4.0
    for name, x in trainer.learner.named_parameters():
        assert torch.equal(x, before[name]), name
    hook.remove()
    trainer.train_step(next(batches))
    after = dict(trainer.learner.named_parameters())
    moved = {name.split(".")[0] for name, x in before.items() if not torch.equal(x, after[name])}
    assert moved >= {"encoder", "projector", "teacher", "probe"}


def test_few_labels_give_the_probe_the_sets_loss_and_accuracy() -> None:
    """Whatever the number of ranks and steps that share them: some have no label at all."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(96, 5, generator=generator)
    labels = torch.randint(5, (96,), generator=generator)
    logits[torch.arange(0, 96, 3), labels[::3]] += 9  # a third is right, as is one in five others
    labels[torch.rand(96, generator=generator) < 0.9] = -1
    known = labels >= 0
    share = known.float().mean().item()
    parts = [score(*part, share) for part in zip(logits.split(4), labels.split(4), strict=True)]
    loss, hits = (torch.stack(each).mean().item() for each in zip(*parts, strict=True))
    assert min(len(part[part >= 0]) for part in labels.split(4)) == 0
    assert loss == pytest.approx(F.cross_entropy(logits[known], labels[known]).item(), rel=1e-5)
    right = (logits[known].argmax(1) == labels[known]).float().mean().item()
    assert hits == pytest.approx(right, rel=1e-5) and 0.2 < right < 0.9


def test_a_run_goes_on_in_float16(beton: Beton) -> None:
    """What another precision saved has no state of a scaler."""
    state = small_trainer(beton).state_dict()
    assert state["scaler"] == {}
    trainer = small_trainer(beton)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    trainer.load_state_dict(state)
    assert trainer.scaler.get_scale() == 8.0


def test_the_views_shown_are_those_that_the_step_trains_on(beton: Beton) -> None:
    """Two large views and three small ones of each sample, of the first of two parts."""
    view = View(blur_prob=0)
    trainer = small_trainer(beton, "swav", view=view, local_crops=3, accumulate=2)
    batch = next(trainer.epoch())
    shown = trainer.views(batch, 3)
    assert [tuple(part.shape) for part in shown] == [(2, 3, 3, 8, 8), (3, 3, 3, 8, 8)]
    seen = []
    forward = trainer.model.forward
    trainer.model.forward = lambda views, labels: seen.append(views) or forward(views, labels)
    trainer.train_step(batch)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (beton.manifest.mean, beton.manifest.std))
    for ours, theirs in zip(shown, seen[0], strict=True):
        pixels = (theirs.unflatten(0, (-1, 8))[:, :3] * std + mean).clamp(0, 1)
        torch.testing.assert_close(ours, pixels)
