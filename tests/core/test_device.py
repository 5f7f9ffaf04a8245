"""The precision that auto chooses."""

from pathlib import Path

import pytest
import torch

from fastproj.core.device import CPUINFO, choose_precision, computes_in_bfloat16

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("flags", "computes"),
    [
        ("fpu avx512f avx512_bf16", True),
        ("fpu amx_bf16 amx_tile", True),
        ("fpu avx2 avx512f avx512_vnni amx_tile", False),
        ("", False),
    ],
)
def test_a_processor_says_whether_it_computes_in_bfloat16(
    tmp_path: Path, flags: str, computes: bool
) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(f"processor\t: 0\nmodel name\t: one\nflags\t\t: {flags}\nbugs\t\t: none\n")
    assert computes_in_bfloat16(file) is computes


def test_without_a_list_of_flags_it_does_not(tmp_path: Path) -> None:
    assert not computes_in_bfloat16(tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text("Features\t: fp asimd bf16\n")  # another architecture
    assert not computes_in_bfloat16(tmp_path / "cpuinfo")


def test_auto_asks_this_processor_and_a_name_is_obeyed() -> None:
    asked = torch.bfloat16 if computes_in_bfloat16(CPUINFO) else torch.float32
    assert choose_precision("auto", CPU) == asked
    for name in ("float32", "bfloat16", "float16"):
        assert choose_precision(name, CPU) == getattr(torch, name)


@pytest.mark.skipif(not CPUINFO.exists(), reason="no /proc/cpuinfo here")
def test_torch_says_the_same_of_this_processor() -> None:
    ours = computes_in_bfloat16(CPUINFO)
    assert ours == torch.cpu._is_avx512_bf16_supported()  # no processor has AMX without it
