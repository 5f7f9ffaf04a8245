"""Atomic writes: what a refusal of the system leaves and says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastproj.core.errors import InputError
from fastproj.core.files import replacing, write_text

ROOT = Path(__file__).parents[2]


def test_a_text_takes_the_place_of_another(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "one")
    write_text(path, "zwei ü")
    assert path.read_text(encoding="utf-8") == "zwei ü"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("x"), InputError("x")])
def test_an_exception_leaves_what_was_there_and_is_raised_as_it_is(tmp_path, error):
    path = tmp_path / "a.txt"
    write_text(path, "one")
    with pytest.raises(type(error)) as caught, replacing(path) as file:
        file.write(b"half")
        raise error
    assert caught.value is error
    assert path.read_text() == "one" and list(tmp_path.iterdir()) == [path]


def test_a_killed_writers_file_goes_at_a_later_write_and_a_living_ones_stays(tmp_path):
    path = tmp_path / "a[1].txt"
    left, fresh, other = (tmp_path / f"{name}.0123abcd.tmp" for name in ("a[1].txt",) * 2 + ("b",))
    fresh = fresh.with_name("a[1].txt.4567abcd.tmp")
    for file in (left, fresh, other):
        file.write_text("half")
    os.utime(left, (0, 0))
    os.utime(other, (0, 0))
    with replacing(path) as file:
        living = next(p for p in tmp_path.iterdir() if p not in (path, left, fresh, other))
        os.utime(living, (0, 0))  # as if it had waited for long
        write_text(path, "one")
        assert living.exists() and fresh.exists() and other.exists() and not left.exists()
        file.write(b"two")
    assert path.read_text() == "two"
    assert sorted(tmp_path.iterdir()) == sorted([path, fresh, other])


WRITE = """
import sys
from pathlib import Path
from fastproj.core.errors import run_command
from fastproj.core.files import write_text
run_command(lambda argv: write_text(Path(argv[0]), "text"))
"""


def test_a_read_only_file_system_is_named(tmp_path):
    """Removing the temporary file is refused there as well, and must not hide the reason."""
    script = f'mount -t tmpfs -o ro none {tmp_path} && exec "$@"'
    in_a_namespace = ["unshare", "--mount", "--map-root-user"]
    refused = subprocess.run([*in_a_namespace, "sh", "-c", script, "sh", "true"],
                             capture_output=True).returncode  # fmt: skip
    if refused:
        pytest.skip("this system lets nobody mount a file system")
    done = subprocess.run(
        [*in_a_namespace, "sh", "-c", script, "sh", sys.executable, "-c", WRITE, tmp_path / "a"],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == (
        f"error: cannot write {tmp_path}/a: Read-only file system; make room or fix the "
        "permissions\n"
    )
