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
    """The autocast dtype; ``auto`` is bfloat16 where the processor or GPU computes in it.

    Elsewhere it is float32 on a CPU and float16 on a GPU.
    """
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[
            name
        ]
    if device.type == "cpu":
        # Computed, bfloat16 is 1.9 times as fast (small ResNet, Intel Xeon with AMX, one core);
        # emulated, its convolutions take 3 to 5 times as long as float32.
        return torch.bfloat16 if computes_in_bfloat16(CPUINFO) else torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def computes_in_bfloat16(cpuinfo: Path) -> bool:
    """Whether the processor multiplies in bfloat16 by AVX-512 or AMX.

    Read from the flags that Linux lists in ``cpuinfo``; False where there is no such file. (torch
    answers too, but by private functions.)
    """
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return False
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(flags)
