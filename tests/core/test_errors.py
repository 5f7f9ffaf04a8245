"""What ends a command with one line, and what does not."""

import numpy as np
import pytest
import torch

from fastproj.core.errors import InputError, SettingError, run_command

# As torch 2.15 says it.
CUDA = """CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 139.81 GiB
of which 512.00 MiB is free. Process 7 has 139.30 GiB memory in use."""


def ask_for_too_much(argv) -> None:
    torch.empty(1 << 46, dtype=torch.float64)


def raises(error: Exception):
    def main(argv) -> None:
        raise error

    return main


@pytest.mark.parametrize(
    ("main", "code", "words"),
    [
        (raises(InputError("two\nlines")), 1, "error: two lines"),
        (raises(SettingError("x")), 2, "error: x"),
        (raises(FileNotFoundError(2, "none", "a")), 1, "error: [Errno 2] none: 'a'"),
        (ask_for_too_much, 1, "error: out of memory (524,288.00 GiB asked for, "),
        (lambda argv: np.empty(1 << 46), 1, "error: out of memory (524,288.00 GiB asked for, "),
        (raises(MemoryError()), 1, "error: out of memory ("),
        (raises(torch.OutOfMemoryError(CUDA)), 1,
         "error: out of memory (2.00 GiB asked for, 0.50 GiB free): lower --optim.batch_size or"),
        (raises(KeyboardInterrupt()), 130, "stopped"),
    ],
)  # fmt: skip
def test_one_line_and_an_exit_code(main, code, words, capsys) -> None:
    with pytest.raises(SystemExit) as left:
        run_command(main, [])
    out, err = capsys.readouterr()
    assert left.value.code == code and out == ""
    assert err.startswith(words) and err.count("\n") == 1


def test_a_bug_is_raised() -> None:
    with pytest.raises(RuntimeError, match="a bug"):
        run_command(raises(RuntimeError("a bug")), [])
