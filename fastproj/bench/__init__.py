"""Speed of every stage beside its peers, measured in the same run on the same machine."""

import time
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import torch


class Timing(NamedTuple):
    """Seconds of one call: median, fastest and slowest of ``repeats``."""

    median: float
    min: float
    max: float
    repeats: int

    def rates(self, images: int) -> dict[str, float | int]:
        """The images/s of a call that does ``images``: median, slowest and fastest."""
        return {
            "images_per_second": images / self.median,
            "min": images / self.max,
            "max": images / self.min,
            "repeats": self.repeats,
        }


def measure(fn: Callable[[], object], warmup: int = 2, repeats: int = 7) -> Timing:
    """Time ``fn()`` on the wall clock, after ``warmup`` calls; waits for a GPU's work to end."""
    seconds = []
    for turn in range(warmup + repeats):
        start = time.perf_counter()
        fn()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if turn >= warmup:
            seconds.append(time.perf_counter() - start)
    return Timing(median(seconds), min(seconds), max(seconds), repeats)
