"""The watch over the next batch."""

import time
from collections.abc import Iterator

import pytest

from fastproj.core import watchdog


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The times at which a process would have ended."""
    found: list[float] = []
    monkeypatch.setattr(watchdog, "TICK", 0.02)
    monkeypatch.setattr(watchdog, "_end", lambda seconds: found.append(time.monotonic()))
    return found


def slow(count: int, seconds: float) -> Iterator[int]:
    for number in range(count):
        time.sleep(seconds)
        yield number


def test_batches_that_come_slowly_but_come_end_nothing(ended: list[float]) -> None:
    """A GPU whose host does nothing but wait: no look ever finds it at work."""
    assert list(watchdog.watched(slow(15, 0.1), 0.3)) == list(range(15))
    assert not ended


def test_one_that_does_not_come_ends_the_process(ended: list[float]) -> None:
    start = time.monotonic()
    list(watchdog.watched(slow(1, 3.0), 0.3))
    assert 0.25 < ended[0] - start < 2.5
