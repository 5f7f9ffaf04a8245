"""Bringing jobs to their end: what is found, what runs beside what, and what a failure stops."""

import fcntl
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fastproj.core.errors import InputError
from fastproj.studies import running
from fastproj.studies.plan import Arm, Job, Plan
from fastproj.studies.processes import reason
from fastproj.studies.running import Log, Runner, StudyError, locked, state
from tests.support.studies import fake_run
from tests.support.terminals import terminal


@pytest.fixture
def jobs(tmp_path: Path) -> list[Job]:
    """Two arms, two seeds: a0, b0, a1, b1."""
    plan = Plan(
        tmp_path / "s", "a", "logistic.top1", (Arm("a", "r"), Arm("b", "r")), {"d": {}}, (0, 1)
    )
    return plan.jobs({("a", "d"): {}, ("b", "d"): {}})


def test_how_far_a_run_has_come(jobs: list[Job]) -> None:
    run = jobs[0].run
    assert state(run) == "absent"
    run.path.mkdir(parents=True)
    run.config.write_text("")  # killed before its first checkpoint
    assert state(run) == "absent"
    fake_run(jobs[0], None, ended=False)
    assert state(run) == "cut"
    fake_run(jobs[0], None)
    assert state(run) == "trained"
    fake_run(jobs[0], step=4)  # evaluated before its end
    assert state(run) == "trained"
    fake_run(jobs[0])
    assert state(run) == "whole"
    scores = run.evaluation.read_text()
    run.evaluation.write_text(scores.replace("{", '{"missing": ["probe knn failed"],', 1))
    assert state(run) == "trained"
    run.evaluation.write_text(scores)
    kept = run.metrics.read_text()
    run.metrics.write_text("x\n")
    with pytest.raises(InputError, match="is no JSON object"):
        state(run)
    run.metrics.unlink()
    assert state(run) == "cut"
    run.metrics.write_text(kept)
    for path in run.checkpoints.iterdir():
        path.unlink()
    assert state(run) == "whole"  # the weights were thrown away
    run.metrics.unlink()
    with pytest.raises(InputError, match="another step than its last and no checkpoint"):
        state(run)


class Process:
    """A command that ends when it is looked at for the second time, after doing its work."""

    pid = 2**22 + 1  # no process has it
    programs: list[list[str]] = []
    started: list[list[str]] = []  # the words after fastproj
    environments: list[dict[str, str]] = []
    codes: dict[str, int] = {}  # command and folder -> exit code
    jobs: dict[str, Job] = {}

    def __init__(self, argv: Sequence[str], env: dict[str, str], **rest: Any) -> None:
        self.programs.append(list(argv))
        at = list(argv).index("fastproj") + 1
        self.words, self.looked, self.returncode = list(argv[at:]), 0, None
        self.started.append(self.words)
        self.environments.append(env)
        self.output = rest["stdout"]

    def poll(self) -> int | None:
        self.looked += 1
        if self.looked == 2 and self.returncode is None:
            name = next(n for n in self.jobs if n.split("/")[1] in " ".join(self.words))
            self.returncode = self.codes.get(f"{self.words[0]} {name}", 0)
            if self.returncode:
                error = b"" if self.returncode < 0 else b"error: the disk is full\n"
                self.output.write(b"so it goes\n" + error)
                self.output.flush()
            elif self.words[0] == "evaluate":
                fake_run(self.jobs[name])
            else:
                fake_run(self.jobs[name], None)
        return self.returncode

    def terminate(self) -> None:
        self.returncode = 143

    kill = terminate

    def wait(self) -> int:
        return self.returncode or 0


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch, jobs: list[Job]) -> type[Process]:
    for name, value in {"programs": [], "started": [], "environments": [], "codes": {}}.items():
        monkeypatch.setattr(Process, name, value)
    monkeypatch.setattr(Process, "jobs", {job.name: job for job in jobs})
    monkeypatch.setattr(running, "Popen", Process)
    monkeypatch.setattr(running, "POLL", 0.0)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return Process


def test_what_is_whole_is_left_alone_and_what_was_cut_goes_on(
    jobs: list[Job],
    process: type[Process],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole, cut, trained, absent = jobs
    fake_run(whole)
    fake_run(cut, None, ended=False)
    fake_run(trained, None)
    seen: list[str] = []
    checked: list[str] = []
    runner = Runner(
        tmp_path / "s", 1, check=lambda job: checked.append(job.name),
        finished=lambda job: str(seen.append(job.name)),
    )  # fmt: skip
    runner.run(jobs)
    assert process.started == [
        ["train", "--run.resume", str(cut.run.path)], ["evaluate", str(cut.run.path)],
        ["evaluate", str(trained.run.path)],
        ["train", *absent.argv()], ["evaluate", str(absent.run.path)],
    ]  # fmt: skip
    assert seen == [job.name for job in jobs] and not runner.problems
    assert set(checked) == set(seen)
    assert "4/4  d/b-seed1: " in capsys.readouterr().err
    runner.run(jobs)
    assert len(process.started) == 5 and runner.log.together() == set()


def test_a_failed_run_is_a_line_and_stops_nothing(
    jobs: list[Job], process: type[Process], tmp_path: Path
) -> None:
    process.codes |= {f"train {jobs[0].name}": 1, f"evaluate {jobs[1].name}": -9}
    jobs[2].run.path.mkdir(parents=True)
    fake_run(jobs[2], step=8)
    (jobs[2].run.path / "eval.json").write_text("{")
    runner = Runner(tmp_path / "s", 2)
    runner.run(jobs)
    log = tmp_path / "s" / "logs" / "d-a-seed0.log"
    assert runner.problems[jobs[0].name] == f"d/a-seed0: the disk is full ({log})"
    killed = "d/b-seed0: killed by SIGKILL, and its last line is 'so it goes' ("
    assert runner.problems[jobs[1].name].startswith(killed)
    assert "eval.json is damaged" in runner.problems[jobs[2].name]
    assert runner.problems.keys() == {job.name for job in jobs[:3]}
    assert state(jobs[3].run) == "whole"


def test_a_command_that_changes_nothing_is_not_repeated_for_ever(
    jobs: list[Job], process: type[Process], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{__name__}.fake_run", lambda *args, **rest: None)
    runner = Runner(tmp_path / "s", 1)
    runner.run(jobs[:1])
    assert len(process.started) == 1 and "is as absent as before" in str(runner.problems)


def test_an_error_of_the_study_ends_it(
    jobs: list[Job], process: type[Process], tmp_path: Path
) -> None:
    def finished(job: Job) -> str:
        raise StudyError("no such metric")

    handlers = signal.getsignal(signal.SIGTERM)
    with pytest.raises(StudyError):
        Runner(tmp_path / "s", 2, finished=finished).run(jobs)
    assert len(process.started) <= 4 and signal.getsignal(signal.SIGTERM) == handlers


def test_runs_at_once_share_the_cores_or_take_a_gpu_each_and_the_log_says_so(
    jobs: list[Job], process: type[Process], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "cores", lambda: 5)
    runner = Runner(tmp_path / "s", 2, gpus=2)
    runner.run(jobs[:3])
    assert {env["OMP_NUM_THREADS"] for env in process.environments} == {"2"}
    assert {env["CUDA_VISIBLE_DEVICES"] for env in process.environments} == {"0", "1"}
    starts = [event for event in runner.log.events() if event["event"] == "start"]
    assert [event["beside"] for event in starts[:2]] == [[], [jobs[0].name]]
    assert runner.log.together() >= {jobs[0].name, jobs[1].name}
    ends = [event for event in runner.log.events() if event["event"] == "end"]
    assert {event["code"] for event in ends} == {0} and len(ends) == len(starts) == 6


@pytest.mark.parametrize("visible", [None, "a,b,c,d,e"])
def test_runs_of_several_ranks_are_torchruns_with_gpus_of_their_own(
    jobs: list[Job], process: type[Process], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    visible: str | None,
) -> None:  # fmt: skip
    monkeypatch.setattr(running, "cores", lambda: 9)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    runner = Runner(tmp_path / "s", None, gpus=5, ranks=2)
    runner.run(jobs)
    assert not runner.problems and len(process.programs) == 8
    for program in process.programs:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        assert program[1:7] == [*torchrun, "-m", "fastproj"]
    starts = [event for event in runner.log.events() if event["event"] == "start"]
    assert max(len(event["beside"]) for event in starts) == 1  # five GPUs are room for two runs
    used = {env["CUDA_VISIBLE_DEVICES"] for env in process.environments}
    assert used == ({"a,b", "c,d"} if visible else {"0,1", "2,3"})
    assert {env["OMP_NUM_THREADS"] for env in process.environments} == {"2"}  # 9 cores, 4 ranks


def test_ranks_take_a_core_each_and_no_fewer_gpus_than_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "cores", lambda: 5)
    assert [running.at_once(None, ranks) for ranks in (1, 2, 3, 6)] == [5, 2, 1, 1]
    assert running.at_once(3, 2, 4) == 3 and running.at_once(None, 4, 8) == 2
    with pytest.raises(InputError, match="study.ranks 3 takes as many GPUs.* shows 2: lower it"):
        Runner(tmp_path / "s", None, gpus=2, ranks=3)


def test_a_run_starts_beside_others_only_where_memory_has_room_for_one_as_large(
    jobs: list[Job], process: type[Process], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gib, free = 1 << 30, [20]
    monkeypatch.setattr(running, "memory", lambda: (64 << 30, free[0] * gib))
    monkeypatch.setattr(running, "own_memory", lambda pid: 3 * gib)
    monkeypatch.setattr(running, "cores", lambda: 4)

    def beside(name: str) -> int:
        runner = Runner(tmp_path / name, None)
        fresh = Plan(tmp_path / name, "a", "x", (Arm("a", "r"), Arm("b", "r")), {"d": {}}, (0, 1))
        made = fresh.jobs({("a", "d"): {}, ("b", "d"): {}})
        monkeypatch.setattr(Process, "jobs", {job.name: job for job in made})
        runner.run(made)
        assert not runner.problems
        starts = [event for event in runner.log.events() if event["event"] == "start"]
        return max(len(event["beside"]) for event in starts)

    assert beside("roomy") == 3  # one per core
    free[0] = 3
    assert beside("just") == 3  # what runs is as large as it gets
    free[0] = 2
    assert beside("full") == 0
    monkeypatch.setattr(running, "own_memory", lambda pid: gib)
    free[0] = 4  # the first may grow by 1 GiB, the second as well, and the third has no 2 GiB
    assert beside("growing") == 2


def test_the_memory_of_a_process_is_its_own_and_nothing_after_its_end() -> None:
    block = bytearray(64 << 20)
    assert len(block) < running.own_memory(os.getpid()) < 64 << 30
    assert running.own_memory(2**22 + 1) == 0  # above the kernel's largest id


def test_the_memory_of_a_run_is_that_of_its_ranks_too() -> None:
    held = "block = bytearray(b'x' * (64 << 20))"
    wait = "print(flush=True); input()"
    inner = f"{held}; {wait}"
    outer = f"import subprocess, sys; {held}\nsubprocess.run([sys.executable, '-c', {inner!r}])"
    with subprocess.Popen(
        [sys.executable, "-c", outer], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin and process.stdout
        process.stdout.readline()  # the inner one holds its block
        assert 128 << 20 < running.own_memory(process.pid) < 192 << 20
        process.stdin.close()


def test_the_reason_is_the_first_error_of_this_command(tmp_path: Path) -> None:
    """Of several ranks, the others and torchrun write more after it."""
    path = tmp_path / "log"
    path.write_text("error: of an earlier start\n")
    since = path.stat().st_size
    assert reason(path, since, -9) == "killed by SIGKILL"
    with path.open("a") as file:
        file.write("step 1\nerror: the disk is full\nerror: rank 0 lost rank 1\n=====\n")
    assert reason(path, since, 1) == "the disk is full"


def test_what_may_change_reaches_a_run_that_is_there(tmp_path: Path) -> None:
    """Betons that moved, another device; nothing that the run learns from."""
    settings = {"data.val": "v", "train.keep": "1", "optim.lr": "2", "run.device": "cpu"}
    arms = (Arm("a", "r"), Arm("b", "r"))
    plan = Plan(tmp_path / "s", "a", "x", arms, {"d": settings}, (0,))
    job, _ = plan.jobs({("a", "d"): {}, ("b", "d"): {}})
    path = str(job.run.path)
    cut = ["train", "--run.resume", path, "--data.val=v", "--train.keep=1", "--run.device=cpu"]
    assert running.command(job, "cut") == cut
    assert running.command(job, "trained") == ["evaluate", path, "--data.val=v", "--run.device=cpu"]
    assert running.command(job, "absent") == ["train", *job.argv()]


def test_a_signal_ends_the_runs_and_starts_no_other(
    jobs: list[Job],
    process: type[Process],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def check(job: Job) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    fake_run(jobs[0], None, ended=False)
    runner = Runner(tmp_path / "s", 1, check=check)
    runner.run(jobs)
    assert runner.signal == signal.SIGTERM and len(process.started) == 1
    assert runner.problems == {}
    assert "SIGTERM: the runs save where they stand" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_runs_are_told_once_to_end(
    jobs: list[Job],
    process: type[Process],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
) -> None:
    """A run takes a second signal, some time after the first, for an order to end unsaved."""
    told: list[int] = []

    def poll(self: Process) -> int | None:
        self.looked += 1
        if self.looked == 2:
            os.kill(os.getpid(), number)
        return 128 + number if self.looked > 9 else None

    before = signal.signal(number, signal.SIG_DFL)
    monkeypatch.setattr(Process, "poll", poll)
    monkeypatch.setattr(Process, "terminate", lambda self: told.append(self.looked))
    runner = Runner(tmp_path / "s", 1)
    runner.run(jobs)
    signal.signal(number, before)
    assert runner.signal == number and len(told) == 1 and not runner.problems


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_ctrl_c_after_another_signal_ends_the_runs_now(
    jobs: list[Job], process: type[Process], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    first: signal.Signals,
) -> None:  # fmt: skip
    def poll(self: Process) -> int | None:
        self.looked += 1
        if self.looked <= 2:
            os.kill(os.getpid(), first if self.looked == 1 else signal.SIGINT)
        return self.returncode

    killed: list[Process] = []
    monkeypatch.setattr(Process, "poll", poll)
    monkeypatch.setattr(Process, "kill", lambda self: killed.append(self))
    with pytest.raises(KeyboardInterrupt):
        Runner(tmp_path / "s", 1).run(jobs)
    assert len(killed) == len(process.started) == 1


def test_half_a_line_of_a_killed_study_spoils_no_other(tmp_path: Path) -> None:
    log = Log(tmp_path / "study.jsonl")
    assert log.events() == []
    log.event("start", job="a", beside=[])
    with log.path.open("a") as file:
        file.write('{"event": "sta')
    log.event("start", job="b", beside=["a"])
    log.event("start", job="c", beside=[])
    assert [event["job"] for event in log.events()] == ["a", "b", "c"]
    assert log.together() == {"a", "b"}


def test_two_studies_of_one_folder_wait_for_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "study.lock"
    monkeypatch.setattr(running, "POLL", 0.01)
    with path.open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        monkeypatch.setattr(running, "PATIENCE", 0.05)
        with pytest.raises(InputError, match="is at work"), locked(path):
            pass
        assert capfd.readouterr().err.count("waiting") == 1
        monkeypatch.setattr(running, "PATIENCE", 60)
        threading.Timer(0.1, fcntl.flock, (other, fcntl.LOCK_UN)).start()
        with locked(path) as descriptor:
            assert os.fstat(descriptor)


def test_the_bar_counts_runs_at_80_columns(
    jobs: list[Job], process: type[Process], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process.codes[f"train {jobs[1].name}"] = 1
    with terminal(monkeypatch) as screen:
        Runner(tmp_path / "s", 1, finished=lambda job: "it is whole").run(jobs)
    bars = screen.bars()
    assert all(len(shown) <= 80 for shown in bars)
    assert re.fullmatch(r"100% .+ 4/4  00:00 left, 1 failed", bars[-1]), bars
    assert f"  1/4  {jobs[0].name}: it is whole" in screen.text
