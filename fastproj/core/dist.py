"""Distributed training: rank, world size, and differentiable collectives.

The only room that uses ``torch.distributed``. torchrun starts the processes and tells each one its
place in RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE. With a single process nothing is
initialized and every function here is the identity.
"""

import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from threading import Thread
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import _functional_collectives as functional
from torch.distributed.constants import default_pg_nccl_timeout, default_pg_timeout
from torch.nn.parallel import DistributedDataParallel

from fastproj.core.errors import InputError

T = TypeVar("T")

ROLL_CALL = 5.0  # seconds that ranks which lost another one have to say so


class Rank(NamedTuple):
    """This process's rank and the world size, over all machines and on this machine (local)."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int = 1


class _Joined(NamedTuple):
    """The group that this process joined last, also after it has left it."""

    store: dist.Store
    rank: int
    world_size: int


_joined: _Joined | None = None


def start(device: str | torch.device, timeout: float | None = None) -> Rank:
    """Join the process group that torchrun announces; alone, or when called again, do nothing.

    ``device`` decides the backend: NCCL for ``cuda`` (the current GPU becomes the one numbered
    LOCAL_RANK), Gloo otherwise. ``timeout``: seconds that ranks wait for one another, here and in
    every later collective; None: torch's. Raises ``InputError`` if the environment is incomplete, a
    GPU is missing, or other ranks do not join, and names these.
    """
    global _joined
    rank, world_size, local = (_announced(n) for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    local_world_size = _announced("LOCAL_WORLD_SIZE")
    if world_size is None or world_size == 1:
        _joined = None
        return Rank(0, 1, 0)
    if rank is None or local is None:
        raise InputError(
            f"WORLD_SIZE is {world_size} but RANK or LOCAL_RANK is not set: use torchrun"
        )
    on_cuda = torch.device(device).type == "cuda"
    if on_cuda:
        if local >= torch.cuda.device_count():
            raise InputError(
                f"rank {rank} needs GPU {local} but this machine shows {torch.cuda.device_count()}:"
                " start at most one process per GPU (torchrun --nproc_per_node)"
            )
        torch.cuda.set_device(local)
    if not dist.is_initialized():
        theirs = (on_cuda and default_pg_nccl_timeout) or default_pg_timeout
        patience = timedelta(seconds=timeout) if timeout else theirs
        store = _meet(rank, world_size, patience, local_world_size == world_size)
        _joined = _Joined(store, rank, world_size)
        with losing_ranks():
            dist.init_process_group(
                "nccl" if on_cuda else "gloo",
                store=store,
                rank=rank,
                world_size=world_size,
                timeout=patience,
                device_id=torch.device("cuda", local) if on_cuda else None,
            )
    return Rank(rank, world_size, local, local_world_size or 1)


def _meet(rank: int, world_size: int, patience: timedelta, one_machine: bool) -> dist.Store:
    """The store of all ranks, once every one has come. ``InputError`` names those that have not."""
    host, port = os.environ.get("MASTER_ADDR"), _announced("MASTER_PORT")
    if host is None or port is None:
        raise InputError("MASTER_ADDR or MASTER_PORT is not set: use torchrun")
    where = f"{host}:{port} within {patience.total_seconds():g} s"
    keys = [f"rank {number} has started" for number in range(world_size)]
    ours = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # no torchrun serves one
    try:
        store: dist.Store = dist.TCPStore(
            host, port, world_size, ours and rank == 0, patience,
            wait_for_workers=False, multi_tenant=ours,
        )  # fmt: skip
        if one_machine:
            # torchrun keeps its store when it restarts the ranks, with the dead ones' addresses
            # in it. Over several machines each torchrun counts its own restarts: set
            # TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 there, for a new store each time.
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            store = dist.PrefixStore(f"attempt {attempt}", store)
        store.set_timeout(patience)
        store.set(keys[rank], "")
        with suppress(dist.DistStoreError):
            store.wait(keys)
        late = [number for number, key in enumerate(keys) if not store.check([key])]
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"rank {rank} of {world_size} did not meet the others at {where}"
            f" ({str(error).splitlines()[0]}): start all ranks with one torchrun command"
        ) from error
    if late:
        raise InputError(
            f"rank {rank} of {world_size}: {_named(late)} did not come to {where}: start all ranks "
            "with one torchrun command, or wait longer with --run.timeout"
        )
    return store


def _named(ranks: list[int]) -> str:
    """``rank 1``, or ``ranks 1, 3``."""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def _announced(name: str) -> int | None:
    text = os.environ.get(name)
    if text is None:
        return None
    if not text.isdecimal():
        raise InputError(f"environment variable {name} is {text!r}, not a whole number: unset it")
    return int(text)


def stop() -> None:
    """Leave the process group, if there is one. Safe to call twice."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """This process's rank; 0 for a single process."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes; 1 for a single process."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process is rank 0, which alone writes files and prints."""
    return rank() == 0


# torch.compile keeps functional collectives in its graph, and no others. Called eagerly with Gloo,
# they aborted a process at its end in one of some 50 runs (torch 2.15).
def _sum(x: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        assert dist.group.WORLD is not None
        summed = functional.all_reduce(x.contiguous(), "sum", dist.group.WORLD)
        return functional.wait_tensor(summed)
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        if torch.compiler.is_compiling():
            assert dist.group.WORLD is not None
            every = functional.all_gather_tensor(x.contiguous(), 0, dist.group.WORLD)
            return functional.wait_tensor(every)
        parts = [
            torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world_size())
        ]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        # Every rank's loss depends on this rank's rows, so their gradients are summed.
        return _sum(grad).chunk(world_size())[rank()]


def gather(x: Tensor) -> Tensor:
    """Concatenate every rank's ``x`` (n, ...) to (world·n, ...), in rank order.

    Differentiable: the gradient of ``x`` is the *sum* of all ranks' gradients for these rows. All
    ranks must give the same shape and dtype. A single process returns ``x`` itself.
    """
    return _Gather.apply(x) if world_size() > 1 else x


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        return _sum(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        return _sum(grad)


def total(x: Tensor) -> Tensor:
    """Sum of ``x`` over ranks, same shape and dtype.

    Differentiable: the gradient of ``x`` is the *sum* of all ranks' gradients of the total. All
    ranks must give the same shape. A single process returns ``x`` itself.
    """
    return _Total.apply(x) if world_size() > 1 else x


def mean(x: Tensor) -> Tensor:
    """Mean of ``x`` over ranks, same shape and dtype (floating), detached."""
    x = x.detach()
    if world_size() == 1:
        return x
    total = x.clone()
    dist.all_reduce(total)
    return total / world_size()


def replicated(module: nn.Module, device: torch.device) -> nn.Module:
    """``module`` on ``device``, its gradients averaged over ranks; itself where there is one rank.

    Each rank keeps its own buffers, which are rank 0's at the start.
    """
    if world_size() == 1:
        return module
    model = DistributedDataParallel(module, [device] if device.type == "cuda" else None)
    # The argument is deprecated in torch 2.15, and 2.11 does not have the one after it.
    model.broadcast_buffers = False
    return model


def any_true(flag: bool) -> bool:
    """Whether ``flag`` is true on any rank: a signal may reach one rank, and all must stop.

    Waits for every rank, and for the GPU under NCCL, so do not call it in every step.
    """
    if world_size() == 1:
        return flag
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    votes = torch.tensor(int(flag), device=device)
    dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    return bool(votes.item())


def exchange(value: T) -> list[T]:
    """Every rank's ``value`` (plain numbers and text), in rank order."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def require_same(facts: Mapping[str, object]) -> None:
    """Raises ``InputError`` on every rank where a rank's ``facts`` differ from rank 0's."""
    first, *others = exchange(dict(facts))
    for number, theirs in enumerate(others, start=1):
        for name in first | theirs:
            if theirs.get(name) != first.get(name):
                raise InputError(
                    f"rank {number} was started with {name} = {theirs.get(name)}, rank 0 with "
                    f"{first.get(name)}: start all ranks with the same settings, plugins and data"
                )


@contextmanager
def together() -> Iterator[None]:
    """Where the block raises ``InputError`` or ``OSError`` on one rank, every rank raises.

    The block must hold no collective: a rank that failed would take no part in it.
    """
    failure: Exception | None = None
    try:
        yield
    except (InputError, OSError) as error:
        failure = error
    reasons = exchange(None if failure is None else str(failure))
    if failure is not None:
        raise failure
    for number, reason in enumerate(reasons):
        if reason is not None:
            raise InputError(f"rank {number}: {reason}")


@contextmanager
def losing_ranks() -> Iterator[None]:
    """Turn a collective's failure, because another rank died or hangs, into an ``InputError``.

    It names the ranks that do not notice the failure themselves within ``ROLL_CALL`` seconds.
    """
    try:
        yield
    except RuntimeError as error:
        if not _joined or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        reason = re.sub(r"^\[.*?\]\s*", "", re.split(r"\. |\n", str(error))[0])
        lost = _roll_call(_joined)
        raise InputError(
            f"rank {_joined.rank} lost {_named(lost) if lost else 'another rank'}: it died, or did "
            f"not arrive within run.timeout ({reason}); the last line of that rank says why"
        ) from error


def _roll_call(joined: _Joined) -> list[int]:
    """The ranks that do not answer; rank 0, which holds the store, where the store is silent."""
    keys = [f"rank {number} lost another" for number in range(joined.world_size)]
    absent = [0] * (joined.rank > 0)

    def ask() -> None:
        with suppress(RuntimeError):
            joined.store.set(keys[joined.rank], "")
            end = time.monotonic() + ROLL_CALL
            while time.monotonic() < end:
                absent[:] = [n for n, key in enumerate(keys) if not joined.store.check([key])]
                if not absent:
                    break
                time.sleep(0.1)

    asking = Thread(target=ask, daemon=True)  # the store of a frozen machine would hold it for ever
    asking.start()
    asking.join(ROLL_CALL + 1)
    return list(absent)
