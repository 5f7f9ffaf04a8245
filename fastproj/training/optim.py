"""Optimizers: parameter groups, LARS, and the learning rate of each step.

A parameter group is torch.optim's dictionary with three keys of ours: ``adapt`` (whether LARS
scales its parameters' updates), ``peak`` (its highest learning rate, from which ``set_rates``
computes ``lr`` before each step) and ``constant`` (true if the learning rate stays at its peak).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastproj.core.errors import InputError
from fastproj.models.architectures import undecayed
from fastproj.training import OPTIMIZERS

Group = dict[str, Any]
HOW = ("foreach", "fused", "capturable", "differentiable")  # of a group: another device's differ
SMALL = 2**18  # elements: LARS scales tensors of at most this size together (1 MB of factors each)


def parameter_groups(modules: Iterable[nn.Module], weight_decay: float) -> list[Group]:
    """The trainable parameters of ``modules`` in two groups, each parameter once.

    Weight decay and LARS's scaling apply to matrices and filters, not to parameters of at most one
    dimension (biases, BatchNorm's scale and shift), as is usual with LARS [You et al. 2017, arXiv
    1708.03888; Grill et al. 2020, arXiv 2006.07733, appendix J], and not to ``undecayed`` ones.
    """
    decayed: dict[nn.Parameter, None] = {}
    plain: dict[nn.Parameter, None] = {}
    for module in modules:
        left_out = undecayed(module)
        for name, p in module.named_parameters():
            if p.requires_grad:
                (decayed if p.ndim > 1 and name not in left_out else plain)[p] = None
    return [
        {"params": list(decayed), "weight_decay": weight_decay, "adapt": True},
        {"params": list(plain), "weight_decay": 0.0, "adapt": False},
    ]


def probe_group(probe: nn.Module, peak: float) -> Group:
    """The online probe's parameters with their own peak rate, without decay or LARS's scaling."""
    return {"params": list(probe.parameters()), "weight_decay": 0.0, "adapt": False, "peak": peak}


class Lars(torch.optim.Optimizer):
    """SGD with momentum whose step for each adapted tensor w is proportional to w's norm.

    [You et al. 2017, arXiv 1708.03888], in the clipped form of apex's LARC, as
    ``timm.optim.Lars(trust_clip=True)`` computes it: with decay λ and gradient g,

        rate = trust_coefficient·‖w‖ / (‖g‖ + λ‖w‖ + 1e-8),  or 1 if ‖w‖ or ‖g‖ is 0
        m ← momentum·m + min(1, rate/lr)·(g + λw);  w ← w − lr·m

    Groups with ``adapt=False`` use 1 instead of that minimum: plain SGD with momentum. A few
    multi-tensor calls process all tensors of a group, without a host sync. If ``GradScaler`` finds
    a gradient that is not finite, the step changes nothing, also without a host sync.
    """

    _step_supports_amp_scaling = True  # GradScaler then sets the tensors grad_scale and found_inf

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[Group],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.02,
        adapt: bool = True,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(
            params, {**defaults, "trust_coefficient": trust_coefficient, "adapt": adapt}
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """One update from the parameters' ``grad``, which is not modified."""
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
            _scale(updates, _trust_ratios(params, grads, group))
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


def _trust_ratios(params: list[Tensor], grads: list[Tensor], group: Group) -> Tensor:
    """One number per parameter, (n,)."""
    weight = torch.stack(torch._foreach_norm(params))
    gradient = torch.stack(torch._foreach_norm(grads))
    rate = group["trust_coefficient"] * weight / (gradient + group["weight_decay"] * weight + 1e-8)
    rate = torch.where((weight > 0) & (gradient > 0), rate, 1.0)
    return (rate / group["lr"]).clamp(max=1.0)


def _scale(updates: Sequence[Tensor], ratios: Tensor) -> None:
    """Multiply each tensor by its number of ``ratios``, in place.

    A list of 0-dim tensors makes a GPU launch one kernel per tensor. So there the ratios of small
    tensors are first repeated for each element, which one kernel does for many tensors; then one
    kernel multiplies many. Products are the same to the bit.
    """
    one_by_one = list(zip(updates, ratios.unbind(), strict=True))
    if ratios.is_cuda:
        together = [(update, ratio) for update, ratio in one_by_one if update.numel() <= SMALL]
        one_by_one = [(update, ratio) for update, ratio in one_by_one if update.numel() > SMALL]
        if together:
            _scale_together(*zip(*together, strict=True))
    if one_by_one:
        torch._foreach_mul_(*map(list, zip(*one_by_one, strict=True)))


def _scale_together(updates: Sequence[Tensor], ratios: Sequence[Tensor]) -> None:
    """The same for dense tensors: foreach is fast for two lists of equal shapes and strides."""
    sizes = [update.numel() for update in updates]
    pairs = zip(ratios, sizes, strict=True)
    repeated = torch.cat([ratio.expand(size) for ratio, size in pairs]).split(sizes)
    factors = [
        part.as_strided(update.shape, update.stride(), part.storage_offset())
        for part, update in zip(repeated, updates, strict=True)
    ]
    torch._foreach_mul_(list(updates), factors)


def lars(
    groups: list[Group], lr: float, *, momentum: float = 0.9, trust_coefficient: float = 0.02
) -> Lars:
    """``Lars`` over ``groups``."""
    return Lars(groups, lr, momentum=momentum, trust_coefficient=trust_coefficient)


def sgd(groups: list[Group], lr: float, *, momentum: float = 0.9) -> torch.optim.SGD:
    """torch's SGD with momentum over ``groups``."""
    optimizer = torch.optim.SGD(groups, lr, momentum=momentum, fused=_fused(groups))
    if optimizer.defaults["fused"] and momentum:
        optimizer.register_step_pre_hook(_start_momentum)
    return optimizer


def _start_momentum(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Zeros, laid out as the gradients; torch 2.15 begins with what the memory held.

    It shows where GradScaler skips the first step, which would have overwritten that.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is None:  # not to be asked for its state, which that would make
                continue
            state = optimizer.state[parameter]
            if state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(parameter.grad)


def adamw(groups: list[Group], lr: float) -> torch.optim.AdamW:
    """torch's AdamW over ``groups``, with torch's betas."""
    return torch.optim.AdamW(groups, lr, fused=_fused(groups))


def _fused(groups: list[Group]) -> bool | None:
    """On a GPU one kernel per group, which also skips GradScaler's bad steps without a host sync;
    elsewhere torch's default."""
    return all(p.is_cuda for group in groups for p in group["params"]) or None


def build_optimizer(
    name: str, groups: list[Group], lr: float, **options: Any
) -> torch.optim.Optimizer:
    """The optimizer ``name`` over ``groups``, which bring their own weight decay.

    ``lr`` is the peak rate of every group without its own; ``options`` are those that
    the entry names. Raises ``SettingError`` for a name that is not in ``OPTIMIZERS``.
    """
    return OPTIMIZERS[name]([{"peak": lr, **group} for group in groups], lr, **options)


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
    optimizer: torch.optim.Optimizer, step: int, total: int, warmup: float, start: float
) -> None:
    """Set each group's ``lr`` for ``step``: ``warmup_cosine`` with the group's ``peak``, or the
    peak itself if the group is ``constant``."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"]
        if not group.get("constant"):
            group["lr"] = warmup_cosine(step, total, warmup, group["peak"], start)


def cosine(first: float, last: float, progress: float) -> float:
    """From ``first`` at progress 0 to ``last`` at 1 along half a cosine, as a momentum encoder's
    momentum [Grill et al. 2020, arXiv 2006.07733, section 3.3]."""
    return last - (last - first) * (math.cos(math.pi * progress) + 1) / 2


def linear(values: Sequence[float], progress: float) -> float:
    """Linear from the first value at progress 0 to the last at 1; a single value is constant."""
    return values[0] + (values[-1] - values[0]) * progress


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """``optimizer.load_state_dict``, which checks little else than how many parameters there are.

    Raises ``InputError`` where a parameter's state lacks an entry that others have, or is of
    another shape, not finite or impossible, and where a group's hyperparameters are others.
    """
    known = [dict(group) for group in optimizer.param_groups]
    groups = [dict(group) for group in state["param_groups"]]
    for group, own in zip(groups, known, strict=False):  # their number is torch's to compare
        group |= {name: own[name] for name in HOW if name in own}
        for name in own.keys() - {"params", "lr", *HOW}:
            if group.setdefault(name, own[name]) != own[name]:  # an older torch has fewer
                raise InputError(f"the optimizer's {name} is {group[name]}, not {own[name]}")
    optimizer.load_state_dict({**state, "param_groups": groups})
    entries = {name for of_one in optimizer.state.values() for name in of_one}
    for parameter, of_one in optimizer.state.items():
        for name in entries:
            value = of_one.get(name)
            whole = isinstance(value, Tensor) and value.shape in (parameter.shape, ())
            if not whole or not value.isfinite().all() or (name == "step" and value < 0):
                raise InputError(
                    f"the optimizer's {name} of a parameter is missing, not finite or of another "
                    "shape: take an older checkpoint"
                )
