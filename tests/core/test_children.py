"""Children end with their parent."""

import subprocess
import sys
import time
from pathlib import Path

import pytest


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_child_is_killed_with_its_parent() -> None:
    """The parent dies without a word, as by SIGKILL; the child would sleep for a minute."""
    program = (
        "import os, subprocess, sys, time\n"
        "from fastproj.core.children import die_with\n"
        "argv = [sys.executable, '-c', 'import time; print(1, flush=True); time.sleep(60)']\n"
        "die = die_with(os.getpid())\n"
        "child = subprocess.Popen(argv, preexec_fn=die, stdout=subprocess.PIPE)\n"
        "child.stdout.readline()\n"
        "print(child.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == -9
    status = Path(f"/proc/{int(done.stdout)}/stat")
    for _ in range(500):
        if not status.exists() or status.read_text().split()[2] == "Z":
            return
        time.sleep(0.02)
    raise AssertionError("the child lives")
