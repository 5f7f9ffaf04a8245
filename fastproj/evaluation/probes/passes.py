"""Passes over the rows of multinomial logistic regression: objective, gradient, probabilities.

Each pass serves all heads at once, in their type; what parts of the rows give is added in float64.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from fastproj.core.linear import linear, pack

ROWS = 4096  # computed at once
HEADS = 512  # times classes computed at once: 8 MB of float32 logits
PACKED = 2**27  # numbers that are also kept packed, twice: 1 GiB


class Rows:
    """``x``: float32 or float64 (N, d); ``y``: int64 (N,), every class in it. ``many``: many passes
    are to come. ``prior``: each class's share of the rows, float64 (C,).
    """

    def __init__(self, x: Tensor, y: Tensor, many: bool = False) -> None:
        self.x, self.y = x, y
        self.prior = torch.bincount(y).double() / len(y)
        self.packed: list[tuple[Tensor, Tensor]] = []
        if many and x.numel() <= PACKED:
            self.packed = [(pack(rows), pack(rows.T)) for rows in x.float().split(ROWS)]

    def __len__(self) -> int:
        return len(self.x)

    def evaluate(self, heads: Tensor, l2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """f (S,), its gradient (S, C, d+1) in the heads' type, and about how far f is from its
        minimum (S,): |∂f/∂W|² / (2 l) + |∂f/∂b|² / (2 shares of the classes).
        """
        n, kind = len(self), heads.dtype
        loss = torch.zeros(len(heads), dtype=torch.float64, device=heads.device)
        gradient = torch.zeros_like(heads, dtype=torch.float64)
        minus = torch.full((1, 1, 1), -1.0, dtype=kind, device=heads.device)
        for group, y, columns, logits in self._logits(heads):
            log_p = logits.log_softmax(1)
            target = y.expand(len(log_p), 1, -1)
            loss[group] -= log_p.gather(1, target).sum((1, 2), dtype=torch.float64)
            error = log_p.exp_().scatter_add_(1, target, minus.expand_as(target)).flatten(0, 1)
            gradient[group, :, :-1] += linear(error, columns).view(*log_p.shape[:2], -1)
            gradient[group, :, -1] += error.sum(1).view(log_p.shape[:2])
        gradient /= n
        slopes = gradient[..., :-1]
        slopes += l2.view(-1, 1, 1) * heads[..., :-1]
        value = loss / n + l2 / 2 * heads[..., :-1].double().square().sum((1, 2))
        away = slopes.square().sum((1, 2)) / (2 * l2)
        away += (gradient[..., -1].square() / (2 * self.prior)).sum(1)
        return value, gradient.to(kind), away

    def probabilities(self, heads: Tensor) -> tuple[Tensor, Tensor]:
        """Means of the probabilities p (S, C) and of diag(p) - ppᵀ (S, C, C), float64."""
        mass = torch.zeros_like(heads[..., -1], dtype=torch.float64)
        products = torch.zeros_like(mass.diag_embed())
        for group, _, _, logits in self._logits(heads):
            p = logits.softmax(1)
            mass[group] += p.sum(2, dtype=torch.float64)
            products[group] += p @ p.mT
        return mass / len(self), (mass.diag_embed() - products) / len(self)

    def _logits(self, heads: Tensor) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """Some heads and rows after the other: slice of the heads, labels, the rows' transpose
        (d, rows) for ``linear``, logits (heads, C, rows).

        Rows come last, where they are contiguous: a softmax over the last of few classes is slow.
        """
        classes = heads.shape[1]
        many = max(1, HEADS // classes)
        for first in range(0, len(heads), many):
            group = slice(first, first + many)
            weight = heads[group, :, :-1].flatten(0, 1).contiguous()
            intercept = heads[group, :, -1:].flatten(0, 1)
            for y, rows, columns in self._parts(heads.dtype):
                logits = linear(weight, rows).add_(intercept)
                yield group, y, columns, logits.view(-1, classes, len(y))

    def _parts(self, kind: torch.dtype) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for i, (x, y) in enumerate(zip(self.x.split(ROWS), self.y.split(ROWS), strict=True)):
            if self.packed and kind == torch.float32:
                yield y, *self.packed[i]
            else:
                rows = x.to(kind)
                yield y, rows, rows.T
