"""The fault harness: one try of each fault, many in ``make soak``, and the page it fills."""

import importlib.util
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.faults.entries import BETWEEN, ENTRIES, NEED_ROOT

ROOT = Path(__file__).parents[2]


@cache
def results(tries: int, out: Path) -> dict[str, dict]:
    """In a new process: this one may have computed gradients, or started worker processes."""
    subprocess.run(
        [sys.executable, "-m", "tests.faults", "--tries", str(tries), "--out", out],
        cwd=ROOT, stdout=subprocess.DEVNULL, timeout=550,
    )  # fmt: skip
    return json.loads(out.read_text())


@pytest.mark.parametrize("name", ENTRIES)
@pytest.mark.parametrize("tries", [1, pytest.param(30, marks=[pytest.mark.slow, pytest.mark.soak])])
def test_nothing_is_lost(name: str, tries: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    if name in NEED_ROOT and os.geteuid():
        pytest.skip("only root may mount a small disk")
    result = results(tries, tmp_path_factory.getbasetemp() / f"faults-{tries}.json")[name]
    assert result["tried"] == tries
    assert result["survived"] + sum(result["lost"].values()) == tries
    assert result["lost"].keys() <= {BETWEEN}, result


def test_the_page_is_what_the_tool_writes() -> None:
    spec = importlib.util.spec_from_file_location("reliability", ROOT / "tools" / "reliability.py")
    assert spec and spec.loader
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    results = json.loads(tool.RESULTS.read_text("utf-8"))
    assert tool.PAGE.read_text("utf-8") == tool.page(results), "run python tools/reliability.py"
    assert set(results) == set(ENTRIES), "run python -m tests.faults --out docs/reliability.json"
    assert all(result["fault"] == ENTRIES[name].__doc__ for name, result in results.items())
