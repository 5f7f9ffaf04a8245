"""A set read from a mounted network store: the same batches; and what a lost connection says."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fastproj.data.beton import open_beton
from fastproj.loaders import Center, Crop, open_loader
from fastproj.prepare.encode import Store
from tests.support.betons import digit_like, photographs, write, write_shards
from tests.support.network import missing, mounted

pytestmark = [pytest.mark.slow, pytest.mark.soak]
ROOT = Path(__file__).parents[2]
DRAIN = """
import sys
from fastproj.core.errors import run_command
from fastproj.data.beton import open_beton
from fastproj.loaders import Crop, open_loader

def main(argv):
    with open_loader(open_beton(sys.argv[1]), [Crop(32, 2)], 8, engine="stream") as loader:
        next(iter(loader))
        print("reading", flush=True)
        sys.stdin.readline()
        for _ in range(3):
            for _ in loader:
                pass

run_command(main)
"""


@pytest.fixture(autouse=True)
def needs() -> None:
    if lacks := missing():
        pytest.skip(f"no network store: {lacks} is missing")


@pytest.mark.parametrize("engine", ["stream", "resident", "reference"])
@pytest.mark.parametrize("kind", ["raw", "jpeg"])
def test_shards_of_a_network_store_give_the_batches_of_one_local_file(
    tmp_path: Path, kind: str, engine: str
) -> None:
    if (engine, kind) == ("resident", "jpeg"):
        pytest.skip("resident reads no JPEGs")
    rng = np.random.default_rng(0)
    source = (
        digit_like(rng, 90, 20, 5) if kind == "raw" else photographs(rng, tmp_path / "files", 40)
    )
    local = write(source, tmp_path / "one", Store(kind, quality=90))
    parts = write_shards(source, tmp_path / "shards", Store(kind, quality=90), 3)
    with mounted(parts.path.parent, tmp_path / "far"):
        far = open_beton(tmp_path / "far" / parts.path.name)
        found = []
        for beton in (local, far):
            groups = [Crop(32, 2), Center(24, 0.9)]
            with open_loader(beton, groups, 8, engine=engine, workers=2, seed=3) as loader:
                found.append([*loader, *loader])
        for ours, theirs in zip(*found, strict=True):
            assert torch.equal(ours.labels, theirs.labels)
            assert all(torch.equal(a, b) for a, b in zip(ours.crops, theirs.crops, strict=True))
        del far, beton, loader  # a file that is mapped keeps the mount busy


def test_a_lost_connection_ends_the_reader_with_one_line(tmp_path: Path) -> None:
    """Of a set that is larger than what has been read ahead."""
    source = digit_like(np.random.default_rng(0), 4000, 64, 5)
    beton = write(source, tmp_path / "one", Store("raw"))
    with mounted(beton.path.parent, tmp_path / "far") as cut:
        reader = subprocess.Popen(
            [sys.executable, "-c", DRAIN, str(tmp_path / "far" / beton.path.name)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            cwd=ROOT,
        )  # fmt: skip
        assert reader.stdout and reader.stdout.readline() == "reading\n"
        cut()
        _, said = reader.communicate("\n", timeout=120)
    assert reader.returncode != 0
    print(said)
    (line,) = said.splitlines()
    assert line.startswith("error: ")
