"""The fault harness: one try of each fault, many in ``make soak``, and the page it fills."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.faults.inputs import INPUTS
from tests.faults.sanitized import FAULT, NAME
from tests.faults.table import ENTRIES, missing

ROOT = Path(__file__).parents[2]


SLOW = {"kill_evaluate", "kill_study", "signal_trainer", "remove_folder_under_trainer",
        "jump_clock_under_trainer", "lose_network_store_under_trainer"}  # fmt: skip
LONG = {"train_long"}  # 10 s for a try
POSSIBLE = [name for name in ENTRIES if not missing(name)]


def results(module: str, out: Path, *arguments: str) -> dict[str, dict]:
    """In a new process: this one may have computed gradients, or started worker processes."""
    subprocess.run(
        [sys.executable, "-m", module, "--out", out, *arguments],
        cwd=ROOT, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    return json.loads(out.read_text())


def survives(names: Sequence[str], tries: int, folder: Path) -> None:
    out = folder / f"{names[0]}.json"
    found = results("tests.faults", out, "--tries", str(tries), "--only", *names)
    for name in names:
        result = found[name]
        assert result["survived"] == result["tried"] == tries, result


def test_nothing_is_lost(tmp_path: Path) -> None:
    survives([name for name in POSSIBLE if name not in SLOW | LONG], 1, tmp_path)


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_nothing_is_lost_of_what_takes_long(tmp_path: Path) -> None:
    survives(sorted(SLOW & {*POSSIBLE}), 1, tmp_path)


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", POSSIBLE)
def test_nothing_is_lost_in_many_tries(tmp_path: Path, name: str) -> None:
    survives([name], 1 if name in LONG else 100, tmp_path)


def refused_or_equal(names: Sequence[str], cases: int, folder: Path) -> None:
    arguments = ("--cases", str(cases), "--only", *names)
    found = results("tests.faults.fuzz", folder / "fuzzed.json", *arguments)
    assert set(found) == set(names)
    for result in found.values():
        assert not result["lost"], result
        assert result["survived"] == result["tried"] >= min(cases, 1000)


def test_hostile_input_is_refused_or_read_as_it_was(tmp_path: Path) -> None:
    refused_or_equal([*INPUTS], 10, tmp_path)


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", INPUTS)
def test_hostile_input_in_many_cases(tmp_path: Path, name: str) -> None:
    refused_or_equal([name], 14_000 if name == "beton_bits" else 8_000, tmp_path)


@pytest.mark.parametrize("cases", [300, pytest.param(30_000, marks=[pytest.mark.soak])])
def test_the_sanitizers_find_nothing_in_the_c_code(cases: int, tmp_path: Path) -> None:
    asan = subprocess.check_output(["gcc", "-print-file-name=libasan.so"], text=True)
    if "/" not in asan:
        pytest.skip("gcc has no AddressSanitizer here")
    out = tmp_path / "sanitized.json"
    result = results("tests.faults.sanitized", out, "--cases", str(cases))[NAME]
    assert not result["lost"] and result["survived"] == cases, result


def test_the_page_is_what_the_tool_writes() -> None:
    spec = importlib.util.spec_from_file_location("reliability", ROOT / "tools" / "reliability.py")
    assert spec and spec.loader
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    results = json.loads(tool.RESULTS.read_text("utf-8"))
    assert tool.PAGE.read_text("utf-8") == tool.page(results), "run python tools/reliability.py"
    told = {name: entry.__doc__ for name, entry in ENTRIES.items()}
    told |= {name: f"fuzzed: {kind.__doc__}" for name, kind in INPUTS.items()} | {NAME: FAULT}
    told |= {
        f"guided_{name}": f"fuzzed, led by coverage: {kind.__doc__}"
        for name, kind in INPUTS.items()
    }
    assert {name: result["fault"] for name, result in results.items()} == told
