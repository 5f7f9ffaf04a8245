"""Time and memory of a training step of the sparse head, beside plain autograd doing the same."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastproj.bench import measure
from fastproj.optim import Lars, parameter_groups
from fastproj.sparse import Sparse


class Plain(nn.Module):
    """The formula of ``Sparse`` as one writes it: ReLU, top-k, a mask, a matrix product."""

    def __init__(self, features: int, latents: int, out: int, k: int) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(features, latents), nn.Linear(latents, out)
        self.pre_bias = nn.Parameter(torch.zeros(features))
        self.k, self.add = k, features == out

    def forward(self, x: Tensor) -> Tensor:
        code = F.relu(self.encoder(x - self.pre_bias))
        mask = torch.zeros_like(code).scatter_(1, code.topk(self.k).indices, 1.0)
        out = self.decoder(code * mask)
        return out + self.pre_bias if self.add else out


HEADS: dict[str, Callable[..., nn.Module]] = {
    "fastproj sparse head": Sparse,
    "relu, top-k, mask, matmul": Plain,
}


def run(
    device: str = "cpu",
    warmup: int = 1,
    repeats: int = 5,
    rows: int = 512,
    features: int = 512,
    latents: int = 100_000,
    out: int = 512,
    k: int = 1000,
) -> list[dict[str, Any]]:
    """Forward, backward and a step of LARS, float32, at the paper's size: one row a head.

    Each head has a process of its own, with this one's count of threads. Beside the rates (in which
    an image is a row of features), ``seconds`` is a step's median and ``peak_bytes`` the most
    memory at once, beyond that of the process before: resident on a CPU, in tensors on a GPU. It
    holds the weights, their gradients, and LARS's momentum and updates: four times the weights.
    """
    lines = []
    for engine in HEADS:
        given = {
            "engine": engine, "device": device, "threads": torch.get_num_threads(),
            "warmup": warmup, "repeats": repeats, "rows": rows,
            "sizes": [features, latents, out, k],
        }  # fmt: skip
        child = subprocess.run(
            [sys.executable, "-m", "fastproj.bench.heads", json.dumps(given)],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        measured = json.loads(child.stdout.splitlines()[-1])
        lines.append(
            {"stage": "heads", "engine": engine, "size": features, "batch": rows}
            | measured
            | {
                "note": f"{features} -> {latents:,} -> {out}, k {k:,}:"
                f" {measured['seconds']:.3f} s a step, {measured['peak_bytes'] / 1e9:.2f} GB"
            }
        )
    return lines


def step_of(given: dict[str, Any]) -> dict[str, float | int]:
    """What ``run`` says of one head, measured in this process."""
    torch.set_num_threads(given["threads"])
    device, rows = torch.device(given["device"]), given["rows"]
    build = HEADS[given["engine"]]
    _stepper(build, 4, (8, 64, 8, 2), device)()  # loads libraries, compiles kernels
    before = _memory("VmRSS") if device.type == "cpu" else 0
    timing = measure(
        _stepper(build, rows, given["sizes"], device), given["warmup"], given["repeats"]
    )
    if device.type == "cpu":
        peak = _memory("VmHWM") - before
    else:
        peak = torch.cuda.max_memory_allocated(device)
    return timing.rates(rows) | {"seconds": timing.median, "peak_bytes": peak}


def _stepper(
    build: Callable[..., nn.Module], rows: int, sizes: Sequence[int], device: torch.device
) -> Callable[[], None]:
    features, _, out, _ = sizes
    torch.manual_seed(0)
    head = build(*sizes).to(device)
    optimiser = Lars(parameter_groups([head], 1e-4), lr=0.1)
    x = torch.randn(rows, features, device=device, requires_grad=True)
    grad = torch.randn(rows, out, device=device)

    def step() -> None:
        optimiser.zero_grad()
        head(x).backward(grad)
        optimiser.step()

    return step


def _memory(field: str) -> int:
    """Bytes of this process: ``VmRSS``, resident now, or ``VmHWM``, at most so far.

    Not ``ru_maxrss``: a child's begins at its parent's.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}: memory is measured on Linux")


if __name__ == "__main__":  # as run() starts it
    print(json.dumps(step_of(json.loads(sys.argv[1]))))
