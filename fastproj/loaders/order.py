"""Which sample comes next: a function of (seed, epoch, step, rank) and of nothing else.

Every epoch is one permutation of the whole set, drawn from (seed, epoch). Step s takes the next
``world * batch_size`` samples of it and rank r the r-th share of those, so two ranks see the
global batches that one rank would have seen, and a cursor (epoch, step) says all there is to
know about where a run stands.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from fastproj.errors import InputError


@dataclass(frozen=True)
class Order:
    """The order of one rank over a set of ``samples`` samples.

    ``batch_size`` is this rank's share of a step. Without ``shuffle`` the samples come in the
    order of the file; without ``drop_last`` the last step may be smaller, and on several ranks
    some of them may then get nothing (never a sample twice).
    """

    samples: int
    batch_size: int
    seed: int = 0
    shuffle: bool = True
    drop_last: bool = True
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if self.drop_last and self.steps == 0:
            raise InputError(
                f"a batch of {self.batch_size} on {self.world} rank(s) is larger than the set of "
                f"{self.samples} samples: lower optim.batch_size to at most {self.samples}"
            )

    @property
    def steps(self) -> int:
        """Steps of an epoch, the same on every rank."""
        whole = self.batch_size * self.world
        return self.samples // whole if self.drop_last else -(-self.samples // whole)

    def batch(self, epoch: int, step: int) -> np.ndarray:
        """Positions in the beton, int64, of this rank's samples at (epoch, step)."""
        start = (step * self.world + self.rank) * self.batch_size
        if not self.shuffle:
            return np.arange(start, min(start + self.batch_size, self.samples))
        return permutation(self.samples, self.seed, epoch)[start : start + self.batch_size]


@lru_cache(maxsize=4)
def permutation(samples: int, seed: int, epoch: int) -> np.ndarray:
    """The epoch's order of all samples (int64), kept because every step asks for it."""
    order = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(samples)
    order.setflags(write=False)
    return order
