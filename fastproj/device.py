"""Which device to compute on, and in which precision."""

import torch

from fastproj.errors import InputError


def choose_device(name: str) -> torch.device:
    """``auto`` is CUDA where there is one. Raises InputError for a device that is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "run.device is cuda but torch sees no GPU: run python -m fastproj.doctor, or use "
            "--run.device cpu"
        )
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """The autocast dtype; ``auto`` is float32 on a CPU, else bfloat16 where the GPU has it."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[
            name
        ]
    if device.type == "cpu":
        return torch.float32  # bfloat16 convolutions are 3-5 times slower without AMX
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
