"""Projectors: the head between encoder and objective, thrown away after pre-training.

A projector kind is one function and one line in ``PROJECTORS``.
"""

from collections.abc import Callable

from torch import nn

from fastproj.errors import SettingError


class Projector(nn.Sequential):
    """Features (N, d) -> projections (N, ``out_features``)."""

    def __init__(self, *layers: nn.Module, out_features: int) -> None:
        super().__init__(*layers)
        self.out_features = out_features


def mlp(features: int, *, hidden: int, out: int, depth: int, batch_norm: bool) -> Projector:
    """``depth`` linear layers with ReLU between them, and BatchNorm before each ReLU if asked.

    Depth 2 without BatchNorm is SimCLR's Linear-ReLU-Linear [Chen et al. 2020, arXiv 2002.05709,
    section 2.1]; depth 3 with it is Barlow Twins' [arXiv 2103.03230, section 2.2].
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
        width = hidden
    return Projector(*layers, nn.Linear(width, out), out_features=out)


def linear(features: int, *, out: int, **_: object) -> Projector:
    """One linear layer."""
    return Projector(nn.Linear(features, out), out_features=out)


def none(features: int, **_: object) -> Projector:
    """The identity: the objective sees the encoder's features."""
    return Projector(out_features=features)


PROJECTORS: dict[str, Callable[..., Projector]] = {"mlp": mlp, "linear": linear, "none": none}


def build_projector(
    kind: str, features: int, hidden: int, out: int, depth: int, batch_norm: bool
) -> Projector:
    """A new, randomly initialised projector for encoder features of width ``features``.

    ``hidden`` and ``out`` are widths, ``depth`` counts linear layers; a kind ignores what it has
    no use for. Raises ``SettingError`` for a kind that is not in ``PROJECTORS``.
    """
    if kind not in PROJECTORS:
        raise SettingError(f"projector.kind: no {kind!r}; choose one of {', '.join(PROJECTORS)}")
    return PROJECTORS[kind](features, hidden=hidden, out=out, depth=depth, batch_norm=batch_norm)
