"""Cores and memory: real processes, and control groups as both kernel layouts write them."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from fastproj.core.machine import cores, memory
from fastproj.prepare.workers import Workers

MIB = 1 << 20


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n")
    return root


def test_a_process_pinned_to_one_core_counts_one():
    core = min(os.sched_getaffinity(0))
    program = f"import os; os.sched_setaffinity(0, [{core}])\n"
    program += "from fastproj.core.machine import cores; print(cores())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "1\n", done.stderr


def test_without_control_groups_it_is_what_the_system_says(tmp_path):
    assert cores(tmp_path) == len(os.sched_getaffinity(0))
    total, available = memory(tmp_path)
    assert total == psutil.virtual_memory().total
    assert available == pytest.approx(psutil.virtual_memory().available, rel=0.2)


@pytest.mark.parametrize(
    ("quota", "expected"),
    [("100000 100000", 1), ("190000 100000", 1), ("20000 100000", 1), ("max 100000", 1 << 20)],
)
def test_cpu_quota_version_2(tmp_path, quota, expected):
    root = tree(tmp_path, {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": quota})
    assert cores(root) == min(expected, len(os.sched_getaffinity(0)))


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 3, reason="a quota of 2 cuts 3 cores or more")
def test_the_tightest_ancestor_counts(tmp_path):
    files = {
        "proc/self/cgroup": "0::/slice/job",
        "sys/fs/cgroup/slice/cpu.max": "250000 100000",
        "sys/fs/cgroup/slice/job/cpu.max": "max 100000",
    }
    assert cores(tree(tmp_path, files)) == 2


def test_cpu_quota_version_1_seen_from_inside_a_container(tmp_path):
    """The group's own path is the host's and does not exist here: the mount's root is the group."""
    files = {
        "proc/self/cgroup": "5:memory:/docker/4f2a\n4:cpu,cpuacct:/docker/4f2a\n0::/",
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "100000",
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "50000",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": str(900 * MIB),
        "sys/fs/cgroup/memory/memory.usage_in_bytes": str(700 * MIB),
        "sys/fs/cgroup/memory/memory.stat": "cache 1\ntotal_inactive_file " + str(300 * MIB),
    }
    root = tree(tmp_path, files)
    assert cores(root) == min(2, len(os.sched_getaffinity(0)))
    assert memory(root) == (900 * MIB, 500 * MIB)


def test_no_quota_version_1(tmp_path):
    files = {
        "proc/self/cgroup": "4:cpu:/",
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
    }
    assert cores(tree(tmp_path, files)) == len(os.sched_getaffinity(0))


def test_memory_limit_version_2(tmp_path):
    files = {
        "proc/self/cgroup": "0::/job",
        "sys/fs/cgroup/job/memory.max": str(100 * MIB),
        "sys/fs/cgroup/job/memory.current": str(90 * MIB),
        "sys/fs/cgroup/job/memory.stat": f"anon {40 * MIB}\ninactive_file {10 * MIB}\n"
        f"active_file {20 * MIB}",
        "sys/fs/cgroup/memory.max": "max",
        "sys/fs/cgroup/memory.current": str(10**12),
    }
    assert memory(tree(tmp_path, files)) == (100 * MIB, 40 * MIB)


@pytest.mark.parametrize("name", ["sched_getaffinity", "register_at_fork"])
def test_a_system_without_it_is_no_attribute_error(name):
    """macOS has no affinity, Windows neither: a process that lacks them, as those do."""
    program = f"import os, random, torch; del os.{name}\n"  # what torch asks for is its own matter
    program += "import fastproj.augment.native\n"
    program += "from fastproj.core.machine import cores; print(cores())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 1 <= int(done.stdout) <= os.cpu_count()


def test_windows_has_no_forkserver(monkeypatch):
    monkeypatch.setattr("multiprocessing.get_all_start_methods", lambda: ["spawn"])
    workers = Workers(1)
    try:
        assert workers.submit(len, (1, 2)).result(timeout=60) == 2
    finally:
        workers.close()


POLICY = """
import os, fastproj
print(os.environ["OMP_WAIT_POLICY"], os.environ.get("GOMP_SPINCOUNT"))
"""


def test_openmps_threads_spin_shortly_unless_the_user_has_chosen() -> None:
    environment = {
        k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    }
    found = []
    for given in ({}, {"OMP_WAIT_POLICY": "active"}):
        done = subprocess.run(
            [sys.executable, "-c", POLICY], capture_output=True, text=True,
            env=environment | given, check=True,
        )  # fmt: skip
        found.append(done.stdout.split())
    assert found == [["passive", "1000"], ["active", "None"]]
