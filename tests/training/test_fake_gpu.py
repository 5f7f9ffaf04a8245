"""A GPU's step where there is no GPU, on tensors that have a device, a shape and no data.

torch's ``FakeTensorMode`` runs each operation for its result's device, shape and strides alone.
Operations on two devices fail, and so does whatever would make the host wait to read a value. What
needs a driver is replaced here: generators, the backward pass, moving a module.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import fastproj.training.learner
from fastproj.augment.draw import View
from fastproj.data.beton import Beton
from fastproj.loaders import Batch
from fastproj.loaders.crop import crop_batch
from fastproj.objective import OBJECTIVES
from fastproj.objective.methods import Swav
from fastproj.prepare.encode import Store
from fastproj.training.trainer import Trainer
from tests.support.betons import digit_like, write
from tests.support.trainers import small_trainer

GPU = torch.device("cuda", 0)
CLASSES = 4
# Every part that a step may have: stochastic features, penalties, a discretized sparse head.
PARTS: dict[str, Any] = {
    "noise": "learned",
    "penalties": {"superfluous_a": (0.1,), "superfluous_b": (0.1,), "matrix_information": (0, 0.1),
                  "sparsehead": (0.1,)},
    "head": {"dropout": 0.2, "levels": 4, "latents": 64}, "size": 16,
    "view": View(solarize_prob=0.2), "optimizer": "lars",
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    **{name: {"objective": name, "proximal": True} for name in OBJECTIVES},
    "small crops, in parts": {
        "objective": "swav", "local_crops": 2, "accumulate": 2, "groups": "activations",
        "bn_per_view": True,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def beton(tmp_path_factory: pytest.TempPathFactory) -> Beton:
    source = digit_like(np.random.default_rng(0), 83, 12, CLASSES)
    return write(source, tmp_path_factory.mktemp("data"), Store("raw"))


@pytest.fixture
def fake_gpu() -> Iterator[None]:
    rand = torch.rand
    with ExitStack() as stack:
        for owner, name, instead in (
            (FakeTensorMode, "__deepcopy__", lambda self, _: self),  # of a teacher's weights
            (nn.Module, "to", lambda self, *_, **__: self),  # built where it belongs
            (torch, "Generator", lambda d: SimpleNamespace(device=d, manual_seed=lambda _: None)),
            (torch, "rand", lambda *shape, generator=None, **given: rand(*shape, **given)),
        ):  # fmt: skip
            stack.enter_context(mock.patch.object(owner, name, instead, create=True))
        stack.enter_context(FakeTensorMode())
        yield


def trainer_of(beton: Beton, **changes: Any) -> Trainer:
    with torch.device(GPU):
        return small_trainer(beton, engine="reference", device=GPU, **{**PARTS, **changes})


def step(trainer: Trainer) -> dict[str, Tensor]:
    """One step on a batch without data; every weight gets a gradient of its shape."""
    learner = trainer.learner

    def backward(loss: Tensor) -> None:
        assert loss.device == GPU and loss.shape == () and loss.requires_grad
        for weight in learner.parameters():
            weight.grad = torch.empty_like(weight) if weight.requires_grad else None

    labels = torch.empty(16, dtype=torch.int64, device=GPU)
    crops = tuple(
        torch.empty(16 * group.num_views, group.size, group.size, 3, dtype=torch.uint8, device=GPU)
        .permute(0, 3, 1, 2) for group in trainer.loader.crops
    )  # fmt: skip
    with mock.patch.object(Tensor, "backward", backward):
        return trainer.train_step(Batch(crops, labels, labels))


@pytest.mark.parametrize("name", VARIANTS)
def test_a_step_stays_on_the_device_and_reads_nothing(
    beton: Beton, name: str, fake_gpu: None
) -> None:
    trainer = trainer_of(beton, **VARIANTS[name])
    objective = trainer.learner.objective
    for number in range(4):  # two epochs: prototypes are frozen, then move, and the queue is full
        if isinstance(objective, Swav):  # reads its queue's length at the start of an epoch
            objective.epoch, objective.frozen = number // 2, number < 2
        metrics = step(trainer)
        assert {"loss", "online_probe", "objective"} <= set(metrics)
        assert all(value.device == GPU and value.shape == () for value in metrics.values())
    assert not isinstance(objective, Swav) or objective.remembers
    for weight in trainer.learner.parameters():
        assert weight.device == GPU
    for state in trainer.optimizer.state.values():
        assert state["momentum_buffer"].device == GPU


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16])
def test_views_have_the_type_that_the_step_computes_in(
    beton: Beton, precision: torch.dtype, fake_gpu: None
) -> None:
    trainer = trainer_of(beton, precision=precision)

    def look(module: nn.Module, given: tuple[Any, ...]) -> None:
        """Stop here: torch refuses autocast for a GPU that is not there."""
        raise InterruptedError([view.dtype for view in given[0]])

    trainer.learner.register_forward_pre_hook(look)
    with pytest.raises(InterruptedError) as seen:
        step(trainer)
    assert seen.value.args == ([precision],)


def test_views_of_a_gpu_are_in_channels_last_memory(beton: Beton, fake_gpu: None) -> None:
    views = trainer_of(beton).augmentations[0]
    crops = torch.empty(8, 3, 16, 16, dtype=torch.uint8, device=GPU)
    out = views(crops, views.sample(4, SimpleNamespace(device=GPU)))  # type: ignore[arg-type]
    assert out.device == GPU and out.is_contiguous(memory_format=torch.channels_last)


def test_crops_of_a_gpu(fake_gpu: None) -> None:
    images = torch.empty(8, 3, 20, 30, dtype=torch.uint8, device=GPU)
    crops = crop_batch(images, torch.empty(2, 8, 4, dtype=torch.int64, device=GPU), 16)
    assert crops.device == GPU and crops.dtype == torch.uint8 and crops.shape == (2, 8, 3, 16, 16)
    assert crops.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)


def reading(logits: Tensor, labels: Tensor, labeled: float) -> tuple[Tensor, Tensor]:
    return logits.sum(), torch.tensor(logits.sum().item())


def elsewhere(logits: Tensor, labels: Tensor, labeled: float) -> tuple[Tensor, Tensor]:
    return logits.sum(), (logits.argmax(1) == torch.zeros(len(labels), device="cpu")).sum()


@pytest.mark.parametrize(
    ("wrong", "error"), [(reading, DataDependentOutputException), (elsewhere, RuntimeError)]
)
def test_what_waits_or_mixes_devices_is_found(
    beton: Beton, wrong: Any, error: Any, fake_gpu: None
) -> None:
    trainer = trainer_of(beton)
    with mock.patch.object(fastproj.training.learner, "score", wrong), pytest.raises(error):
        step(trainer)
