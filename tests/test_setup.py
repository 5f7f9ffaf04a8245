"""The set-up script: as a user who may not install packages, and where nothing is to be done."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = ("setup.sh", "pyproject.toml", "constraints.txt")


@pytest.fixture
def checkout() -> Iterator[Path]:
    """The script's own files in a folder that every user can read (pytest's own are private)."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file in FILES:
            shutil.copy(ROOT / file, folder)
        folder.chmod(0o777)
        yield folder


def test_without_packages_and_without_root_it_prints_the_line_to_run(checkout):
    """A PATH with the shell's tools, and neither a compiler nor sudo nor a Python."""
    tools = checkout / "bin"
    tools.mkdir(mode=0o755)
    for tool in ("bash", "dirname", "echo", "id", "xargs"):
        (tools / tool).symlink_to(shutil.which(tool) or pytest.fail(f"no {tool} here"))
    (tools / "apt-get").symlink_to("/usr/bin/false")  # never to be run
    user = {"user": "nobody", "group": "nogroup"} if os.getuid() == 0 else {}
    done = subprocess.run(
        [checkout / "setup.sh"], env={"PATH": str(tools)}, capture_output=True, text=True, **user
    )
    assert done.returncode == 1
    assert not (checkout / ".venv").exists()
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: Debian packages are missing")
    command = line[line.index("sudo sh -c ") :]
    assert command.startswith(
        "sudo sh -c 'apt-get update && apt-get install -y --no-install-recommends g++ pkg-config"
    )
    assert " libjpeg-dev python3-venv python3-dev" in command
    assert command.endswith("'")


def test_a_python_that_will_not_do():
    done = subprocess.run(
        [ROOT / "setup.sh"], env=os.environ | {"PYTHON": "false"}, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr == "error: PYTHON=false is no Python 3.11 or newer\n"


in_venv = pytest.mark.skipif(
    Path(sys.prefix) != ROOT / ".venv", reason="these tests do not run in the set-up's own .venv"
)


@in_venv
def test_where_nothing_is_to_be_done_it_takes_no_time():
    before = (ROOT / ".venv" / "set-up").read_text()
    start = time.monotonic()
    done = subprocess.run([ROOT / "setup.sh", "dev"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert time.monotonic() - start < 10
    assert (ROOT / ".venv" / "set-up").read_text() == before


@in_venv
def test_an_extra_that_is_not_there():
    done = subprocess.run([ROOT / "setup.sh", "nosuch"], capture_output=True, text=True)
    assert done.returncode == 1
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = ", ".join(project["optional-dependencies"])
    assert done.stderr == f"error: no extra named nosuch; there are: {extras}\n"
