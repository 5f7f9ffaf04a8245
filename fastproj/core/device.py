"""Which device to compute on, and in which precision."""

from pathlib import Path

import torch

from fastproj.core.errors import InputError

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
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


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
