"""Projectors: the head between encoder and objective, thrown away after pre-training.

A projector is a trunk of hidden blocks, a last layer and what is done to its output. A kind is one
function and one line in ``PROJECTORS``; a sparse last layer and a discretised output go with any.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastproj.errors import InputError, SettingError
from fastproj.sparse import Sparse


class Discretise(nn.Module):
    """Every coordinate of z to one of ``levels`` evenly spaced values in [-1, 1].

    With L levels, o = 1/2 for an even L and 0 for an odd one, and s = (L - 1)(1 - 1e-3) / 2,

        bounded = s·tanh(z + tan(o/s)) - o;  out = round(bounded) / (L // 2)

    [arXiv 2503.00507; PKU-ML/Projector_Theory; finite scalar quantisation, arXiv 2309.15505]. The
    gradient is that of ``bounded / (L // 2)``: straight through the rounding. A row carries at most
    d·log2(L) bits. Any shape; float32 whatever autocast says (float64 stays float64).
    Three levels send |z| < 0.55 to 0: a row may be all zeros.
    """

    def __init__(self, levels: int) -> None:
        super().__init__()
        if levels < 2:
            raise SettingError(f"projector.levels: {levels} is below 2; null leaves z continuous")
        self.levels = levels

    def forward(self, z: Tensor) -> Tensor:
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        scale = (self.levels - 1) * (1 - 1e-3) / 2
        offset = 0.5 if self.levels % 2 == 0 else 0.0
        bounded = torch.tanh(z + math.tan(offset / scale)) * scale - offset
        rounded = bounded + (bounded.round() - bounded).detach()
        return rounded / (self.levels // 2)

    def extra_repr(self) -> str:
        return f"levels={self.levels}"


class First(nn.Module):
    """The first ``out`` features (N, d) -> (N, ``out``), unchanged."""

    def __init__(self, out: int) -> None:
        super().__init__()
        self.out = out

    def forward(self, features: Tensor) -> Tensor:
        return features[:, : self.out]

    def extra_repr(self) -> str:
        return f"out={self.out}"


class Stages(NamedTuple):
    """What a kind builds: hidden blocks, the width they give, the last layer, its width."""

    trunk: nn.Sequential
    width: int
    last: nn.Module
    out: int


class Projector(nn.Module):
    """Features (N, d) -> projections (N, ``out_features``): ``head(hidden(features))``."""

    def __init__(
        self, trunk: nn.Sequential, last: nn.Module, output: nn.Module, out_features: int
    ) -> None:
        super().__init__()
        self.trunk, self.last, self.output = trunk, last, output
        self.out_features = out_features

    def hidden(self, features: Tensor) -> Tensor:
        """Features (N, d) to the activations (N, h) that the last layer sees."""
        return self.trunk(features)

    def head(self, hidden: Tensor) -> Tensor:
        """Activations (N, h) of ``hidden`` to projections (N, ``out_features``)."""
        return self.output(self.last(hidden))

    def forward(self, features: Tensor) -> Tensor:
        return self.head(self.hidden(features))

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile each stage in place (``nn.Module.compile``), as ``hidden`` and ``head`` see it.

        The names in the state dict stay what they are.
        """
        for stage in self.children():
            stage.compile(*args, **kwargs)

    def first_weight(self) -> Tensor:
        """The weight (units, d) that meets the features first.

        Raises ``InputError`` for a projector without one.
        """
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                return layer.weight
        raise InputError(
            "this projector has no weight (kind none or direct): choose kind linear, mlp or barlow"
        )


def mlp(
    features: int, *, hidden: int, out: int, depth: int, batch_norm: bool, dropout: float
) -> Stages:
    """``depth`` linear layers with ReLU between them.

    BatchNorm before each ReLU if asked, and a share ``dropout`` of the units dropped after it.
    Depth 2 without either is SimCLR's Linear-ReLU-Linear [arXiv 2002.05709, section 2.1].
    """
    if depth < 1:
        raise SettingError(f"projector.depth: {depth} is below 1; kind 'none' has no layer")
    layers: list[nn.Module] = []
    width = features
    for _ in range(depth - 1):
        layers.append(nn.Linear(width, hidden, bias=not batch_norm))  # BatchNorm has its own bias
        if batch_norm:
            layers.append(nn.BatchNorm1d(hidden))
        layers.append(nn.ReLU(inplace=True))
        if dropout:
            layers.append(nn.Dropout(dropout))
        width = hidden
    return Stages(nn.Sequential(*layers), width, nn.Linear(width, out), out)


def barlow(features: int, *, hidden: int, out: int, dropout: float, **_: object) -> Stages:
    """Barlow Twins' (Linear-BN-ReLU) twice, then Linear [arXiv 2103.03230, section 2.2]."""
    return mlp(features, hidden=hidden, out=out, depth=3, batch_norm=True, dropout=dropout)


def linear(features: int, *, out: int, **_: object) -> Stages:
    """One linear layer."""
    return Stages(nn.Sequential(), features, nn.Linear(features, out), out)


def direct(features: int, *, out: int, **_: object) -> Stages:
    """DirectCLR: the first ``out`` features themselves [arXiv 2110.09348, section 6]."""
    if out > features:
        raise SettingError(
            f"projector.out: kind direct cannot take the first {out} of {features} features: lower"
            f" it to {features} or less"
        )
    return Stages(nn.Sequential(), features, First(out), out)


def none(features: int, **_: object) -> Stages:
    """The identity: the objective sees the encoder's features."""
    return Stages(nn.Sequential(), features, nn.Identity(), features)


PROJECTORS: dict[str, Callable[..., Stages]] = {
    "none": none,
    "direct": direct,
    "linear": linear,
    "mlp": mlp,
    "barlow": barlow,
}


def build_projector(
    kind: str,
    features: int,
    *,
    hidden: int,
    out: int,
    depth: int,
    batch_norm: bool,
    dropout: float,
    latents: int | None,
    k: float,
    levels: int | None,
) -> Projector:
    """A new, randomly initialised projector for encoder features of width ``features``.

    ``hidden`` and ``out`` are widths, ``depth`` counts linear layers, ``dropout`` is a share; a
    kind ignores what it has no use for. ``latents``, unless None, puts a ``Sparse`` layer of that
    width, from which a row keeps ``k`` (a count, or a share below 1), in the place of the kind's
    last layer; after ``none`` it stands alone. ``levels``, unless None, discretises the output.

    Raises ``SettingError`` for a kind that is not in ``PROJECTORS``, and where settings clash.
    """
    if kind not in PROJECTORS:
        raise SettingError(f"projector.kind: no {kind!r}; choose one of {', '.join(PROJECTORS)}")
    trunk, width, last, out_features = PROJECTORS[kind](
        features, hidden=hidden, out=out, depth=depth, batch_norm=batch_norm, dropout=dropout
    )
    if latents is not None:
        if kind == "direct":
            raise SettingError(
                "projector.latents: kind direct has no last layer to make sparse: set latents to"
                " null, or choose kind none"
            )
        last, out_features = Sparse(width, latents, out, k), out
    output = nn.Identity() if levels is None else Discretise(levels)
    return Projector(trunk, last, output, out_features)
