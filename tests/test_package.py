"""The package as others get it: the console script, the wheel, the source distribution."""

import ctypes
import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import time
import venv
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

from fastproj import __version__
from fastproj.__main__ import COMMANDS
from fastproj.core.files import shipped_recipe

ROOT = Path(__file__).parents[1]
HERE = Path(sysconfig.get_path("purelib"))


def run(*words: object, **options) -> subprocess.CompletedProcess:
    return subprocess.run([str(w) for w in words], capture_output=True, text=True, **options)


def imported(*python: str) -> set[str]:
    """The modules that ``python ...`` imports; it must end well."""
    done = run(sys.executable, "-X", "importtime", *python, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-500:]
    return {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("start", ["fastproj {}", "fastproj.{}"])
def test_help_does_not_wait_for_torch(name: str, start: str) -> None:
    if start == "fastproj.{}" and name in ("prepare", "transfer", "segment"):
        pytest.skip("a room, or in one: no module to run")
    modules = imported("-m", *start.format(name).split(), "--help")
    assert "fastproj.core.errors" in modules  # or none would be seen
    assert not modules & {"torch", "numba", "torchvision", "sklearn"}


def test_the_commands_are_listed_and_a_wrong_one_is_put_right() -> None:
    start = time.monotonic()
    done = run(sys.executable, "-m", "fastproj", "--help", cwd=ROOT)
    assert time.monotonic() - start < 3  # 0.06 s alone on a machine
    assert done.returncode == 0
    listed = [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")]
    assert listed == list(COMMANDS)
    done = run(sys.executable, "-m", "fastproj", "trian", cwd=ROOT)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: unknown command 'trian'; did you mean 'train'?\n"


@pytest.mark.parametrize("module", ["matplotlib", "nvidia"])
def test_a_package_that_only_an_extra_brings_is_named(module: str, tmp_path: Path) -> None:
    """Its import fails, as where the extra is not installed."""
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules['{module}'] = None\n")
    (tmp_path / "needs.py").write_text(f"def main(argv):\n    import {module}.something\n")
    program = (
        "from fastproj import __main__ as m\n"
        "m.COMMANDS['needs'] = m.Command('needs', '')\nm.main('needs')"
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = run(sys.executable, "-c", program, env=os.environ | {"PYTHONPATH": path}, cwd=tmp_path)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: fastproj needs needs {module}: run ./setup.sh ")


def test_a_shipped_recipe_is_found_by_name_and_a_file_comes_first(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = str(ROOT / "rcfg" / "in100.yaml")
    assert [shipped_recipe(name) for name in ("in100", "in100.yaml", "rcfg/in100.yaml")] == (
        [shipped] * 3
    )
    (tmp_path / "rcfg").mkdir()
    (tmp_path / "rcfg" / "in100.yaml").touch()
    assert shipped_recipe("rcfg/in100.yaml") == "rcfg/in100.yaml"
    assert shipped_recipe("in100") == shipped
    assert shipped_recipe("no such recipe") == "no such recipe"


def test_the_versions_agree() -> None:
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()


def build(kind: str, source: Path, out: Path) -> Path:
    """The sdist or wheel of a source tree, by its build backend, without the network."""
    program = f"from setuptools import build_meta as b; print(b.build_{kind}({str(out)!r}))"
    done = run(sys.executable, "-c", program, cwd=source)
    assert done.returncode == 0, done.stderr[-2000:]
    return out / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(source distribution, wheel built from it) of what git knows in this checkout."""
    work = tmp_path_factory.mktemp("package")
    files = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    for name in filter(None, files.stdout.split("\0")):
        if (ROOT / name).is_file():
            (work / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
            (work / "tree" / name).write_bytes((ROOT / name).read_bytes())
    sdist = build("sdist", work / "tree", work)
    with tarfile.open(sdist) as archive:
        archive.extractall(work / "unpacked", filter="data")
    (source,) = (work / "unpacked").iterdir()
    return sdist, build("wheel", source, work)


@pytest.mark.slow
def test_the_wheel_holds_what_it_needs_and_no_more(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[1]) as wheel:
        names = set(wheel.namelist())
        (about,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = message_from_bytes(wheel.read(about))
    kept = {name for name in names if ".dist-info/" not in name}
    ours = [path for path in (ROOT / "fastproj").rglob("*.py")]
    wanted = {path.relative_to(ROOT).as_posix() for path in ours}
    wanted |= {f"fastproj/{p.relative_to(ROOT)}" for p in (ROOT / "rcfg").rglob("*.yaml")}
    wanted |= {f"fastproj/{n}" for n in ("py.typed", "prepare/imagenet100.txt", "_native.abi3.so")}
    assert wanted <= kept
    assert all(name.endswith(".pyi") or name.startswith("fastproj/rcfg/") for name in kept - wanted)
    assert "-cp311-abi3-" in built[1].name
    assert set(metadata.get_all("Provides-Extra")) == {
        *{"corruptions", "dali", "dev", "ffcv", "onnx", "parquet", "report", "slurm"},
        *{"tensorboard", "timm", "transfer", "wandb"},
    }
    required = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert not any(line.startswith(("ffcv", "opencv", "matplotlib", "pytest")) for line in required)


@pytest.mark.slow
def test_the_source_distribution_is_complete(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tracked = run("git", "ls-files", cwd=ROOT).stdout.split()
    missing = {name for name in tracked if (ROOT / name).exists()} - names
    assert missing <= {".dockerignore", ".gitignore"}


@pytest.mark.slow
def test_the_wheel_runs_outside_the_checkout(built: tuple[Path, Path], tmp_path: Path) -> None:
    """In an environment of its own, which sees the packages that the tests have, but not us."""
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout
                .strip())  # fmt: skip
    with zipfile.ZipFile(built[1]) as wheel:
        wheel.extractall(site)  # noqa: S202  a zip, which zipfile keeps inside; and our own
    for entry in HERE.iterdir():  # an editable install's .pth among them would lead to the checkout
        if "fastproj" not in entry.name and entry.suffix != ".pth" and entry.name != "__pycache__":
            (site / entry.name).symlink_to(entry) if not (site / entry.name).exists() else None
    outside = {"cwd": tmp_path, "env": {"PATH": "/nonexistent", "HOME": str(tmp_path)}}

    where = run(python, "-c", "import fastproj; print(fastproj.__file__)", **outside)
    assert where.stdout.startswith(str(site)), where
    done = run(python, "-m", "fastproj", "doctor", **outside)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "./setup.sh" not in done.stdout  # there is none here

    few = ["--run.name", "few", "--data.train", "d/train.beton", "--data.val", "d/val.beton",
           "--optim.epochs", "1", "--optim.warmup_epochs", "0"]  # fmt: skip
    for words in (
        ["prepare", "--dataset", "digits", "--out", "d"],
        ["train", "--cfg", "demo", *few, "--train.stop_after", "2"],
    ):
        done = run(python, "-m", "fastproj", *words, **outside)
        assert done.returncode == 0, done.stderr
    events = (tmp_path / "runs" / "few" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["event"] for line in events].count("checkpoint") == 2


@pytest.mark.slow
@pytest.mark.parametrize("registry", [pytest.param(True, marks=pytest.mark.soak), False])
def test_where_pkg_config_finds_no_libjpeg_the_registry_brings_one(
    built: tuple[Path, Path], tmp_path: Path, registry: bool
) -> None:
    """Without a registry either, the library is built for raw stores alone."""
    nothing = tmp_path / "bin" / "pkg-config"
    nothing.parent.mkdir()
    nothing.write_text("#!/bin/sh\nexit 1\n")
    nothing.chmod(0o755)
    environment = os.environ | {"PATH": f"{nothing.parent}{os.pathsep}{os.environ['PATH']}"}
    if not registry:
        environment |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}
    words = ["wheel", "--no-deps", *([] if registry else ["--no-build-isolation"])]
    done = run(sys.executable, "-m", "pip", *words, built[0], cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        library = ctypes.CDLL(wheel.extract("fastproj/_native.abi3.so", tmp_path))
    assert library.fastproj_has_jpeg() == registry
