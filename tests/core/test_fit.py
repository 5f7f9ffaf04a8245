"""What fits into memory: found by real allocations under a real limit, in a process of its own."""

import contextlib
import gc
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from fastproj.core.fit import first_that_fits, halves

LIMITED = """
import resource, sys
import psutil, torch
from fastproj.core.errors import memory_shortage
from fastproj.core.fit import first_that_fits, halves
from fastproj.core.machine import keep_freed_memory, memory_left

keep_freed_memory()
MIB = 1 << 20
used = psutil.Process().memory_info().vms
resource.setrlimit(resource.RLIMIT_AS, (used + 300 * MIB, -1))
assert 250 * MIB < memory_left() <= 300 * MIB, memory_left()

def work(count):
    '''Tensors of ``count`` MiB, most of them kept for the backward pass.'''
    w = torch.ones(count * MIB // 4, requires_grad=True)
    x = w
    for _ in range(8):
        x = x.exp().cos()
    x.sum().backward()
"""
TRIES = """
try:
    work(64)
except RuntimeError as error:
    print(memory_shortage(error))
print(first_that_fits(halves(64, 1), work))
print(first_that_fits([400, 200 * 1024], lambda count: torch.ones(count * MIB // 4)))
"""


def limited(program: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-c", f"{LIMITED}\n{program}"]
    return subprocess.run(argv, capture_output=True, text=True)


def test_the_first_that_fits_under_a_limit_of_the_process() -> None:
    """What is found after a failure is what fits in a process in which nothing has failed."""
    done = limited(TRIES)
    assert done.returncode == 0, done.stderr
    said, fits, none = done.stdout.splitlines()
    asked, free = said.split(", ")
    assert asked == "0.06 GiB asked for" and free.endswith(" GiB free")
    assert float(free.split()[0]) < 0.07
    assert none == "None"
    assert limited(f"work({fits})").returncode == 0
    twice = limited(f"work(2 * {fits})")
    assert twice.returncode == 1 and "can't allocate memory" in twice.stderr


class Fails(torch.autograd.Function):
    """Whose backward pass runs out of memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        raise MemoryError


def test_what_a_failed_backward_pass_held_is_free() -> None:
    """torch keeps what was still to be done, with its tensors, until the next backward pass."""

    def fail() -> None:
        w = torch.ones(999, requires_grad=True)
        waits = (w * 2).exp()
        (waits.sum() + Fails.apply((w * 3).exp()).sum()).backward()

    with contextlib.suppress(MemoryError):
        fail()
    assert first_that_fits([1], torch.ones) == 1
    held = [x for x in gc.get_objects() if type(x) is Tensor and x.shape == (999,)]
    assert not held


def test_halves_end_at_the_smallest() -> None:
    assert halves(100, 2) == [50, 25, 12, 6, 3]
    assert halves(3, 2) == [] and halves(2, 1) == [1]


def test_another_error_is_no_lack_of_memory() -> None:
    def work(count: int) -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        first_that_fits([1], work)
    assert first_that_fits([1, 2], torch.ones) == 1
