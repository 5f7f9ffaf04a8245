"""A module as it is evaluated, for a moment."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Put ``module`` in eval mode, then give every submodule its own training flag back.

    So nothing is dropped, and batch norm uses its running statistics and leaves them as they are.
    """
    flags = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in flags:
            part.training = training
