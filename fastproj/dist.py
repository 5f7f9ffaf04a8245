"""Several processes as one: rank, world, and a gather that gradients flow through.

The only room that knows of ``torch.distributed``. Processes are started by torchrun, which says
who is who in RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE; alone, nothing is initialised and
every function here is the identity.
"""

import os
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastproj.errors import InputError


class Rank(NamedTuple):
    """Who this process is: its number, how many there are, and the same on this machine."""

    rank: int
    world: int
    local: int
    local_world: int = 1


def start(device: str | torch.device, timeout: float = 600.0) -> Rank:
    """Join the other ranks that torchrun announces; alone, do nothing.

    ``device`` decides the backend: NCCL for ``cuda`` (this process's current GPU becomes number
    ``local``), Gloo otherwise. ``timeout`` in seconds is how long ranks wait for one another, here
    and in every later collective. Raises ``InputError`` where the environment is incomplete, a GPU
    is missing, or the others do not come.
    """
    rank, world, local = (_announced(n) for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    local_world = _announced("LOCAL_WORLD_SIZE")
    if world is None or world == 1:
        return Rank(0, 1, 0)
    if rank is None or local is None:
        raise InputError(f"WORLD_SIZE is {world} but RANK or LOCAL_RANK is not set: use torchrun")
    on_cuda = torch.device(device).type == "cuda"
    if on_cuda:
        if local >= torch.cuda.device_count():
            raise InputError(
                f"rank {rank} needs GPU {local} but this machine shows {torch.cuda.device_count()}:"
                " start as many processes a machine as it has GPUs"
            )
        torch.cuda.set_device(local)
    try:
        dist.init_process_group(
            "nccl" if on_cuda else "gloo",
            timeout=timedelta(seconds=timeout),
            device_id=torch.device("cuda", local) if on_cuda else None,
        )
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        reason = str(error).splitlines()[0]
        raise InputError(
            f"rank {rank} of {world} did not meet the others at {where} within {timeout:g} s"
            f" ({reason}): start all ranks with one torchrun command"
        ) from error
    return Rank(rank, world, local, local_world or 1)


def _announced(name: str) -> int | None:
    text = os.environ.get(name)
    if text is None:
        return None
    if not text.isdecimal():
        raise InputError(f"environment variable {name} is {text!r}, not a whole number: unset it")
    return int(text)


def stop() -> None:
    """Leave the group, if there is one. Safe to call twice."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """This process's number, 0 when alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes there are, 1 when alone."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process is the one that writes files and talks."""
    return rank() == 0


class _Gather(torch.autograd.Function):
    # torch.distributed.nn.functional.all_gather did this, but is deprecated.
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        # Every rank's loss depends on this rank's rows: their gradients add up.
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.chunk(world())[rank()]


@torch.compiler.disable
def _outside_graphs(function: type[torch.autograd.Function], x: Tensor) -> Tensor:
    """Collectives as they are: inside a compiled graph torch would rewrite them."""
    return function.apply(x)


def gather(x: Tensor) -> Tensor:
    """Concatenate every rank's ``x`` (n, ...) to (world·n, ...), in rank order.

    Differentiable: the gradient of ``x`` is the *sum* over ranks of what each rank's loss says of
    these rows. All ranks must give the same shape and dtype. Alone, ``x`` itself.
    """
    return _outside_graphs(_Gather, x) if world() > 1 else x


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


def total(x: Tensor) -> Tensor:
    """Sum of ``x`` over ranks, same shape and dtype.

    Differentiable as ``gather`` is: the gradient of ``x`` is the *sum* over ranks of what each
    rank's loss says of the total. All ranks must give the same shape. Alone, ``x`` itself.
    """
    return _outside_graphs(_Total, x) if world() > 1 else x


def mean(x: Tensor) -> Tensor:
    """Mean of ``x`` over ranks, same shape and dtype (floating), detached."""
    x = x.detach()
    if world() == 1:
        return x
    total = x.clone()
    dist.all_reduce(total)
    return total / world()


def any_true(flag: bool) -> bool:
    """Whether any rank says true: a signal may reach one rank only, and all must stop together.

    Waits for every rank, and for the GPU under NCCL: not for every step of a fast loop.
    """
    if world() == 1:
        return flag
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    votes = torch.tensor(int(flag), device=device)
    dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    return bool(votes.item())


def barrier() -> None:
    """Wait until every rank is here."""
    if world() > 1:
        dist.barrier()
