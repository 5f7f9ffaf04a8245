"""Projectors: the head between encoder and objective, thrown away after pre-training.

A projector consists of a trunk of hidden blocks, a last layer, and operations on its output. A
kind is one function and one line in ``fastproj.models.PROJECTORS``. Every kind but ``direct`` can
have a sparse last layer; every kind can have a batch-normalized and a discretized output.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastproj.core.errors import InputError, SettingError
from fastproj.core.table import hyperparameters
from fastproj.models import PROJECTORS
from fastproj.models.frozen import frozen
from fastproj.models.sparse import Sparse

OUT = 256  # units of the output, by default


class Discretize(nn.Module):
    """Rounds every coordinate of z to one of ``levels`` evenly spaced values in [-1, 1].

    With L levels, o = 1/2 for an even L and 0 for an odd one, and s = (L - 1)(1 - 1e-3) / 2,

        bounded = s·tanh(z + tan(o/s)) - o;  out = round(bounded) / (L // 2)

    [arXiv 2503.00507; PKU-ML/Projector_Theory; finite scalar quantization, arXiv 2309.15505]. The
    gradient is that of ``bounded / (L // 2)`` (straight-through rounding). A row of d coordinates
    carries at most d·log2(L) bits. Any shape; float32 even under autocast (float64 stays float64).
    With three levels |z| < 0.55 becomes 0, so a row may be all zeros.
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
    """What a kind builds: hidden blocks and their output width, the last layer and its width."""

    trunk: nn.Sequential
    width: int
    last: nn.Module
    out: int


class Projector(nn.Module):
    """Features (N, d) -> projections (N, ``out_features``): ``head(hidden(features))``."""

    def __init__(
        self,
        trunk: nn.Sequential,
        last: nn.Module,
        output: nn.Module,
        out_features: int,
        norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.trunk, self.last, self.output = trunk, last, output
        self.norm = norm or nn.Identity()
        self.out_features = out_features

    def hidden(self, features: Tensor) -> Tensor:
        """Features (N, d) to the last layer's input (N, h)."""
        return self.trunk(features)

    def head(self, hidden: Tensor) -> Tensor:
        """The output (N, h) of ``hidden`` to projections (N, ``out_features``)."""
        return self.output(self.norm(self.last(hidden)))

    def forward(self, features: Tensor) -> Tensor:
        return self.head(self.hidden(features))

    def first_weight(self) -> Tensor:
        """The weight (units, d) of the first linear layer.

        Raises ``InputError`` for a projector without a linear layer.
        """
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                return layer.weight
        raise InputError(
            "this projector has no weight (kind none or direct): choose kind linear, mlp or barlow"
        )


def as_projector(module: nn.Module, num_features: int) -> Projector:
    """A ``Projector`` as it is; any other module (N, ``num_features``) -> (N, d) as one.

    The module then counts as the last layer: the features are the hidden activations. Raises what
    the module raises for features of this width.
    """
    if isinstance(module, Projector):
        return module
    with torch.no_grad(), frozen(module):
        out_features = module(torch.zeros(2, num_features)).shape[1]
    return Projector(nn.Sequential(), module, nn.Identity(), out_features)


def mlp(
    num_features: int,
    *,
    hidden: int = 2048,
    out: int = OUT,
    depth: int = 2,
    batch_norm: bool = False,
    dropout: float = 0.0,
) -> Stages:
    """``depth`` linear layers with ReLU between them.

    With ``batch_norm``, BatchNorm comes before each ReLU; ``dropout`` after it is a probability.
    Depth 2 without either is SimCLR's Linear-ReLU-Linear [arXiv 2002.05709, section 2.1].
    """
    if depth < 1:
        raise SettingError(f"projector.depth: {depth} is below 1; kind 'none' has no layer")
    layers: list[nn.Module] = []
    width = num_features
    for _ in range(depth - 1):
        layers.append(nn.Linear(width, hidden, bias=not batch_norm))  # BatchNorm has its own bias
        if batch_norm:
            layers.append(nn.BatchNorm1d(hidden))
        layers.append(nn.ReLU(inplace=True))
        if dropout:
            layers.append(nn.Dropout(dropout))
        width = hidden
    return Stages(nn.Sequential(*layers), width, nn.Linear(width, out), out)


def barlow(
    num_features: int, *, hidden: int = 2048, out: int = OUT, dropout: float = 0.0
) -> Stages:
    """Barlow Twins' (Linear-BN-ReLU) twice, then Linear [arXiv 2103.03230, section 2.2]."""
    return mlp(num_features, hidden=hidden, out=out, depth=3, batch_norm=True, dropout=dropout)


def linear(num_features: int, *, out: int = OUT) -> Stages:
    """One linear layer."""
    return Stages(nn.Sequential(), num_features, nn.Linear(num_features, out), out)


def direct(num_features: int, *, out: int = OUT) -> Stages:
    """DirectCLR: the first ``out`` features themselves [arXiv 2110.09348, section 6]."""
    if out > num_features:
        raise SettingError(
            f"projector.out: kind direct cannot take the first {out} of {num_features} features:"
            f" lower it to {num_features} or less"
        )
    return Stages(nn.Sequential(), num_features, First(out), out)


def none(num_features: int) -> Stages:
    """The identity: the objective sees the encoder's features."""
    return Stages(nn.Sequential(), num_features, nn.Identity(), num_features)


def build_projector(
    kind: str,
    num_features: int,
    *,
    latents: int | None = None,
    k: float = 0.01,
    levels: int | None = None,
    output_norm: bool = False,
    **options: Any,
) -> Projector:
    """A new, randomly initialized projector for encoder features of width ``num_features``.

    ``options`` are those that the kind names: ``hidden`` and ``out`` are widths, ``depth`` counts
    linear layers, ``dropout`` is a probability. ``latents``, unless None, replaces the kind's last
    layer by a ``Sparse`` layer with so many latents, of which each sample keeps ``k`` (a count, or
    a fraction if below 1), and with ``out`` outputs. ``output_norm`` ends the projector in a batch
    norm without scale and shift, as MoCo v3's and SimSiam's for a ResNet [arXiv 2104.02057,
    2011.10566; solo-learn]; a linear last layer then has no bias, which the norm would remove.
    ``levels``, unless None, discretizes the output, after the norm.

    Raises ``SettingError`` for a kind that is not in ``PROJECTORS``, or settings that conflict.
    """
    entry = PROJECTORS[kind]
    if latents is None:
        trunk, _, last, out_features = entry(num_features, **options)
    elif kind == "direct":
        raise SettingError(
            "projector.latents: kind direct has no last layer to make sparse: set latents to"
            " null, or choose kind none"
        )
    else:
        out_features = options.pop("out", OUT)
        if "out" in hyperparameters(entry):
            options["out"] = out_features
        trunk, width, _, _ = entry(num_features, **options)
        last = Sparse(width, latents, out_features, k)
    output = nn.Identity() if levels is None else Discretize(levels)
    norm = nn.BatchNorm1d(out_features, affine=False) if output_norm else None
    if output_norm and isinstance(last, nn.Linear):
        last.register_parameter("bias", None)
    return Projector(trunk, last, output, out_features, norm)
