"""A study of four heads and five seeds on digits, killed twice: the table of an unkilled one."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from fastproj.prepare.encode import Store
from fastproj.prepare.sources import open_sources
from fastproj.runs.folder import RunFolder
from fastproj.studies.running import Log
from tests.support.betons import write
from tests.support.studies import contents

ROOT = Path(__file__).parents[2]

# The demo's recipe, small: 384 digits, 6 steps of 64 per epoch, a ResNet on crops of 8 pixels.
FILE = """
study: {{recipe: demo, seeds: [0, 1, 2, 3, 4], controls: false, name: heads, processes: 2}}
settings:
  run: {{device: cpu}}
  views: {{size: 8}}
  optim: {{epochs: 2, warmup_epochs: 0, batch_size: 64}}
  train: {{precision: float32, log_every: 1}}
  eval: {{logistic_strengths: [1e-2, 1e-1]}}
sets:
  digits: {{data: {{train: {root}/train.beton, val: {root}/val.beton, engine: resident}}}}
arms:
  default:
  regularized:
    settings: {{matrix_information: {{weight: 0.1}}}}
    published: 0.26
    acted: matrix_information lower
  discretized:
    settings: {{projector: {{levels: 30}}}}
    published: 1.03
    acted: used_codes above 0.5
  sparse:
    settings: {{projector: {{kind: none, latents: 512, k: 16}}}}
    acted: dead_latents below 0.5
"""


@pytest.fixture
def argv(tmp_path: Path) -> list[str]:
    """The study of a part of the digits, without the folder that it writes to."""
    for source, count in zip(open_sources("digits"), (384, 180), strict=True):
        few = replace(
            source, images=source.images[:count], labels=source.labels[:count],
            names=source.names[:count],
        )  # fmt: skip
        write(few, tmp_path, Store("raw"))
    (tmp_path / "study.yaml").write_text(FILE.format(root=tmp_path))
    program = [sys.executable, "-m", "tests.support.studies", "--cfg", f"{tmp_path}/study.yaml"]
    return [*program, "--study.dir"]


def kill_when(argv: Sequence[str], reached: Callable[[], bool]) -> None:
    """Start the study, and kill its process group with SIGKILL as soon as it has come so far."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        argv, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while not reached():
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.timeout(1800)  # 90 s of processor time
def test_a_study_of_digits_killed_twice_gives_the_table_of_an_unkilled_one(
    argv: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "killed" / "heads"
    trains = RunFolder(folder / "digits" / "discretized-seed0").metrics
    log = Log(folder / "study.jsonl")

    def evaluates() -> bool:  # a run of the third seed
        last = log.events()[-1]
        return (last["event"], last.get("command")) == ("start", "evaluate") and (
            last["job"].endswith("seed2")
        )

    killed = [*argv, str(tmp_path / "killed")]
    kill_when(killed, lambda: trains.exists() and b'"event": "step"' in trains.read_bytes())
    kill_when(killed, evaluates)
    assert not (folder / "table.csv").exists()
    outputs = []
    for name in ("killed", "whole"):
        done = subprocess.run(
            [*argv, str(tmp_path / name)], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        outputs.append([line for line in done.stdout.splitlines() if "hours of" not in line][:-1])
    found = [event["found"] for event in log.events() if event["event"] == "start"]
    assert "cut" in found and len(found) > 40  # commands of an unkilled study
    assert len(Log(tmp_path / "whole" / "heads" / "study.jsonl").events()) == 80
    assert contents(folder) == contents(tmp_path / "whole" / "heads")
    assert outputs[0] == outputs[1] and len(outputs[0]) > 10
    assert len(contents(folder)["json"]["runs"]) == 20
