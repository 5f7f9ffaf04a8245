"""A foreign file whose labels cannot be."""

from pathlib import Path

import numpy as np
import pytest

from fastproj.core.errors import InputError
from fastproj.data.layout import DESCRIPTOR, HEADER, row_type
from fastproj.prepare.adopt import adopt
from fastproj.prepare.encode import Store
from tests.support.betons import digit_like, write_here


def test_a_label_beyond_all_classes_is_one_line_and_no_memory(tmp_path: Path) -> None:
    path = write_here(digit_like(np.random.default_rng(0), 5, 12, 4), tmp_path, Store("raw")).path
    path.with_suffix(".json").unlink()
    row = row_type(False)
    np.memmap(path, row, "r+", HEADER.itemsize + len(row) * DESCRIPTOR.itemsize, 5)["label"][3] = (
        2**40
    )
    with pytest.raises(InputError, match="a label is 1099511627776: it is damaged"):
        adopt(path)
    assert not path.with_suffix(".json").exists()
