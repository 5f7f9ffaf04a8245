"""A study's jobs through submitit: its debug executor here, its local one in tests/commands."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fastproj.core.errors import InputError
from fastproj.studies import scheduler
from fastproj.studies.plan import Arm, Job, Plan
from fastproj.studies.running import state
from fastproj.studies.scheduler import Scheduler, Work
from tests.support.studies import fake_run


@pytest.fixture
def jobs(tmp_path: Path) -> list[Job]:
    """Two arms, two seeds: a0, b0, a1, b1."""
    arms = (Arm("a", "r"), Arm("b", "r"))
    plan = Plan(tmp_path / "s", "a", "logistic.top1", arms, {"d": {}}, (0, 1))
    return plan.jobs({("a", "d"): {}, ("b", "d"): {}})


class Process:
    """A command that ends at once, after doing its work, or fails where ``codes`` says so."""

    pid = 0

    def __init__(self, returncode: int) -> None:
        self.returncode = returncode

    def poll(self) -> int:
        return self.returncode


@pytest.fixture
def started(jobs: list[Job], monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands as they start; the second job's training fails."""
    found: list[list[str]] = []

    def spawn(argv: Sequence[str], output: Any, environment: Any, keep: Any, ranks: int) -> Process:
        found.append(list(argv))
        assert ranks == 2
        job = next(job for job in jobs if job.run.path.name in " ".join(argv))
        if job is jobs[1]:
            output.write(b"error: the disk is full\n")
            output.flush()
            return Process(1)
        fake_run(job, 30 if argv[0] == "evaluate" else None)
        return Process(0)

    monkeypatch.setattr(scheduler, "spawn", spawn)
    monkeypatch.setattr(scheduler, "POLL", 0.0)
    return found


def test_each_job_of_the_scheduler_brings_one_run_to_its_end(
    jobs: list[Job], started: list[list[str]], tmp_path: Path
) -> None:
    fake_run(jobs[2], None, ended=False)
    fake_run(jobs[3])
    seen: list[str] = []
    checked: list[str] = []
    runner = Scheduler(
        tmp_path / "s", None, "debug", {"timeout_min": 3}, lambda job: checked.append(job.name),
        lambda job: str(seen.append(job.name)), ranks=2,
    )  # fmt: skip
    runner.run(jobs)
    assert [words[:2] for words in started] == [
        ["train", "--cfg=r"], ["evaluate", str(jobs[0].run.path)],
        ["train", "--cfg=r"],
        ["train", "--run.resume"], ["evaluate", str(jobs[2].run.path)],
    ]  # fmt: skip
    assert {state(jobs[i].run) for i in (0, 2, 3)} == {"whole"}
    log = tmp_path / "s" / "logs" / "d-b-seed0.log"
    assert runner.problems == {"d/b-seed0": f"d/b-seed0: the disk is full ({log})"}
    assert seen == ["d/b-seed1", "d/a-seed0", "d/a-seed1"] and set(seen) == set(checked)
    # Nobody knows what else a scheduler's machine does: no rate of these is quoted.
    submitted = {job.name for job in jobs[:3]}
    assert runner.log.together() == submitted
    assert {event["event"] for event in runner.log.events()} == {"submit"}


def test_a_command_that_changes_nothing_is_not_repeated_for_ever(
    jobs: list[Job], started: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{__name__}.fake_run", lambda *args, **rest: None)
    Scheduler(tmp_path / "s", None, "debug", {})  # makes the folder
    assert "is as absent as before its last command" in Work(tmp_path / "s", jobs[0], ranks=2)()
    assert len(started) == 1


def test_a_job_that_is_requeued_first_lets_training_save(jobs: list[Job], tmp_path: Path) -> None:
    """``checkpoint`` ends the command by SIGTERM, waits for it, and gives the same work again."""
    program = "import signal, time; signal.signal(15, lambda *_: exit(0)); print(1, flush=True)"
    child = subprocess.Popen(
        [sys.executable, "-c", f"{program}; time.sleep(60)"], stdout=subprocess.PIPE
    )
    assert child.stdout
    child.stdout.readline()
    work = Work(tmp_path / "s", jobs[0], 1, 2)
    assert work.checkpoint().function == work  # before any command has started
    work._pid = child.pid
    again = work.checkpoint()
    assert child.poll() == 0 and again.function == work and not again.args
    assert not hasattr(again.function, "_pid")
    child.stdout.close()


FAKES = {
    # Starts each element of an array, and returns: submitit writes what they read afterwards.
    "sbatch": """
script = open(sys.argv[-1]).read()
open(os.environ["FAKE"] + "/script", "a").write(script)
array = re.search(r"--array=0-(\\d+)%(\\d+)", script)
for at in range(int(array[1]) + 1) if array else [None]:
    ids = {"SLURM_JOB_ID": "70", "SLURM_LOCALID": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "1",
           "SLURM_JOB_NUM_NODES": "1", "SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "here"}
    if at is not None:
        ids |= {"SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": str(at)}
    subprocess.Popen(["bash", sys.argv[-1]], env={**os.environ, **ids},
                     stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print("Submitted batch job 70")
""",
    "srun": """
words = sys.argv[1:]
while words[0].startswith("-"):
    words = words[1:] if "=" in words[0] or words[0] == "--unbuffered" else words[2:]
os.execvp(words[0], words)
""",
    "sacct": """
print("JobID|State|NodeList")
for at in range(2):
    ended = glob.glob(os.environ["FAKE"] + f"/../s/submitit/70_{at}_*_result.pkl")
    print(f"70_{at}|{'COMPLETED' if ended else 'RUNNING'}|here")
""",
    "scancel": "open(os.environ['FAKE'] + '/cancelled', 'a').write(' '.join(sys.argv[1:]))",
}


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with the four commands of Slurm that submitit calls."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, program in FAKES.items():
        path = folder / name
        path.write_text(f"#!{sys.executable}\nimport glob, os, re, subprocess, sys\n{program}")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE", str(folder))
    return folder


def test_on_slurm_the_jobs_are_one_array_and_a_second_start_waits_for_them(
    jobs: list[Job], slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for job in jobs[:2]:
        fake_run(job)
    parameters = {"timeout_min": 30, "gpus_per_node": 1, "slurm_partition": "gpu"}
    runner = Scheduler(tmp_path / "s", 2, "slurm", parameters)
    monkeypatch.setattr(scheduler, "LOOK", 0.0)
    # The runs cannot start (there is no recipe r): their reason comes back through submitit.
    runner.run(jobs)
    script = (slurm / "script").read_text()
    for words in ("--array=0-1%2", "--partition=gpu", "--time=30", "--gpus-per-node=1",
                  "--job-name=s", "--signal=USR2@"):  # fmt: skip
        assert words in script
    assert runner.problems.keys() == {job.name for job in jobs[2:]}
    assert all("cannot read r" in line for line in runner.problems.values()), runner.problems
    submits = [event for event in runner.log.events() if event["event"] == "submit"]
    assert [event["id"] for event in submits] == ["70_0", "70_1"]

    # A second start finds both jobs in the queue: it submits none, and cancels them when stopped.
    monkeypatch.setattr(scheduler.submitit.SlurmJob, "done", lambda self: False)
    before = signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    for number in (signal.SIGUSR1, signal.SIGTERM):
        monkeypatch.setattr(
            scheduler.time, "sleep", lambda seconds, number=number: os.kill(os.getpid(), number)
        )
        again = Scheduler(tmp_path / "s", 2, "slurm", parameters)
        again.run(jobs)
        assert again.signal == number
        assert (slurm / "cancelled").exists() == (number == signal.SIGTERM)
    signal.signal(signal.SIGUSR1, before)
    assert (slurm / "script").read_text() == script
    assert sorted((slurm / "cancelled").read_text().split("70_")) == ["", "0", "1"]


@pytest.mark.parametrize(
    ("cluster", "parameters", "words"),
    [
        ("slurm", {}, 'study.executor slurm: submitit says: Could not detect "srun"'),
        ("local", {"slurm_partion": "gpu"}, "submitit says: Unknown argument 'partion' for"),
        ("local", {"timeout_min": "long"}, 'submitit says: Parameter "timeout_min" expected type'),
        ("local", {"nodes": 2}, "submitit says: LocalExecutor can use only one node"),
    ],
)
def test_what_submitit_refuses_is_one_line(
    tmp_path: Path, cluster: str, parameters: dict[str, Any], words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match=words) as caught:
        Scheduler(tmp_path / "s", None, cluster, parameters)
    assert "\n" not in str(caught.value)


def test_a_folder_that_cannot_be_written_is_one_line() -> None:
    with pytest.raises(InputError, match="cannot write /proc/nowhere"):
        Scheduler(Path("/proc/nowhere/s"), None, "local", {})
