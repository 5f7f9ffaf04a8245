"""Optimisers: parameter groups, LARS, and the learning rate of each step.

A group is a dictionary as torch.optim takes it, with three keys of ours: ``adapt`` (whether LARS
scales its parameters' updates), ``peak`` (its highest learning rate, from which ``set_rates``
computes ``lr`` before each step) and ``constant`` (true where the rate stays at its peak).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastproj.errors import SettingError

Group = dict[str, Any]


def parameter_groups(modules: Iterable[nn.Module], weight_decay: float) -> list[Group]:
    """The trainable parameters of ``modules`` in two groups, each parameter once.

    Matrices and filters are decayed and adapted; parameters of at most one dimension (biases,
    BatchNorm's scale and shift) are neither, as LARS users do [You et al. 2017, arXiv 1708.03888;
    Grill et al. 2020, arXiv 2006.07733, appendix J].
    """
    unique = dict.fromkeys(p for m in modules for p in m.parameters() if p.requires_grad)
    return [
        {
            "params": [p for p in unique if p.ndim > 1],
            "weight_decay": weight_decay,
            "adapt": True,
        },
        {"params": [p for p in unique if p.ndim <= 1], "weight_decay": 0.0, "adapt": False},
    ]


def probe_group(probe: nn.Module, peak: float) -> Group:
    """All of the online probe's parameters at a peak rate of their own: no decay, no scaling."""
    return {"params": list(probe.parameters()), "weight_decay": 0.0, "adapt": False, "peak": peak}


class Lars(torch.optim.Optimizer):
    """SGD with momentum whose step, in each adapted tensor w, is in proportion to w's norm.

    [You et al. 2017, arXiv 1708.03888], in the clipped form of apex's LARC, as
    ``timm.optim.Lars(trust_clip=True)`` computes it: with decay λ and gradient g,

        rate = trust·‖w‖ / (‖g‖ + λ‖w‖ + 1e-8),  or 1 where ‖w‖ or ‖g‖ is 0
        m ← momentum·m + min(1, rate/lr)·(g + λw);  w ← w − lr·m

    Groups with ``adapt=False`` put 1 for that minimum: plain SGD with momentum. All tensors of a
    group are handled by a few multi-tensor calls and nothing waits for the device, nor for a
    ``GradScaler`` that found a gradient which is not finite: the step then changes nothing.
    """

    _step_supports_amp_scaling = True  # GradScaler sets grad_scale and found_inf, tensors, instead

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[Group],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 0.02,
        adapt: bool = True,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "trust": trust, "adapt": adapt})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """One update from the parameters' ``grad``, which is left as it is."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if any(p.grad is not None for p in group["params"]):
                self._step_group(group)
        return loss

    def _step_group(self, group: Group) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        grads = [p.grad for p in params]
        scale, not_finite = (getattr(self, name, None) for name in ("grad_scale", "found_inf"))
        if scale is not None:
            grads = list(torch._foreach_div(grads, scale))
        updates = torch._foreach_add(grads, params, alpha=group["weight_decay"])
        if group["adapt"]:
            torch._foreach_mul_(updates, _trust_ratios(params, grads, group))
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        changed = [*params, *buffers]
        before = [] if not_finite is None else [x.clone() for x in changed]
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, updates)
        torch._foreach_add_(params, buffers, alpha=-group["lr"])
        if not_finite is not None:
            for now, old in zip(changed, before, strict=True):
                now.copy_(torch.where(not_finite > 0, old, now))


def _trust_ratios(params: list[Tensor], grads: list[Tensor], group: Group) -> list[Tensor]:
    weight = torch.stack(torch._foreach_norm(params))
    gradient = torch.stack(torch._foreach_norm(grads))
    rate = group["trust"] * weight / (gradient + group["weight_decay"] * weight + 1e-8)
    rate = torch.where((weight > 0) & (gradient > 0), rate, 1.0)
    return list((rate / group["lr"]).clamp(max=1.0).unbind())


def build_optimiser(
    name: str, groups: list[Group], lr: float, momentum: float, trust: float
) -> torch.optim.Optimizer:
    """``lars``, ``sgd`` or ``adamw`` over ``groups``, whose decay is already in them.

    ``lr`` is the peak rate of every group that does not name its own. ``trust`` is LARS's alone;
    AdamW takes no ``momentum`` (its betas are torch's). Raises ``SettingError`` for another name.
    """
    groups = [{"peak": lr, **group} for group in groups]
    # On a GPU one kernel a group, which also asks GradScaler on the device whether to skip a step.
    fused = all(p.is_cuda for group in groups for p in group["params"]) or None  # torch's default
    if name == "lars":
        return Lars(groups, lr, momentum=momentum, trust=trust)
    if name == "sgd":
        return torch.optim.SGD(groups, lr, momentum=momentum, fused=fused)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr, fused=fused)
    raise SettingError(f"optim.optimiser: no {name!r}; choose one of lars, sgd, adamw")


def warmup_cosine(step: int, total: int, warmup: float, peak: float, start: float) -> float:
    """The learning rate of ``step``, counted from 0: linear warm-up, then half a cosine.

    From ``start`` at step 0 to ``peak`` at step ``warmup`` (may be fractional), then down to 0 at
    step ``total`` and after it [Loshchilov and Hutter 2017, arXiv 1608.03983, without restarts].
    """
    if step >= total:
        return 0.0
    if step < warmup:
        return start + (peak - start) * step / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def set_rates(
    optimiser: torch.optim.Optimizer, step: int, total: int, warmup: float, start: float
) -> None:
    """Give each group its rate for ``step``: ``warmup_cosine`` up to the group's own ``peak``, or
    that peak itself where the group is ``constant``."""
    for group in optimiser.param_groups:
        group["lr"] = group["peak"]
        if not group.get("constant"):
            group["lr"] = warmup_cosine(step, total, warmup, group["peak"], start)


def cosine(first: float, last: float, progress: float) -> float:
    """From ``first`` at progress 0 to ``last`` at 1 along half a cosine: a momentum encoder's
    momentum [Grill et al. 2020, arXiv 2006.07733, section 3.3]."""
    return last - (last - first) * (math.cos(math.pi * progress) + 1) / 2


def linear(values: Sequence[float], progress: float) -> float:
    """From the first value at progress 0 to the last at 1; one value stays as it is."""
    return values[0] + (values[-1] - values[0]) * progress
