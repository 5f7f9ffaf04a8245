"""The container's layout against FFCV's own, the check before reading, and the full check."""

import base64
import json
import math
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastproj.core.errors import InputError
from fastproj.core.files import replacing
from fastproj.data.beton import Beton, open_beton
from fastproj.data.foreign import TYPES
from fastproj.data.layout import (
    DESCRIPTOR,
    HEADER,
    IMAGE_TYPE,
    INT_TYPE,
    JPEG,
    RAW,
    TABLE,
    VERSION,
    row_type,
)
from fastproj.data.manifest import (
    FORMAT,
    Manifest,
    pack_hashes,
    pack_names,
    read_manifest,
    write_manifest,
)
from fastproj.data.verify import FirstRead, verify
from fastproj.prepare.encode import Store, encode
from fastproj.prepare.writer import PAGE, write_container

ROOT = Path(__file__).resolve().parents[2]
STORES = [Store("raw"), Store("jpeg", quality=90), Store("square", side=12)]


def pixels(count: int, seed: int = 0) -> list[np.ndarray]:
    """Images of several sizes, all different: uint8 (H, W, 3)."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(4, 40, (count, 2))
    return [rng.integers(0, 256, (h, w, 3), np.uint8) for h, w in sizes]


def write(path: Path, images: list[np.ndarray], store: Store = STORES[0]) -> Path:
    """A beton and its manifest from pixels; labels go 0, 1, 2, 0, …"""
    samples = [encode(Image.fromarray(x), i % 3, store)[0] for i, x in enumerate(images)]
    with replacing(path) as file:
        written = write_container(file, iter(samples), len(samples), store.kind == "square")
    manifest = Manifest(
        format=FORMAT,
        fastproj="0",
        command="a test",
        dataset="folder",
        split="train",
        samples=written.samples,
        classes=("ant", "bee", "cat"),
        store=store.kind,
        quality=store.quality,
        max_resolution=store.max_resolution,
        side=store.side,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        file_bytes=written.file_bytes,
        sha256=written.sha256,
        content=written.content,
        skipped=(),
        hashes=pack_hashes(written.hashes),
        sources=pack_names([f"ant/é\n{i}\udcff.png" for i in range(len(samples))]),
    )
    write_manifest(manifest, path.with_suffix(".json"))
    return path


@pytest.fixture
def beton(tmp_path: Path) -> Path:
    return write(tmp_path / "train.beton", pixels(40))


def flip(path: Path, position: int, bit: int = 1) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ bit]))


def test_layout_is_ffcvs():
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.rgb_image import IMAGE_MODES
    from ffcv.types import (
        ALLOC_TABLE_TYPE,
        CURRENT_VERSION,
        TYPE_ID_HANDLER,
        FieldDescType,
        HeaderType,
        get_metadata_type,
    )

    def flat(dtype):  # names aside: FFCV numbers its columns
        return dtype.itemsize, [
            (offset, flat(kind) if kind.names else kind.str)
            for kind, offset in ((value[0], value[1]) for value in dtype.fields.values())
        ]

    assert flat(HEADER) == flat(HeaderType) and HEADER.names == HeaderType.names
    assert TABLE == ALLOC_TABLE_TYPE
    assert DESCRIPTOR.itemsize == FieldDescType.itemsize
    assert [DESCRIPTOR.fields[n][1] for n in DESCRIPTOR.names] == [
        FieldDescType.fields[n][1] for n in FieldDescType.names
    ]
    for square, ints in ((False, 2), (True, 4)):
        theirs = get_metadata_type([RGBImageField(), *[IntField()] * ints])
        assert flat(row_type(square)) == flat(theirs)
    assert (IMAGE_MODES["jpg"], IMAGE_MODES["raw"]) == (JPEG, RAW)
    assert TYPE_ID_HANDLER[IMAGE_TYPE] is RGBImageField and TYPE_ID_HANDLER[INT_TYPE] is IntField
    # What --adopt reads: every field type of FFCV's 1.0.2 and of its repository's head (3a12966).
    assert CURRENT_VERSION == VERSION
    assert {*TYPES, 255} == {*TYPE_ID_HANDLER}  # 255: a type of the user's own
    for number, (_, kind) in TYPES.items():
        field = TYPE_ID_HANDLER[number]
        theirs = field.metadata_type.fget(None)  # no field type's row depends on its arguments
        assert (flat(kind) if kind.names else kind) == (flat(theirs) if theirs.names else theirs)


@pytest.mark.parametrize("store", STORES, ids=lambda store: store.kind)
def test_ffcvs_reader_reads_what_open_beton_reads(tmp_path, store):
    from ffcv.reader import Reader

    images = pixels(10)
    path = write(tmp_path / "train.beton", images, store)
    ours, theirs = open_beton(path), Reader(str(path))
    image = theirs.metadata["f0"]
    assert theirs.field_names[:3] == ["image", "label", "index"]
    np.testing.assert_array_equal(ours.mode, image["mode"])
    np.testing.assert_array_equal(ours.width, image["width"])
    np.testing.assert_array_equal(ours.height, image["height"])
    np.testing.assert_array_equal(ours.pointer, image["data_ptr"])
    np.testing.assert_array_equal(ours.label, theirs.metadata["f1"])
    np.testing.assert_array_equal(ours.index, theirs.metadata["f2"])
    np.testing.assert_array_equal(ours.length, theirs.alloc_table["size"])
    assert [(x.shape[1], x.shape[0]) for x in images] == (
        list(zip(ours.source_width, ours.source_height, strict=True))
    )
    if store.kind == "raw":
        for i, x in enumerate(images):
            np.testing.assert_array_equal(ours.stored(i).reshape(x.shape), x)
    if store.kind == "square":
        assert theirs.field_names[3:] == ["width", "height"]
        np.testing.assert_array_equal(ours.source_width, theirs.metadata["f3"])
        assert set(ours.width) == set(ours.height) == {12}


def test_no_sample_straddles_a_page(tmp_path):
    """Pages grow for a large sample; FFCV reads whole pages, and looks a pointer's page up."""
    small, large = np.zeros((700, 700, 3), np.uint8), np.zeros((2000, 2000, 3), np.uint8)
    beton = open_beton(write(tmp_path / "a.beton", [small] * 8 + [large] + [small] * 4))
    page = int(beton.data[4:8].view("<u4")[0])
    assert page == 2 * PAGE  # 12 MB need 16 MiB
    first, last = beton.pointer // page, (beton.pointer + beton.length - 1) // page
    np.testing.assert_array_equal(first, last)
    assert (np.diff(beton.pointer) >= beton.length[:-1]).all()
    beton = open_beton(write(tmp_path / "b.beton", [small] * 8))
    assert int(beton.data[4:8].view("<u4")[0]) == PAGE
    np.testing.assert_array_equal(beton.pointer // PAGE, (beton.pointer + beton.length - 1) // PAGE)


def test_an_intact_beton_opens_and_verifies(beton):
    opened = open_beton(beton)
    assert len(opened) == 40 and opened.classes == ("ant", "bee", "cat")
    np.testing.assert_array_equal(opened.label, np.arange(40) % 3)
    assert opened.manifest.source_names()[7] == "ant/é\n7\udcff.png"
    seen: list[int] = []
    assert verify(beton, seen.append) == []
    assert sum(seen) == 40


def test_a_cut_beton_does_not_open(beton):
    size = beton.stat().st_size
    rng = np.random.default_rng(0)
    ends = [1, 23, 24, 3000, 4000, PAGE, PAGE + 100, size - 24, size - 1]
    for end in ends + rng.integers(0, size, 20).tolist():
        with beton.open("r+b") as file:
            whole = file.read()
            file.truncate(end)
        with pytest.raises(InputError, match=r"cut, damaged|too short"):
            open_beton(beton)
        beton.write_bytes(whole)
    assert len(open_beton(beton)) == 40
    beton.write_bytes(whole + b"\0")
    with pytest.raises(InputError, match="cut, damaged"):
        open_beton(beton)


@pytest.mark.parametrize("content", [b"", b"not a beton\n" * 900, b"\0" * 5000], ids=len)
def test_other_files_do_not_open(beton, content):
    beton.write_bytes(content)
    with pytest.raises(InputError, match=r"too short|not a beton"):
        open_beton(beton)


def test_ffcvs_own_file_of_two_fields_is_called_what_it_is(tmp_path):
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    path = tmp_path / "theirs.beton"
    fields = {"image": RGBImageField(write_mode="raw"), "label": IntField()}
    writer = DatasetWriter(str(path), fields, num_workers=1)
    writer.from_indexed_dataset([(x, i) for i, x in enumerate(pixels(4))])
    with pytest.raises(
        InputError, match=r"no manifest .*image \(RGB image\), label \(int\).* --adopt"
    ):
        open_beton(path)


def test_missing_files_are_named(beton, tmp_path):
    with pytest.raises(InputError, match="no such beton"):
        open_beton(tmp_path / "val.beton")
    with pytest.raises(InputError, match="no such beton"):
        open_beton(tmp_path)
    beton.with_suffix(".json").unlink()
    with pytest.raises(InputError, match="no manifest beside"):
        open_beton(beton)


def test_a_killed_writers_header_does_not_open(beton):
    """FFCV's writer leaves table pointer 0 until the end, and then reads a million rows."""
    with beton.open("r+b") as file:
        file.seek(16)
        file.write(bytes(8))
    with pytest.raises(InputError, match="half written"):
        open_beton(beton)


def test_the_manifest_of_another_file_is_refused(beton, tmp_path):
    """Same count, same sizes, other pixels: only the content digest tells."""
    other = write(tmp_path / "other.beton", [255 - x for x in pixels(40)])
    assert other.stat().st_size == beton.stat().st_size
    shutil.copy(other.with_suffix(".json"), beton.with_suffix(".json"))
    with pytest.raises(InputError, match="content digest.*manifest is of another file"):
        open_beton(beton)
    shorter = write(tmp_path / "shorter.beton", pixels(39))
    shutil.copy(shorter.with_suffix(".json"), beton.with_suffix(".json"))
    with pytest.raises(InputError, match="samples.*manifest is of another file"):
        open_beton(beton)


@pytest.mark.parametrize("store", STORES, ids=lambda store: store.kind)
def test_every_flipped_byte_is_found_and_its_sample_named(tmp_path, store):
    path = write(tmp_path / "train.beton", pixels(40), store)
    beton = open_beton(path)
    pointer, length = beton.pointer.copy(), beton.length.copy()
    data_start, table_start = int(pointer[0]), len(beton.data) - 40 * TABLE.itemsize
    row = row_type(store.kind == "square")
    rows_start = HEADER.itemsize + len(row.names) * DESCRIPTOR.itemsize
    rows_end = rows_start + 40 * row.itemsize
    rng = np.random.default_rng(1)
    whole = path.read_bytes()

    for sample in rng.integers(0, 40, 10):
        position = int(pointer[sample] + rng.integers(0, length[sample]))
        bit = 1 << int(rng.integers(0, 8))
        flip(path, position, bit)
        (damage,) = verify(path)
        assert damage.index == sample
        assert damage.source == f"ant/é\n{sample}\udcff.png"
        flip(path, position, bit)

    for start, end in ((0, rows_start), (rows_start, rows_end), (table_start, len(whole))):
        for position in rng.integers(start, end, 8).tolist():
            bit = 1 << int(rng.integers(0, 8))
            flip(path, position, bit)
            try:
                found = verify(path)
            except InputError:
                found = ["does not open"]
            assert found, f"nobody missed byte {position}"
            flip(path, position, bit)

    flip(path, data_start - 1)  # padding
    (damage,) = verify(path)
    assert damage.index is None and "outside the samples" in damage.reason
    flip(path, data_start - 1)
    assert path.read_bytes() == whole and verify(path) == []


def test_many_damaged_samples_are_all_named(beton):
    opened = open_beton(beton)
    damaged = [3, 4, 17, 39]
    for sample in damaged:
        flip(beton, int(opened.pointer[sample] + 1))
    assert [damage.index for damage in verify(beton)] == damaged


def test_a_changed_label_is_named(beton):
    row = row_type(False)
    position = HEADER.itemsize + 3 * DESCRIPTOR.itemsize + 5 * row.itemsize
    flip(beton, position + row.fields["label"][1], 3)  # 2 becomes 1: another class
    assert open_beton(beton).label[5] == 1
    (damage,) = verify(beton)
    assert damage.index == 5


def test_rows_that_cannot_be_are_refused_on_opening(beton):
    rows_at = HEADER.itemsize + 3 * DESCRIPTOR.itemsize
    row = row_type(False)
    table_at = beton.stat().st_size - 40 * TABLE.itemsize
    for position, message in (
        (rows_at + 6 * row.itemsize + row.fields["label"][1] + 1, "label outside .* sample 6"),
        (rows_at + 6 * row.itemsize + row.fields["index"][1], "index .* sample 6"),
        (rows_at + 6 * row.itemsize, "raw size|no such image mode"),
        (rows_at + 6 * row.itemsize + 1, "raw size .* sample 6"),
        (rows_at + 6 * row.itemsize + 6, "pointers .* sample 6"),
        (table_at + 6 * TABLE.itemsize, "sample ids"),
        (table_at + 6 * TABLE.itemsize + 8, "pointers .* sample 6"),
        (table_at + 6 * TABLE.itemsize + 16, "raw size .* sample 6"),
        (table_at + 6 * TABLE.itemsize + 21, "reach past .* sample 6"),
    ):
        flip(beton, position, 2)
        with pytest.raises(InputError, match=message):
            open_beton(beton)
        flip(beton, position, 2)
    open_beton(beton)


@pytest.mark.parametrize("store", STORES, ids=lambda store: store.kind)
def test_a_flipped_bit_of_header_rows_or_table_is_refused_or_changes_nothing(tmp_path, store):
    """Every byte of header, rows and table, and some of the descriptors, mostly unused."""
    path = write(tmp_path / "train.beton", pixels(5), store)
    row = row_type(store.kind == "square")
    rows = HEADER.itemsize + len(row.names) * DESCRIPTOR.itemsize
    end = path.stat().st_size
    columns = [x.name for x in fields(Beton) if x.name not in ("path", "manifest", "files", "data")]
    whole = {name: getattr(open_beton(path), name).copy() for name in columns}
    refused = 0
    for position in (
        *range(HEADER.itemsize),
        *range(HEADER.itemsize, rows, 29),
        *range(rows, rows + 5 * row.itemsize),
        *range(end - 5 * TABLE.itemsize, end),
    ):
        flip(path, position, 1 << position % 8)
        try:
            beton = open_beton(path)
            FirstRead(beton).check(np.arange(5))
        except InputError:
            refused += 1
        else:
            for name in columns:
                np.testing.assert_array_equal(getattr(beton, name), whole[name], str(position))
        flip(path, position, 1 << position % 8)
    assert refused > 200


def test_a_table_in_another_order_is_sorted(beton):
    """FFCV's own writer leaves its table in the order its workers finished."""
    opened = open_beton(beton)
    expected = opened.pointer.copy()
    with beton.open("r+b") as file:
        table_at = beton.stat().st_size - 40 * TABLE.itemsize
        file.seek(table_at)
        table = np.frombuffer(file.read(), TABLE)
        file.seek(table_at)
        file.write(np.random.default_rng(0).permutation(table).tobytes())
    np.testing.assert_array_equal(open_beton(beton).pointer, expected)
    (damage,) = verify(beton)
    assert damage.index is None


def test_a_damaged_manifest_is_told_from_a_damaged_beton(beton):
    path = beton.with_suffix(".json")
    manifest = read_manifest(path)
    hashes = bytearray(base64.b64decode(manifest.hashes))
    hashes[0] ^= 1
    write_manifest(replace(manifest, hashes=pack_hashes(bytes(hashes))), path)
    with pytest.raises(InputError, match=r"train.json: damaged, the beton itself is intact"):
        verify(beton)
    write_manifest(replace(manifest, sources="AAAA"), path)
    with pytest.raises(InputError, match="train.json: damaged"):
        verify(beton)


def test_manifests_that_are_none_are_refused(beton):
    path = beton.with_suffix(".json")
    good = json.loads(path.read_text())
    for content, message in (
        ("", "not a manifest"),
        (path.read_text()[:100], "not a manifest"),
        ("[1]", "keys differ"),
        (json.dumps({**good, "more": 1}), "keys differ"),
        (json.dumps({**good, "format": 99}), "format is 99, not 1"),
        (json.dumps(good).replace("{", '{"side": 3, ', 1), "side stands in it twice"),
        ("[" * 100_000, "not a manifest"),
        (json.dumps(good).replace('"samples": 40', f'"samples": {"9" * 5000}'), "not a manifest"),
    ):
        path.write_text(content)
        with pytest.raises(InputError, match=message) as refused:
            open_beton(beton)
        assert "\n" not in str(refused.value)


WRONG = {
    "mean": [0.5, [], [0.5], [0.5] * 4, "0.5", None, [0.5, 0.5, None], [0.5, 0.5, "0.5"],
             [0.5, 0.5, math.nan], [0.5, 0.5, 10**400], [0.5, 0.5, -0.1], [0.5, 0.5, True]],
    "std": [[-0.2, 0.2, 0.2], [math.inf, 0.2, 0.2], [0.2]],
    "samples": [0, -1, 40.0, "40", None, True, 2**63],
    "classes": [None, "abc", [1, 2], [["a"]], {}],
    "store": ["png", None, []], "quality": [0, 101, "90", 90.5], "side": [0, -8, "8"],
    "max_resolution": [0, 1.5], "file_bytes": [0, None, "1"], "format": ["1", None, []],
    "sha256": ["", "x" * 64, None, 5], "content": ["0" * 63, None],
    "skipped": [None, [1], [{"source": 1}]], "sources": [None, 3], "command": [None, []],
    "hashes": [None, "AAAA", "?", 7, "é"],
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_every_value_of_a_manifest_is_checked(beton, name):
    path = beton.with_suffix(".json")
    good = json.loads(path.read_text())
    for value in WRONG[name]:
        path.write_text(json.dumps({**good, name: value}))
        with pytest.raises(InputError, match=rf"train.json: (its )?{name} .*write the beton"):
            open_beton(beton)


def test_an_original_size_that_no_image_has_is_refused(tmp_path):
    path = write(tmp_path / "train.beton", pixels(5), STORES[2])
    rows = np.memmap(path, row_type(True), "r+", HEADER.itemsize + 5 * DESCRIPTOR.itemsize, 5)
    rows["width"][2] = 1 << 59
    rows.flush()
    with pytest.raises(InputError, match="original size too large .* the first is sample 2"):
        open_beton(path)


def test_manifest_round_trip(beton):
    manifest = read_manifest(beton.with_suffix(".json"))
    copy = beton.with_name("copy.json")
    write_manifest(manifest, copy)
    assert read_manifest(copy) == manifest


def test_replacing_leaves_the_old_file_after_a_failure(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), replacing(path) as file:
            file.write(b"new")
            raise error
        assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with replacing(path) as file:
        file.write(b"new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_one_line_and_leaves_the_old_file(tmp_path):
    """A limit on file size stands in for the disk: the same refusal from the same call."""
    path = tmp_path / "file"
    path.write_text("old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        refused = pytest.raises(InputError, match="cannot write .*file: File too large")
        with refused, replacing(path) as file:
            file.write(bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_no_write_permission_is_one_line(tmp_path):
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o555)
    program = """if True:
        import os, pathlib, sys
        from fastproj.core.errors import run_command
        from fastproj.core.files import replacing

        def main(argv):
            with replacing(pathlib.Path("x.beton")):
                pass

        os.chdir(sys.argv[1])
        if os.geteuid() == 0:  # root may write anywhere
            os.setuid(65534)
        run_command(main)
    """
    for parent in [tmp_path, *tmp_path.parents][:3]:  # another user must get through
        parent.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1
    why = "Permission denied; make room or fix the permissions"
    assert done.stderr == f"error: cannot write x.beton: {why}\n"
