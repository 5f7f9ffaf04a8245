"""Where memory runs out, one line names what fits; started with that, the command ends well.

The host's memory is limited for real (``ulimit -v``), each time in a process of its own. The
encoders have no convolution: oneDNN may crash where its kernels get no memory.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fastproj.core.errors import InputError
from fastproj.data.beton import Beton
from fastproj.evaluation.features import features
from fastproj.loaders import Crop, open_loader
from fastproj.prepare.encode import Store
from fastproj.training.fit import train_step
from tests.support.betons import digit_like, write
from tests.support.trainers import small_trainer

COUNT, SIDE = 2048, 8
LIMITED = """
import resource, sys
import psutil, torch
import fastproj.train
from fastproj.__main__ import dispatch
from fastproj.core.errors import run_command
from fastproj.evaluation.features import features

torch.set_num_threads(1)
room, *argv = sys.argv[1:]
used = psutil.Process().memory_info().vms
resource.setrlimit(resource.RLIMIT_AS, (used + (int(room) << 20), -1))
"""
TRAIN = """
import torch.nn as nn
from fastproj.augment.draw import View
from fastproj.augment.views import Augmentation
from fastproj.data.beton import open_beton
from fastproj.loaders import Crop, open_loader
from fastproj.objective.losses import nt_xent
from fastproj.training.fit import train_step
from fastproj.training.learner import Learner
from fastproj.training.trainer import Trainer

def epoch(argv):
    beton, size, parts = open_beton(argv[0]), *map(int, argv[1:])
    encoder = nn.Flatten()
    encoder.num_features = 192
    hidden = nn.Linear(192, 4096), nn.BatchNorm1d(4096), nn.ReLU(), nn.Linear(4096, 64)
    learner = Learner(encoder, nn.Sequential(*hidden), nt_xent, len(beton.classes))
    loader = open_loader(beton, [Crop(8, 2)], size, engine="resident", workers=1)
    plain = View(flip_prob=0, jitter_prob=0, gray_prob=0, blur_prob=0, solarize_prob=0)
    views = Augmentation([plain, plain], (0.5,) * 3, (0.25,) * 3)
    optimizer = torch.optim.SGD(learner.parameters(), 0.1, momentum=0.9)
    trainer = Trainer(
        learner, loader, optimizer, [views], accumulate=parts, precision=torch.float32
    )
    for batch in trainer.epoch():
        train_step(trainer, batch)

run_command(epoch, argv)
"""
# 8 MiB per image; the extraction takes 64 images at once.
FEATURES = """
wide = torch.nn.Sequential(
    torch.nn.Flatten(), torch.nn.Linear(3, 2**21), torch.nn.AdaptiveAvgPool1d(1)
)
batch = torch.ones(128, 3, 1, 1), torch.zeros(128)
run_command(lambda argv: print(len(features(wide, [batch]))))
"""


@pytest.fixture(scope="module")
def beton(tmp_path_factory: pytest.TempPathFactory) -> Beton:
    source = digit_like(np.random.default_rng(0), COUNT, SIDE, 4)
    return write(replace(source, split="train"), tmp_path_factory.mktemp("fit"), Store("raw"))


def limited(mebibytes: int, program: str, *argv: object) -> subprocess.CompletedProcess[str]:
    """``program`` with so much memory beside what its imports take."""
    words = [sys.executable, "-c", LIMITED + program, str(mebibytes), *map(str, argv)]
    return subprocess.run(
        words,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
    )


@pytest.mark.slow
def test_what_fits_into_the_hosts_memory_is_named_and_fits(beton: Beton) -> None:
    failed = limited(180, TRAIN, beton.path, COUNT, 1)
    assert failed.returncode == 1, failed.stderr
    found = re.fullmatch(
        r"error: out of memory in step 1 of 2048 images \(0\.\d\d GiB asked for, 0\.\d\d GiB free\)"
        r": --optim\.batch_size (\d+)(?: or --optim\.accumulate (\d+))? fits \(tried\)",
        failed.stderr.splitlines()[-1],
    )
    assert found, failed.stderr
    for size, parts in ((found[1], 1), (COUNT, found[2])):
        if parts:  # 80 MiB more: what imports and a heap leave free varies by some 40
            done = limited(260, TRAIN, beton.path, size, parts)
            assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_run_whose_memory_ran_out_keeps_no_state_of_the_tries(
    beton: Beton, tmp_path: Path
) -> None:
    failed = limited(
        200, "run_command(dispatch, argv)", "train", "--run.dir", tmp_path, "--run.name", "r",
        "--run.device", "cpu", "--data.train", beton.path, "--data.engine", "resident",
        "--data.workers", 1, "--views.size", SIDE, "--model.encoder", "torch.nn:Flatten",
        "--projector.hidden", 4096, "--optim.epochs", 2, "--optim.batch_size", COUNT,
        "--train.precision", "float32",
    )  # fmt: skip
    assert failed.returncode == 1 and "Traceback" not in failed.stderr, failed.stderr
    assert failed.stderr.splitlines()[-1].startswith("error: out of memory ")
    steps = re.findall("(?m)^epoch +step (\\d+)", failed.stderr)  # a heap may hold one, and no two
    kept = sorted(path.name for path in (tmp_path / "r" / "checkpoints").iterdir())
    assert kept == [f"step-{int(step):08d}.pt" for step in ["0", *steps]]


def test_how_many_images_features_fit_is_named() -> None:
    failed = limited(400, FEATURES)
    assert failed.returncode == 1 and failed.stdout == "", failed.stderr
    line = failed.stderr.splitlines()[-1]
    found = re.fullmatch(
        r"error: out of memory with the features of 128 images at once \(0\.50 GiB asked for, "
        r"0\.\d\d GiB free\): --eval\.batch_size (\d+) fits \(tried\)",
        line,
    )
    assert found and 2 <= int(found[1]) <= 32, failed.stderr  # 32 images are 256 MiB, 64 are 512


def test_a_set_that_does_not_fit_is_one_line(beton: Beton) -> None:
    side = np.full(COUNT, 1 << 22)
    huge = replace(beton, width=side, height=side)
    with pytest.raises(InputError, match=r"does not fit into the memory of cpu \(.*stream"):
        open_loader(huge, [Crop(SIDE, 2)], 16, engine="resident", workers=1)


@pytest.fixture
def short_of_memory() -> Iterator[None]:
    """1 GiB of the GPU, whatever else is in use."""
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((1 << 30) / total)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.gpu
def test_what_fits_into_a_gpu_is_named_and_fits(beton: Beton, short_of_memory: None) -> None:
    def epoch(batch_size: int, accumulate: int) -> None:
        trainer = small_trainer(
            beton, size=32, batch_size=batch_size, accumulate=accumulate, device="cuda:0",
            engine="resident",
        )  # fmt: skip
        for batch in trainer.epoch():
            train_step(trainer, batch)

    with pytest.raises(InputError, match=r"step 1 of 2048 images .* fits \(tried\)") as caught:
        epoch(COUNT, 1)
    found = dict(re.findall(r"--optim\.(\w+) (\d+)", str(caught.value)))
    assert found.keys() == {"batch_size", "accumulate"}
    for name, number in found.items():
        epoch(**{"batch_size": COUNT, "accumulate": 1, name: int(number)})


@pytest.mark.gpu
def test_how_many_images_features_fit_on_a_gpu_is_named(short_of_memory: None) -> None:
    wide = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(3, 2**21), torch.nn.AdaptiveAvgPool1d(1)
    ).cuda()  # 8 MiB per image
    images, labels = torch.ones(256, 3, 1, 1), torch.zeros(256)
    with pytest.raises(InputError, match=r"256 images .*--eval\.batch_size \d+ fits") as caught:
        features(wide, [(images, labels)])
    fits = int(re.findall(r"batch_size (\d+) fits", str(caught.value))[0])
    parts = zip(images.split(fits), labels.split(fits), strict=True)
    assert len(features(wide, list(parts))) == 256
