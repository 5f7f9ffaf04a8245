"""Plugins: real files that add entries, recorded with their hash and loaded again."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastproj.core.errors import InputError, SettingError
from fastproj.objective import OBJECTIVES
from fastproj.settings import RUN, load

ROOT = Path(__file__).parents[2]
HINGE = """
from fastproj.objective import OBJECTIVES

def hinge(z1, z2, margin: float = 0.5, steps: int | None = None, squared: bool = False):
    return (margin - (z1 * z2).sum(1)).clamp(min=0).mean()

OBJECTIVES["hinge"] = hinge
"""


@pytest.fixture(autouse=True)
def tables():
    before = dict(OBJECTIVES)
    yield
    OBJECTIVES.clear()
    OBJECTIVES.update(before)
    for name in [name for name in sys.modules if name.startswith("fastproj_plugin_")]:
        del sys.modules[name]


def read(*argv):
    return load(RUN, ["--data.train", "x", *argv], "test", "")


def write(folder: Path, name: str, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    return folder / name


def test_a_new_hyperparameter_needs_no_declaration(tmp_path):
    """From a recipe, its path relative to the file that names it; from the command line; short."""
    plugin = write(tmp_path / "heads", "mine.py", HINGE)
    recipe = write(
        tmp_path / "heads", "r.yaml",
        "plugins: [mine.py]\nobjective: {name: hinge, margin: 0.25}\n",
    )  # fmt: skip
    found = read("--cfg", str(recipe))
    assert found.objective.options == {"margin": 0.25, "steps": None, "squared": False}
    over = read("--cfg", str(recipe), "--margin", "2", "--objective.steps=3")
    assert over.objective.options == {"margin": 2.0, "steps": 3, "squared": False}
    options = read("--plugins", str(plugin), "--objective.name=hinge", "--squared=yes")
    assert options.objective.options["squared"] is True
    with pytest.raises(SettingError, match="objective.margin must be a number, not 'wide'"):
        read("--cfg", str(recipe), "--margin", "wide")
    with pytest.raises(SettingError, match="objective.margin is read by hinge, not by simclr"):
        read("--cfg", str(recipe), "--objective.name=simclr", "--objective.margin=1")
    assert "margin" not in read("--cfg", str(recipe), "--objective.name=simclr").objective.options


@pytest.mark.parametrize(
    ("parameter", "words"),
    [
        ("clip: float = math.inf", "objective.clip must be a number.*, not '.inf'"),
        ("tag: str = ''", "objective.tag must be"),
        ("weights: tuple = ()", "objective.weights must be numbers"),
        ("temperature: float | None = None", "objective.temperature must be .*, not null"),
    ],
)
def test_a_default_that_no_file_could_give_is_refused_at_once(tmp_path, parameter, words):
    """A run's config.yaml holds it: read again it would be refused."""
    text = HINGE.replace("margin: float = 0.5", f"margin: float = 0.5, {parameter}")
    plugin = write(tmp_path, "mine.py", "import math\n" + text)
    with pytest.raises(SettingError, match=f"the default in a signature: {words}"):
        read("--plugins", str(plugin), "--objective.name", "hinge")


def test_a_package_around_a_plugin_that_fails_is_one_line(tmp_path, monkeypatch):
    write(tmp_path / "failing_package", "__init__.py", "nonsense\n")
    write(tmp_path / "failing_package", "losses.py", HINGE)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(InputError, match="can be imported .NameError: name 'nonsense'") as why:
        read("--plugins", "failing_package.losses")
    assert "\n" not in str(why.value)


def test_a_module_is_a_plugin_too(tmp_path, monkeypatch):
    write(tmp_path, "my_own_heads.py", HINGE.replace('"hinge"', '"hinge2"'))
    monkeypatch.syspath_prepend(tmp_path)
    found = read("--plugins=my_own_heads", "--objective.name=hinge2")
    assert found.plugins[0].startswith("my_own_heads#sha256=")
    with pytest.raises(InputError, match="plugin 'no_such_heads' is neither a file"):
        read("--plugins=no_such_heads")
    sys.modules.pop("my_own_heads")


def test_config_yaml_loads_it_again_and_names_one_that_changed(tmp_path):
    plugin = write(tmp_path, "mine.py", HINGE)
    found = read("--plugins", str(plugin), "--objective.name=hinge", "--margin=0.75")
    config = write(tmp_path / "run", "config.yaml", found.to_yaml())
    assert f"{plugin}#sha256=" in config.read_text()
    assert found.flat()["plugins"][0].startswith("mine.py#sha256=")
    code = (
        "import sys; from fastproj.core.errors import run_command\n"
        "from fastproj.settings import RUN, load\n"
        "run_command(lambda argv: print(load(RUN, argv, 'x', '').objective.options) or 0)\n"
    )

    def again():
        return subprocess.run(
            [sys.executable, "-c", code, "--cfg", str(config)], text=True, capture_output=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=tmp_path / "run",
        )  # fmt: skip

    done = again()
    assert done.returncode == 0 and "'margin': 0.75" in done.stdout, done.stderr
    plugin.write_text(HINGE + "# another\n")
    done = again()
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert f"plugin {plugin} has changed since" in done.stderr and "config.yaml" in done.stderr
    plugin.unlink()
    done = again()
    assert done.returncode == 1 and f"cannot read plugin {plugin}" in done.stderr


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1\nraise ValueError('no')\n", "bad.py, line 2: ValueError: no"),
        ("x = 1\n\ndef (\n", "bad.py, line 3: SyntaxError"),
        ("import no_such_module\n", "bad.py, line 1: ModuleNotFoundError"),
        ("raise SystemExit(3)\n", "bad.py, line 1: SystemExit"),
    ],
)
def test_an_error_inside_a_plugin_names_file_and_line(tmp_path, text, words):
    with pytest.raises(InputError) as error:
        read("--plugins", str(write(tmp_path, "bad.py", text)))
    assert words in str(error.value) and error.value.exit_code == 1


def test_help_lists_a_plugins_entry(tmp_path, capsys):
    with pytest.raises(SystemExit):
        read("--help", "--plugins", str(write(tmp_path, "mine.py", HINGE)))
    assert "| hinge)" in capsys.readouterr().out
