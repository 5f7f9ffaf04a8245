"""Draw hostile input and count what is read or refused: ``python -m tests.faults.fuzz``."""

import argparse
import ctypes
import gc
import json
import os
import resource
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.faults.entries import FORK
from tests.faults.inputs import INPUTS

ROOM = 1 << 30  # bytes of address space that a case may add
PATIENCE = 10  # seconds of processor time for one case
WAITING = 60  # seconds, for one that waits instead
HOW = {"fuzz": "fuzzed", "guided": "fuzzed, led by coverage"}  # by module


def _stuck(number: int, frame: object) -> None:
    raise TimeoutError(f"more than {PATIENCE} s of work, or {WAITING} s of waiting")


# Runs cases until ``enough()``; it may end the process, once it has told the error of one.
Drive = Callable[[Any, Callable[[], bool], Callable[[BaseException | None], None]], None]


def at_random(
    each: Any, enough: Callable[[], bool], tell: Callable[[BaseException | None], None]
) -> None:
    """Hypothesis draws the cases, and counts them itself."""
    try:
        each()
    except BaseException as error:
        tell(error)
    else:
        tell(None)


def _try_all(
    name: str, cases: int, drive: Drive, told: Connection, count: "Synchronized[int]"
) -> None:
    """In a process of its own: tell what the first failure was; empty: there was none."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        strategy, read = INPUTS[name](Path(folder))
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, resource.RLIM_INFINITY))
        signal.signal(signal.SIGPROF, _stuck)
        signal.signal(signal.SIGALRM, _stuck)
        warnings.simplefilter("ignore")  # Pillow's and torch's, of files that are read or refused
        gc.freeze()

        @seed(0)
        @settings(
            max_examples=cases, deadline=None, database=None, suppress_health_check=[*HealthCheck],
            phases=[Phase.generate], print_blob=False,
        )  # fmt: skip
        @given(strategy)
        def each(case: Any) -> None:
            count.value += 1
            signal.setitimer(signal.ITIMER_PROF, PATIENCE)
            signal.alarm(WAITING)
            try:
                read(case)
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
                signal.alarm(0)
                if count.value % 20 == 0:  # modules and exceptions hold each other
                    gc.collect()

        def tell(error: BaseException | None) -> None:
            if error is None:
                told.send("")
            else:
                if isinstance(error, BaseExceptionGroup):  # a failure that did not come again
                    error = error.exceptions[0]
                *_, place = traceback.extract_tb(error.__traceback__)
                told.send(f"{type(error).__name__}: {error} ({place.name}, {place.line})")

        drive(each, lambda: count.value >= cases, tell)


def fuzz(name: str, cases: int, drive: Drive, module: str) -> dict[str, Any]:
    """One row of the results; ``module`` is the one that was started."""
    reader, writer = FORK.Pipe(duplex=False)
    count = FORK.Value(ctypes.c_long)
    process = FORK.Process(target=_try_all, args=(name, cases, drive, writer, count))
    process.start()
    writer.close()
    try:
        lost = reader.recv()
    except EOFError:
        process.join()
        lost = f"the process: exit code {process.exitcode}"
    process.join()
    return {
        "fault": f"{HOW[module]}: {INPUTS[name].__doc__}",
        "tried": count.value,
        "survived": count.value - bool(lost),
        "lost": {lost: 1} if lost else {},
        "command": f"python -m tests.faults.{module} --only {name} --cases {cases}",
    }


def main(drive: Drive = at_random, module: str = "fuzz") -> None:
    parser = argparse.ArgumentParser(prog=f"python -m tests.faults.{module}")
    parser.add_argument("--cases", type=int, default=1000, help="cases of each kind of input")
    parser.add_argument("--only", choices=INPUTS, nargs="+", help="some of the kinds")
    parser.add_argument("--out", type=Path, help="JSON; kinds that did not run stay as they are")
    given = parser.parse_args()
    results = json.loads(given.out.read_text()) if given.out and given.out.exists() else {}
    failed = False
    for name in given.only or INPUTS:
        result = fuzz(name, given.cases, drive, module)
        results[name if module == "fuzz" else f"{module}_{name}"] = result
        failed = failed or bool(result["lost"])
        print(f"{name}: {result['survived']} of {result['tried']}", *result["lost"], sep="\n  ",
              flush=True)  # fmt: skip
        if given.out:
            given.out.write_text(json.dumps(results, indent=1) + "\n")
    sys.exit(failed)


if __name__ == "__main__":
    main()
