"""The compiled library: found or named as missing, and with the same structs in C and Python."""

import ctypes
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from fastproj.augment import native as augment
from fastproj.core import native
from fastproj.core.errors import InputError
from fastproj.evaluation.probes import nearest
from fastproj.loaders import fill
from fastproj.prepare.encode import Store
from tests.support.betons import digit_like, write

BUILD_HINT = r"the native part, .*, is not built for here \(.*\): in a checkout run \./setup\.sh"


def test_a_missing_library_says_how_to_build_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    with pytest.raises(InputError, match=BUILD_HINT):
        native.library.__wrapped__()


def test_a_library_from_before_a_part_was_written_says_how_to_build_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(fill.__file__).with_suffix(".c")
    old = tmp_path / "_native.so"
    subprocess.run(["gcc", "-shared", "-fPIC", source, "-o", old, "-ljpeg", "-lm"], check=True)
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    with pytest.raises(InputError, match=BUILD_HINT.replace(r"\(.*", r"\(.*fastproj_augment.*")):
        native.library.__wrapped__()


@pytest.mark.parametrize(
    ("part", "room", "structs"),
    [
        ("fill", fill, {"Batch": native.Batch, "CropSpec": native.CropSpec}),
        ("augment", augment, {"Batch": augment._Batch}),
        ("nearest", nearest, {"Search": nearest._Search}),
    ],
    ids=["fill", "augment", "nearest"],
)
def test_the_structs_are_the_same_in_c(
    part: str, room, structs: dict[str, type], tmp_path: Path
) -> None:
    """ctypes and C agree on the size of each struct and the offset of each field."""
    source = Path(room.__file__).with_name(f"{part}.c").resolve()
    lines = "".join(
        f'printf("%zu ", sizeof({name}));'
        + "".join(f'printf("%zu ", offsetof({name}, {field}));' for field, _ in struct._fields_)
        for name, struct in structs.items()
    )
    (tmp_path / "main.c").write_text(
        f'#include <stddef.h>\n#include <stdio.h>\n#include "{source}"\n'
        f"int main(void) {{ {lines} }}"
    )
    program = tmp_path / "main"
    subprocess.run(["gcc", tmp_path / "main.c", "-o", program, "-ljpeg", "-lm"], check=True)
    printed = subprocess.run([program], capture_output=True, text=True, check=False).stdout.split()
    assert [int(size) for size in printed] == [
        number
        for struct in structs.values()
        for number in (
            ctypes.sizeof(struct), *(getattr(struct, f).offset for f, _ in struct._fields_)
        )
    ]  # fmt: skip


def test_without_libjpeg_raw_stores_work_and_jpeg_stores_say_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(fill.__file__).with_suffix(".c")
    others = [
        Path(augment.__file__).with_name("augment.c"),
        Path(nearest.__file__).with_suffix(".c"),
    ]
    plain = tmp_path / "_native.so"
    build = ["gcc", "-shared", "-fPIC", "-DWITHOUT_JPEG", source, *others, "-o", plain, "-lm"]
    subprocess.run(build, check=True)
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    built = native.library.__wrapped__()
    for room in (native, fill):
        monkeypatch.setattr(room, "library", lambda: built)

    rng = np.random.default_rng(0)
    raw = write(digit_like(rng, 4, 8, 2), tmp_path / "raw", Store("raw"))
    boxes = np.broadcast_to(np.array([0, 0, 8, 8]), (1, 4, 4))
    crops = torch.zeros(1, 4, 8, 8, 3, dtype=torch.uint8).permute(0, 1, 4, 2, 3)
    fill.Fill(raw, np.arange(4), [boxes], [crops]).run()
    stored = np.stack([raw.data[p : p + 192].reshape(8, 8, 3) for p in raw.pointer])
    assert (crops[0].permute(0, 2, 3, 1).numpy() == stored).all()

    jpeg = write(digit_like(rng, 4, 8, 2), tmp_path / "jpeg", Store("jpeg", quality=90))
    with pytest.raises(InputError, match="built without libjpeg: use --data.engine reference"):
        fill.Fill(jpeg, np.arange(4), [boxes], [crops])
