"""The acceptance run: all of it runs on a CPU, with few packages, and keeps what it has."""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from fastproj.bench.__main__ import main
from fastproj.bench.gpu import CARRIED, cifar10, correctness
from fastproj.bench.gpu.cifar10 import run_name
from fastproj.bench.gpu.command import PARTS
from fastproj.bench.gpu.measure import Ceilings
from fastproj.bench.gpu.record import Check, Figure, Item, NotMeasuredError, Record, figure
from fastproj.bench.gpu.runs import Sets, options, trainer_of
from fastproj.core.errors import SettingError
from fastproj.prepare.encode import Store
from fastproj.runs.folder import RunFolder
from fastproj.runs.journal import Part
from tests.support.betons import digit_like, write_here

ROOT = Path(__file__).parents[2]
SCALING = (ROOT / "docs" / "scaling.md").read_text("utf-8")
# What torch's own metadata requires, as it is imported. optree: torch imports it where it finds its
# metadata; packaging: setuptools brings its own and prefers an installed one.
TORCH = ("torch", "torchgen", "functorch", "numpy", "filelock", "typing_extensions", "setuptools",
         "_distutils_hack", "sympy", "mpmath", "networkx", "jinja2", "markupsafe", "fsspec",
         "triton", "nvidia", "cuda", "optree", "packaging")  # fmt: skip
THERE = ["fastproj", *TORCH, *CARRIED]
BLOCKED = """
import sys
from importlib.machinery import PathFinder
class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        top, spec = name.partition(".")[0], super().find_spec(name, path, target)
        known = {{*{allowed}, *sys.stdlib_module_names}}
        if top in known or top.startswith("_sysconfigdata") or "setuptools/_vendor" in str(spec):
            return spec
sys.meta_path = [Bare if finder is PathFinder else finder for finder in sys.meta_path]
sys.argv = ["bench", *{argv}]
from fastproj.__main__ import main
main("bench")
"""


def in_a_bare_python(argv: list[str], compiled: Path) -> subprocess.CompletedProcess:
    """``fastproj bench`` where nothing but ``THERE`` can be imported; ``compiled``: empty."""
    return subprocess.run(
        [sys.executable, "-c", BLOCKED.format(allowed=THERE, argv=argv)],
        cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
                          "TORCHINDUCTOR_CACHE_DIR": str(compiled)},
    )  # fmt: skip


@pytest.fixture(scope="module")
def maker() -> Any:
    """tools/performance_gpu.py, a script and no package."""
    spec = importlib.util.spec_from_file_location("gpu", ROOT / "tools" / "performance_gpu.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def made(name: str, value: float = 2.0, **more: Any) -> Figure:
    return figure(name, "s", [value - 1, value, value + 3], **more)


def test_a_figure_has_the_median_and_the_bounds() -> None:
    one = figure("f", "ms", [5.0, 1.0, 2.0], note="why")
    assert (one.median, one.low, one.high, one.n, one.note) == (2.0, 1.0, 5.0, 3, "why")


def test_each_figure_is_on_the_disk_before_the_next(tmp_path: Path) -> None:
    record = Record(tmp_path / "part.json", {"part": "p"})

    def kept() -> Iterator[Figure]:
        for count in range(3):
            items = json.loads(record.path.read_text())["items"] if count else [{"found": []}]
            assert len(items[0]["found"]) == count
            yield made(f"figure {count}")

    record.run({"an item": kept})
    assert not record.problems()
    items = json.loads(record.path.read_text())["items"]
    assert [f["name"] for f in items[0]["found"]] == ["figure 0", "figure 1", "figure 2"]


def test_what_fails_or_does_not_hold_is_told_and_the_rest_is_measured(tmp_path: Path) -> None:
    def fails() -> Iterator[Figure]:
        yield made("before")
        raise ZeroDivisionError("no")

    def absent() -> Iterator[Figure]:
        raise NotMeasuredError("it is not here")
        yield

    def lacks(module: str) -> Item:
        return lambda: [made("never", float(importlib.import_module(module).__doc__ is None))]

    record = Record(tmp_path / "part.json", {"part": "p"})
    checks = [Check("holds", True, ""), Check("does not", False, "")]
    record.run(
        {
            "fails": fails,
            "absent": absent,
            "no package": lacks("no_such_package.part"),
            "a typo": lacks("fastproj.bench.gpu.no_such_module"),
            "checks": lambda: checks,
        }
    )
    items = json.loads(record.path.read_text())["items"]
    failed, missing, package, typo, checked = items
    assert failed["found"][0]["name"] == "before" and "ZeroDivisionError: no" in failed["error"]
    assert missing["missing"] == "it is not here" and not missing["error"]
    assert len(checked["found"]) == 2
    assert package["missing"] == "no_such_package is not installed" and not package["error"]
    assert "no_such_module" in typo["error"] and not typo["missing"]
    assert record.problems() == ["fails", "a typo", "does not"]


def test_no_item_starts_when_the_time_is_spent(tmp_path: Path) -> None:
    record = Record(tmp_path / "part.json", {"part": "p"}, limit=0.0)
    record.run({"late": lambda: pytest.fail("it started")})
    assert "0 s were spent" in json.loads(record.path.read_text())["items"][0]["missing"]


def test_a_file_is_no_folder_for_its_files(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="give --bench.out FOLDER"):
        main(["gpu", "--bench.out", str(tmp_path / "one.json")])


@pytest.mark.slow
def test_the_whole_runs_with_few_packages_and_leaves_figures_that_are_predicted(
    tmp_path: Path, maker: Any
) -> None:
    done = in_a_bare_python(
        ["gpu", "--bench.out", str(tmp_path), "--bench.tiny", "true", "--bench.device", "cpu",
         "--bench.workers", "1"],
        tmp_path / "compiled",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    results = {part: json.loads((tmp_path / f"{part}.json").read_text()) for part in PARTS}
    missing = {item["name"]: item["missing"] for result in results.values()
               for item in result["items"] if item["missing"]}  # fmt: skip
    assert missing.keys() == {"tests marked gpu", "slow tests marked gpu", "compiled steps",
                              "accuracy", "sparse head", "the sparse head's step"}  # fmt: skip
    assert missing["tests marked gpu"] == "pytest is not installed"
    assert missing["sparse head"] == "numba is not installed"
    for part, result in results.items():
        assert result["tiny"] and result["settings"]["device"] == "cpu"
        for item in result["items"]:
            assert not item["error"] and (item["found"] or item["missing"]), (part, item["name"])
            assert all(one.get("passed", True) for one in item["found"]), item
    names = [one["name"] for result in results.values() for item in result["items"]
             for one in item["found"]]  # fmt: skip
    assert len(names) == len(set(names))
    epochs = [one for result in results.values() for item in result["items"]
              for one in item["found"] if one["name"].endswith(", an epoch")]  # fmt: skip
    assert len(epochs) == 10 and all(one["share"] > 0 for one in epochs)
    for predicted in maker.predictions(SCALING):  # on a CPU the batches are of 4
        if "batch" not in predicted or "sparse head" in predicted:
            continue
        tiny = predicted.rpartition(" ")[0] + " 4, "
        assert [name for name in names if name.startswith(tiny) and name.endswith(", an epoch")]
    page = maker.page(results, SCALING)
    for name in names:
        assert name in page
    for one in epochs:
        (row,) = [line for line in page.splitlines() if line.startswith(f"| {one['name']} |")]
        assert f"| {one['share']:.1%} |" in row
    assert "predicted are\n14–25 % of the nominal peak" in page
    compiled = {path.suffix for path in (tmp_path / "compiled").rglob("*")}
    assert ".so" in compiled, "no C++ was compiled"


@pytest.mark.slow
def test_the_sparse_head_is_timed_where_numba_is(tmp_path: Path, maker: Any) -> None:
    """What the bare Python leaves out on a CPU."""
    main(["gpu", "--bench.out", str(tmp_path), "--bench.tiny", "true", "--bench.device", "cpu",
          "--bench.workers", "1", "--bench.part", "imagenet100", "--bench.items",
          "sparse head,the sparse head's step"])  # fmt: skip
    alone, step = json.loads((tmp_path / "imagenet100.json").read_text())["items"]
    assert [one["n"] for one in alone["found"]] == [2, 2]
    assert [one["share"] > 0 for one in step["found"]] == [True, True]
    assert step["found"][1]["name"] == "ImageNet-100, sparse head, batch 4, an epoch"
    assert "ImageNet-100, sparse head, batch 256" in maker.predictions(SCALING)


STUB = """
import pytest
pytestmark = pytest.mark.gpu
def test_holds(): pass
def test_does_not(): assert not "equal"
def test_skipped(): pytest.skip("no device")
"""


def test_the_suites_own_tests_are_counted_and_what_fails_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(correctness, "CHECKOUT", tmp_path)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_stub.py").write_text(STUB)
    record = Record(tmp_path / "part.json", {"part": "p"})
    check, told = correctness.tests("gpu", record, tiny=False)
    assert isinstance(check, Check) and isinstance(told, dict)
    assert not check.passed and check.seen == "1 passed, 1 failed, 1 skipped"
    assert (
        told["tests"] == ["tests/test_stub.py::test_does_not"] and "AssertionError" in told["end"]
    )
    (tmp_path / "tests" / "test_stub.py").write_text(STUB.replace('not "equal"', '"equal"'))
    (check,) = correctness.tests("gpu", record, tiny=False)
    assert check == Check("tests marked gpu", True, "2 passed, 0 failed, 1 skipped")
    broken = "import no_such_module\nimport pytest\npytestmark = pytest.mark.gpu\n"
    (tmp_path / "tests" / "test_broken.py").write_text(broken)
    check, told = correctness.tests("gpu", record, tiny=False)
    assert not check.passed and "2 passed" in check.seen  # it stops no other
    assert any("test_broken.py" in line for line in told["tests"])


def test_an_epochs_share_is_its_operations_beside_the_best_product(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Multiplications counted by hooks of the layers, and times of a journal written here."""
    source = digit_like(np.random.default_rng(0), 24, 32, 4)
    beton = write_here(source, tmp_path, Store("raw"))
    sets = Sets(beton, beton, beton, beton, torch.device("cpu"), 1, tiny=True)
    run = tmp_path / "run"
    run.mkdir()
    epochs = [{"event": "epoch", "epoch": epoch, "time": time, "steps": 3,
               "seconds": dict.fromkeys(get_args(Part), 1) | {"step": 3}}
              for epoch, time in enumerate((10.0, 20.0, 24.0, 28.0))]  # fmt: skip
    RunFolder(run).metrics.write_text("".join(f"{json.dumps(event)}\n" for event in epochs))
    monkeypatch.setattr(cifar10, "train_run", lambda *_: run)
    monkeypatch.setattr(cifar10, "ceilings", lambda *_: (Ceilings(1.0, 1e12, 1.0), []))
    (found,) = cifar10.epochs(sets, tmp_path, 8, "true", True)

    products = 0

    def count(layer: torch.nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        nonlocal products
        weight = layer.get_parameter("weight")
        products += output.numel() * weight[0].numel()  # of each output with a whole filter

    given = options(sets, "cifar10", 8, 4) | {"train.compile": "false"}
    learner = trainer_of(sets, given).learner
    for module in learner.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            module.register_forward_hook(count)
    learner((torch.zeros(16, 3, 16, 16),), torch.zeros(8, dtype=torch.int64))
    similarities = 16 * 16 * 8  # the objective's, of 16 projections of 8 numbers
    work = 3 * 2 * (products + similarities)  # forward, and twice backward
    assert found.share == pytest.approx(3 * work / 4.0 / 1e12, rel=1e-3)  # 3 steps in 4 s
    assert (found.median, found.n, found.data_wait) == (4.0, 3, 0.25)


@pytest.mark.slow
def test_the_accuracy_of_given_images_is_measured(tmp_path: Path, maker: Any) -> None:
    for split, count in (("train", 48), ("val", 24)):
        source = digit_like(np.random.default_rng(count), count, 32, 4)
        write_here(replace(source, split=split), tmp_path, Store("raw"))
    main(["gpu", "--bench.out", str(tmp_path / "out"), "--bench.tiny", "true", "--bench.device",
          "cpu", "--bench.workers", "1", "--bench.part", "cifar10", "--bench.items", "accuracy",
          "--bench.small", str(tmp_path / "train.beton")])  # fmt: skip
    (item,) = json.loads((tmp_path / "out" / "cifar10.json").read_text())["items"]
    assert not item["error"] and not item["missing"]
    known = maker.predictions(SCALING)
    goals = {one["name"]: maker.of(one["name"], known).goal for one in item["found"]}
    assert goals == {"CIFAR-10 fast, linear top-1": "90 %", "CIFAR-10 fast, training": "10 min"}
    assert 0 <= item["found"][0]["median"] <= 100 and item["found"][1]["median"] > 0


def test_the_page_is_what_the_script_writes_now(maker: Any) -> None:
    written = maker.PAGE.read_text(encoding="utf-8")
    assert written == maker.page(maker.load(), SCALING), "run: python tools/performance_gpu.py"


def test_a_figure_stands_beside_its_prediction_and_its_goal(maker: Any) -> None:
    name = f"{run_name(256, 'graphs', True)}, an epoch"
    found = made(name, peak_bytes=3 * 10**9, data_wait=0.0123, share=0.2, note="so")
    entry = {"name": "run", "found": [found.__dict__], "missing": "", "error": ""}
    text = maker.item(entry, maker.predictions(SCALING))
    row = [name, "1.6–2.1 s", "2.0 s", "2 s", "1 – 5", "3", "3.00 GB", "1.2%", "20.0%", "so"]
    assert f"| {' | '.join(row)} |" in text
    other = maker.item(entry | {"found": [made(f"{name}, other").__dict__]}, {})
    assert "predicted" not in other and "goal" not in other


def test_a_page_tells_what_failed_and_what_was_not_measured(maker: Any) -> None:
    entry = {"name": "run", "found": [Check("equal", False, "1 differs").__dict__],
             "missing": "no time", "error": "Traceback\n  x\nZeroDivisionError: no\n"}  # fmt: skip
    text = maker.item(entry, {})
    for shown in ("| equal | **no** | 1 differs |", "Not measured: no time.", "`ZeroDivisionError"):
        assert shown in text
    assert "Not measured: no GPU" in maker.page({}, SCALING)
