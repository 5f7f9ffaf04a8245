"""Inverses of what comes near the Hessian of multinomial logistic regression.

The Hessian at a head (C, d+1) is the mean over the rows of (diag(p) - ppᵀ) ⊗ (x, 1)(x, 1)ᵀ, with p
the row's probabilities, plus l I for the weights. Each class here is made once, from one head or
from none, and serves all strengths l: called with gradients (S, C, d+1) and strengths (S,), it
returns its products with the inverse, in the gradients' shape and type.
"""

import torch
from torch import Tensor

from fastproj.core.linear import linear
from fastproj.core.threads import each

ROWS = 2**13  # that a ``Kronecker`` is made from, or 8 per feature
SAMPLED = 8  # rows per feature that a block is made from
ALONE = 1024  # features up to which one thread makes a block: 0.1 GB each; others are shared
LARGEST = 2**28  # numbers that ``Blocks`` may hold: 1 GiB


class Kronecker:
    """(A ⊗ B + l I)⁻¹ for the weights, and A⁺ for the intercept.

    ``a`` (C, C), ``b`` (d, d): symmetric, float64. It has the form of Böhning's bound (1992,
    "Multinomial logistic regression algorithm", ½(I - 11ᵀ/C) in A's place), which is looser.
    """

    def __init__(self, a: Tensor, b: Tensor) -> None:
        self.basis_values, self.basis = torch.linalg.eigh(b)
        self.class_values, self.classes = torch.linalg.eigh(a)
        self.basis_values.clamp_(min=0)
        null = self.class_values <= 1e-12 * self.class_values.max()
        self.class_values.clamp_(min=0)
        self.intercept = torch.where(null, 0.0, 1 / self.class_values).unsqueeze(1)

    @classmethod
    def at_zero(cls, x: Tensor, prior: Tensor) -> "Kronecker":
        """Of rows ``x`` (N, d) and W = 0, where it is the Hessian but for the coupling of W and b.

        A is the covariance of the one-hot labels, whose shares are ``prior`` (C,), B is XᵀX/n.
        """
        x = spread(x)
        return cls(prior.diag() - prior.outer(prior), (x.T @ x).double() / len(x))

    @classmethod
    def at(cls, x: Tensor, head: Tensor) -> "Kronecker":
        """Of rows ``x`` (N, d) at ``head`` (C, d+1).

        A is the mean of diag(p) - ppᵀ; in B a row counts by the trace of that, with the mean 1.
        """
        x = spread(x)
        p = torch.addmm(head[:, -1].to(x), x, head[:, :-1].to(x).T).softmax(1)
        trace = 1 - p.square().sum(1)
        a = p.mean(0).diag() - p.T @ p / len(p)
        b = x.T @ (x * (trace / trace.sum().clamp(min=1e-30)).unsqueeze(1))
        return cls(a.double(), b.double())

    def __call__(self, gradient: Tensor, l2: Tensor) -> Tensor:
        kind = gradient.dtype
        classes, basis = self.classes.to(kind), self.basis.to(kind)
        turned = classes.T @ gradient
        curvature = self.class_values.unsqueeze(1) * self.basis_values
        weight = turned[..., :-1] @ basis / (curvature + l2.view(-1, 1, 1)).to(kind) @ basis.T
        intercept = turned[..., -1:] * self.intercept.to(kind)
        return classes @ torch.cat([weight, intercept], dim=-1)


class Blocks:
    """The inverse of the Hessian's blocks at ``head``, one per class, of rows ``x`` (N, d).

    The block of a class is the mean of v (x, 1)(x, 1)ᵀ, v = p(1 - p), plus l I. With x centered at
    the block's own mean the intercept stands alone, so that one eigendecomposition serves all
    strengths. The mean is taken over ``SAMPLED`` · d rows, drawn at equal steps of the sum of v.

    Many classes have little in common, and then this comes nearer than ``Kronecker``. It ignores
    that their probabilities sum to 1, but for one thing: what all classes have in common changes no
    probability, so it is taken out of the gradient and out of the result.
    """

    def __init__(self, x: Tensor, head: Tensor) -> None:
        x, head = x.float(), head.float()
        classes, width = len(head), x.shape[1]
        count = SAMPLED * width
        steps = (torch.arange(count, dtype=torch.float64, device=x.device) + 0.5) / count
        p = linear(x, head[:, :-1]).add_(head[:, -1]).softmax(1)
        self.values = x.new_empty(classes, width)
        self.vectors = x.new_empty(classes, width, width)
        self.center, self.mass = x.new_empty(classes, width), x.new_empty(classes)

        def block(c: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            sums = (p[:, c] * (1 - p[:, c])).cumsum(0, dtype=torch.float64)
            rows = x[torch.searchsorted(sums, steps * sums[-1]).clamp(max=len(x) - 1)]
            mass, center = (sums[-1] / len(x)).float(), rows.mean(0)
            rows = (rows - center) * (mass / count).sqrt()
            return mass, center, *torch.linalg.eigh(linear(rows.T, rows.T))

        blocks = (each if width <= ALONE else map)(block, range(classes))
        for c, (mass, center, values, vectors) in enumerate(blocks):
            self.mass[c], self.center[c] = mass, center
            self.values[c], self.vectors[c] = values, vectors
        self.values.clamp_(min=0)
        self.mass.clamp_(min=1e-30)

    def __call__(self, gradient: Tensor, l2: Tensor) -> Tensor:
        kind = gradient.dtype
        gradient = (gradient - gradient.mean(1, keepdim=True)).float()
        intercept = gradient[..., -1]
        slopes = gradient[..., :-1] - intercept.unsqueeze(2) * self.center
        turned = slopes.transpose(0, 1) @ self.vectors
        turned /= self.values.unsqueeze(1) + l2.float().unsqueeze(1)
        weight = (turned @ self.vectors.mT).transpose(0, 1)
        intercept = intercept / self.mass - (weight * self.center).sum(2)
        out = torch.cat([weight, intercept.unsqueeze(2)], dim=2).to(kind)
        return out - out.mean(1, keepdim=True)


def precondition(x: Tensor, head: Tensor) -> Kronecker | Blocks:
    """What brings heads near ``head`` (C, d+1) to their optimum soonest.

    With 50,000 rows and 512 features, 16 strengths for 100 classes take 92 passes over the rows
    with ``Blocks``, some 420 without. A GPU's passes are so fast that a hundred eigendecompositions
    would not pay (a prediction).
    """
    small = len(head) * x.shape[1] ** 2 <= LARGEST
    return Blocks(x, head) if small and x.device.type == "cpu" else Kronecker.at(x, head)


def spread(x: Tensor) -> Tensor:
    """At most ``ROWS`` of the rows, or 8 per feature, evenly spread."""
    return x[:: -(-len(x) // max(ROWS, 8 * x.shape[1]))]
