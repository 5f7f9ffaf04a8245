"""Worker processes: results, errors, and that no way of ending leaves the parent waiting."""

import gc
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import pytest

from fastproj.core.errors import InputError
from fastproj.prepare.workers import Workers


def square(x: int) -> int:
    return x * x


def fail(x: int) -> None:
    raise ZeroDivisionError(f"no {x}")


def own_pid() -> int:
    return os.getpid()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_while_sending() -> None:
    """Announce a result of 1,000 bytes, send four of them, and be killed."""
    (pipe,) = [thing for thing in gc.get_objects() if isinstance(thing, Connection)]
    os.write(pipe.fileno(), struct.pack("!i", 1000) + b"half")
    die()


@pytest.fixture
def workers() -> Iterator[Workers]:
    workers = Workers(2)
    yield workers
    workers.close()


def test_results_and_errors_come_back_in_their_futures(workers: Workers) -> None:
    futures = [workers.submit(square, x) for x in range(20)]
    assert [future.result() for future in futures] == [x * x for x in range(20)]
    with pytest.raises(ZeroDivisionError, match="no 7"):
        workers.submit(fail, 7).result()
    assert workers.submit(square, 3).result() == 9  # and its process goes on


@pytest.mark.parametrize("death", [die, die_while_sending])
def test_a_killed_worker_is_an_input_error(workers: Workers, death) -> None:
    with pytest.raises(InputError, match="a worker process was killed"):
        workers.submit(death).result(timeout=60)


KILLED = """
import os, time
from fastproj.prepare.workers import Workers
if __name__ == "__main__":
    workers = Workers(1)
    print(workers.submit(os.getpid).result(), flush=True)
    workers.submit(time.sleep, 60)
    time.sleep(0.5)
    os.kill(os.getpid(), 9)
"""


def test_a_worker_at_work_ends_with_its_killed_parent(tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    root = Path(__file__).parents[2]
    with open(tmp_path / "pid", "w") as out:  # a pipe would not end before the worker does
        done = subprocess.run(
            [sys.executable, str(script)], stdout=out, timeout=120,
            env={**os.environ, "PYTHONPATH": str(root)},
        )  # fmt: skip
    assert done.returncode == -9
    deadline = time.monotonic() + 10
    while psutil.pid_exists(int((tmp_path / "pid").read_text())):
        assert time.monotonic() < deadline, "the worker lives"
        time.sleep(0.02)


def test_closing_ends_workers_at_work() -> None:
    workers = Workers(2)
    pids = {workers.submit(own_pid).result() for _ in range(8)}
    for _ in range(2):
        workers.submit(time.sleep, 60)
    began = time.monotonic()
    workers.close()
    assert time.monotonic() - began < 20
    assert not any(psutil.pid_exists(pid) for pid in pids)
