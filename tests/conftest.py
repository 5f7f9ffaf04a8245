"""For all tests: those marked ``gpu`` skip, visibly, where there is none; Ctrl-C is heard."""

import signal

import pytest
import torch


def pytest_configure() -> None:
    # A shell that runs the tests in the background lets them and their children ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
