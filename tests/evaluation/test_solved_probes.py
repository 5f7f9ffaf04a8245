"""Logistic regression, ridge, the perceptron and few-shot against scikit-learn and plain torch."""

import math
import warnings

import numpy as np
import pytest
import torch
from scipy.interpolate import CubicSpline
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge, RidgeClassifier
from torch import nn

from fastproj.bench.logistic import correlated
from fastproj.core.errors import InputError
from fastproj.evaluation.extract import Extractor
from fastproj.evaluation.features import Features
from fastproj.evaluation.probes import regression, softmax
from fastproj.evaluation.probes.least_squares import least_squares, ridge
from fastproj.evaluation.probes.neighbors import knn
from fastproj.evaluation.probes.perceptron import mlp, train_mlp
from fastproj.evaluation.probes.regression import logistic
from fastproj.evaluation.probes.sgd import linear_probe
from fastproj.evaluation.probes.shots import draw, few_shot
from fastproj.evaluation.probes.softmax import certify, solve
from fastproj.models.encoders import build_encoder
from fastproj.prepare.encode import Store
from fastproj.prepare.sources import open_sources
from tests.support.betons import write_here


def as_features(x, y) -> Features:
    return Features(torch.as_tensor(np.asarray(x)), torch.as_tensor(np.asarray(y)))


def problem(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 (N, d) and labels of four classes."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(400) % 4
    if kind == "encoder":
        return digits_encoded()
    x = torch.randn(400, 12, generator=generator)
    if kind != "random":
        x[:, :4] += 0.8 * torch.eye(4)[y]
    if kind == "conditioned":  # a covariance of condition number 1e6
        basis = torch.linalg.qr(torch.randn(12, 12, generator=generator))[0]
        x = x * torch.logspace(0, -3, 12) @ basis
    if kind == "deficient":  # copies of columns, and constant ones
        x[:, 6:10], x[:, 10], x[:, 11] = x[:, :4], 0, 1
    if kind == "separable":
        x[:, :4] += 9 * torch.eye(4)[y]
    if kind == "wide":  # more features than images, some of them copies
        x, y = torch.cat([x[:40], torch.randn(40, 40, generator=generator)], dim=1), y[:40]
        x = torch.cat([x, x[:, :20]], dim=1)
    if kind == "rare":  # two images of the last class
        keep = (y < 3) | (torch.arange(400) < 8)
        x, y = x[keep], y[keep]
    return x, y


def digits_encoded() -> tuple[torch.Tensor, torch.Tensor]:
    """400 digits through a small ResNet with random weights, and their labels."""
    images, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(images[:400]).float().reshape(-1, 1, 8, 8).expand(-1, 3, -1, -1) / 16
    torch.manual_seed(0)
    with torch.no_grad():
        features = build_encoder("resnet_small", "cifar").eval()(x)
    return features, torch.from_numpy(labels[:400]).long()


def oracle(x: torch.Tensor, y: torch.Tensor, strength: float) -> tuple[np.ndarray, float]:
    """scikit-learn's head (C, d+1) in float64 with a tight tolerance, and f from the formula."""
    model = LogisticRegression(C=1 / (strength * len(x)), tol=1e-10, max_iter=20_000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # it is as exact as float64 lets it be
        model.fit(x.double().numpy(), y.numpy())
    head = np.column_stack([model.coef_, model.intercept_])
    return head, objective(x, y, head, strength)


def objective(x: torch.Tensor, y: torch.Tensor, head: np.ndarray, strength: float) -> float:
    logits = x.double().numpy() @ head[:, :-1].T + head[:, -1]
    top = logits.max(1)
    likelihood = logits[np.arange(len(y)), y] - top - np.log(np.exp(logits.T - top).sum(0))
    return -likelihood.mean() + strength / 2 * (head[:, :-1] ** 2).sum()


KINDS = ["random", "overlapping", "conditioned", "deficient", "separable", "rare", "wide",
         "encoder"]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_all_strengths_reach_scikit_learns_optimum(kind):
    x, y = problem(kind)
    strengths = torch.tensor([0.1, 1e-5, 10.0, 1e-3, 1e-4, 1e-2], dtype=torch.float64)
    found = solve(x, y, int(y.max()) + 1, strengths)
    assert found.suboptimality.max() <= 1e-6
    for strength, head, value in zip(
        strengths.tolist(), found.heads.numpy(), found.objective.tolist(), strict=True
    ):
        expected, best = oracle(x, y, strength)
        assert objective(x, y, head, strength) == pytest.approx(value, rel=1e-10)
        assert value <= best * (1 + 1e-6)
        # Strong convexity: |W - W*|² <= 2 (f - min f) / l, twice for the oracle's own error.
        away = ((head[:, :-1] - expected[:, :-1]) ** 2).sum()
        assert away <= 2 * 2 * 1e-6 * best / strength + 1e-9


def test_strengths_between_others_start_near_their_optimum(monkeypatch):
    x, y = correlated(3000, 48, 10)
    strengths = torch.logspace(-5, 0, 16, dtype=torch.float64)
    found = solve(x, y, 10, strengths)
    monkeypatch.setattr(softmax, "FEW", 99)
    apart = solve(x, y, 10, strengths)
    assert found.iterations.sum() < 0.7 * apart.iterations.sum()
    torch.testing.assert_close(found.objective, apart.objective, rtol=1e-6, atol=0)


@pytest.mark.parametrize("count", [3, 4, 9])
def test_the_spline_is_scipys(count):
    generator = torch.Generator().manual_seed(count)
    knots = torch.rand(count, generator=generator, dtype=torch.float64).sort().values * 12
    at = torch.linspace(float(knots[0]), float(knots[-1]), 50, dtype=torch.float64)
    values = torch.randn(count, 2, generator=generator, dtype=torch.float64)
    expected = CubicSpline(knots, values, bc_type="natural")(at)
    np.testing.assert_allclose(softmax._spline(knots, at) @ values, expected, atol=1e-9)


def test_strengths_come_back_in_the_order_given():
    x, y = problem("overlapping")
    given = torch.tensor([0.1, 1e-3, 0.1, 1e-5, 1.0, 1e-2, 1e-4], dtype=torch.float64)
    found = solve(x, y, 4, given)
    assert torch.equal(found.heads[0], found.heads[2])
    apart = torch.cat([solve(x, y, 4, strength.view(1)).objective for strength in given])
    torch.testing.assert_close(found.objective, apart, rtol=1e-6, atol=0)


def test_strengths_a_rounding_apart_are_solved():
    x, y = problem("overlapping")
    given = torch.tensor([1e-3, 0.01, 0.1, 1.0, 2.0, 10.0], dtype=torch.float64)
    given = torch.cat([given, given.nextafter(torch.tensor(20.0).double())])
    found = solve(x, y, 4, given)
    assert found.suboptimality.max() <= 1e-6
    torch.testing.assert_close(found.objective[:6], found.objective[6:], rtol=1e-6, atol=0)


@pytest.mark.parametrize("off", [1e-4, 1e-2, 0.3])
def test_the_certificate_counts_an_intercept_that_is_off(off, monkeypatch):
    x, y = problem("overlapping")
    best = oracle(x, y, 0.01)[1]
    heads = solve(x, y, 4, torch.tensor([0.01])).heads
    moved = heads.clone()
    moved[0, :, -1] += off * torch.tensor([1.0, -2.0, 0.5, 0.0])
    monkeypatch.setattr(softmax, "_short", torch.zeros_like)  # no intercept moves
    kept, value, bound = certify(x, y, moved, torch.tensor([0.01]))
    assert torch.equal(kept, moved)
    assert 0 < (value - best) / value <= bound
    assert bound < 500 * off**2 + 1e-6  # and is of use


def test_the_certificate_bounds_the_distance_to_the_optimum_from_anywhere():
    x, y = problem("overlapping")
    best = oracle(x, y, 0.01)[1]
    generator = torch.Generator().manual_seed(1)
    scales = torch.tensor([0.0, 0.1, 1.0], dtype=torch.float64)
    heads = torch.randn(3, 4, 13, generator=generator, dtype=torch.float64) * scales.view(3, 1, 1)
    found = certify(x, y, heads, torch.full((3,), 0.01))
    for head, moved, value, bound in zip(heads, *found, strict=True):
        assert torch.equal(moved[:, :-1], head[:, :-1])
        assert value <= objective(x, y, head.numpy(), 0.01) + 1e-12  # the intercept is its best
        shift = moved.numpy().copy()
        shift[:, -1] += 1e-3 * np.array([1, -1, 0, 0])
        assert value < objective(x, y, shift, 0.01)
        assert (value - best) / value <= bound * (1 + 1e-9)


def test_a_class_without_an_image_is_never_predicted():
    x, y = problem("overlapping")
    y = y + (y == 3)  # 0, 1, 2 and 4 of six classes
    found = solve(x, y, 6, torch.tensor([0.01]))
    plain = solve(x, y - (y == 4).long(), 4, torch.tensor([0.01]))
    assert torch.equal(found.heads[0, [0, 1, 2, 4]], plain.heads[0])
    train, val = as_features(x, y), as_features(x[:6], [0, 1, 2, 3, 4, 5])
    result = logistic(train, val, 6, strengths=[0.01])
    assert not set(result.predictions.tolist()) & {3, 5}
    assert result.metrics["top5"] == pytest.approx(4 / 6)  # never a hit either
    for probe in (ridge, mlp, linear_probe):
        assert probe(train, val, 6).predictions.shape == (6,)


@pytest.fixture(scope="module")
def digits() -> tuple[Features, Features]:
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    x, y = (images[order] / 16).astype(np.float32), labels[order]
    return as_features(x[:600], y[:600]), as_features(x[1200:], y[1200:])


def standardized(train: Features, val: Features) -> list[torch.Tensor]:
    mean, std = train.features.double().mean(0), train.features.double().std(0, correction=0)
    std[std == 0] = 1
    return [(part.features.double() - mean) / std for part in (train, val)]


def test_logistic_scores_as_scikit_learn_at_the_strength_that_it_chose(digits):
    train, val = digits
    result = logistic(train, val, strengths=[1e-4, 1e-2, 1.0])
    chosen = result.protocol["chosen"]
    x, there = standardized(train, val)
    head, _ = oracle(x, train.labels, chosen["strength"])
    logits = there.numpy() @ head[:, :-1].T + head[:, -1]
    expected = (logits.argmax(1) == val.labels.numpy()).mean()
    assert result.metrics["top1"] == pytest.approx(expected, abs=0.002)  # one image
    chosen = result.protocol["chosen"]
    assert chosen["suboptimality"] <= result.protocol["tolerance"] == 1e-6
    assert len(chosen["iterations"]) == 4
    assert chosen["holdout_images"] == 60 and not chosen["tie"]


def test_the_demos_raw_pixels_are_solved_to_the_weakest_strength(tmp_path):
    """Nearly separable: float64 has to shorten a step by more than a hundred thousand times."""
    train, val = (
        Extractor(16, torch.device("cpu")).raw(write_here(source, tmp_path, Store("raw")))
        for source in open_sources("digits", tmp_path, "all", False)
    )
    found = logistic(train, val).protocol
    assert found["strengths"][0] == 1e-5
    assert found["chosen"]["suboptimality"] <= found["tolerance"]


@pytest.mark.parametrize("probe", [logistic, ridge])
def test_the_choice_never_sees_the_validation_set(digits, probe):
    train, val = digits
    misled = probe(train, Features(val.features, val.labels.flip(0)), strengths=[1e-3, 0.1])
    honest = probe(train, val, strengths=[1e-3, 0.1])
    assert misled.metrics["top1"] < 0.3 < honest.metrics["top1"]
    assert honest.protocol["chosen"] == misled.protocol["chosen"]


@pytest.mark.parametrize("probe", [logistic, ridge])
def test_edges_ties_and_a_fixed_strength_are_said(digits, probe):
    train, val = digits
    assert probe(train, val, strengths=[1e-7, 1.0]).protocol["chosen"]["edge"] == ["strength"]
    easy = as_features(torch.eye(2).repeat(20, 1), [0, 1] * 20)
    chosen = probe(easy, easy, strengths=[0.01, 0.1]).protocol["chosen"]
    assert chosen["tie"] and chosen["edge"] == []
    fixed = probe(train, val, strengths=[0.01]).protocol
    assert fixed["chosen"]["strength"] == 0.01 and fixed["holdout"] is None
    assert "holdout_top1" not in fixed["chosen"]
    assert fixed["selection"].startswith("none")
    single = as_features(torch.eye(4), range(4))  # one image per class
    assert probe(single, single, strengths=[0.01]).metrics["top1"] == 1
    with pytest.raises(InputError, match="every class has one training image"):
        probe(single, single)
    with pytest.raises(InputError, match="must be above 0"):
        probe(train, val, strengths=[0.0])


def test_ridge_equals_scikit_learn(digits):
    train, val = digits
    strengths = [1e-4, 1e-2, 1.0]
    x, there = standardized(train, val)
    heads = least_squares(x.float() + 3, train.labels, 10, strengths).double()  # not centered
    for strength, head in zip(strengths, heads, strict=True):
        model = Ridge(alpha=strength * len(x)).fit(x.numpy() + 3, np.eye(10)[train.labels])
        np.testing.assert_allclose(head[:, :-1], model.coef_, atol=1e-5)
        np.testing.assert_allclose(head[:, -1], model.intercept_, atol=1e-4)
        classifier = RidgeClassifier(alpha=strength * len(x)).fit(x.numpy(), train.labels)
        result = ridge(train, val, strengths=[strength])
        agree = result.predictions.numpy() == classifier.predict(there.numpy())
        assert agree.mean() > 0.998


def test_mlp_equals_a_plain_torch_loop():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(70, 6, generator=generator), torch.arange(70) % 3
    before = torch.get_rng_state()
    model = train_mlp(x, y, 3, 8, 0.01, 0.1, epochs=3, batch_size=32, seed=5)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(5)
    first, last = nn.Linear(6, 8), nn.Linear(8, 3)
    optimizer = torch.optim.AdamW(
        [*first.parameters(), *last.parameters()], lr=0.01, weight_decay=0.1
    )
    order, step = torch.Generator().manual_seed(5), 0
    for _ in range(3):
        rows = torch.randperm(70, generator=order)
        for part in (rows[:32], rows[32:64]):
            for group in optimizer.param_groups:
                group["lr"] = 0.01 * (1 + math.cos(math.pi * step / 6)) / 2
            optimizer.zero_grad()
            scores = last(first(x[part]).clamp(min=0))
            (-scores.log_softmax(1)[torch.arange(32), y[part]].mean()).backward()
            optimizer.step()
            step += 1
    torch.testing.assert_close(model(x), last(first(x).clamp(min=0)))


def test_the_mlp_reads_what_no_line_can():
    x = torch.rand(800, 2, generator=torch.Generator().manual_seed(0)) - 0.5
    y = (x.prod(1) > 0).long()
    train, val = as_features(x[:600], y[:600]), as_features(x[600:], y[600:])
    assert mlp(train, val, hidden=64, learning_rate=0.01).metrics["top1"] > 0.95
    assert logistic(train, val, strengths=[0.01]).metrics["top1"] < 0.7


def test_few_shot_draws_are_stratified_nested_and_those_that_logistic_gets(digits):
    train, val = digits
    counts = train.labels.bincount()
    tenth = draw(train.labels, 0.1, seed=3)
    assert train.labels[tenth].bincount().tolist() == (counts * 0.1).round().int().tolist()
    few = draw(train.labels, 2, seed=3)
    assert train.labels[few].bincount().tolist() == [2] * 10
    assert set(few.tolist()) < set(tenth.tolist())
    assert not torch.equal(few, draw(train.labels, 2, seed=4))
    result = few_shot(train, val, labels=[2, 0.1], draws=3, strength=0.1, seed=3)
    for size, name in ((2, ""), (0.1, "_10%")):
        expected = []
        for seed in (3, 4, 5):
            rows = draw(train.labels, size, seed)
            subset = Features(train.features[rows], train.labels[rows])
            expected.append(logistic(subset, val, 10, strengths=[0.1]).metrics["top1"])
        assert result.metrics[f"top1{name}"] == pytest.approx(np.mean(expected))
        assert result.metrics[f"top1{name}_std"] == pytest.approx(np.std(expected, ddof=1))
    assert result.protocol["images"] == {"2": 20, "10%": len(tenth)}


def test_few_shot_is_scikit_learns_on_each_draw(digits, monkeypatch):
    train, val = digits
    drawn: list[tuple[Features, np.ndarray]] = []

    def recorded(part: Features, *args, **how) -> regression.LinearHead:
        head = regression_fit(part, *args, **how)
        drawn.append((part, head.weights.double().numpy()))
        return head

    regression_fit = regression.fit
    monkeypatch.setattr(regression, "fit", recorded)
    strength, labels, draws = 0.03, (3, 0.1), 3
    result = few_shot(train, val, labels=labels, draws=draws, strength=strength, seed=7)
    assert len(drawn) == len(labels) * draws
    rows = {row.numpy().tobytes(): at for at, row in enumerate(train.features)}
    chosen = [{rows[row.numpy().tobytes()] for row in part.features} for part, _ in drawn]
    scores = []
    for (part, head), at in zip(drawn, chosen, strict=True):
        assert len(at) == len(part)  # no image twice
        mean, std = part.features.numpy().mean(0), part.features.double().numpy().std(0)
        std[std <= 1e-6 * std.max()] = 1
        x, inputs = ((f.features.double().numpy() - mean) / std for f in (part, val))
        ours = objective(torch.from_numpy(x), part.labels, head, strength)
        theirs, best = oracle(torch.from_numpy(x), part.labels, strength)
        assert ours == pytest.approx(best, rel=2e-6)
        mine, found = (inputs @ each[:, :-1].T + each[:, -1] for each in (head, theirs))
        second, first = np.sort(found, 1)[:, -2:].T
        clear = first - second > 1e-3  # the others may fall either way: f is solved to 1e-6
        assert np.array_equal(mine.argmax(1)[clear], found.argmax(1)[clear])
        assert clear.mean() > 0.995
        scores.append((mine.argmax(1) == val.labels.numpy()).mean())
    counts, few, tenth = train.labels.bincount().numpy(), chosen[:draws], chosen[draws:]
    assert all(np.array_equal(p.labels.bincount(), [3] * 10) for p, _ in drawn[:draws])
    wanted = np.round(counts * 0.1)
    assert all(np.array_equal(p.labels.bincount(), wanted) for p, _ in drawn[draws:])
    assert all(small < large for small, large in zip(few, tenth, strict=True))
    assert len({frozenset(at) for at in few}) == draws and len(set(scores)) > draws
    for name, found in (("", scores[:draws]), ("_10%", scores[draws:])):
        assert result.metrics[f"top1{name}"] == pytest.approx(np.mean(found), abs=1e-12)
        assert result.metrics[f"top1{name}_std"] == pytest.approx(np.std(found, ddof=1), abs=1e-12)


def test_few_shot_takes_one_of_a_rare_class_and_refuses_too_many():
    labels = torch.tensor([0] * 50 + [2] * 3)
    assert labels[draw(labels, 0.01, 0)].tolist() == [0, 2]
    train = as_features(torch.randn(53, 3, generator=torch.Generator().manual_seed(0)), labels)
    with pytest.raises(InputError, match="takes 4 images of each class, but class 2 has 3"):
        few_shot(train, train, labels=[4])


def test_knn_scores_every_k_and_temperature_and_the_first_is_the_score(digits):
    train, val = digits
    found = knn(train, val, k=[5, 1, 20], temperature=[0.07, 0.5]).metrics
    assert len(found) == 12
    for k in (5, 1, 20):
        for temperature in (0.07, 0.5):
            alone = knn(train, val, k=k, temperature=temperature).metrics
            name = "" if (k, temperature) == (5, 0.07) else f"_k{k}_t{temperature}"
            assert alone == {"top1": found[f"top1{name}"], "top5": found[f"top5{name}"]}
