"""The comparison of heads on a CPU: its arithmetic, and the table that is committed."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "tools" / "compare_cpu.py"
spec = importlib.util.spec_from_file_location("compare_cpu", SCRIPT)
compare_cpu = importlib.util.module_from_spec(spec)
spec.loader.exec_module(compare_cpu)


def seeds(*top1):
    return [{"accuracy": {"pre-trained": {"sgd": x, "knn": 1 - x}}} for x in top1]


def test_the_paired_gain_is_of_the_same_seeds():
    results = {"default": seeds(0.50, 0.52, 0.60), "other": seeds(0.51, 0.55, 0.61)}
    table = compare_cpu.summary(results, probe="sgd")
    assert table["default"]["mean"] == pytest.approx(54)
    assert table["default"]["std"] == pytest.approx(((16 + 4 + 36) / 2) ** 0.5)
    assert table["default"]["gain"] == table["default"]["gain_std"] == 0
    # Differences 1, 3, 1: far less spread than either column has.
    assert table["other"]["gain"] == pytest.approx(5 / 3)
    assert table["other"]["gain_std"] == pytest.approx((8 / 3 / 2) ** 0.5)
    assert compare_cpu.summary(results, probe="knn")["other"]["gain"] == pytest.approx(-5 / 3)


def test_every_variant_is_a_recipe_and_the_committed_table_follows_from_its_runs():
    for recipe in compare_cpu.VARIANTS.values():
        assert (ROOT / "rcfg" / f"{recipe}.yaml").exists()
    kept = json.loads((ROOT / "docs" / "compare-cpu.json").read_text())
    assert kept["changes"] == compare_cpu.CHANGES
    assert list(kept["runs"]) == list(compare_cpu.VARIANTS)
    assert {len(runs) for runs in kept["runs"].values()} == {len(compare_cpu.SEEDS)}
    for probe in ("sgd", "knn"):
        for variant, row in compare_cpu.summary(kept["runs"], probe).items():
            assert kept["tables"][probe][variant] == pytest.approx(row)
    readme = (ROOT / "README.md").read_text()
    for variant, row in kept["tables"]["sgd"].items():
        assert f"| {variant} | {row['mean']:.2f} ± {row['std']:.2f} |" in readme
