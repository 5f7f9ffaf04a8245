"""Signals that ask for a stop between two steps."""

import signal
from collections.abc import Iterator

import pytest

from fastproj.core.interruption import STOPS, Interruption


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


def test_what_the_process_was_started_to_ignore_stays_ignored(number: signal.Signals) -> None:
    signal.signal(number, signal.SIG_IGN)
    with Interruption() as interruption:
        signal.raise_signal(number)
        assert interruption.signal == 0
    assert signal.getsignal(number) == signal.SIG_IGN
