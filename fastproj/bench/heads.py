"""A training step of the sparse head beside the same step in plain autograd: time and memory."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastproj.bench import Engine, Plan, Role, Row, compare, limits, timed
from fastproj.bench.alone import alone, memory
from fastproj.core.device import prepare_device
from fastproj.models.sparse import Sparse
from fastproj.training.optim import Lars, parameter_groups

PAPER = (512, 100_000, 512, 1000)  # features, latents, out, k


class Plain(nn.Module):
    """``Sparse`` written in plain torch: ReLU, top-k, a mask, a matrix product."""

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
    "sparse head": Sparse,
    "relu, top-k, mask, matmul": Plain,
}


def run(plan: Plan, rows: int = 512, sizes: Sequence[int] = PAPER) -> list[Row]:
    """Forward pass, backward pass and a LARS step in float32; the unit is one row of features.

    ``peak_bytes`` is the peak memory of a step in a new process, minus the memory at its start:
    resident memory on a CPU, tensors on a GPU. It includes weights, gradients, LARS's momentum and
    updates, together four times the weights. The limit is a single matrix product: the encoder's
    in the forward pass.
    """
    features, latents, out, k = sizes
    roles: tuple[Role, Role] = ("ours", "peer")
    engines = [
        Engine(name, role, rows, _prepare(name, rows, sizes, plan.device))
        for name, role in zip(HEADS, roles, strict=True)
    ]
    product = limits.products(1, rows, features, latents, plan.device, rows)
    case = f"{features} -> {latents:,} -> {out}, k {k:,}, {rows} rows"
    compared = compare("heads", case, "rows", [*engines, product], 1, plan.repeats)
    return [row if row.role == "limit" else _with_peak(row, rows, sizes, plan) for row in compared]


def _with_peak(row: Row, rows: int, sizes: Sequence[int], plan: Plan) -> Row:
    once = alone(measured, name=row.engine, rows=rows, sizes=list(sizes),
                 device=plan.device.type, repeats=0)  # fmt: skip
    return replace(row, peak_bytes=once["peak_bytes"])


def measured(
    name: str, rows: int, sizes: Sequence[int], device: str, repeats: int
) -> dict[str, Any]:
    """Run 1 + ``repeats`` steps in this process: ``seconds`` of each, ``peak_bytes``, ``work``."""
    if device != "cpu":  # on a CPU it would keep freed memory, and the peak counts that
        prepare_device(torch.device(device), tf32=True)
    stepper(name, 4, (8, 64, 8, 2), torch.device(device))()  # loads libraries, compiles kernels
    before = memory("VmRSS")
    step = stepper(name, rows, sizes, torch.device(device))
    seconds = [timed(step) for _ in range(1 + repeats)]
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else memory("VmHWM") - before
    return {"seconds": seconds, "peak_bytes": peak, "work": rows}


def stepper(name: str, rows: int, sizes: Sequence[int], device: torch.device) -> Callable[[], None]:
    """A function that does one training step of the head ``HEADS[name]``."""
    features, _, out, _ = sizes
    torch.manual_seed(0)
    head = HEADS[name](*sizes).to(device)
    optimizer = Lars(parameter_groups([head], 1e-4), lr=0.1)
    x = torch.randn(rows, features, device=device, requires_grad=True)
    grad = torch.randn(rows, out, device=device)

    def step() -> None:
        optimizer.zero_grad()
        head(x).backward(grad)
        optimizer.step()

    return step


def _prepare(
    name: str, rows: int, sizes: Sequence[int], device: torch.device
) -> Callable[[], Callable[[], object]]:
    return lambda: stepper(name, rows, sizes, device)
