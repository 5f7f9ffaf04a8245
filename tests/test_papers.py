"""docs/papers.md: it is what its tool writes, it names every study, and its sums are right."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from fastproj.settings import RUN, load

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def papers() -> ModuleType:
    spec = importlib.util.spec_from_file_location("papers", ROOT / "tools" / "papers.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_page_is_what_the_tool_writes(papers: ModuleType) -> None:
    assert papers.PAGE.read_text() == papers.page(), "run python tools/papers.py"


def test_every_study_is_named_and_exists(papers: ModuleType) -> None:
    named = {name for *_, names, _ in papers.ROWS for name in names}
    assert named == {path.stem for path in (ROOT / "rcfg" / "study").glob("*.yaml")}


def test_a_run_costs_the_sum_over_its_layers(papers: ModuleType) -> None:
    """ResNet-18 at 32 pixels with a stem of padding 2, so that its stages have 34 to 5 pixels."""
    convolutions = [(3, 64, 3, 34)]
    before = 64
    for width, side in ((64, 34), (128, 17), (256, 9), (512, 5)):
        convolutions += [(before, width, 3, side)] + [(width, width, 3, side)] * 3
        convolutions += [(before, width, 1, side)] if width > before else []
        before = width
    macs = sum(a * b * k * k * side * side for a, b, k, side in convolutions)
    head = 512 * 2048 + 2048 * 256
    settings = load(RUN, ["--cfg", "cifar10"], "test", "")
    # Two views; a multiplication and an addition; forward, and twice as much backward.
    expected = 2 * 2 * 3 * (macs + head) * 50_000 * 200
    assert papers.run_operations(settings) == expected
