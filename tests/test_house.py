"""The shape of the house: imports point up, only commands see settings."""

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]

# A room may import the rooms before it, never one behind it.
ROOMS = [
    *["core", "settings", "data", "prepare", "loaders", "augment", "models", "objective"],
    *["training", "runs", "evaluation", "transfer", "studies", "reporting"],
    "__main__",  # imports commands by name when it runs them; as scripts they hand over to it
    *["train", "evaluate", "embed", "study", "report", "export", "doctor", "bench", "demo"],
]
# The commands, and what turns their settings into the parts of a run: all that sees settings.
COMMANDS = {"train", "evaluate", "embed", "study", "report", "export", "doctor", "bench", "demo"}
SEE_SETTINGS = {
    *{"fastproj.prepare.command", "fastproj.runs.command", "fastproj.runs.start"},
    *{"fastproj.training.build", "fastproj.transfer.run"},
    *{"fastproj.transfer.detection", "fastproj.transfer.segmentation"},
}

SOURCES = sorted((ROOT / "fastproj").rglob("*.py"))


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def room(module: str) -> str:
    """``fastproj.loaders.order`` -> ``loaders``; the package itself, and not ours: empty."""
    parts = module.split(".") + [""]
    return parts[1] if parts[0] == "fastproj" else ""


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of every import in a file, relative ones spelled out, inner ones too."""
    package = dotted(path).split(".")
    if path.name != "__init__.py":
        package.pop()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            # "from fastproj import dist" names a room behind the package.
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def test_imports_are_found_however_they_are_written(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    sample = tmp_path / "fastproj" / "loaders" / "sample.py"
    sample.parent.mkdir(parents=True)
    sample.write_text(
        "import fastproj.core.errors, torch.nn\n"
        "from fastproj.core import dist\n"
        "from ..augment import Augmentation\n"
        "def late():\n"
        "    from . import order\n"
        "    from .. import train as t\n"
        "    from fastproj.prepare.sources import Source\n"
    )
    found = [room(module) for _, module in sorted(imports(sample))]
    assert found == ["core", "", "core", "augment", "loaders", "train", "prepare"]


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_imports_point_up(path):
    here = room(dotted(path))
    assert not here or here in ROOMS, f"{name(path)}: give the room {here} its place in ROOMS"
    for line, module in imports(path):
        there = room(module)
        if there in ROOMS and there != here:
            above = ROOMS[: ROOMS.index(here)] if here else []
            assert there in above, f"{name(path)}:{line} imports {module}, which lies below it"
            assert there != "settings" or here in COMMANDS or dotted(path) in SEE_SETTINGS, (
                f"{name(path)}:{line} imports settings, which only commands see"
            )


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_a_file_fits_a_readers_head(path):
    assert len(path.read_text().splitlines()) < 400


def test_the_tested_versions_lie_within_the_bounds():
    text = (ROOT / "constraints.txt").read_text()
    assert not re.search(r"://|^-|@", text, re.M), "a registry or an option"
    pins = dict(line.lower().split("==") for line in text.splitlines() if not line.startswith("#"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    for line in sum(extras, project["dependencies"]):
        asked = Requirement(line)
        pinned = pins[asked.name.lower()]
        assert asked.specifier.contains(pinned), f"{line}, and constraints.txt pins {pinned}"
