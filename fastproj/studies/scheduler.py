"""Runs the jobs of a study through submitit: on Slurm, or by its local and debug executors.

A job of the scheduler brings one run to its end by the ordinary commands. Shortly before its time
limit, or when it is preempted, training saves where it stands, submitit puts the job into the queue
again, and it goes on.
"""

import contextlib
import math
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit

from fastproj.core.errors import InputError
from fastproj.core.files import writing
from fastproj.core.machine import cores
from fastproj.studies.plan import Job
from fastproj.studies.processes import reason
from fastproj.studies.running import (
    POLL,
    Executor,
    at_once,
    command,
    locked,
    log_file,
    spawn,
    state,
)

# Of one job, where the study says nothing else. A run may be requeued as often as it takes.
PARAMETERS = {"timeout_min": 240, "nodes": 1, "tasks_per_node": 1}
REQUEUES = 1000
LOOK = 2.0  # seconds between looks at the scheduler's jobs


@dataclass
class Work:
    """One job of the scheduler: called, it brings ``job`` to its end; returns why it could not."""

    folder: Path  # of the study
    job: Job
    threads: int | None = None  # of each rank; None: what the scheduler gives
    ranks: int = 1  # of each command, within the one task of the scheduler's job

    def __call__(self) -> str:
        """Train or resume, then evaluate; empty if the run is whole."""
        path = log_file(self.folder, self.job)
        environment = dict(os.environ)
        if self.threads is not None:
            environment.setdefault("OMP_NUM_THREADS", str(self.threads))
        # An earlier, killed start of the study may have left a job for the same run.
        with locked(path.with_suffix(".lock"), math.inf) as lock, open(path, "ab") as output:
            before = None
            while (found := state(self.job.run, self.job.command)) != "whole":
                if found == before:
                    return f"{self.job.run.path} is as {found} as before its last command"
                before = found
                since = output.tell()
                process = spawn(command(self.job, found), output, environment, (lock,), self.ranks)
                self._pid = process.pid
                while process.poll() is None:  # a wait would hold a lock that checkpoint needs
                    time.sleep(POLL)
                if process.returncode:
                    return f"{reason(path, since, process.returncode)} ({path})"
        return ""

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """submitit calls this before it requeues the job: the command saves and ends."""
        with contextlib.suppress(ProcessLookupError, ChildProcessError, AttributeError):
            os.kill(self._pid, 15)
            os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOWAIT)
        again = Work(self.folder, self.job, self.threads, self.ranks)
        return submitit.helpers.DelayedSubmission(again)


class Scheduler(Executor):
    """Runs jobs by submitit's executor ``cluster``: ``slurm``, ``local`` or ``debug``.

    On Slurm all jobs are one array, of which ``processes`` run at once at most (None: any number);
    the other two take jobs as room is. ``parameters`` are submitit's: ``timeout_min``,
    ``gpus_per_node``, ``slurm_partition``. ``ranks``: processes of each run, which share the one
    task of its job. Raises ``InputError`` where submitit refuses them, and where there is no Slurm.
    ``check`` and ``finished`` are the ``Executor``'s. Ctrl-C and
    SIGTERM cancel all jobs: their runs go on from the last checkpoint. Slurm's outlive the other
    signals, such as a closing terminal's, and the next start finds them.
    """

    def __init__(
        self,
        folder: Path,
        processes: int | None,
        cluster: str,
        parameters: Mapping[str, Any],
        check: Callable[[Job], None] = lambda job: None,
        finished: Callable[[Job], str] = lambda job: "",
        ranks: int = 1,
    ) -> None:
        super().__init__(folder, check, finished)
        self._processes, self._slurm, self._ranks = processes, cluster == "slurm", ranks
        array = {"slurm_array_parallelism": processes} if self._slurm and processes else {}
        try:
            with writing(folder):
                self._submitit = submitit.AutoExecutor(
                    folder / "submitit", cluster=cluster, slurm_max_num_timeout=REQUEUES
                )
            self._submitit.update_parameters(
                **{**PARAMETERS, "name": folder.name, **array, **parameters}
            )
        except InputError:
            raise
        except (RuntimeError, NameError, AssertionError, ValueError, TypeError) as error:
            text = str(error).partition("\n")[0]
            raise InputError(f"study.executor {cluster}: submitit says: {text}") from None

    def run(self, jobs: Sequence[Job]) -> None:
        waiting: list[Job] = []
        running: dict[Job, submitit.Job] = {}
        with self._listening(len(jobs)):
            earlier = self._submitted()
            for job in jobs:
                if self._look(job) is not None:
                    handle = earlier.get(job.name)
                    if handle is None or handle.done() or handle.state == "UNKNOWN":
                        waiting.append(job)
                    else:  # of a start that was killed: its jobs live on
                        running[job] = handle
            room = len(waiting) if self._slurm else at_once(self._processes, self._ranks)
            try:
                while (waiting or running) and not self.signal:
                    free = max(0, room - len(running))
                    self._submit(waiting[:free], running)
                    del waiting[:free]
                    for job in [job for job, handle in running.items() if handle.done()]:
                        self._end(job, running.pop(job))
                    time.sleep(LOOK if running and self._slurm else POLL)
            finally:
                if self._cancels(self.signal):
                    for handle in running.values():
                        handle.cancel(check=False)

    def _ends(self, number: int) -> str:
        return f"the scheduler's jobs {'are canceled' if self._cancels(number) else 'go on'}"

    def _cancels(self, number: int) -> bool:
        """Whether the jobs end with this process: Slurm's outlive a terminal that closes."""
        return not self._slurm or number in (0, signal.SIGINT, signal.SIGTERM)

    def _submit(self, jobs: Sequence[Job], running: dict[Job, submitit.Job]) -> None:
        if not jobs:
            return
        beside = at_once(self._processes, self._ranks) * self._ranks
        threads = None if self._slurm else max(1, cores() // beside)
        with self._submitit.batch():  # an array
            handles = [
                self._submitit.submit(Work(self.folder, job, threads, self._ranks)) for job in jobs
            ]
        for job, handle in zip(jobs, handles, strict=True):
            self.log.event("submit", job=job.name, id=handle.job_id)
            running[job] = handle

    def _submitted(self) -> dict[str, submitit.Job]:
        """Slurm's newest job for each of ours, from starts before this one.

        The other executors' jobs are known only to the process that started them.
        """
        if not self._slurm:
            return {}
        ids = {e["job"]: e["id"] for e in self.log.events() if e["event"] == "submit"}
        return {
            name: submitit.SlurmJob(folder=self.folder / "submitit", job_id=number)
            for name, number in ids.items()
        }

    def _end(self, job: Job, handle: submitit.Job) -> None:
        try:
            said = handle.result()
        except Exception as error:  # whatever the job raised, or submitit where it has no result
            said = " ".join(str(error).split())
        found = self._look(job) if not said else None
        if said or found is not None:
            self._fail(job, said or f"the scheduler's job {handle.job_id} left it {found}")
