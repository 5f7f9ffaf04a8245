"""Run folders as train and evaluate leave them, with numbers of the test's choice; forked runs."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from fastproj.__main__ import dispatch
from fastproj.core.errors import run_command
from fastproj.evaluation.results import Evaluation, Row, write_evaluation
from fastproj.runs import checkpoint
from fastproj.studies import running
from fastproj.studies.plan import Job

LABELS = np.arange(40) % 4  # of the val images


def fake_run(
    job: Job,
    right: int | None = 30,
    holdout: float = 0.5,
    diagnostics: dict[str, float] | None = None,
    **changes: Any,
) -> None:
    """A whole run whose linear probe is right on the first ``right`` of the images.

    ``changes``: ``epochs`` and ``val`` (the content) of the protocol, ``step`` of the evaluation,
    ``ended`` false for a run that was cut; ``right`` None: not evaluated.
    """
    run = job.run
    run.path.mkdir(parents=True, exist_ok=True)
    checkpoint.save(checkpoint.step_path(run.checkpoints, 8), {"step": 8}, 1)
    parts = {"data_wait": 1.0, "step": 8.0, "pause": 1.0}
    events: list[dict[str, Any]] = [
        {"event": "start", "step": 0},
        {"event": "epoch", "epoch": 0, "step": 8, "steps": 8, "seconds": parts,
         "diagnostics": {"matrix_information": 1.0, **(diagnostics or {})}},
    ]  # fmt: skip
    if changes.get("ended", True):
        events.append({"event": "end", "step": 8, "images_per_second": 100.0, "seconds": parts})
    run.metrics.write_text("".join(json.dumps(event) + "\n" for event in events))
    packages = {"fastproj": "0", "torch": "1"}
    about = {"git": {"commit": "c" * 40, "dirty": False}, "cpu": "a cpu", "packages": packages,
             "gpus": [], "python": "3", "platform": "p", "cores": 2}  # fmt: skip
    run.environment.write_text(json.dumps(about))
    if right is None:
        return
    predicted = np.where(np.arange(len(LABELS)) < right, LABELS, (LABELS + 1) % 4)
    rows, kept = [], {}
    for probe in ("logistic", "knn"):
        chosen = {"chosen": {"holdout_top1": holdout}} if probe == "logistic" else {}
        path = run.predictions(job.dataset, "pre-trained", probe).relative_to(run.path).as_posix()
        kept[path] = torch.from_numpy(predicted)
        rows.append(
            Row(
                encoder="pre-trained",
                data=job.dataset,
                probe=probe,
                metrics={"top1": right / len(LABELS), "top5": 1.0},
                protocol={
                    "data": {
                        "train": {"content": "t"},
                        "val": {"content": changes.get("val", "v")},
                    },
                    "features": {"crop": {"size": 8}},
                    "probe": {"epochs": changes.get("epochs", 3), "seed": job.pair, **chosen},
                },
                seconds={"features": 20.0, "probe": 3.0},
                predictions=path,
            )
        )  # fmt: skip
    header = {"file": "f", "sha256": "s", "step": changes.get("step", 8), "epoch": 1}
    write_evaluation(run, Evaluation(header, {}, tuple(rows)), kept)


def contents(folder: Path) -> dict[str, Any]:
    """The tables of a study, without its times and the commit, which may change meanwhile."""
    lines = (folder / "table.md").read_text().splitlines()
    report = json.loads((folder / "study.json").read_text())
    del report["hours"], report["environment"]["git"]
    for run in report["runs"]:
        del run["hours"], run["images_per_second"]
    names = ("table.csv", "table.tex", "metrics.csv")
    tables: dict[str, Any] = {name: (folder / name).read_bytes() for name in names}
    return tables | {"json": report, "md": [
        line for line in lines if "hours of" not in line and "; commit " not in line
    ]}  # fmt: skip


class Forked:
    """A command as ``subprocess.Popen`` would run it, in a fork, which imports nothing again."""

    def __init__(self, argv: Sequence[str], stdout: IO[bytes], env: Mapping[str, str],
                 preexec_fn: Callable[[], None] | None, **rest: Any) -> None:  # fmt: skip
        assert list(argv[1:3]) == ["-m", "fastproj"] and rest["start_new_session"]
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid:
            return
        os.setsid()
        if preexec_fn:
            preexec_fn()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        os.dup2(stdout.fileno(), 1)
        os.dup2(stdout.fileno(), 2)
        os.environ.update(env)
        code = 1
        try:
            run_command(dispatch, argv[3:])
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self) -> int:
        while self.poll() is None:
            time.sleep(0.01)
        assert self.returncode is not None
        return self.returncode

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def terminate(self) -> None:
        os.kill(self.pid, signal.SIGTERM)


if __name__ == "__main__":  # a study whose commands are forks of it
    import fastproj.evaluate
    import fastproj.study
    import fastproj.train  # noqa: F401, imported once for all commands

    running.Popen = Forked  # type: ignore[misc,assignment]
    run_command(fastproj.study.main, sys.argv[1:])
