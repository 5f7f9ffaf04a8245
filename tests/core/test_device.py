"""The precision that auto chooses."""

from pathlib import Path

import pytest
import torch

from fastproj.core.device import CPUINFO, choose_precision, fast_in_bfloat16

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("vendor", "flags", "fast"),
    [
        ("AuthenticAMD", "fpu avx512f avx512_bf16", True),
        ("AuthenticAMD", "fpu avx2 avx512f avx512_vnni", False),
        ("GenuineIntel", "fpu avx512_bf16 amx_bf16 amx_tile", True),
        ("GenuineIntel", "fpu avx512_bf16", False),  # slower than float32 there
        ("GenuineIntel", "fpu avx512_vnni amx_tile", False),
        ("", "", False),
    ],
)
def test_a_processor_says_whether_bfloat16_is_faster(
    tmp_path: Path, vendor: str, flags: str, fast: bool
) -> None:
    file = tmp_path / "cpuinfo"
    core = f"vendor_id\t: {vendor}\nmodel name\t: one\nflags\t\t: {flags}\nbugs\t\t: none\n"
    file.write_text(f"processor\t: 0\n{core}\nprocessor\t: 1\n{core}")
    assert fast_in_bfloat16(file) is fast


def test_without_a_list_of_flags_it_does_not(tmp_path: Path) -> None:
    assert not fast_in_bfloat16(tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text("Features\t: fp asimd bf16\n")  # another architecture
    assert not fast_in_bfloat16(tmp_path / "cpuinfo")


def test_auto_asks_this_processor_and_a_name_is_obeyed() -> None:
    asked = torch.bfloat16 if fast_in_bfloat16(CPUINFO) else torch.float32
    assert choose_precision("auto", CPU) == asked
    for name in ("float32", "bfloat16", "float16"):
        assert choose_precision(name, CPU) == getattr(torch, name)
