"""Hostile betons and manifests."""

import contextlib
import io
import json
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from fastproj.core.errors import InputError
from fastproj.data.beton import Beton, open_beton
from fastproj.data.layout import DESCRIPTOR, HEADER, TABLE, row_type
from fastproj.data.verify import FirstRead, verify
from fastproj.loaders.boxes import Crop, draw
from fastproj.loaders.crop import batch_like
from fastproj.loaders.fill import Fill
from fastproj.prepare.adopt import adopt
from fastproj.prepare.writer import PAGE
from tests.faults.damage import STORES, VALUES, Damage, Fuzzed, damaged, write_again
from tests.support.betons import digit_like, photographs, write_here


class Dense(NamedTuple):
    """A beton without the hole between its rows and its first image.

    ``content``: all other bytes, of which ``head`` end with the last row. ``places``: those of
    header, fields, rows and table, without the unused part of the fields' descriptors.
    """

    beton: Beton
    content: bytes
    head: int
    places: list[int]

    def write(self, path: Path, content: bytes) -> Path:
        """``content`` with the hole; a new file, as what maps the old one keeps that."""
        path.unlink(missing_ok=True)
        with path.open("wb") as file:
            file.write(content[: self.head])
            if len(content) > self.head:
                file.seek(PAGE)
                file.write(content[self.head :])
        return path


def _betons(folder: Path) -> list[Dense]:
    sources = [digit_like(np.random.default_rng(0), 5, 12, 4),
               photographs(np.random.default_rng(0), folder / "photographs", 5),
               digit_like(np.random.default_rng(0), 5, 16, 4)]  # fmt: skip
    pairs = zip(sources, STORES, strict=True)
    return [_dense(write_here(source, folder / store.kind, store)) for source, store in pairs]


def _dense(beton: Beton) -> Dense:
    row = row_type(beton.manifest.store == "square")
    rows = HEADER.itemsize + len(row) * DESCRIPTOR.itemsize
    head = rows + len(beton) * row.itemsize
    content = beton.data[:head].tobytes() + beton.data[PAGE:].tobytes()
    starts = range(HEADER.itemsize, rows, DESCRIPTOR.itemsize)
    used = [at for start in starts for at in range(start, start + 64)]
    table = range(len(content) - len(beton) * TABLE.itemsize, len(content))
    return Dense(beton, content, head, [*range(HEADER.itemsize), *used, *range(rows, head), *table])


def _decode(beton: Beton) -> torch.Tensor:
    """Every image as the engine ``stream`` reads it, without its hash compared."""
    positions = np.arange(len(beton))
    boxes = draw([Crop(8)], beton, positions, 0, 0)
    crops = [batch_like(1, len(beton), 8, torch.device("cpu"))]
    Fill(beton, positions, boxes, crops).run()
    return crops[0]


COLUMNS = [f.name for f in fields(Beton) if f.name not in ("path", "manifest", "files", "data")]


def _same_or_refused(whole: Dense, content: bytes) -> None:
    with suppress(InputError):
        opened = open_beton(whole.write(whole.beton.path, content))
        with suppress(InputError):  # what decodes does not rely on the hashes
            _decode(opened)
        FirstRead(opened).check(np.arange(len(opened)))
        for name in COLUMNS:
            assert np.array_equal(getattr(opened, name), getattr(whole.beton, name)), name


def beton_tables(folder: Path) -> Fuzzed:
    """header, fields, rows and table of a beton"""
    betons = _betons(folder)
    cases = [st.tuples(st.just(i), damaged(b.content, b.places)) for i, b in enumerate(betons)]
    return st.one_of(cases), lambda case: _same_or_refused(betons[case[0]], bytes(case[1]))


def beton_bits(folder: Path) -> Fuzzed:
    """one bit of a byte of a beton's header, fields, rows or table (14,000 cases: of every byte)"""
    betons = _betons(folder)
    places = [(b, at) for b in betons for at in range(len(b.content)) if at < b.head]
    places += [(b, at) for b in betons for at in b.places if at >= b.head]

    def read(number: int) -> None:
        whole, at = places[number]
        content = bytearray(whole.content)
        content[at] ^= 1 << at % 8
        _same_or_refused(whole, bytes(content))

    return st.integers(0, len(places) - 1), read


def adopted_files(folder: Path) -> Fuzzed:
    """an FFCV file that is adopted: header, fields, rows and table"""
    betons = _betons(folder)[:2]
    path = folder / "foreign.beton"

    def read(case: tuple[int, Damage]) -> None:
        path.with_suffix(".json").unlink(missing_ok=True)
        with suppress(InputError), contextlib.redirect_stderr(io.StringIO()):
            _decode(adopt(betons[case[0]].write(path, bytes(case[1]))))

    cases = [st.tuples(st.just(i), damaged(b.content, b.places)) for i, b in enumerate(betons)]
    return st.one_of(cases), read


@st.composite
def _changed_manifest(take: DrawFn, content: dict[str, Any]) -> bytes:
    name = take(st.sampled_from([*content]) | st.text(max_size=8))
    return json.dumps({**content, name: take(VALUES)}).encode()


def manifests(folder: Path) -> Fuzzed:
    """manifest: any bytes, any value"""
    whole = _betons(folder)[0].beton
    path = whole.path.with_suffix(".json")
    text = path.read_bytes()

    def read(content: bytes | Damage) -> None:
        with suppress(InputError):
            opened = open_beton(write_again(path, content).with_suffix(".beton"))
            FirstRead(opened).check(np.arange(len(opened)))
            _decode(opened)
            with suppress(InputError):
                verify(opened.path)
            np.testing.assert_array_equal(opened.label, whole.label)

    return damaged(text) | _changed_manifest(json.loads(text)), read
