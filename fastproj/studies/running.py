"""Runs the jobs of a study by the ordinary commands, each a process of its own, several at once.

What is whole is left alone and what was cut is resumed, so that a study may be ended and started
again at any moment. The study's journal says what ran beside what.
"""

import fcntl
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import DEVNULL, Popen
from types import FrameType
from typing import IO, Any, Literal

from fastproj.core.children import die_with
from fastproj.core.errors import InputError
from fastproj.core.files import append, writing
from fastproj.core.interruption import STOPS
from fastproj.core.machine import cores, memory
from fastproj.core.progress import Progress, write_line
from fastproj.evaluation.results import read_evaluation
from fastproj.runs import checkpoint, journal
from fastproj.runs.folder import RunFolder
from fastproj.studies.plan import Job
from fastproj.studies.processes import own_memory, reason

State = Literal["absent", "cut", "trained", "whole"]
POLL = 0.1  # seconds between looks at the processes
PATIENCE = 60.0  # seconds that runs of an earlier, killed start have to end
# What a run that is there takes from the study anew: where data lie and what it runs on, and where
# it goes on training also how it is logged and kept. What data it has seen is compared by content,
# by train where it resumes, and by ``scores``.
MOVED = ("run.device", "data.")
FREE = (
    *MOVED,
    *("train.compile", "train.log_every", "train.log_to", "train.checkpoint_every", "train.keep"),
)
LOGS = "logs"  # folder of what the commands print
LEAST = 2 << 30  # bytes: what a run is taken to need until the study has seen more
SAVING = "3600"  # seconds that torchrun gives ranks which it has told to end; by itself 30


class StudyError(InputError):
    """What is wrong with the study, and not with one of its runs."""


def state(run: RunFolder, by: str = "train") -> State:
    """How far a run of the command ``by`` has come.

    ``absent`` is also a run without a checkpoint, which a kill left before its first step.
    ``trained``: it has ended, and was not evaluated since. ``whole`` needs no checkpoint any more:
    scores that belong to the last step are kept when the weights are thrown away. Other commands
    than train score before they end, and leave ``trained`` out. Raises ``InputError`` where journal
    or scores are damaged.
    """
    ends = journal.read(run.metrics) if run.metrics.exists() else []
    ends = [event["step"] for event in ends if event["event"] == "end"]
    scored = ends and run.evaluation.exists()
    if scored and by != "train":
        return "whole"
    if scored:
        evaluation = read_evaluation(run)
        if evaluation.checkpoint["step"] == ends[-1] and not evaluation.missing:
            return "whole"
    if checkpoint.latest(run.checkpoints) is None:
        if run.evaluation.exists():
            raise InputError(
                f"{run.path} has scores of another step than its last and no checkpoint: remove "
                "the folder"
            )
        return "absent"
    return "trained" if ends and by == "train" else "cut"


def command(job: Job, found: State) -> list[str]:
    """The words after ``fastproj`` of the next command of a job whose run has come so far.

    A run that is there reads its own settings; those that may have changed since are given anew.
    """
    if found == "absent":
        return [job.command, *job.argv()]
    free = FREE if found == "cut" else MOVED
    changed = [f"--{name}={x}" for name, x in job.overrides.items() if name.startswith(free)]
    words = [job.command, "--run.resume"] if found == "cut" else ["evaluate"]
    return [*words, str(job.run.path), *changed]


def spawn(argv: Sequence[str], output: IO[bytes], environment: Mapping[str, str],
          keep: Sequence[int] = (), ranks: int = 1) -> Popen:  # fmt: skip
    """Start ``fastproj`` in a session of its own, on so many ranks; it dies with this process.

    ``keep``: descriptors that it inherits; of several ranks torchrun does.
    """
    program = ["-m", "fastproj", *argv]
    if ranks > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        program = [*torchrun, *program]
        environment = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": SAVING, **environment}
    return Popen(
        [sys.executable, *program], stdin=DEVNULL, stdout=output, stderr=output,
        env=environment, pass_fds=keep, preexec_fn=die_with(os.getpid()), start_new_session=True,
    )  # fmt: skip


def at_once(processes: int | None, ranks: int, gpus: int = 0) -> int:
    """Runs at once: ``processes``, or as many as GPUs, else cores, suffice for ``ranks`` each."""
    return processes or max(1, (gpus or cores()) // ranks)


def log_file(folder: Path, job: Job) -> Path:
    """Where the commands of a job print, in the study's folder."""
    return folder / LOGS / f"{job.name.replace('/', '-')}.log"


@dataclass
class Log:
    """``study.jsonl``: one object per line.

    ``start`` and ``end`` of each command of each job on this machine, ``submit`` of each job that
    went to a scheduler.
    """

    path: Path

    def event(self, kind: str, **fields: Any) -> None:
        """Append one line."""
        with writing(self.path), open(self.path, "ab", buffering=0) as file:
            if file.tell():  # a kill may have left half a line
                with open(self.path, "rb") as before:
                    before.seek(-1, os.SEEK_END)
                    if before.read(1) != b"\n":
                        file.write(b"\n")
            line = json.dumps({"event": kind, "time": time.time(), **fields}) + "\n"
            append(file, line.encode())

    def events(self) -> list[dict[str, Any]]:
        """Every whole line."""
        found = []
        for line in self.path.read_bytes().splitlines() if self.path.exists() else ():
            try:
                event = json.loads(line)
            except ValueError:
                continue
            found += [event] if isinstance(event, dict) else []
        return found

    def together(self) -> set[str]:
        """The jobs that were not known to be alone on a machine: their rates say little.

        Those that ran beside another one at any time, and those of a scheduler, whose machines may
        do other work.
        """
        events = self.events()
        starts = [event for event in events if event["event"] == "start" and event["beside"]]
        return {name for event in starts for name in (event["job"], *event["beside"])} | {
            event["job"] for event in events if event["event"] == "submit"
        }


@contextmanager
def locked(path: Path, patience: float | None = None) -> Iterator[int]:
    """Hold the lock file ``path``; its descriptor is for the children, who keep it while they live.

    So a second start waits until the runs of a killed one have ended. Raises ``InputError`` after
    ``patience`` seconds (``PATIENCE``).
    """
    with writing(path):
        file = open(path, "ab")  # noqa: SIM115
    with file:
        end, told = time.monotonic() + (PATIENCE if patience is None else patience), False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise InputError(
                        f"{path.parent} is at work: another study, or a run of one, holds "
                        f"{path.name}; wait until it has ended"
                    ) from None
                if not told:
                    print(f"waiting for the runs of another start in {path.parent}",
                          file=sys.stderr, flush=True)  # fmt: skip
                told = True
                time.sleep(POLL)
        yield file.fileno()


@dataclass
class _Running:
    job: Job
    found: State
    command: str
    process: Popen
    output: IO[bytes]
    since: int  # where the command's own output begins
    slot: int
    told: bool = False  # to end
    began: float = field(default_factory=time.monotonic)


class Executor:
    """Brings jobs to their end, and tells how far it is; ``run`` is a subclass's.

    ``check`` is called with each job whose folder is there, ``finished`` with each that is whole,
    and returns a few words. An ``InputError`` of them is that job's, a ``StudyError`` ends the
    study. ``problems``: one line per job that failed, by its name. ``signal``: the number of the
    signal that ended ``run``, or 0.
    """

    def __init__(
        self, folder: Path, check: Callable[[Job], None], finished: Callable[[Job], str]
    ) -> None:
        self.folder, self.log = folder, Log(folder / "study.jsonl")
        self.problems: dict[str, str] = {}
        self.signal = 0
        self._check, self._finished = check, finished
        self._bar = Progress(0, lines=False)
        with writing(folder):
            (folder / LOGS).mkdir(parents=True, exist_ok=True)

    def run(self, jobs: Sequence[Job]) -> None:
        """Run what is not whole; returns when nothing is left, or after a signal."""
        raise NotImplementedError

    def _ends(self, number: int) -> str:
        """What becomes of the runs after the signal."""
        return "the runs save where they stand"

    @contextmanager
    def _listening(self, total: int) -> Iterator[None]:
        """A bar of ``total`` jobs, and signals that ask for a stop only set ``signal``."""
        heard = [number for number in STOPS if signal.getsignal(number) != signal.SIG_IGN]
        before = {number: signal.signal(number, self._stop) for number in heard}
        self._bar = Progress(total, unit="runs", lines=False, keep=True)
        try:
            with self._bar:
                yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        again, self.signal = self.signal, self.signal or number
        if again and number == signal.SIGINT:  # the user means now
            self.signal = number
            raise KeyboardInterrupt
        if again:
            return
        write_line(
            f"{signal.Signals(number).name}: {self._ends(number)}, and the same command goes on; "
            "Ctrl-C again ends them now"
        )

    def _look(self, job: Job, before: State | None = None) -> State | None:
        """How far the job is; None where it is whole or has failed, and is counted.

        ``before``: what the last command found, and was to change.
        """
        try:
            found = state(job.run, job.command)
            if found != "absent":
                self._check(job)
            if found == before:
                raise InputError(f"{job.run.path} is as {found} as before its last command")
            said = self._finished(job) if found == "whole" else ""
        except StudyError:
            raise
        except InputError as error:
            self._fail(job, str(error))
            return None
        if found != "whole":
            return found
        self._count(f"{job.name}: {said}")
        return None

    def _fail(self, job: Job, reason: str) -> None:
        self.problems[job.name] = f"{job.name}: {reason}"
        self._count(f"failed: {self.problems[job.name]}")

    def _count(self, line: str) -> None:
        """One job more is done."""
        self._bar.say(f"{len(self.problems)} failed")
        self._bar.update()
        write_line(f"{time.strftime('%H:%M:%S')}  {self._bar.done}/{self._bar.total}  {line}")


class Runner(Executor):
    """Runs jobs as processes of this machine, and stops all of them when it is stopped.

    ``processes``: at once at most; None is one per GPU, or one per core without a GPU. A run starts
    beside others only where the memory has room for it: for as much as the largest run of the
    study has taken, at least ``LEAST``. ``gpus``: how many there are; each of the jobs at once
    takes one, in turns. ``lock``: a descriptor that the children inherit. ``ranks``: processes of
    each run, each of which takes a core or a GPU. Raises ``InputError`` for fewer GPUs than ranks.
    """

    def __init__(
        self,
        folder: Path,
        processes: int | None,
        gpus: int = 0,
        lock: int | None = None,
        check: Callable[[Job], None] = lambda job: None,
        finished: Callable[[Job], str] = lambda job: "",
        ranks: int = 1,
    ) -> None:
        super().__init__(folder, check, finished)
        if 0 < gpus < ranks:
            raise InputError(
                f"study.ranks {ranks} takes as many GPUs, and this machine shows {gpus}: lower it; "
                "for ranks on a CPU set CUDA_VISIBLE_DEVICES to nothing"
            )
        self._processes, self._gpus, self._ranks = at_once(processes, ranks, gpus), gpus, ranks
        self._keep = () if lock is None else (lock,)
        self._largest = LEAST

    def run(self, jobs: Sequence[Job]) -> None:
        waiting, running = list(jobs), list[_Running]()
        with self._listening(len(jobs)):
            try:
                while (waiting and not self.signal) or running:
                    while waiting and not self.signal and self._room(running):
                        self._begin(waiting.pop(0), running)
                    if running:
                        time.sleep(POLL)
                    for one in [one for one in running if one.process.poll() is not None]:
                        running.remove(one)
                        self._end(one, running)
                    if self.signal:
                        _terminate(running)
            except KeyboardInterrupt:
                for one in running:
                    one.process.kill()
                raise
            finally:
                _terminate(running)
                for one in running:
                    one.process.wait()
                    one.output.close()

    def _room(self, running: Sequence[_Running]) -> bool:
        """Whether one more run has a process and memory; the first one always has."""
        if not running:
            return True
        taken = [own_memory(one.process.pid) for one in running]
        self._largest = max(self._largest, *taken)
        growth = sum(self._largest - size for size in taken)
        return len(running) < self._processes and memory()[1] - growth >= self._largest

    def _begin(self, job: Job, running: list[_Running], before: State | None = None) -> None:
        """Start the next command of the job, or count the job where none is left."""
        found = self._look(job, before)
        if found is None:
            return
        argv = command(job, found)
        slot = min(set(range(self._processes)) - {one.slot for one in running})
        threads = max(1, cores() // (self._processes * self._ranks))
        environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
        if self._gpus:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            names = visible.split(",") if visible else [str(n) for n in range(self._gpus)]
            own = range(slot * self._ranks, (slot + 1) * self._ranks)
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(names[n % self._gpus] for n in own)
        beside = sorted(one.job.name for one in running)
        self.log.event("start", job=job.name, command=argv[0], found=found, beside=beside)
        path = log_file(self.folder, job)
        with writing(path):
            output = open(path, "ab")  # noqa: SIM115
        since = output.tell()
        process = spawn(argv, output, environment, self._keep, self._ranks)
        running.append(_Running(job, found, argv[0], process, output, since, slot))

    def _end(self, one: _Running, running: list[_Running]) -> None:
        one.output.close()
        code, seconds = one.process.returncode, time.monotonic() - one.began
        self.log.event("end", job=one.job.name, command=one.command, code=code, seconds=seconds)
        if self.signal:
            return
        if code:
            path = Path(one.output.name)
            self._fail(one.job, f"{reason(path, one.since, code)} ({path})")
        else:
            self._begin(one.job, running, one.found)


def _terminate(running: Sequence[_Running]) -> None:
    """Ask every process to end, once: training saves where it stands, and a second time ends it."""
    for one in running:
        if not one.told and one.process.poll() is None:
            one.process.terminate()
        one.told = True
