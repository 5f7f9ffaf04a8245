"""Signals that ask for a stop between two steps."""

import hashlib
import os
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Thread

import pytest

from fastproj.core import dist, interruption
from fastproj.core.interruption import STOPS, Interruption
from tests.support.ranks import on_ranks


@pytest.fixture(params=STOPS, ids=[number.name for number in STOPS])
def number(request: pytest.FixtureRequest) -> Iterator[signal.Signals]:
    before = signal.getsignal(request.param)
    yield request.param
    signal.signal(request.param, before)


def test_the_first_signal_asks_and_the_handler_goes_with_the_run(
    number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    signal.signal(number, signal.SIG_DFL)
    with Interruption() as interruption:
        assert not interruption.requested(agree=True)
        signal.raise_signal(number)
        signal.raise_signal(number)  # at once: the first one's echo
        assert interruption.signal == number and interruption.requested(agree=False)
    assert signal.getsignal(number) == signal.SIG_DFL
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{number.name}: finishing the step under way")


def long_operation(arrivals: Sequence[tuple[float, signal.Signals]]) -> None:
    """One call into C, as a backward pass: signals come in the midst, their handlers after it."""

    def send() -> None:
        for pause, number in arrivals:
            time.sleep(pause)
            os.kill(os.getpid(), number)

    sender = Thread(target=send)
    sender.start()
    while sender.is_alive():
        hashlib.pbkdf2_hmac("sha256", b"", b"", 3_000_000)  # about a second
    sender.join()


def test_a_signal_in_a_long_operation_is_a_first_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(interruption, "SAME", 0.4)
    said: list[float] = []
    write = interruption.write_line
    monkeypatch.setattr(
        interruption, "write_line", lambda line: (said.append(time.monotonic()), write(line))
    )
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup may have started the tests
    with Interruption() as asked:
        long_operation([(0.1, signal.SIGTERM), (0.05, signal.SIGHUP)])
        ended = time.monotonic()
        assert asked.signal in (signal.SIGTERM, signal.SIGHUP)
    assert said[0] < ended - 0.3  # in the midst of the operation
    signal.signal(signal.SIGHUP, before)
    assert capsys.readouterr().err.count("finishing the step under way") == 1


def test_a_second_signal_in_a_long_operation_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interruption, "SAME", 0.2)
    monkeypatch.setattr(interruption, "GRACE", 300.0)
    with pytest.raises(SystemExit) as end, Interruption():
        long_operation([(0.1, signal.SIGTERM), (0.4, signal.SIGTERM)])
        time.sleep(1)
    assert end.value.code == 128 + signal.SIGTERM


def told() -> list[int]:
    """One of two ranks is signaled: what both are told, and with which signal they leave."""
    with Interruption() as interruption:
        before = interruption.requested(agree=True)
        if dist.rank() == 1:
            signal.raise_signal(signal.SIGTERM)
        between = interruption.requested(agree=False)
        return [before, between, interruption.requested(agree=True), int(interruption.signal)]


def test_a_signal_to_one_rank_stops_all_and_none_ends_well(tmp_path: Path) -> None:
    assert on_ranks(2, told, tmp_path) == [[False, False, True, signal.SIGTERM]] * 2


def test_what_the_process_was_started_to_ignore_stays_ignored(number: signal.Signals) -> None:
    signal.signal(number, signal.SIG_IGN)
    with Interruption() as interruption:
        signal.raise_signal(number)
        assert interruption.signal == 0
    assert signal.getsignal(number) == signal.SIG_IGN
