import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastproj.core import dist
from fastproj.core.errors import InputError
from tests.support.ranks import on_ranks

WORLD = 3
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # of torchrun


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in (*NAMES, "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def collectives() -> dict:
    """On each rank: every function of the room, with inputs that differ by rank."""
    rank = dist.rank()
    x = torch.arange(4.0).reshape(2, 2).T.add(10 * rank).requires_grad_()  # not contiguous
    gathered = dist.gather(x)
    # Each rank weighs all rows differently, so that the sum over ranks shows.
    weights = torch.arange(gathered.numel(), dtype=torch.float32).reshape(gathered.shape)
    (gathered * weights * (rank + 1)).sum().backward()
    y = torch.tensor([1.0 + rank, 2.0]).requires_grad_()
    summed = dist.total(y)
    (summed * (rank + 1)).sum().backward()
    refused = []
    for facts in ({"a": 1, "b": rank // 2}, {"a": 1} if rank < 1 else {"a": 1, "c": 2}, {"d": 3}):
        try:
            dist.require_same(facts)
        except InputError as error:
            refused.append(str(error))
    failed = []
    for ranks in ([], [1, 2], [0]):
        try:
            with dist.together():
                if rank in ranks:
                    raise InputError(f"own {rank}")
        except InputError as error:
            failed.append(str(error))
    return {
        "exchanged": dist.exchange({"rank": rank}),
        "refused": refused,
        "failed": failed,
        "total": summed.detach(),
        "total's gradient": y.grad,
        "rank": rank,
        "world": dist.world_size(),
        "main": dist.is_main(),
        "gathered": gathered.detach(),
        "gradient": x.grad,
        "mean": dist.mean(torch.tensor([float(rank), 1.0])),
        "any, from the last alone": dist.any_true(rank == dist.world_size() - 1),
        "any of none": dist.any_true(False),
    }


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    return on_ranks(WORLD, collectives, tmp_path_factory.mktemp("ranks"))


def test_each_rank_knows_who_it_is(seen):
    assert [(s["rank"], s["world"], s["main"]) for s in seen] == [
        (0, WORLD, True),
        (1, WORLD, False),
        (2, WORLD, False),
    ]


def test_gather_concatenates_in_rank_order(seen):
    block = torch.tensor([[0.0, 2.0], [1.0, 3.0]])
    expected = torch.cat([block, block + 10, block + 20])
    for s in seen:
        assert torch.equal(s["gathered"], expected)


def test_gather_sums_gradients_over_ranks(seen):
    weights = torch.arange(4.0 * WORLD).reshape(2 * WORLD, 2)
    for rank, s in enumerate(seen):
        # sum over ranks r of (r + 1) · the weights of this rank's rows
        assert torch.equal(s["gradient"], weights[2 * rank : 2 * rank + 2] * (1 + 2 + 3))


def test_total_sums_values_and_gradients_over_ranks(seen):
    for s in seen:
        assert torch.equal(s["total"], torch.tensor([1.0 + 2 + 3, 6.0]))
        assert torch.equal(s["total's gradient"], torch.full((2,), 1.0 + 2 + 3))


def test_mean_and_votes_are_the_same_everywhere(seen):
    for s in seen:
        assert torch.equal(s["mean"], torch.tensor([1.0, 1.0]))
        assert s["any, from the last alone"] is True
        assert s["any of none"] is False


def test_ranks_exchange_compare_and_fail_together(seen):
    own = [["rank 1: own 1", "own 0"], ["own 1", "rank 0: own 0"], ["own 2", "rank 0: own 0"]]
    for s, failed in zip(seen, own, strict=True):
        assert s["exchanged"] == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
        first, second = s["refused"]
        assert first.startswith("rank 2 was started with b = 1, rank 0 with 0: start all ranks")
        assert second.startswith("rank 1 was started with c = 2, rank 0 with None")
        assert s["failed"] == failed


def test_only_a_lost_rank_is_called_one(monkeypatch):
    with pytest.raises(RuntimeError, match="gloo"), dist.losing_ranks():
        raise RuntimeError("[gloo/transport/tcp/pair.cc:1] Connection closed")  # alone: a bug
    store = torch.distributed.HashStore()
    monkeypatch.setattr(dist, "_joined", dist._Joined(store, 0, 3))
    monkeypatch.setattr(dist, "ROLL_CALL", 0.3)
    store.set("rank 2 lost another", "")
    with pytest.raises(RuntimeError, match="^a bug$"), dist.losing_ranks():
        raise RuntimeError("a bug")
    words = r"^rank 0 lost rank 1: .* \(Read error \[::1\]:7: reset\); the last line"
    with pytest.raises(InputError, match=words), dist.losing_ranks():
        raise RuntimeError("[/a/gloo/tcp/pair.cc:1] Read error [::1]:7: reset. More words.\nMore")


def test_alone_nothing_is_initialized():
    assert dist.start("cpu") == (0, 1, 0, 1)
    assert not torch.distributed.is_initialized()
    x = torch.randn(3, requires_grad=True)
    assert dist.gather(x) is x and dist.total(x) is x
    assert torch.equal(dist.mean(x), x) and not dist.mean(x).requires_grad
    assert dist.any_true(True) is True and dist.any_true(False) is False
    assert (dist.rank(), dist.world_size(), dist.is_main()) == (0, 1, True)
    assert dist.exchange("x") == ["x"]
    dist.require_same({"a": 1})
    with pytest.raises(InputError, match="^mine$"), dist.together():
        raise InputError("mine")
    dist.stop()


def test_torchrun_starts_it(tmp_path):
    script = tmp_path / "hello.py"
    script.write_text(
        "from fastproj.core import dist\n"
        "import os, torch\n"
        "me = dist.start('cpu')\n"
        "total = dist.gather(torch.tensor([me.rank + 1.0])).sum().item()\n"
        "where = f'local {me.local_rank} of {me.local_world_size}'\n"
        "line = f'rank {me.rank} of {me.world_size}, {where}: {total}\\n'\n"
        "os.write(1, line.encode())  # at once: two ranks write to one pipe\n"
        "dist.stop()\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [*command, str(script)],
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [
        "rank 0 of 2, local 0 of 2: 3.0",
        "rank 1 of 2, local 1 of 2: 3.0",
    ]


@pytest.mark.parametrize("rank", ["0", "1"])
def test_others_that_do_not_come_are_an_input_error(monkeypatch, rank):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    for name, value in zip(NAMES, (rank, "2", rank, "127.0.0.1", port), strict=True):
        monkeypatch.setenv(name, value)
    began = time.monotonic()
    words = r": rank 1 did not come to" if rank == "0" else " did not meet the others at"
    with pytest.raises(InputError, match=rf"rank {rank} of 2{words} 127.0.0.1:{port} within 1 s"):
        dist.start("cpu", timeout=1.0)
    assert time.monotonic() - began < 10
    assert not torch.distributed.is_initialized()


def test_half_an_environment_is_an_input_error(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="RANK or LOCAL_RANK is not set"):
        dist.start("cpu")
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(InputError, match="WORLD_SIZE is 'two'"):
        dist.start("cpu")


@pytest.mark.skipif(torch.cuda.device_count() > 7, reason="this machine has GPU number 7")
def test_missing_gpu_is_an_input_error(monkeypatch):
    for name, value in (("RANK", "7"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "7")):
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="rank 7 needs GPU 7"):
        dist.start("cuda")
