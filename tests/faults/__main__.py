"""Make faults and count what survives them: ``python -m tests.faults --tries 100 --out FILE``."""

import argparse
import json
import shutil
import sys
import tempfile
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path

from tests.faults.entries import FORK, Entry
from tests.faults.table import ENTRIES, missing

LONGEST = 600  # seconds of one try


def _report(entry: Entry, seed: int, folder: Path, answer: Connection) -> None:
    try:
        answer.send(entry(seed, folder))
    except BaseException as error:
        answer.send(f"the try itself: {type(error).__name__}: {error}")


def attempt(entry: Entry, seed: int, shared: Path) -> str:
    """What one try lost; it runs in a process of its own, in an empty folder in ``shared``."""
    folder = shared / f"{entry.__name__}-{seed}"
    folder.mkdir()
    reader, writer = FORK.Pipe(duplex=False)
    process = FORK.Process(target=_report, args=(entry, seed, folder, writer))
    process.start()
    writer.close()
    try:
        lost = reader.recv() if reader.poll(LONGEST) else f"time: no answer within {LONGEST} s"
    except EOFError:
        lost = "the process that tried"
    process.kill()
    process.join()
    shutil.rmtree(folder)
    return lost.replace(str(folder), "DIR")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--tries", type=int, default=100, help="tries of each fault: seeds 0, 1, …")
    parser.add_argument("--only", choices=ENTRIES, nargs="+", help="some of the faults")
    parser.add_argument("--out", type=Path, help="JSON; faults that did not run stay as they are")
    given = parser.parse_args()
    results = json.loads(given.out.read_text()) if given.out and given.out.exists() else {}
    with tempfile.TemporaryDirectory() as shared:
        for name in given.only or ENTRIES:
            if lacks := missing(name):
                print(f"{name}: skipped, there is no {lacks}")
                continue
            losses = [attempt(ENTRIES[name], seed, Path(shared)) for seed in range(given.tries)]
            results[name] = {
                "fault": ENTRIES[name].__doc__,
                "tried": given.tries,
                "survived": losses.count(""),
                "lost": dict(Counter(filter(None, losses))),
                "command": f"python -m tests.faults --only {name} --tries {given.tries}",
            }
            print(f"{name}: {losses.count('')} of {given.tries} survived", *filter(None, losses),
                  sep="\n  ", flush=True)  # fmt: skip
            if given.out:
                given.out.write_text(json.dumps(results, indent=1) + "\n")
    sys.exit(any(result["survived"] < result["tried"] for result in results.values()))


if __name__ == "__main__":
    main()
