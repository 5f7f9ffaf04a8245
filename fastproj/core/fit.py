"""What fits into memory, tried where something did not."""

import gc
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch

from fastproj.core.errors import memory_shortage
from fastproj.core.machine import return_freed_memory

T = TypeVar("T")


def first_that_fits(tries: Iterable[T], work: Callable[[T], object]) -> T | None:
    """The first of ``tries`` that ``work`` does without running out of memory; None: none.

    Call it outside the handler of what failed before: an exception's frames hold their tensors.
    """
    for one in tries:
        _let_go()
        try:
            work(one)
        except (MemoryError, RuntimeError) as error:
            if not memory_shortage(error):
                raise
        else:
            return one
    return None


def _let_go() -> None:
    """Free what the failed work held."""
    with torch.enable_grad():  # a backward pass that failed keeps its tensors until the next one
        torch.zeros((), requires_grad=True).backward()
    gc.collect()
    return_freed_memory()
    torch.cuda.empty_cache()  # does nothing where CUDA is not in use


def halves(number: int, smallest: int) -> list[int]:
    """``number`` halved, rounded down, again and again, none below ``smallest``."""
    found = []
    while (number := number // 2) >= smallest:
        found.append(number)
    return found
