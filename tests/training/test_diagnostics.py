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
from fastproj.training import diagnostics
from fastproj.training.diagnostics import (
    ROWS,
    SPECTRUM,
    Diagnostics,
    active_latents,
    alignment,
    rankme,
    singular_values,
    spectrum,
    squared_cosines,
    uniformity,
    used_codes,
)
from tests.support.ranks import on_ranks

BARLOW = partial(barlow_twins, off_diagonal=0.0051, scale=0.1)
few = settings(max_examples=20, deadline=None)
CURVES = [
    *["negative_loss_features", "log_n_minus_nce_features", "matrix_information"],
    *["matrix_entropy_features", "negative_loss_minus_information", "entropy_minus_information"],
]
PLAIN = {
    *[name + end for name in CURVES for end in ("", "_std")],
    *["alignment_features", "alignment_projections", "uniformity_features"],
    *["uniformity_projections", "rankme_features", "rankme_projections"],
    *["spectrum_features", "spectrum_projections"],
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


def test_a_spectrum_is_numpys():
    for n, d in ((9, 4), (4, 9), (30, 30), (300, 200)):
        rows = draw(n, d)
        sigma = np.linalg.svd(rows.numpy(), compute_uv=False)
        np.testing.assert_allclose(singular_values(rows).numpy(), sigma, rtol=1e-6)
        points = spectrum(singular_values(rows))
        assert [k for k, _ in points] == sorted({k for k, _ in points})
        assert points[0][0] == 1 and points[-1][0] == min(n, d)
        assert [value for _, value in points] == pytest.approx(
            [sigma[k - 1] / sigma.sum() for k, _ in points], rel=1e-3
        )
        if min(n, d) <= SPECTRUM:
            assert len(points) == min(n, d)
            assert sum(value for _, value in points) == pytest.approx(1, rel=1e-3)
        else:
            assert SPECTRUM / 2 < len(points) <= SPECTRUM
            gaps = np.diff([k for k, _ in points])
            assert (gaps[:5] == 1).all() and (np.diff(gaps) >= -1).all()  # dense at the start
    assert spectrum(singular_values(torch.zeros(5, 3))) == [(1, 0.0), (2, 0.0), (3, 0.0)]
    assert all(
        math.isnan(value) for _, value in spectrum(singular_values(torch.full((4, 3), math.nan)))
    )


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


def numbers(report):
    """A report without nesting: its numbers by name, those of a spectrum by place as well."""
    flat = {name: value for name, value in report.items() if not name.startswith("spectrum")}
    for name in report.keys() - flat.keys():
        flat |= {f"{name}.{k}": value for k, value in report[name]}
    return flat


def in_loops(h, z, temperature=0.2):
    """The authors' three terms of one step (2, B, d) and (2, B, o), in float64 loops.

    NCE(h) from SimCLR's equation 1; S₂ and I₂ from the eigenvalues of the Gram matrices.
    """
    features, projections = ([row for view in x.double() for row in unit(view)] for x in (h, z))
    n, images = len(features), h.shape[1]

    def grams(rows):
        return [[sum(u * v for u, v in zip(a, b, strict=True)) for b in rows] for a in rows]

    one, other = grams(features), grams(projections)
    nce = 0.0
    for i, row in enumerate(one):
        others = sum(math.exp(row[k] / temperature) for k in range(n) if k != i)
        nce -= math.log(math.exp(row[(i + images) % n] / temperature) / others) / n

    def entropy(gram):
        return -math.log((np.linalg.eigvalsh(np.array(gram) / n) ** 2).sum())

    joint = [[u * v for u, v in zip(a, b, strict=True)] for a, b in zip(one, other, strict=True)]
    s = entropy(one)
    return {"nce": nce, "s": s, "i": s + entropy(other) - entropy(joint)}


def test_the_authors_curves_are_means_over_the_steps_with_their_spread():
    steps = watched(steps=4)
    report = told(head(), steps)
    terms = [in_loops(*step) for step in steps]
    candidates = 2 * 8 - 1
    wanted = {
        "negative_loss_features": [-t["nce"] for t in terms],
        "log_n_minus_nce_features": [math.log(candidates) - t["nce"] for t in terms],
        "matrix_information": [t["i"] for t in terms],
        "matrix_entropy_features": [t["s"] for t in terms],
        "negative_loss_minus_information": [-t["nce"] - t["i"] for t in terms],
        "entropy_minus_information": [t["s"] - t["i"] for t in terms],
    }
    assert list(wanted) == CURVES
    for name, values in wanted.items():
        mean = sum(values) / 4
        spread = math.sqrt(sum((value - mean) ** 2 for value in values) / 4)
        assert report[name] == pytest.approx(mean, rel=1e-5), name
        assert report[f"{name}_std"] == pytest.approx(spread, rel=1e-3) and spread > 1e-3, name
    once = told(head(), steps[:1])
    assert all(once[f"{name}_std"] == 0 for name in CURVES)


def test_log_n_minus_nce_is_zero_by_chance_and_log_n_where_all_is_told_apart():
    alike = told(head(), [(torch.ones(2, 8, 6), torch.ones(2, 8, 4))])
    assert alike["log_n_minus_nce_features"] == pytest.approx(0, abs=1e-5)
    apart = torch.eye(8).expand(2, 8, 8)
    found = told(head(features=8), [(apart, apart)], temperature=0.01)
    assert found["log_n_minus_nce_features"] == pytest.approx(math.log(15), rel=1e-5)
    assert found["matrix_entropy_features"] == pytest.approx(math.log(8), rel=1e-5)


def test_squared_cosines_of_bfloat16_are_float32():
    h, z = (x[0].flatten(0, 1).bfloat16() for x in zip(*watched(), strict=True))
    found = squared_cosines(h, z)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, squared_cosines(h.double(), z.double()).float())


def test_the_report_is_made_of_the_measures():
    steps = watched()
    report = told(head(), steps)
    assert set(report) == PLAIN | {"near_zero_groups"}
    assert all(type(x) is float and math.isfinite(x) for x in numbers(report).values())
    for name, number in (("features", 0), ("projections", 1)):
        one, other = (torch.cat([step[number][view] for step in steps]) for view in (0, 1))
        assert report[f"alignment_{name}"] == pytest.approx(alignment(one, other).item(), rel=1e-5)
        both = (uniformity(one) + uniformity(other)).item() / 2
        assert report[f"uniformity_{name}"] == pytest.approx(both, rel=1e-5)
        rank = rankme(torch.cat([one, other])).item()
        assert report[f"rankme_{name}"] == pytest.approx(rank, rel=1e-5)
        assert report[f"spectrum_{name}"] == spectrum(singular_values(torch.cat([one, other])))
    assert report["alignment_features"] != pytest.approx(report["alignment_projections"], rel=0.01)


def test_the_curves_take_the_runs_own_loss():
    steps = watched()
    for changes, function in (
        ({}, partial(nt_xent, temperature=0.2)),
        ({"temperature": 0.9}, partial(nt_xent, temperature=0.9)),
        ({"loss": BARLOW}, BARLOW),
    ):
        report = told(head(), steps, **changes)
        mean = -sum(function(*h).item() for h, _ in steps) / len(steps)
        assert report["negative_loss_features"] == pytest.approx(mean, rel=1e-5)
        assert report["negative_loss_minus_information"] == pytest.approx(
            mean - report["matrix_information"], rel=1e-5
        )
        assert ("log_n_minus_nce_features" in report) == ("loss" not in changes)


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
        assert all(math.isfinite(value) for value in numbers(report).values())
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
    assert all(math.isfinite(value) for value in numbers(report).values())
    assert report["matrix_entropy_features"] == pytest.approx(0, abs=1e-5)
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
    assert numbers(report) == pytest.approx(numbers(wanted), rel=1e-4)


def test_watching_keeps_references_to_the_last_rows(monkeypatch):
    kept = Diagnostics(head())
    monkeypatch.setattr(diagnostics, "squared_cosines", lambda h, z: h.new_zeros(3))
    kept.loss = lambda one, other: one.new_zeros(())  # only the rows matter here
    steps = watched(steps=20, batch=ROWS // 16)  # 512 rows a step
    for h, z in steps:
        kept.watch(h.requires_grad_(), z)
    assert [h.data_ptr() for h, _ in kept._kept] == [h.data_ptr() for h, _ in steps[-8:]]
    assert not any(x.requires_grad for pair in kept._kept for x in pair)
    monkeypatch.setattr(dist, "world_size", lambda: 2)
    kept.watch(*steps[0])
    assert len(kept._kept) == 4  # this rank's half of the rows
    monkeypatch.setattr(dist, "world_size", lambda: 1)
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
    kept.watch(*first[0])
    kept.clear()  # an epoch that nobody asked about
    for step in second:
        kept.watch(*step)
    assert kept.report() == wanted


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
            assert numbers(one) == pytest.approx(numbers(other), rel=1e-4, abs=1e-6)
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
    assert numbers(kept.report()) == pytest.approx(numbers(wanted), rel=1e-3, abs=1e-6)
