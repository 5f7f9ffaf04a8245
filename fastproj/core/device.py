"""Which device to compute on, in which precision, and how a process is set up for it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from fastproj.core.errors import InputError
from fastproj.core.machine import keep_freed_memory

CPUINFO = Path("/proc/cpuinfo")


def choose_device(name: str) -> torch.device:
    """``auto`` is CUDA where there is one; ``mps`` (Apple's GPU) has never been tried.

    Raises InputError for a device that is not there.
    """
    if name == "mps":
        if not torch.backends.mps.is_available():
            raise InputError("run.device is mps but torch sees no Apple GPU: use --run.device cpu")
        return torch.device("mps")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "run.device is cuda but torch sees no GPU: run python -m fastproj.doctor, or use "
            "--run.device cpu"
        )
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def prepare_device(device: torch.device, number: int = 0, *, tf32: bool) -> torch.device:
    """Set this process up to compute on ``device``; returns the device with its number.

    On CUDA, cuDNN times its algorithms for each shape, because batches have few shapes, and float32
    is multiplied in ``tf32`` or exactly. Training may use TF32, evaluation does not: torch's own
    default differs between matrix products (exact) and convolutions (TF32).
    """
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        _set_tf32(tf32)
        return torch.device("cuda", number)
    if device.type == "cpu":
        keep_freed_memory()
    return device


@contextmanager
def exact_float32() -> Iterator[None]:
    """Within it, CUDA multiplies float32 exactly, also in a process that trains in TF32."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    _set_tf32(False)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def _set_tf32(on: bool) -> None:
    torch.set_float32_matmul_precision("high" if on else "highest")
    torch.backends.cudnn.allow_tf32 = on


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """The autocast dtype; ``auto`` is bfloat16 where it is faster on this processor or GPU.

    Elsewhere it is float32 on a CPU and float16 on a GPU.
    """
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[
            name
        ]
    if device.type == "cpu":
        return torch.bfloat16 if fast_in_bfloat16(CPUINFO) else torch.float32
    native = torch.cuda.is_bf16_supported(including_emulation=False)  # since Ampere
    return torch.bfloat16 if native else torch.float16


def fast_in_bfloat16(cpuinfo: Path) -> bool:
    """Whether the processor trains faster in bfloat16: one with AMX, or AMD's with AVX-512 BF16.

    A step of the small ResNet in bfloat16 had 1.9 times float32's images/s on an Intel Xeon with
    AMX (one core) and 1.8 times on an AMD EPYC with AVX-512 BF16 (2 cores), but 0.77 times on an
    Intel Xeon with AVX-512 BF16 alone (2 cores, n = 8; ResNet-18: 0.67 times, n = 4). Where
    bfloat16 is emulated, convolutions take 3 to 5 times as long.

    Read from the vendor and the flags that Linux lists in ``cpuinfo``; False where there is no such
    file.
    """
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return False
    fields = {name.strip(): value.split() for name, _, value in (x.partition(":") for x in lines)}
    flags = fields.get("flags", [])
    amd = fields.get("vendor_id") == ["AuthenticAMD"]
    return "amx_bf16" in flags or (amd and "avx512_bf16" in flags)
