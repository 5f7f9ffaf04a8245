"""Oracles: each paper's formula in float64 loops, and one rank for two."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastproj.core import dist
from fastproj.core.table import hyperparameters
from fastproj.models import PROJECTORS
from fastproj.models.projector import build_projector
from fastproj.objective import barlow_twins, nt_xent
from fastproj.objective.penalties import matrix_information
from fastproj.training import diagnostics
from fastproj.training.diagnostics import (
    ROWS,
    Diagnostics,
    active_latents,
    alignment,
    rankme,
    uniformity,
    used_codes,
)
from tests.support.ranks import on_ranks

BARLOW = partial(barlow_twins, off_diagonal=0.0051, scale=0.1)
few = settings(max_examples=20, deadline=None)
PLAIN = {
    *["matrix_information", "lower_bound_surrogate", "upper_bound_surrogate"],
    *["alignment_features", "alignment_projections", "uniformity_features"],
    *["uniformity_projections", "rankme_features", "rankme_projections"],
}


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def head(kind="mlp", features=6, **changes):
    torch.manual_seed(0)
    given = {"hidden": 16, "out": 4, "depth": 2, "batch_norm": True, "dropout": 0.5}
    given |= {"latents": None, "k": 2, "levels": None} | changes
    named = {**hyperparameters(PROJECTORS[kind]), **dict.fromkeys(("latents", "k", "levels"))}
    if given["latents"]:
        named["out"] = None
    return build_projector(kind, features, **{n: v for n, v in given.items() if n in named})


def unit(rows):
    return [[v / math.sqrt(sum(u * u for u in row)) for v in row] for row in rows.tolist()]


def squared_distance(a, b):
    return sum((u - v) ** 2 for u, v in zip(a, b, strict=True))


@few
@given(n=st.integers(2, 6), d=st.integers(1, 5), seed=st.integers(0, 999))
def test_alignment_and_uniformity_equal_the_paper_in_loops(n, d, seed):
    x, y = draw(2, n, d, seed=seed).unbind()
    a, b = unit(x), unit(y)
    aligned = sum(squared_distance(p, q) for p, q in zip(a, b, strict=True)) / n
    pairs = [(p, q) for i, p in enumerate(a) for j, q in enumerate(a) if i != j]
    uniform = math.log(sum(math.exp(-2 * squared_distance(p, q)) for p, q in pairs) / len(pairs))
    assert alignment(x, y).item() == pytest.approx(aligned)
    assert uniformity(x).item() == pytest.approx(uniform)
    assert alignment(x.half(), y.half()).dtype == torch.float32
    assert uniformity(x.float() * 1000).item() == pytest.approx(uniform, rel=1e-4, abs=1e-5)


def test_known_alignment_and_uniformity():
    x = draw(5, 3)
    assert alignment(x, 7 * x).item() == pytest.approx(0, abs=1e-12)
    assert alignment(x, -x).item() == pytest.approx(4)
    assert uniformity(torch.ones(5, 3)).item() == pytest.approx(0, abs=1e-6)
    assert uniformity(torch.tensor([[1.0, 0], [-3, 0]])).item() == pytest.approx(-8)
    # Orthogonal rows are as far apart as those of a uniform sphere of many dimensions.
    assert uniformity(torch.eye(64)).item() == pytest.approx(-4)
    assert uniformity(draw(500, 400)).item() == pytest.approx(-4, abs=0.05)


@few
@given(n=st.integers(1, 9), d=st.integers(1, 9), seed=st.integers(0, 999))
def test_rankme_equals_the_paper(n, d, seed):
    rows = draw(n, d, seed=seed)
    sigma = np.linalg.svd(rows.numpy(), compute_uv=False)
    entropy = 0.0
    for value in sigma:
        p = value / sigma.sum() + 1e-7
        entropy -= p * math.log(p)
    assert rankme(rows).item() == pytest.approx(math.exp(entropy), rel=1e-6)
    assert rankme(rows.T).item() == pytest.approx(math.exp(entropy), rel=1e-6)
    assert 1 - 1e-5 < rankme(rows).item() < min(n, d) * (1 + 1e-5)


def test_known_ranks():
    assert rankme(torch.eye(7)).item() == pytest.approx(7, rel=1e-4)
    assert rankme(torch.ones(50, 7)).item() == pytest.approx(1, abs=1e-4)
    assert rankme(torch.zeros(50, 7)).item() == pytest.approx(1, abs=1e-4)  # collapsed
    low = draw(60, 3) @ torch.linalg.qr(draw(30, 3, seed=1)).Q.T
    assert 2.5 < rankme(low).item() < 3.001
    assert rankme(draw(10, 500)).item() <= 10.001  # as many rows, no more
    assert rankme(torch.full((4, 3), math.nan)).isnan()


@few
@given(
    n=st.integers(1, 30),
    levels=st.sampled_from([2, 3, 4, 5, 30]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 999),
)
def test_used_codes_counts_what_a_discretized_output_takes(n, levels, dtype, seed):
    codes = head("linear", levels=levels).output(3 * draw(n, 5, seed=seed)).to(dtype)
    counts = [len(set(column)) for column in zip(*codes.tolist(), strict=True)]
    assert max(counts) <= levels
    assert used_codes(codes, levels).item() == pytest.approx(np.mean(counts) / levels)


def test_every_level_can_be_used():
    z = torch.linspace(-20, 20, 2001)[:, None].expand(-1, 3)
    for levels in (2, 3, 4, 5, 30):
        assert used_codes(head("linear", levels=levels).output(z), levels) == 1
        assert used_codes(torch.zeros(9, 3), levels).item() == pytest.approx(1 / levels)


def by_hand(projector, features):
    """Which latents stay among a row's k largest positive ones, row by row."""
    seen = set()
    sparse = projector.last
    with torch.no_grad():
        for row in projector.hidden(features):
            latents = sparse.encoder.weight @ (row - sparse.pre_bias) + sparse.encoder.bias
            kept = sorted(range(len(latents)), key=lambda i: -latents[i])[: sparse.k]
            seen |= {i for i in kept if latents[i] > 0}
    return seen


@pytest.mark.parametrize("kind", ["none", "mlp", "barlow"])
@pytest.mark.parametrize("chunk", [256, 3])
def test_active_latents(kind, chunk, monkeypatch):
    monkeypatch.setattr(diagnostics, "CHUNK", chunk)
    projector, features = head(kind, latents=40, k=3), draw(10, 6, dtype=torch.float32)
    projector(features)  # batch norm has seen something
    state = {name: value.clone() for name, value in projector.state_dict().items()}
    projector.trunk.train()
    if kind == "barlow":
        projector.trunk[1].eval()  # a mode of its own stays as it is
    before = [module.training for module in projector.modules()]
    active = active_latents(projector, features)
    assert [module.training for module in projector.modules()] == before
    assert all(torch.equal(value, state[n]) for n, value in projector.state_dict().items())
    assert active.shape == (40,) and active.dtype == torch.bool
    projector.eval()
    assert set(active.nonzero().flatten().tolist()) == by_hand(projector, features)
    assert 0 < active.sum() < 40


# Together


def watched(*, steps=3, batch=8, seed=0, features=6, out=4, dtype=torch.float32):
    """Steps of two views that have something in common, as (2, B, d) and (2, B, o)."""
    mixing = draw(features, out, seed=99, dtype=dtype)
    common = draw(steps, 1, batch, features, seed=seed, dtype=dtype)
    h = common + 0.5 * draw(steps, 2, batch, features, seed=seed + 1, dtype=dtype)
    return list(zip(h, torch.tanh(h @ mixing), strict=True))


def told(projector, steps, loss=None, **settings):
    kept = Diagnostics(projector, loss, **settings)
    for step in steps:
        kept.watch(*step)
    return kept.report()


def test_the_report_is_made_of_the_measures():
    steps = watched()
    report = told(head(), steps)
    assert set(report) == PLAIN | {"near_zero_groups"}
    assert all(type(value) is float and math.isfinite(value) for value in report.values())
    (h1, h2), (z1, z2) = steps[-1]
    information = matrix_information(torch.cat([h1, h2]), torch.cat([z1, z2]), 2).item()
    assert report["matrix_information"] == pytest.approx(information, rel=1e-5)
    lower = -nt_xent(h1, h2, 0.2).item() - information
    assert report["lower_bound_surrogate"] == pytest.approx(lower, rel=1e-5)
    rows = torch.nn.functional.normalize(torch.cat([h1, h2]))
    entropy = -math.log(((rows @ rows.T) ** 2).mean())
    assert report["upper_bound_surrogate"] == pytest.approx(entropy - information, rel=1e-5)
    for name, number in (("features", 0), ("projections", 1)):
        one, other = (torch.cat([step[number][view] for step in steps]) for view in (0, 1))
        assert report[f"alignment_{name}"] == pytest.approx(alignment(one, other).item(), rel=1e-5)
        both = (uniformity(one) + uniformity(other)).item() / 2
        assert report[f"uniformity_{name}"] == pytest.approx(both, rel=1e-5)
        rank = rankme(torch.cat([one, other])).item()
        assert report[f"rankme_{name}"] == pytest.approx(rank, rel=1e-5)
    assert report["alignment_features"] != pytest.approx(report["alignment_projections"], rel=0.01)


def test_the_lower_bound_takes_the_runs_own_loss():
    steps = watched()
    h1, h2 = steps[-1][0]
    information = told(head(), steps)["matrix_information"]
    for loss, value in (
        (None, nt_xent(h1, h2, 0.2)),
        (BARLOW, barlow_twins(h1, h2, 0.0051, 0.1)),
        (partial(nt_xent, temperature=0.9), nt_xent(h1, h2, 0.9)),
    ):
        report = told(head(), steps, loss)
        wanted = -value.item() - information
        assert report["lower_bound_surrogate"] == pytest.approx(wanted, rel=1e-4)


def test_only_what_applies_is_reported():
    for projector, own in (
        (head("none"), set()),
        (head("direct"), set()),
        (head("none", levels=3), {"used_codes"}),
        (head("linear"), {"near_zero_groups"}),
        (head("none", latents=40), {"near_zero_groups", "dead_latents"}),
        (head("mlp", latents=40, levels=3), {"near_zero_groups", "dead_latents", "used_codes"}),
    ):
        steps = watched()
        if "used_codes" in own:
            steps = [(h, projector.output(z)) for h, z in steps]
        report = told(projector, steps)
        assert set(report) == PLAIN | own
        assert all(math.isfinite(value) for value in report.values())
        if "dead_latents" in own:
            features = torch.cat([h.flatten(0, 1) for h, _ in steps])
            dead = 1 - len(by_hand(projector.eval(), features)) / 40
            assert report["dead_latents"] == pytest.approx(dead)
            assert 0 < report["dead_latents"] < 1
        if "used_codes" in own:
            codes = torch.cat([z.flatten(0, 1) for _, z in steps])
            assert report["used_codes"] == pytest.approx(used_codes(codes, 3).item())


def test_near_zero_groups_are_those_asked_for():
    projector = head("linear")
    with torch.no_grad():
        projector.first_weight()[:, :3] = 0
        projector.first_weight()[:1] = 0
    assert told(projector, watched())["near_zero_groups"] == pytest.approx(3 / 6)
    assert told(projector, watched(), groups="rows")["near_zero_groups"] == pytest.approx(1 / 4)


def test_a_collapsed_run_still_has_numbers():
    """All rows alike, and all projections zero: three levels give that."""
    features, nothing = torch.ones(2, 8, 6), torch.zeros(2, 8, 4)
    report = told(head("mlp", latents=40, levels=3), [(features, nothing)])
    assert all(math.isfinite(value) for value in report.values())
    assert report["rankme_features"] == pytest.approx(1, abs=1e-3)
    assert report["uniformity_features"] == pytest.approx(0, abs=1e-5)
    assert report["used_codes"] == pytest.approx(1 / 3)


def test_a_diverged_run_reports_no_number():
    """NaN, which the journal refuses in one line, and not an error of a library."""
    steps = [(torch.full((2, 8, 6), math.nan), torch.zeros(2, 8, 4))]
    assert math.isnan(told(head(), steps)["rankme_features"])


def test_half_precision_features():
    steps = [(h.bfloat16(), z.bfloat16()) for h, z in watched()]
    report = told(head("mlp", latents=40), steps)
    wanted = told(head("mlp", latents=40), [(h.float(), z.float()) for h, z in steps])
    assert report == pytest.approx(wanted, rel=1e-5)


def test_watching_keeps_references_to_the_last_rows(monkeypatch):
    kept = Diagnostics(head())
    steps = watched(steps=20, batch=ROWS // 16)  # 512 rows a step
    for h, z in steps:
        kept.watch(h.requires_grad_(), z)
    assert [h.data_ptr() for h, _ in kept._kept] == [h.data_ptr() for h, _ in steps[-8:]]
    assert not any(x.requires_grad for pair in kept._kept for x in pair)
    monkeypatch.setattr(dist, "world_size", lambda: 2)
    kept.watch(*steps[0])
    assert len(kept._kept) == 4  # this rank's half of the rows
    monkeypatch.undo()
    large = watched(steps=1, batch=ROWS)
    kept.watch(*large[0])
    assert len(kept._kept) == 1  # the last step is kept whole


def test_an_epoch_reports_its_own_rows():
    first, second = watched(seed=0), watched(seed=5)
    kept = Diagnostics(head())
    for step in first:
        kept.watch(*step)
    assert kept.report() != (wanted := told(head(), second))
    for step in second:
        kept.watch(*step)
    assert kept.report() == wanted
    assert kept.report() == {}


# Two ranks, each with half of the images, say what one says of all.


def two_halves():
    projector = head("mlp", latents=40, levels=3, batch_norm=False)
    steps = [(h, projector.output(z)) for h, z in watched(batch=10)]
    return projector, steps


def on_one_half():
    projector, steps = two_halves()
    mine = slice(5 * dist.rank(), 5 * dist.rank() + 5)
    steps = [(h[:, mine], z[:, mine]) for h, z in steps]
    return [told(projector, steps, loss) for loss in (None, BARLOW)]


@pytest.mark.slow
def test_two_ranks_report_what_one_does(tmp_path):
    wanted = [told(*two_halves(), loss) for loss in (None, BARLOW)]
    ranks = on_ranks(2, on_one_half, tmp_path)
    for seen in ranks:
        for one, other in zip(seen, wanted, strict=True):
            assert one == pytest.approx(other, rel=1e-4)
    assert ranks[0] == ranks[1]


@pytest.mark.gpu
def test_the_gpu_agrees_and_watching_does_not_wait():
    projector, steps = two_halves()
    wanted = told(projector, steps)
    kept = Diagnostics(projector.cuda())
    on_gpu = [(h.cuda(), z.cuda()) for h, z in steps]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in on_gpu:
            kept.watch(*step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert kept.report() == pytest.approx(wanted, rel=1e-3)
