"""The doctor, run as a user runs it: on this machine, and on machines that lack something."""

import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

import pytest

from fastproj import doctor

ROOT = Path(__file__).parents[2]
HERE = Path(sysconfig.get_path("purelib"))
FIX = f" +fix: {re.escape(doctor.SET_UP)}"


def examine(*python: str | Path, **options) -> subprocess.CompletedProcess:
    command = [*python, "-m", "fastproj.doctor"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **options)
    assert "Traceback" not in done.stdout + done.stderr
    return done


def test_this_machine_can_run_the_main_job():
    done = examine(sys.executable)
    assert done.returncode == 0, done.stdout
    rows = re.findall(r"^  (\S+) +(\S+) ", done.stdout, re.MULTILINE)
    assert [name for _, name in rows] == [name for name, _, _ in doctor.CHECKS]
    optional = {name for name, _, needed in doctor.CHECKS if not needed}
    assert optional == {
        *{"GPU", "matplotlib", "FFCV", "DALI", "timm", "pycocotools"},
        *{"ONNX", "TensorBoard", "W&B", "compiler"},
    }
    assert all(state == "ok" for state, name in rows if name not in optional)
    assert done.stdout.endswith("The main job can run here.\n")


def test_no_scikit_learn_a_damaged_ffcv_and_no_compiler(tmp_path):
    """FFCV's library is cut, as by an interrupted copy: to load it ends a process by a signal."""
    for entry in HERE.iterdir():
        if entry.name not in ("sklearn", "ffcv"):
            (tmp_path / entry.name).symlink_to(entry)
    shutil.copytree(HERE / "ffcv", tmp_path / "ffcv")
    (library,) = (tmp_path / "ffcv").glob("_libffcv*.so")
    library.write_bytes(library.read_bytes()[:1000])

    # -S: Python finds no packages but these.
    environment = {"PYTHONPATH": str(tmp_path), "PATH": "/nonexistent"}
    done = examine(sys.executable, "-S", env=environment)
    assert done.returncode == 1
    assert re.search(rf"^  MISSING  packages +no module sklearn\n{FIX}$", done.stdout, re.M)
    assert re.search(
        rf"^  without  FFCV .*\n +fix: {re.escape(doctor._set_up('ffcv', afresh=True))}$",
        done.stdout, re.M,
    )  # fmt: skip
    assert re.search(rf"^  without  compiler +no g\+\+.*\n{FIX}$", done.stdout, re.M)
    assert re.search(r"^  ok       torch", done.stdout, re.M)
    assert done.stderr.endswith("cannot run here: fix packages as said above\n")


def test_an_empty_environment(tmp_path):
    venv.create(tmp_path / "empty", with_pip=False)
    done = examine(tmp_path / "empty" / "bin" / "python")
    assert done.returncode == 1
    assert re.search(rf"^  MISSING  torch +no module torch\n{FIX}$", done.stdout, re.M)
    optional = [name for name, _, needed in doctor.CHECKS if not needed]
    without = re.findall(r"^  without  (\S+)", done.stdout, re.M)
    assert set(without) <= set(optional) and {"matplotlib", "FFCV", "DALI"} <= set(without)
    assert done.stdout.count("MISSING") + len(without) == done.stdout.count(" fix: ")


@pytest.mark.parametrize("name", ["python3.9", "python3.10"])
def test_a_python_too_old(name):
    python = shutil.which(name)
    if python is None or subprocess.run([python, "-V"], capture_output=True).returncode:
        pytest.skip(f"no {name} here")
    done = examine(python)
    assert done.returncode == 1
    assert re.fullmatch(r"error: fastproj needs Python 3\.11.*\n", done.stderr)


def test_too_little_memory(monkeypatch):
    monkeypatch.setattr(doctor, "ENOUGH_MEMORY", 1 << 60)
    with pytest.raises(doctor.Missing, match="the demo needs .* GiB"):
        doctor.memory()


def test_it_knows_every_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = {re.match(r"[\w-]+", line).group() for line in project["dependencies"]}
    assert asked == {*doctor.PACKAGES, "torch"}
