"""The precision that auto chooses."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastproj import evaluate
from fastproj.core.device import (
    CPUINFO,
    choose_precision,
    exact_float32,
    fast_in_bfloat16,
    prepare_device,
)
from fastproj.settings import RUN, load

CPU = torch.device("cpu")
GIVEN = ["--run.device", "cpu", "--data.train", "x", "--data.val", "x"]


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


@pytest.mark.parametrize(("native", "dtype"), [(True, torch.bfloat16), (False, torch.float16)])
def test_a_gpu_that_emulates_bfloat16_takes_float16(
    native: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def supported(including_emulation: bool = True) -> bool:
        return including_emulation or native

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert choose_precision("auto", torch.device("cuda")) == dtype


@pytest.fixture
def flags() -> Iterator[None]:
    """What torch was told before is told again; it takes all of this without a GPU."""
    cudnn, products = torch.backends.cudnn, torch.get_float32_matmul_precision()
    before = cudnn.benchmark, cudnn.allow_tf32
    yield
    cudnn.benchmark, cudnn.allow_tf32 = before
    torch.set_float32_matmul_precision(products)


def arithmetic() -> tuple[str, bool]:
    return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize(("tf32", "said"), [(True, ("high", True)), (False, ("highest", False))])
def test_a_gpu_is_prepared_for_training_or_evaluation(flags: None, tf32: bool, said: tuple) -> None:
    torch.backends.cudnn.benchmark = False
    assert prepare_device(torch.device("cuda"), 3, tf32=tf32) == torch.device("cuda", 3)
    assert torch.backends.cudnn.benchmark and arithmetic() == said
    with exact_float32():
        assert arithmetic() == ("highest", False)
    assert arithmetic() == said


def test_a_cpus_arithmetic_stays_as_it_is(flags: None) -> None:
    before = arithmetic()
    assert prepare_device(CPU, tf32=not before[1]) == CPU and arithmetic() == before


def test_arithmetic_is_as_before_after_an_error(flags: None) -> None:
    prepare_device(torch.device("cuda"), tf32=True)
    with pytest.raises(ZeroDivisionError), exact_float32():
        raise ZeroDivisionError
    assert arithmetic() == ("high", True)


def test_evaluation_asks_for_float32_without_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, bool] = {}
    monkeypatch.setattr(
        evaluate, "prepare_device", lambda device, number, **how: (asked.update(how), device)[1]
    )
    assert evaluate.start_device(load(RUN, GIVEN, "", "")) == CPU
    assert asked == {"tf32": False}
