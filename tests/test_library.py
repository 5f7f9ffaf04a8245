"""The library: its public names, their defaults, the examples, and the page written from them."""

import ast
import importlib.util
import inspect
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import fastproj
from fastproj.settings import RUN

ROOT = Path(__file__).parents[1]
# Defaults at a function that are also a setting's.
SAME = {
    fastproj.open_loader: {"engine": "data.engine", "memory_share": "data.memory_share",
                           "workers": "data.workers", "seed": "run.seed"},
    fastproj.Crop: {"scale": ("views.scale_min", "views.scale_max")},
    fastproj.Center: {"crop_fraction": "eval.crop_fraction"},
    fastproj.build_projector: {"latents": "projector.latents", "k": "projector.k",
                               "levels": "projector.levels"},
    fastproj.Trainer: {"epochs": "optim.epochs", "warmup_epochs": "optim.warmup_epochs",
                       "warmup_lr": "optim.warmup_lr", "accumulate": "optim.accumulate",
                       "diagnostics_every": "train.diagnostics_every", "seed": "run.seed"},
    fastproj.matrix_information: {"alpha": "matrix_information.alpha"},
}  # fmt: skip


def test_importing_it_imports_no_torch() -> None:
    script = "import sys, fastproj; fastproj.__version__; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


def test_every_public_name_is_there_and_documented() -> None:
    stub = ast.parse((ROOT / "fastproj" / "__init__.pyi").read_text())
    names = {
        alias.asname
        for node in stub.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert names == set(fastproj.__all__) and len(names) > 20
    for name in sorted(names):
        found = getattr(fastproj, name)
        assert found.__name__ == name
        assert len(inspect.getdoc(found) or "") > 20, name
        assert not (inspect.getdoc(found) or "").startswith(f"{name}("), f"{name}: dataclass's own"
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = fastproj.no_such_name  # type: ignore[attr-defined]


@pytest.mark.parametrize("function", SAME, ids=lambda function: function.__name__)
def test_defaults_are_those_of_the_settings(function: type) -> None:
    parameters = inspect.signature(function).parameters
    for name, setting in SAME[function].items():
        wanted = (
            tuple(RUN.params[part].default for part in setting)
            if isinstance(setting, tuple)
            else RUN.params[setting].default
        )
        assert parameters[name].default == wanted, f"{function.__name__}({name}) and {setting}"


def test_the_simclr_preset_is_the_default_view() -> None:
    from fastproj.augment.draw import PRESETS

    assert PRESETS[RUN.params["views.preset"].default] == (fastproj.View(), fastproj.View())
    assert {field.name for field in fields(fastproj.View)} - {"sigma"} <= {
        name.partition(".")[2] for name in RUN.params if name.startswith("views.")
    }


def test_an_input_error_is_a_value_error() -> None:
    assert issubclass(fastproj.InputError, ValueError)
    assert issubclass(fastproj.SettingError, fastproj.InputError)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [("simclr", ["--folder", "digits", "--epochs", "1"], "linear probe: 9"),
     ("custom", [], "losses: ")],
)  # fmt: skip
def test_an_example_runs_from_outside_the_checkout(
    name: str, options: list[str], says: str, tmp_path: Path
) -> None:
    script = ROOT / "examples" / f"{name}.py"
    done = subprocess.run(
        [sys.executable, script, *options],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert says in done.stdout


def test_examples_use_public_names_alone_and_stand_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    for name, most in (("simclr", 60), ("custom", 70)):
        text = (ROOT / "examples" / f"{name}.py").read_text()
        assert len(text.splitlines()) <= most
        assert not [line for line in text.splitlines() if "fastproj." in line and "import" in line]
        assert f"examples/{name}.py" in readme
    for name, first, last in (
        ("simclr", "train, val = ", "for epoch in range"),
        ("custom", "class Encoder", "optimizer = "),
    ):
        text = (ROOT / "examples" / f"{name}.py").read_text()
        shown = [line.strip() for line in text[text.index(first) : text.index(last)].splitlines()]
        own = ("def main", '"""The losses of')  # the script's frame
        missing = [x for x in shown if x not in readme and not x.startswith(own)]
        assert len(shown) > 15 and not missing, f"README shows {name}.py as it stands: {missing}"


def test_the_api_page_is_what_the_tool_writes_now() -> None:
    path = ROOT / "tools" / "api.py"
    spec = importlib.util.spec_from_file_location("api", path)
    assert spec and spec.loader
    api = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(api)
    assert api.PAGE.read_text(encoding="utf-8") == api.page(), "run: python tools/api.py"
