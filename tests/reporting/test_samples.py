"""Views, neighbors and maps, against loops and scikit-learn."""

import numpy as np
import torch
from sklearn.neighbors import NearestNeighbors

from fastproj.augment.draw import View
from fastproj.augment.views import Augmentation
from fastproj.reporting import samples
from fastproj.reporting.samples import Embedded


def embedded(n: int = 40, unlabeled: int = 0) -> Embedded:
    """Two clusters that are far apart."""
    draw = np.random.default_rng(0)
    labels = np.arange(n) % 2
    features = draw.normal(size=(n, 5)) + 20 * labels[:, None] * np.array([1, -1, 1, -1, 1])
    features[labels == 0] += np.array([9, 9, 0, 0, 0])
    labels = labels.astype(np.int64)
    labels[:unlabeled] = -1
    images = draw.integers(0, 255, (n, 8, 8, 3)).astype(np.uint8)
    return Embedded(images, features.astype(np.float32), labels, ("a", "b"), 100, "w.pt")


def test_neighbors_are_scikit_learns():
    found = embedded()
    queries = [0, 7, 39]
    order, cosines = samples.nearest(found.features, queries, 5)
    oracle = NearestNeighbors(n_neighbors=6, metric="cosine").fit(found.features)
    distance, index = oracle.kneighbors(found.features[queries])
    assert (order == index[:, 1:]).all()
    assert np.allclose(cosines, 1 - distance[:, 1:], atol=1e-6)
    picture = samples.neighbors(found, queries)
    assert [row[:3] for row in picture.rows[:2]] == [("a", 1, "a"), ("a", 2, "a")]
    assert "(100% here)" in picture.how and len(picture.rows) == 15
    assert "(67% here)" in samples.neighbors(embedded(unlabeled=1), queries).how


def test_the_map_keeps_clusters_apart():
    picture = samples.embedding(embedded())
    points = {name: np.array([row[1:] for row in picture.rows if row[0] == name]) for name in "ab"}
    assert {name: len(found) for name, found in points.items()} == {"a": 20, "b": 20}
    middle = {name: found.mean(0) for name, found in points.items()}
    for name, other in ("ab", "ba"):
        near = np.linalg.norm(points[name] - middle[name], axis=1)
        assert (near < np.linalg.norm(points[name] - middle[other], axis=1)).all()
    assert "40 of 100 val images under w.pt" in picture.how


def test_classes_beyond_ten_are_one_group():
    found = embedded()
    many = Embedded(
        found.images, found.features, np.arange(40) % 13, tuple("abcdefghijklm"), 40, ""
    )
    groups = [row[0] for row in samples.embedding(many).rows]
    assert set(groups) == {*"abcdefghij", "others"}
    assert groups.count("others") == sum(n % 13 >= 10 for n in range(40))


def test_the_shares_of_operations_are_counted():
    views = (View(gray_prob=0.25, blur_prob=0), View(flip_prob=0, solarize_prob=1, jitter_prob=0.5))
    augmentation = Augmentation(views, (0.5,) * 3, (0.25,) * 3)
    params = augmentation.sample(500, torch.Generator().manual_seed(0))
    found = samples.shares(params, views)
    for view in (0, 1):
        mine = range(500 * view, 500 * (view + 1))
        assert np.isclose(found["gray"][view], sum(bool(params.gray[i]) for i in mine) / 500)
        hue = sum(float(params.hue[i]) != 0 or float(params.contrast[i]) != 1 for i in mine)
        assert np.isclose(found["color jitter"][view], hue / 500)
    assert found["blur"][0] == 0 and found["flip"][1] == 0 and found["solarize"] == [0, 1]
    assert abs(found["color jitter"][1] - 0.5) < 0.1


def test_a_sheet_has_each_image_beside_its_views():
    images = np.full((3, 8, 8, 3), 10, np.uint8)
    views = np.stack([np.full_like(images, 20), np.full_like(images, 30)])
    picture = samples.sheet(samples.Views(images, views, {"flip": [0.5, 0.25]}, 100))
    (axes,) = picture.figure.axes
    tiles = np.asarray(axes.images[0].get_array())
    colored = tiles[..., 0][tiles[..., 3] == 255].reshape(3, 8, 3, 8)  # row, y, column, x
    assert [set(colored[:, :, n].ravel().tolist()) for n in range(3)] == [{10}, {20}, {30}]
    assert [text.get_text() for text in axes.texts] == ["image", "view 1", "view 2"]
    assert picture.rows == [("flip", 0.5, 0.25)]
