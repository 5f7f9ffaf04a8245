"""The compiled library: found or named as missing, and agreed upon by C and Python."""

import ctypes
import subprocess
from pathlib import Path

import pytest

from fastproj import augment, native
from fastproj.errors import InputError
from fastproj.loaders import fill

MENDED = r"the native part is not built for here \(.*\): run \./setup\.sh"


def test_a_missing_library_says_how_to_build_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "none.so")
    with pytest.raises(InputError, match=MENDED):
        native.library.__wrapped__()


def test_a_library_from_before_a_part_was_written_says_how_to_build_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(fill.__file__).with_suffix(".c")
    old = tmp_path / "old.so"
    subprocess.run(
        ["gcc", "-shared", "-fPIC", source, "-o", old, "-ljpeg", "-lm"], check=True
    )
    monkeypatch.setattr(native, "LIBRARY", old)
    with pytest.raises(InputError, match=MENDED.replace(".*", ".*fastproj_augment.*")):
        native.library.__wrapped__()


@pytest.mark.parametrize(
    ("room", "structs"),
    [(fill, {"Batch": fill._Batch, "Group": fill._Group}), (augment, {"Batch": augment._Batch})],
    ids=["fill", "augment"],
)
def test_the_structs_are_the_same_in_c(room, structs: dict[str, type], tmp_path: Path) -> None:
    """ctypes and C agree on where everything lies."""
    source = Path(room.__file__).with_suffix(".c").resolve()
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
    told = subprocess.run([program], capture_output=True, text=True, check=False).stdout.split()
    assert [int(size) for size in told] == [
        number
        for struct in structs.values()
        for number in (
            ctypes.sizeof(struct), *(getattr(struct, f).offset for f, _ in struct._fields_)
        )
    ]  # fmt: skip
