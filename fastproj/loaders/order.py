"""The order of samples: a function of (seed, epoch, step, rank) and nothing else.

Every epoch is one permutation of the whole set, drawn from (seed, epoch). Step s takes its next
``world_size * batch_size`` samples, and rank r the r-th ``batch_size`` of those. So two ranks see
the global batches that one rank would see, and the cursor (epoch, step) is the whole state.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from fastproj.core.errors import InputError


@dataclass(frozen=True)
class Order:
    """The order in which one rank reads a set of ``samples`` samples.

    ``batch_size`` is the number of samples per step on this rank. Without ``shuffle`` samples come
    in file order. Without ``drop_last`` the last step may be smaller, and some ranks may then get
    none; no sample comes twice.
    """

    samples: int
    batch_size: int
    seed: int = 0
    shuffle: bool = True
    drop_last: bool = True
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.drop_last and self.steps == 0:
            raise InputError(
                f"a batch of {self.batch_size} on {self.world_size} rank(s) is larger than the set "
                f"of {self.samples} samples: lower optim.batch_size to at most {self.samples}"
            )

    @property
    def steps(self) -> int:
        """Steps per epoch, the same on every rank."""
        whole = self.batch_size * self.world_size
        return self.samples // whole if self.drop_last else -(-self.samples // whole)

    def batch(self, epoch: int, step: int) -> np.ndarray:
        """Positions in the beton, int64, of this rank's samples at (epoch, step)."""
        start = (step * self.world_size + self.rank) * self.batch_size
        if not self.shuffle:
            return np.arange(start, min(start + self.batch_size, self.samples))
        return permutation(self.samples, self.seed, epoch)[start : start + self.batch_size]


@lru_cache(maxsize=4)
def permutation(samples: int, seed: int, epoch: int) -> np.ndarray:
    """The epoch's order of all samples (int64), cached because every step needs it."""
    order = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(samples)
    order.setflags(write=False)
    return order
