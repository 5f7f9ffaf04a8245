"""The demo stops where a command fails. Its whole way takes minutes: `make demo` shows it."""

import subprocess
import sys


def test_a_demo_that_cannot_write_ends_with_the_commands_own_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fastproj.demo", "--data", "/proc/fastproj"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    first, last = done.stderr.splitlines()
    assert "/proc/fastproj" in first
    assert last == "error: the demo ends here: the command to write betons failed, see above"
