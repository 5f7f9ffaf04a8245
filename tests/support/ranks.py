"""Run a test's function on several real processes, as torchrun would start them."""

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from fastproj.core import dist


def on_ranks(world: int, function: Callable[[], Any], folder: Path, seconds: float = 120.0) -> list:
    """What ``function`` returned on each of ``world`` Gloo ranks.

    It is a function of a module's top level, or a partial of one.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.start_processes(
        _enter, (world, port, function, folder), world, join=False, start_method="spawn"
    )
    deadline = time.monotonic() + seconds
    while not context.join(timeout=1.0):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            raise TimeoutError(f"{world} ranks of {function} did not end in {seconds} s")
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(world)]


def _enter(rank: int, world: int, port: int, function: Callable[[], Any], folder: Path) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    dist.start("cpu", timeout=60.0)
    result = function()
    dist.stop()
    torch.save(result, folder / f"rank{rank}.pt")
    # torch's own end aborts one process in some 40, after its work ("terminate called without an
    # active exception", torch 2.15 with Gloo).
    os._exit(0)
