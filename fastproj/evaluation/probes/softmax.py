"""Multinomial logistic regression solved for many L2 strengths at once, to a certified accuracy.

The objective is convex, so it is solved instead of tuned. For a strength l it is

    f(W, b) = mean cross-entropy of softmax(W x + b) + l / 2 |W|²,

as scikit-learn's ``LogisticRegression`` with C = 1 / (l n); the intercept b is not penalized.

Some strengths are solved first; a spline through their heads gives others a start near their
optimum, and so on. The strengths of a turn take preconditioned L-BFGS steps together, so that each
step is two matrix products over the stacked heads. The preconditioner is the Hessian at W = 0
without the coupling of W and b. Where the passes to come would take longer, it is made anew at the
current head of a weak strength. Strengths that are done leave the stack.

The certificate: f - l/2 |W|² is convex, so g(W) = min_b f(W, b) is l-strongly convex, and
g(W) - min f <= |∇g(W)|² / (2 l). ∇g is ∂f/∂W at the best b. Where b is nearly that, with the
residual r = ∂f/∂b and the Hessian B of b, f(W, b) - g(W) is about rᵀB⁻¹r / 2, and ∂f/∂W is away
from ∇g by at most √(L rᵀB⁻¹r): the whole Hessian has no negative direction, and its part of W no
value above L = |XᵀX| / (2 n) (Böhning, 1992). Twice rᵀB⁻¹r is taken, which covers what B changes on
the way. The strengths that float32 did not bring to the tolerance go on in float64.
"""

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fastproj.core.errors import InputError
from fastproj.core.linear import linear
from fastproj.evaluation.probes.passes import Rows
from fastproj.evaluation.probes.preconditioners import Blocks, Kronecker, precondition, spread

Inverse = Kronecker | Blocks

TOLERANCE = 1e-6  # certified: (f - min f) / f
MEMORY = 10  # pairs that L-BFGS remembers
PASSES = {torch.float32: 150, torch.float64: 2000}  # over the rows, at most
FEW = 6  # strengths: so many or more are solved in turns
PACE = 8  # steps from which the pace of a preconditioner is known
COST = 9  # of making one for d features and N rows: COST d²/N passes of one head, on a CPU
GAIN = 3  # times its cost: what the passes to come must cost before one is made
# A step shortened so often in a row: rounding hides the descent. Nearly separable rows need many.
SHORTENED = {torch.float32: 5, torch.float64: 25}
CLOSE = 1e-2  # an intercept's step after which the rest is in the bound


@dataclass(frozen=True)
class Solution:
    """One head per strength.

    ``heads``: float64 (S, C, d+1), the last column is the intercept. ``objective``: its f, float64
    (S,). ``suboptimality``: upper bound of (f - min f) / f, float64 (S,). ``iterations``: passes
    over the rows, int64 (S,), those of the certificate not counted.
    """

    heads: Tensor
    objective: Tensor
    suboptimality: Tensor
    iterations: Tensor


def solve(
    x: Tensor, y: Tensor, classes: int, strengths: Tensor, tolerance: float = TOLERANCE
) -> Solution:
    """Heads that minimize f for each of ``strengths`` (S,), all positive.

    ``x``: float32 (N, d), standardized; ``y``: int64 (N,) below ``classes``. A class without a row
    gets no finite intercept in theory; its head is zero and its intercept minus infinity, so that
    it is never predicted.
    """
    strengths = strengths.to(x.device, torch.float64)
    if not (strengths > 0).all():
        raise InputError("strengths must be above 0: without a penalty there may be no optimum")
    strengths, places = strengths.unique(return_inverse=True)
    present, y = y.unique(return_inverse=True)
    whole, width = x.contiguous(), x.shape[1]
    basis = _span(whole)  # the penalty keeps W in the span of the rows
    rows = Rows(whole if basis is None else whole.double() @ basis, y, many=True)
    prior = rows.prior
    start = torch.zeros(len(present), rows.x.shape[1] + 1, dtype=torch.float64, device=x.device)
    start[:, -1] = prior.log() - prior.log().mean()
    inverse: Inverse = Kronecker.at_zero(rows.x, prior)
    found, iterations, _ = _path(rows, start, strengths, inverse, 0.5 * tolerance)
    heads, objective, bound = _certify(rows, found, strengths, tolerance)
    for aim in (0.5, 0.05):
        left = (bound > tolerance).nonzero().squeeze(1)
        if not len(left):
            break
        inverse = Kronecker.at(rows.x, heads[left[len(left) // 2]])
        found, passes, _ = _lbfgs(
            rows, heads[left], strengths[left], inverse, aim * tolerance, torch.float64
        )
        iterations[left] += passes
        heads[left], objective[left], bound[left] = _certify(
            rows, found, strengths[left], tolerance
        )
    if basis is not None:
        heads = torch.cat([heads[..., :-1] @ basis.T, heads[..., -1:]], dim=2)
        heads, objective, bound = certify(whole, y, heads, strengths, tolerance)
    every = heads.new_zeros(len(strengths), classes, width + 1)
    every[:, :, -1] = -torch.inf
    every[:, present] = heads
    return Solution(every[places], objective[places], bound[places], iterations[places])


def _span(x: Tensor) -> Tensor | None:
    """Orthonormal columns (d, r), float64, that span the rows; None where those span everything.

    Directions with a singular value below 1e-6 of the largest are left out: float32 rows hold
    nothing but rounding there. What that costs is in the certificate, which sees the whole rows.
    """
    if x.shape[1] > len(x):
        return torch.linalg.qr(x.double().T)[0]
    some = spread(x)
    values = torch.linalg.eigvalsh((some.T @ some).double())
    if values[0] > 1e-6 * values[-1]:  # far above what float32 products round away
        return None
    x = x.double()
    values, vectors = torch.linalg.eigh(x.T @ x)
    kept = values > 1e-12 * values[-1]
    return None if kept.all() else vectors[:, kept]


def certify(
    x: Tensor, y: Tensor, heads: Tensor, strengths: Tensor, tolerance: float = TOLERANCE
) -> tuple[Tensor, Tensor, Tensor]:
    """``heads`` (S, C, d+1) with the best intercepts for their weights, f (S,), its bound (S,).

    All float64. Every class has a row in ``y``. The intercepts are found until they cost a bound no
    more than ``tolerance``.
    """
    return _certify(Rows(x, y), heads, strengths.to(x.device, torch.float64), tolerance)


def _certify(
    rows: Rows, heads: Tensor, strengths: Tensor, tolerance: float
) -> tuple[Tensor, Tensor, Tensor]:
    heads = heads.double().clone()
    inverse = _balance(rows, heads)
    curvature = linear(rows.x.T, rows.x.T).norm().double() / len(rows)
    objective, bound = torch.empty_like(strengths), torch.empty_like(strengths)
    before = torch.full_like(strengths, torch.inf)
    left = torch.arange(len(strengths), device=strengths.device)
    for _ in range(20):
        value, gradient, _ = rows.evaluate(heads[left], strengths[left])
        off, slopes = gradient[..., -1], gradient[..., :-1].square().sum((1, 2)).sqrt()
        step = (inverse[left] @ off.unsqueeze(2)).squeeze(2)
        decrement = (off * step).sum(1).clamp(min=0)
        moved, scale = (curvature * decrement).sqrt(), 2 * strengths[left] * value
        objective[left] = value
        bound[left] = (slopes + moved).square() / scale + decrement / value
        within_reach = (slopes - moved).clamp(min=0).square() / scale <= tolerance
        more = (bound[left] > tolerance) & within_reach & (decrement < before[left] / 4)
        before[left] = decrement
        left = left[more]
        if not len(left):
            break
        heads[left, :, -1] -= _short(step[more])
    return heads, objective, bound


def _balance(rows: Rows, heads: Tensor) -> Tensor:
    """Move the intercepts of ``heads`` until the mean probabilities are the shares of the classes.

    By Newton's method, in the rows' type. Returns the inverse Hessian of the intercepts (S, C, C).
    """
    inverse = heads.new_zeros(len(heads), heads.shape[1], heads.shape[1])
    left = torch.arange(len(heads), device=heads.device)
    for _ in range(20):
        mean, covariance = rows.probabilities(heads[left].to(rows.x.dtype))
        # What all classes have in common is no direction: 1 / C keeps rounding from being one.
        inverse[left] = torch.linalg.pinv(covariance + 1 / len(rows.prior), hermitian=True)
        step = _short((inverse[left] @ (mean - rows.prior).unsqueeze(2)).squeeze(2))
        heads[left, :, -1] -= step
        left = left[step.abs().amax(1) >= CLOSE]
        if not len(left):
            break
    return inverse


def _short(step: Tensor) -> Tensor:
    """Newton's steps (S, C), none longer than 1."""
    return step / step.abs().amax(1, keepdim=True).clamp(min=1)


def _path(
    rows: Rows,
    start: Tensor,
    strengths: Tensor,
    inverse: Inverse,
    tolerance: float,
    share: float = 1.0,
) -> tuple[Tensor, Tensor, Inverse]:
    """``_lbfgs`` in float32 for ascending ``strengths``.

    Every second strength is solved first, in the same way; the first few from ``start`` (C, d+1). A
    cubic spline over log l through their heads starts the others a few passes from their optimum.
    """
    count = len(strengths)
    heads = start.float().repeat(count, 1, 1)
    if count < FEW:
        return _lbfgs(rows, heads, strengths, inverse, tolerance, torch.float32, share)
    knots = sorted({*range(0, count, 2), count - 1})
    others = [i for i in range(count) if i not in knots]
    passes = torch.zeros(count, dtype=torch.int64, device=start.device)
    share *= count / len(knots)
    heads[knots], passes[knots], inverse = _path(
        rows, start, strengths[knots], inverse, tolerance, share
    )
    at = strengths.log()
    weights = _spline(at[knots], at[others])
    between = torch.tensordot(weights.to(heads.dtype), heads[knots], 1)
    heads[others], passes[others], inverse = _lbfgs(
        rows, between, strengths[others], inverse, tolerance, torch.float32
    )
    return heads, passes, inverse


def _spline(knots: Tensor, at: Tensor) -> Tensor:
    """Weights (M, K) of values at ``knots`` (K,) for their natural cubic spline ``at`` (M,).

    It is the sum of w |t - knot|³ over the knots, with Σ w = Σ w knot = 0, and a line.
    """
    cubes = (knots - knots.unsqueeze(1)).abs() ** 3
    line = torch.stack([torch.ones_like(knots), knots])
    system = torch.cat([torch.cat([cubes, line]), functional.pad(line.T, (0, 0, 0, 2))], 1)
    there = torch.cat([(at - knots.unsqueeze(1)).abs() ** 3, torch.ones_like(at)[None], at[None]])
    # Not solve: strengths may differ by less than their logarithms can tell.
    return (torch.linalg.pinv(system, hermitian=True) @ there)[: len(knots)].T


def _lbfgs(
    rows: Rows,
    heads: Tensor,
    strengths: Tensor,
    inverse: Inverse,
    tolerance: float,
    kind: torch.dtype,
    share: float = 1.0,
) -> tuple[Tensor, Tensor, Inverse]:
    """Heads (S, C, d+1) of ``kind``, passes (S,) and the last preconditioner.

    A head is done where f is about ``tolerance`` · f from its minimum (``Rows.evaluate``).
    The first preconditioner made serves ``share`` times as many passes as are to come here.
    A step that ends uphill is shortened by the secant of the slope: of a convex f, a slope that is
    not positive at the end proves that f fell, which values in float32 could not.
    """
    found, passes = heads.to(kind), torch.zeros_like(strengths, dtype=torch.int64)
    active = torch.arange(len(strengths), device=heads.device)
    at, l2 = found.clone(), strengths
    # At W = 0 the strength changes nothing: one evaluation serves all.
    first = len(at) if at[..., :-1].any() else 1
    value, gradient, gap = rows.evaluate(at[:first], l2[:first])
    value, gradient = value.expand_as(l2), gradient.expand_as(at)
    made, begun = 0, (gap / (tolerance * value)).log()
    pairs: deque[tuple[Tensor, Tensor, Tensor]] = deque(maxlen=MEMORY)
    length, shortened = torch.ones_like(l2), torch.zeros_like(l2)
    for step in range(PASSES[kind]):
        direction = -_two_loops(gradient, pairs, inverse, l2)
        slope = _dot(direction, gradient)
        trial = at + length.to(kind).view(-1, 1, 1) * direction
        there, uphill, gap = rows.evaluate(trial, l2)
        passes[active] += 1
        end = _dot(direction, uphill)
        taken = (end <= 0) | (there <= value + 1e-4 * length * slope)
        pick = taken.view(-1, 1, 1)
        change, turn = (trial - at) * pick, (uphill - gradient) * pick
        product = _dot(change, turn)
        rho = torch.where(product > 0, 1 / product, 0.0)
        pairs.append((change, turn, rho))
        at, gradient = torch.where(pick, trial, at), torch.where(pick, uphill, gradient)
        value = torch.where(taken, there, value)
        secant = (length * slope / (slope - end)).clamp(min=0).maximum(length / 10)
        length = torch.where(taken, 1.0, secant.minimum(length / 2))
        shortened = torch.where(taken, 0, shortened + 1)
        away = (gap / (tolerance * value)).log()
        done = (taken & (away <= 0)) | (shortened >= SHORTENED[kind])
        found[active] = at
        if done.all():
            break
        if done.any():
            keep = ~done
            active, at, l2, value = active[keep], at[keep], l2[keep], value[keep]
            gradient, length, shortened = gradient[keep], length[keep], shortened[keep]
            begun, away = begun[keep], away[keep]
            pairs = deque(((s[keep], t[keep], r[keep]) for s, t, r in pairs), maxlen=MEMORY)
        since = step + 1 - made
        to_come = share * (since * away / (begun - away).clamp(min=0.1)).sum()  # at the pace so far
        worth = to_come * len(rows) >= GAIN * COST * rows.x.shape[1] ** 2
        if worth and since >= PACE:
            # Not the weakest: nearly separable, it misleads the others.
            inverse = precondition(rows.x, at[len(at) // 3])
            made, begun, share = step + 1, away, 1.0
    return found, passes, inverse


def _two_loops(
    gradient: Tensor,
    pairs: deque[tuple[Tensor, Tensor, Tensor]],
    inverse: Inverse,
    l2: Tensor,
) -> Tensor:
    """L-BFGS's product of the inverse Hessian and the gradient (Nocedal and Wright, algorithm 7.4).

    A pair with rho = 0, of a step that was not taken, changes nothing.
    """
    q, alphas = gradient.clone(), []
    for change, turn, rho in reversed(pairs):
        alpha = (rho * _dot(change, q)).to(q.dtype).view(-1, 1, 1)
        q -= alpha * turn
        alphas.append(alpha)
    q = inverse(q, l2)
    for (change, turn, rho), alpha in zip(pairs, reversed(alphas), strict=True):
        beta = (rho * _dot(turn, q)).to(q.dtype).view(-1, 1, 1)
        q += (alpha - beta) * change
    return q


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """One float64 scalar product per head, (S,)."""
    return (a * b).sum((1, 2)).double()
