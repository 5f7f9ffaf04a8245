"""The same hostile input, led by coverage: ``python -m tests.faults.guided --cases 1000``.

It needs atheris (``pip install atheris``; Linux), which changes the bytes from which hypothesis
draws a case, and keeps those that reach branches of fastproj that no case before has reached.
"""

import os
import sys
from collections.abc import Callable
from typing import Any

import atheris

with atheris.instrument_imports(include=["fastproj"], enable_loader_override=False):
    from tests.faults import fuzz

# Its own limits are off, as ``fuzz`` has some; inputs may be long from the start.
FLAGS = ["-rss_limit_mb=0", "-timeout=0", "-max_len=65536", "-len_control=0", "-verbosity=0"]


def by_coverage(
    each: Any, enough: Callable[[], bool], tell: Callable[[BaseException | None], None]
) -> None:
    """Ends the process, as atheris does."""

    def target(data: bytes) -> None:
        try:
            each.hypothesis.fuzz_one_input(data)
        except BaseException as error:
            tell(error)
            os._exit(0)
        if enough():
            tell(None)
            os._exit(0)

    atheris.Setup([sys.argv[0], *FLAGS], target)
    atheris.Fuzz()


if __name__ == "__main__":
    fuzz.main(by_coverage, "guided")
