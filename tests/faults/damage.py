"""What hostile input is drawn from: damaged bytes, and values of JSON that nobody expects."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from fastproj.prepare.encode import Store
from fastproj.prepare.writer import PAGE

Fuzzed = tuple[SearchStrategy[Any], Callable[[Any], None]]
"""Cases to draw, and what must read or refuse each of them.

The function raises, whatever it is, unless the case is refused with an ``InputError`` or read as
what it was before it was damaged.
"""

NUMBERS = [0, 1, 2, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1]
STORES = (Store("raw"), Store("jpeg", quality=90), Store("square", side=12))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12)
    | st.sampled_from([10**400, "", "../..", "/", "nan", "0" * 300]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner,
                                                                max_size=3),
    max_leaves=6,
)  # fmt: skip


class Damage:
    """Content with some changes, made when it is asked for as ``bytes``: hypothesis keeps cases."""

    def __init__(self, whole: bytes, changes: list[tuple[str, int, bytes | int]]) -> None:
        self.whole, self.changes = whole, changes

    def __bytes__(self) -> bytes:
        data = bytearray(self.whole)
        for change, at, what in self.changes:
            at = min(at, len(data))
            if isinstance(what, bytes):
                data[at : at + (len(what) if change == "write" else 0)] = what
            elif change == "flip":
                data[at : at + 1] = bytes(byte ^ what for byte in data[at : at + 1])
            elif change == "drop":
                del data[at : at + what]
            else:
                del data[at:]
        return bytes(data)

    def __repr__(self) -> str:
        return f"{self.changes} in {len(self.whole)} bytes"


@st.composite
def damaged(take: DrawFn, whole: bytes, places: Sequence[int] = ()) -> Damage:
    """``whole`` with up to four of its ``places`` changed: bits, numbers, cuts, repeated parts."""
    changes: list[tuple[str, int, bytes | int]] = []
    for _ in range(take(st.integers(1, 4))):
        at = take(st.sampled_from(places or range(len(whole))))
        change = take(st.integers(0, 9))
        if change < 4:
            changes.append(("flip", at, take(st.integers(1, 255))))
        elif change < 7:
            near = st.integers(0, 2 * len(whole))
            number = take(st.sampled_from(NUMBERS) | near | near.map(PAGE.__add__))
            size = take(st.sampled_from([2, 4, 8]))
            changes.append(("write", at, (number % 256**size).to_bytes(size, "little")))
        elif change == 7:
            changes.append(("cut", at, 0))
        elif change == 8:
            changes.append(("drop", at, take(st.integers(1, 64))))
        else:
            start = take(st.integers(0, len(whole)))
            changes.append(("insert", at, whole[start : start + take(st.integers(1, 64))]))
    return Damage(whole, changes)


def write_again(path: Path, content: bytes | Damage) -> Path:
    path.write_bytes(bytes(content))
    return path
