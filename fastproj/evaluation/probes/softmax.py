"""Multinomial logistic regression solved for many L2 strengths at once, to a certified accuracy.

The objective is convex, so it is solved instead of tuned. For a strength l it is

    f(W, b) = mean cross-entropy of softmax(W x + b) + l / 2 |W|²,

as scikit-learn's ``LogisticRegression`` with C = 1 / (l n); the intercept b is not penalized.

All strengths take preconditioned L-BFGS steps together, so that each step is two matrix products
over the stacked heads. The preconditioner is the Hessian at W = 0 without the coupling of W and b.
Where the passes to come would take longer, it is made anew at the current head of the median
strength. Strengths that are done leave the stack.

The certificate is the duality gap. f - l/2 |W|² is convex, so g(W) = min_b f(W, b) is l-strongly
convex, and g(W) - min f <= |∇g(W)|² / (2 l). ``certify`` therefore first solves for b by Newton's
method, in float64; then ∇g is ∂f/∂W. Strengths that float32 did not bring that far go on in
float64.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastproj.core.errors import InputError
from fastproj.core.linear import linear
from fastproj.evaluation.probes.preconditioners import Blocks, Kronecker, precondition, spread

Inverse = Kronecker | Blocks

TOLERANCE = 1e-6  # certified: (f - min f) / f
MEMORY = 20  # pairs that L-BFGS remembers
PASSES = {torch.float32: 150, torch.float64: 2000}  # over the rows, at most
PACE = 8  # steps from which the pace of a preconditioner is known
COST = 9  # of making one for d features and N rows: COST d²/N passes of one head, on a CPU
GAIN = 3  # times its cost: what the passes to come must cost before one is made
LOGITS = 2**21  # bytes of logits computed at once: less than what malloc gives back each time


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
    rows = x = x.contiguous()
    width = x.shape[1]
    basis = _span(x)  # the penalty keeps W in the span of the rows: no more unknowns than its rank
    if basis is not None:
        x = x.double() @ basis
    present, y = y.unique(return_inverse=True)
    prior = torch.bincount(y).double() / len(y)
    start = torch.zeros(len(present), x.shape[1] + 1, dtype=torch.float64, device=x.device)
    start[:, -1] = prior.log() - prior.log().mean()
    inverse: Inverse = Kronecker.at_zero(x, prior)
    heads = start.repeat(len(strengths), 1, 1)
    objective, bound = torch.zeros_like(strengths), torch.full_like(strengths, torch.inf)
    iterations = torch.zeros(len(strengths), dtype=torch.int64, device=x.device)
    for kind, aim in ((torch.float32, 0.25), (torch.float64, 0.5), (torch.float64, 0.05)):
        left = (bound > tolerance).nonzero().squeeze(1)
        if not len(left):
            break
        if kind == torch.float64:
            inverse = Kronecker.at(x, heads[left[len(left) // 2]])
        found, passes = _lbfgs(x, y, heads[left], strengths[left], inverse, aim * tolerance, kind)
        iterations[left] += passes
        heads[left], objective[left], bound[left] = certify(x, y, found, strengths[left])
    if basis is not None:
        heads = torch.cat([heads[..., :-1] @ basis.T, heads[..., -1:]], dim=2)
        heads, objective, bound = certify(rows, y, heads, strengths)
    whole = heads.new_zeros(len(strengths), classes, width + 1)
    whole[:, :, -1] = -torch.inf
    whole[:, present] = heads
    return Solution(whole, objective, bound, iterations)


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
    x: Tensor, y: Tensor, heads: Tensor, strengths: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """``heads`` (S, C, d+1) with the best intercepts for their weights, f (S,), its bound (S,).

    All in float64. Every class has a row in ``y``. The bound is |∂f/∂W|² / (2 l) / f, plus what the
    intercept's residual could change if its optimum were 100 away.
    """
    heads, strengths = heads.double().clone(), strengths.to(x.device, torch.float64)
    prior = torch.bincount(y, minlength=heads.shape[1]).double() / len(x)
    before, far = torch.full_like(strengths, torch.inf), True
    for _ in range(20):
        if far:
            mean, covariance = _probabilities(x, heads)
            inverse, off = torch.linalg.pinv(covariance, hermitian=True), mean - prior
        step = (inverse @ off.unsqueeze(2)).squeeze(2)
        heads[..., -1] -= step / step.abs().amax(1, keepdim=True).clamp(min=1)
        far = bool(step.abs().max() > 1e-2)  # else the covariance is as it was
        value, gradient, _ = _evaluate(x, y, heads, strengths)
        gap = gradient[..., :-1].square().sum((1, 2)) / (2 * strengths)
        off = gradient[..., -1]
        residual = 100 * off.abs().sum(1)
        if not ((residual > 3e-8 * value) & (residual < before / 2)).any():
            break  # the intercepts count no more, or float64 brings them no further
        before = residual
    return heads, value, (gap + residual) / value


def _lbfgs(
    x: Tensor,
    y: Tensor,
    heads: Tensor,
    strengths: Tensor,
    inverse: Inverse,
    tolerance: float,
    kind: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Heads (S, C, d+1) of ``kind`` and passes (S,).

    A head is done where |∂f/∂(W, b)|² / (2 l) <= tolerance · f.
    A step that ends uphill is shortened by the secant of the slope: of a convex f, a slope that is
    not positive at the end proves that f fell, which values in float32 could not.
    """
    found, passes = heads.to(kind), torch.zeros_like(strengths, dtype=torch.int64)
    active = torch.arange(len(strengths), device=x.device)
    at, l2 = found.clone(), strengths
    # At W = 0 the strength changes nothing: one evaluation serves all.
    first = len(at) if at[..., :-1].any() else 1
    value, gradient, norm = _evaluate(x, y, at[:first], l2[:first])
    value, gradient = value.expand_as(l2), gradient.expand_as(at)
    made, begun = 0, (norm / (2 * l2 * tolerance * value)).log()
    pairs: deque[tuple[Tensor, Tensor, Tensor]] = deque(maxlen=MEMORY)
    length, shortened = torch.ones_like(l2), torch.zeros_like(l2)
    for step in range(PASSES[kind]):
        direction = -_two_loops(gradient, pairs, inverse, l2)
        slope = _dot(direction, gradient)
        trial = at + length.to(kind).view(-1, 1, 1) * direction
        there, uphill, norm = _evaluate(x, y, trial, l2)
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
        away = (norm / (2 * l2 * tolerance * value)).log()
        # Five in a row: rounding hides the descent.
        done = (taken & (away <= 0)) | (shortened >= 5)
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
        to_come = (since * away / (begun - away).clamp(min=0.1)).sum()  # at the pace so far
        if since >= PACE and to_come * len(x) >= GAIN * COST * x.shape[1] ** 2:
            inverse = precondition(x, at[len(at) // 2])
            made, begun = step + 1, away
    return found, passes


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


def _probabilities(x: Tensor, heads: Tensor) -> tuple[Tensor, Tensor]:
    """Mean probabilities (S, C) and the mean of diag(p) - ppᵀ (S, C, C), in the heads' type."""
    mass = torch.zeros_like(heads[..., -1])
    products = mass.diag_embed()
    for _, _, logits in _logits(x, heads):
        p = logits.softmax(1)
        mass += p.sum(2)
        products += p @ p.mT
    return mass / len(x), (mass.diag_embed() - products) / len(x)


def _logits(x: Tensor, heads: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Some rows after the other: which they are, the rows in the heads' type, logits (S, C, rows).

    Rows come last, where they are contiguous: a softmax over the last of few classes is slow.
    """
    count, classes, _ = heads.shape
    weight = heads[..., :-1].flatten(0, 1).contiguous()
    intercept = heads[..., -1:].flatten(0, 1)
    size = max(256, LOGITS // (count * classes * heads.itemsize))
    for start in range(0, len(x), size):
        part = slice(start, start + size)
        rows = x[part].to(heads.dtype)
        logits = linear(weight, rows).add_(intercept)
        yield part, rows, logits.view(count, classes, -1)


def _evaluate(x: Tensor, y: Tensor, heads: Tensor, l2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """f (S,), its gradient (S, C, d+1) in the heads' type, and its square (S,).

    Sums over the rows are float64.
    """
    count, classes, _ = heads.shape
    n, kind = len(x), heads.dtype
    loss = torch.zeros(count, dtype=torch.float64, device=x.device)
    gradient = torch.zeros(count * classes, x.shape[1] + 1, dtype=torch.float64, device=x.device)
    minus = torch.full((1, 1, 1), -1.0, dtype=kind, device=x.device)
    for part, rows, logits in _logits(x, heads):
        log_p = logits.log_softmax(1)
        target = y[part].expand(count, 1, -1)
        loss -= log_p.gather(1, target).sum((1, 2), dtype=torch.float64)
        error = log_p.exp_().scatter_add_(1, target, minus.expand_as(target)).flatten(0, 1)
        gradient[:, :-1] += linear(error, rows.T)
        gradient[:, -1] += error.sum(1, dtype=torch.float64)
    gradient = (gradient / n).view(count, classes, -1)
    slopes = gradient[..., :-1]
    slopes += l2.view(-1, 1, 1) * heads[..., :-1]
    value = loss / n + l2 / 2 * heads[..., :-1].double().square().sum((1, 2))
    return value, gradient.to(kind), gradient.square().sum((1, 2))
