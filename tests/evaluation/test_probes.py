"""The probes against scikit-learn and against torch's own Linear and SGD."""

import inspect
import json
import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from fastproj.core.errors import InputError
from fastproj.evaluation import PROBES
from fastproj.evaluation.features import Features
from fastproj.evaluation.probes import nearest
from fastproj.evaluation.probes.common import ROWS, edges, ranks, score, stratified_split
from fastproj.evaluation.probes.neighbors import knn
from fastproj.evaluation.probes.sgd import fit, linear_probe
from fastproj.evaluation.protocol import takes_images
from fastproj.settings import RUN

CPU = torch.device("cpu")
OF_FEATURES = [name for name in PROBES if not takes_images(name)]
GRID = {
    "learning_rates": (0.01, 0.03, 0.1),
    "weight_decays": (1e-3, 1e-2),
    "epochs": 30,
    "batch_size": 128,
    "holdout": 0.1,
    "device": CPU,
}


def as_features(x, y) -> Features:
    x = torch.as_tensor(np.asarray(x), dtype=torch.float32)
    y = torch.as_tensor(np.asarray(y), dtype=torch.int64)
    return Features(x, y)


@pytest.fixture(scope="module")
def digits() -> tuple[Features, Features]:
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    x, y = images[order] / 16, labels[order]
    return as_features(x[:1200], y[:1200]), as_features(x[1200:], y[1200:])


@pytest.fixture(scope="module")
def blobs() -> tuple[Features, Features]:
    """Four overlapping Gaussians in 20 dimensions, each column with its own scale and offset."""
    rng = np.random.default_rng(1)
    centers = rng.normal(size=(4, 20)) * 0.45
    labels = rng.integers(0, 4, 6000)
    x = (centers[labels] + rng.normal(size=(6000, 20))) * rng.uniform(0.01, 100, 20) + 7
    return as_features(x[:3000], labels[:3000]), as_features(x[3000:], labels[3000:])


def logistic_regression(train: Features, val: Features, penalty: float) -> float:
    """Accuracy of scikit-learn's on standardized features; ``penalty`` is our weight decay."""
    mean, std = train.features.mean(0), train.features.std(0).clamp(min=1e-6)
    oracle = LogisticRegression(C=1 / (penalty * len(train)), max_iter=2000)
    oracle.fit(((train.features - mean) / std).numpy(), train.labels.numpy())
    return oracle.score(((val.features - mean) / std).numpy(), val.labels.numpy())


@pytest.mark.parametrize("penalty", [0.1, 0.01])
def test_a_converged_head_has_the_weights_of_logistic_regression(blobs, penalty):
    train, _ = blobs
    x = (train.features - train.features.mean(0)) / train.features.std(0)
    oracle = LogisticRegression(C=1 / (penalty * len(x)), tol=1e-8, max_iter=2000)
    oracle.fit(x.numpy(), train.labels.numpy())
    expected = np.column_stack([oracle.coef_, oracle.intercept_])
    design, rows = torch.cat([x, torch.ones(len(x), 1)], dim=1), torch.arange(len(x))
    head = fit(design, train.labels, rows, 4, [(0.5, penalty)], 300, len(x), seed=0)[0]
    np.testing.assert_allclose(head.numpy(), expected, atol=1e-3)


@pytest.mark.parametrize("data", ["digits", "blobs"])
def test_the_chosen_head_is_within_a_point_of_logistic_regression(data, request):
    train, val = request.getfixturevalue(data)
    expected = max(logistic_regression(train, val, penalty) for penalty in (1e-3, 1e-2))
    classes = int(train.labels.max()) + 1
    results = [linear_probe(train, val, classes, seed=seed, **GRID) for seed in range(3)]
    assert abs(np.mean([r.metrics["top1"] for r in results]) - expected) < 0.01
    assert all(r.metrics["top1"] <= r.metrics["top5"] <= 1 for r in results)


class Largest(TorchDispatchMode):
    """The most numbers that an operation gave."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for one in found if isinstance(found, tuple | list) else [found]:
            if isinstance(one, Tensor):
                self.numbers = max(self.numbers, one.numel())
        return found


def test_heads_are_scored_without_all_their_logits_at_once():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3 * ROWS, 5, generator=generator)
    y = torch.randint(0, 30, (len(x),), generator=generator)
    heads = torch.randn(16, 30, 5, generator=generator)
    heads[1, 2, 3] = torch.nan
    rows = torch.arange(0, len(x), 2)
    with Largest() as largest:
        accuracy, entropy = score(heads, x, y, rows)
    assert largest.numbers == ROWS * 30
    for head, right, loss in zip(heads, accuracy, entropy, strict=True):
        logits = x[rows] @ head.T
        assert right == (ranks(logits, y[rows]) < 1).double().mean()
        expected = functional.cross_entropy(logits.double(), y[rows])
        torch.testing.assert_close(loss, expected, equal_nan=True)


def test_sgd_holds_no_target_of_each_row_and_class():
    x, y = torch.randn(9000, 5), torch.randint(0, 50, (9000,))
    with Largest() as largest:
        fit(x, y, torch.arange(9000), 50, [(0.1, 0.0)], 1, 256, seed=0)
    assert largest.numbers <= 256 * 50


def test_every_head_of_the_grid_equals_a_plain_torch_loop():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 12, generator=generator)
    y = torch.randint(0, 5, (200,), generator=generator)
    design = torch.cat([x, torch.ones(200, 1)], dim=1)
    rows = torch.arange(0, 200, 2)  # a subset, 32 a batch: three whole batches an epoch
    grid = [(0.01, 0.0), (0.3, 1e-3), (0.1, 0.1)]
    epochs, batch, seed = 7, 32, 11
    heads = fit(design, y, rows, 5, grid, epochs, batch, seed)
    for (rate, decay), head in zip(grid, heads, strict=True):
        linear = nn.Linear(12, 5)
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
        optimizer = torch.optim.SGD(
            [
                {"params": [linear.weight], "weight_decay": decay},
                {"params": [linear.bias], "weight_decay": 0.0},
            ],
            lr=rate,
            momentum=0.9,
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs * 3)
        order = torch.Generator().manual_seed(seed)
        for _ in range(epochs):
            shuffled = rows[torch.randperm(100, generator=order)]
            for chosen in shuffled.split(batch)[:3]:
                optimizer.zero_grad()
                nn.functional.cross_entropy(linear(x[chosen]), y[chosen]).backward()
                optimizer.step()
                schedule.step()
        expected = torch.cat([linear.weight, linear.bias.unsqueeze(1)], dim=1)
        torch.testing.assert_close(head, expected, rtol=1e-5, atol=1e-5)


def test_the_choice_never_sees_the_validation_set(digits):
    train, val = digits
    shuffled = Features(val.features, val.labels.flip(0))
    honest = linear_probe(train, val, 10, seed=0, **GRID)
    misled = linear_probe(train, shuffled, 10, seed=0, **GRID)
    assert misled.metrics["top1"] < 0.3 < honest.metrics["top1"]
    assert honest.protocol["chosen"] == misled.protocol["chosen"]


def test_features_on_any_scale_give_the_same_accuracy(digits):
    train, val = digits
    moved = [Features(f.features * 1e-4 + 3e-3, f.labels) for f in (train, val)]
    plain = linear_probe(train, val, 10, seed=0, **GRID)
    scaled = linear_probe(*moved, 10, seed=0, **GRID)
    assert abs(plain.metrics["top1"] - scaled.metrics["top1"]) < 0.005


def test_a_choice_at_the_end_of_its_list_is_said(blobs):
    train, val = blobs
    grid = GRID | {"epochs": 2, "weight_decays": (0.001,)}
    tied = linear_probe(train, val, 4, **grid | {"learning_rates": (1e-7, 3e-7)}).protocol
    assert tied["chosen"]["tie"] and tied["chosen"]["edge"] == []
    better = linear_probe(train, val, 4, **grid | {"learning_rates": (1e-7, 1.0)}).protocol
    assert not better["chosen"]["tie"] and better["chosen"]["edge"] == ["learning rate"]
    accuracy = torch.tensor([[0.5, 0.6, 0.9], [0.5, 0.6, 0.89], [0.5, 0.6, 0.7]])  # rates, decays
    lists = {"learning_rate": (1, 2, 3), "weight_decay": (1, 2, 3)}
    assert edges(lists, accuracy, 100, ()) == ("weight decay",)  # 0.89 is within the error
    assert edges(lists, accuracy, 1_000_000, ()) == ("learning rate", "weight decay")
    assert edges(lists, accuracy.flip(1), 100, ["weight_decay"]) == ()
    assert edges({"strength": (1,)}, accuracy[0, :1], 100, ()) == ()  # nothing was chosen


def test_stratified_split_holds_out_its_share_of_each_class():
    labels = torch.tensor([0] * 100 + [1] * 40 + [3] * 2 + [4])
    kept, held = stratified_split(labels, 0.1, seed=5)
    assert torch.equal(torch.cat([kept, held]).sort().values, torch.arange(len(labels)))
    assert labels[held].bincount(minlength=5).tolist() == [10, 4, 0, 1, 0]
    again, other = (stratified_split(labels, 0.1, seed=s)[1] for s in (5, 6))
    assert torch.equal(held, again) and not torch.equal(held, other)


@pytest.mark.parametrize("k, temperature", [(1, 0.07), (20, 0.07), (200, 0.5)])
def test_knn_equals_scikit_learn(digits, k, temperature, monkeypatch):
    train, val = digits
    monkeypatch.setattr(nearest, "SIMILARITIES", 50_000)  # many chunks, the last one partial
    unit = [nn.functional.normalize(f.features.double(), dim=1).numpy() for f in (train, val)]
    oracle = KNeighborsClassifier(
        n_neighbors=k,
        metric="cosine",
        algorithm="brute",
        weights=lambda distance: np.exp((1 - distance) / temperature),
    ).fit(unit[0], train.labels.numpy())
    shares = oracle.predict_proba(unit[1])
    truth = val.labels.numpy()
    own = shares[np.arange(len(truth)), truth]
    above = (shares > own[:, None]).sum(1)
    result = knn(train, val, 10, k=k, temperature=temperature)
    assert result.metrics["top1"] == pytest.approx(oracle.score(unit[1], truth), abs=1e-9)
    assert result.metrics["top5"] == pytest.approx(((above < 5) & (own > 0)).mean(), abs=1e-9)


def test_knn_ties_go_to_the_first_image_and_the_lower_class():
    axes = torch.eye(3)
    bank = Features(axes[[0, 0, 0, 1]], torch.tensor([2, 1, 1, 0]))
    for label, hit in ((2, 1.0), (1, 0.0), (0, 0.0)):  # k = 1: the first of three equals
        query = Features(axes[[0]], torch.tensor([label]))
        assert knn(bank, query, 3, k=1, temperature=0.07).metrics["top1"] == hit
    query = Features(axes[[0]], torch.tensor([1]))
    result = knn(bank, query, 3, k=2, temperature=0.07)  # one vote each: class 1 before class 2
    assert result.metrics["top1"] == 1.0
    stranger = Features(axes[[0]], torch.tensor([0]))
    assert knn(bank, stranger, 3, k=2, temperature=0.07).metrics["top5"] == 0.0  # no vote, no hit


def test_knn_small_temperatures_do_not_overflow(digits):
    train, val = digits
    nearest = knn(train, val, 10, k=1, temperature=0.07)
    assert knn(train, val, 10, k=20, temperature=1e-4).metrics["top1"] == pytest.approx(
        nearest.metrics["top1"], abs=0.003
    )


def test_ranks_count_classes_before_the_true_one():
    scores = torch.tensor(
        [[0.1, 0.9, 0.5], [0.5, 0.5, 0.5], [math.nan, 0.1, 0.2], [0, math.nan, 1]]
    )
    assert ranks(scores, torch.tensor([2, 1, 2, 1])).tolist() == [1, 1, 1, 3]


@pytest.mark.parametrize(
    "train_labels, val_labels, classes, words",
    [
        ([0, 1, 2, 3], [0, 1, 2, -1], 4, "validation labels run from -1"),
        ([-1, -1, -1, -1], [0, 1, 2, 3], 4, "training labels run from -1"),
        ([0, 1, 2, 3], [0, 1, 2, 4], 4, "outside 0..3"),
        ([0, 0, 0, 0], [0, 0, 0, 0], 1, "at least two"),
        ([2, 2, 2, 2], [0, 1, 2, 3], 4, "at least two"),
    ],
)
def test_unusable_labels_are_one_line(train_labels, val_labels, classes, words):
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    train, val = as_features(x, train_labels), as_features(x, val_labels)
    for run in (
        lambda: linear_probe(train, val, classes, seed=0, **GRID),
        lambda: knn(train, val, classes, k=1),
    ):
        with pytest.raises(InputError, match=words) as caught:
            run()
        assert "\n" not in str(caught.value)


def test_widths_that_differ_and_too_many_neighbors_are_one_line():
    train, val = as_features(torch.eye(4), range(4)), as_features(torch.ones(4, 5), range(4))
    with pytest.raises(InputError, match="4 and 5 wide"):
        knn(train, val, 4, k=1, temperature=0.07)
    with pytest.raises(InputError, match="k = 5 needs"):
        knn(train, train, 4, k=5, temperature=0.07)


@pytest.mark.gpu
def test_probes_agree_between_cpu_and_gpu(digits):
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    train, val = digits
    cpu = linear_probe(train, val, 10, seed=0, **GRID)
    there = [Features(f.features.cuda(), f.labels.cuda()) for f in (train, val)]
    gpu = linear_probe(*there, 10, seed=0, **GRID | {"device": torch.device("cuda")})
    assert abs(cpu.metrics["top1"] - gpu.metrics["top1"]) < 0.005
    assert knn(*there, 10).metrics == knn(train, val, 10).metrics


@pytest.mark.parametrize("name", OF_FEATURES)
def test_predictions_give_the_accuracy_and_classes_are_counted(digits, name):
    train, val = digits
    options = {"sgd": {"epochs": 10}, "few_shot": {"draws": 1}}.get(name, {})
    result = PROBES[name](train, val, **options)
    assert result.predictions.shape == val.labels.shape
    assert result.predictions.dtype == torch.int64
    hit = (result.predictions == val.labels).double().mean().item()
    assert result.metrics["top1"] == pytest.approx(hit, abs=1e-6)
    assert result.metrics["top1"] <= result.metrics["top5"] <= 1
    json.dumps(result.protocol)
    assert result.seconds > 0


def test_a_part_of_an_image_cannot_be_drawn(digits):
    with pytest.raises(InputError, match="few_shot cannot take 2.5 images of each class"):
        PROBES["few_shot"](*digits, 10, labels=(2.5,), draws=1)


def test_one_image_per_class_is_one_line():
    train = as_features(torch.eye(4), range(4))
    with pytest.raises(InputError, match="every class has one training image"):
        linear_probe(train, train, **GRID)
    assert knn(train, train, k=1).metrics["top1"] == 1.0


def test_a_class_of_one_image_is_counted_as_not_held_out():
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    train = as_features(x, [0, 0, 1, 1, 2])
    chosen = linear_probe(train, train, **GRID).protocol["chosen"]
    assert (chosen["classes_not_held_out"], chosen["holdout_images"]) == (1, 2)


@pytest.mark.parametrize("name", OF_FEATURES)
def test_features_that_are_not_finite_are_one_line(name):
    good = as_features(torch.eye(4), [0, 0, 1, 1])
    for bad in (torch.nan, torch.inf):
        broken = as_features(torch.eye(4) * bad, [0, 0, 1, 1])
        with pytest.raises(InputError, match="training features hold NaN"):
            PROBES[name](broken, good)
        with pytest.raises(InputError, match="validation features hold NaN"):
            PROBES[name](good, broken)


def test_the_seed_and_the_device_are_the_callers():
    for name, function in PROBES.items():
        parameters = list(inspect.signature(function).parameters.values())
        parameters = [p for p in parameters if p.kind is not p.VAR_KEYWORD]
        first = ["train", "val", "num_classes"]
        if name not in OF_FEATURES:
            first = ["encoder", *first]
        if name == "corruptions":
            first[1] = "train_features"
        assert [p.name for p in parameters[: len(first)]] == first, name
        for parameter in parameters[len(first) :]:
            assert parameter.kind is parameter.KEYWORD_ONLY
            given = parameter.name in ("mean", "std", "precision", "seed", "device")
            assert given != (f"eval.{name}_{parameter.name}" in RUN.params)


def test_a_probe_that_diverges_says_so_and_scores_nothing(blobs) -> None:
    train, val = (Features(part.features[:200], part.labels[:200]) for part in blobs)
    rates = {"learning_rates": (1e20, 1e25), "weight_decays": (1e20,), "epochs": 5}
    for some in (rates, {**rates, "learning_rates": (1e25,)}):
        with pytest.raises(InputError, match="no score of the probe is finite, so it diverged"):
            linear_probe(train, val, **some)
