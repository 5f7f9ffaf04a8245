"""A writer killed before or after each of its renames: the older pair of files, or the new one."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fastproj.core.files import LEFT_BEHIND
from fastproj.data.beton import open_beton
from fastproj.data.verify import verify
from fastproj.prepare.encode import Store
from tests.support.betons import digit_like, write

KILLED = """
import os, sys
from pathlib import Path
import numpy as np
from fastproj.prepare.encode import Store
from tests.support.betons import digit_like, write

out, rename, after = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "True"
replace, done = Path.replace, []

def counted(self, target):
    done.append(target)
    if len(done) == rename and not after:
        os.kill(os.getpid(), 9)
    replace(self, target)
    if len(done) == rename:
        os.kill(os.getpid(), 9)

if __name__ == "__main__":
    Path.replace = counted
    write(digit_like(np.random.default_rng(1), 6, 8, 2), out, Store("raw"))
"""
OLD, NEW = (
    digit_like(np.random.default_rng(seed), count, 8, 2) for seed, count in ((0, 4), (1, 6))
)
RENAMES = 3  # of the waiting manifest, the beton and the manifest


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("rename", range(1, RENAMES + 1))
@pytest.mark.parametrize("after", [False, True])
def test_a_writer_killed_at_a_rename(tmp_path: Path, rename: int, after: bool, there: bool) -> None:
    out = tmp_path / "out"
    path = out / "train.beton"
    if there:
        write(OLD, out, Store("raw"))
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, str(script), str(out), str(rename), str(after)],
        env={**os.environ, "PYTHONPATH": root}, timeout=120,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL
    if there or path.exists():
        new = rename + after > 2
        np.testing.assert_array_equal(open_beton(path).label, (NEW if new else OLD).labels)
        verify(path)
    write(OLD, out, Store("raw"))  # and over what was left
    for left in out.glob("*.tmp"):
        os.utime(left, (time.time() - 2 * LEFT_BEHIND,) * 2)
    write(NEW, out, Store("raw"))
    np.testing.assert_array_equal(open_beton(path).label, NEW.labels)
    assert sorted(file.name for file in out.iterdir()) == ["train.beton", "train.json"]
