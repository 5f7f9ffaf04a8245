"""For all tests: those marked ``gpu`` skip, visibly, where there is none; Ctrl-C is heard."""

import os
import signal

import pytest
import torch


def pytest_configure() -> None:
    # One thread per process, also in those that tests start: the models are tiny, and threads that
    # wait for each other take most of the time where another process computes on the same cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    # A shell that runs the tests in the background lets them and their children ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
