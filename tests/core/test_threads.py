"""Small pieces of work by single threads."""

import pytest
import torch

from fastproj.core.threads import each


@pytest.mark.parametrize("broken", [False, True])
def test_each_piece_has_one_thread_and_torch_has_its_own_again(broken: bool) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)

    def piece(number: int) -> tuple[int, int]:
        if broken and number == 5:
            raise ValueError("five")
        return number, torch.get_num_threads()

    try:
        if broken:
            with pytest.raises(ValueError, match="five"):
                list(each(piece, range(9)))
        else:
            assert list(each(piece, range(9))) == [(number, 1) for number in range(9)]
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
