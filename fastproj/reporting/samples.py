"""What images show of a run: augmented views, nearest neighbors, and a map of the features."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from fastproj.augment.draw import Params, View
from fastproj.reporting.figures import Picture, in_style, scatter
from fastproj.reporting.page import Table

NEIGHBORS = 5  # shown of each image
CLASSES = 10  # that a map can tell apart by color
OTHERS = "others"

Images = NDArray[np.uint8]


@dataclass(frozen=True)
class Views:
    """Some training images and their augmented views.

    ``images``: uint8 (n, h, w, 3); ``views``: uint8 (V, n, h, w, 3). ``shares``: operation -> per
    view, the fraction of ``drawn`` views it was drawn for.
    """

    images: Images
    views: Images
    shares: Mapping[str, Sequence[float]]
    drawn: int


@dataclass(frozen=True)
class Embedded:
    """Some val images and their features.

    ``images``: uint8 (n, h, w, 3), small ones to show; ``features``: float32 (n, d); ``labels``:
    int64 (n,), -1 without one; ``classes``: the names. ``of``: images in the set. ``weights``:
    name of the encoder's file.
    """

    images: Images
    features: NDArray[np.float32]
    labels: NDArray[np.int64]
    classes: Sequence[str]
    of: int
    weights: str


def shares(params: Params, views: Sequence[View]) -> dict[str, list[float]]:
    """Operation -> per view, the fraction of its samples that ``params`` (N = views · n) change.

    A strength of 0 changes nothing, whatever its probability.
    """
    jitter = (params.brightness != 1) | (params.contrast != 1)
    jitter |= (params.saturation != 1) | (params.hue != 0)
    found = {
        "flip": params.flip,
        "color jitter": jitter,
        "gray": params.gray,
        "blur": params.sigma > 0,
        "solarize": params.solarize,
    }
    return {
        name: hit.float().unflatten(0, (len(views), -1)).mean(1).tolist()
        for name, hit in found.items()
    }


def share_table(views: Views) -> Table:
    """How often each operation was drawn, per view."""
    head = ["operation", *(f"view {n + 1} (% of crops)" for n in range(len(views.views)))]
    rows = [
        [name, *(f"{100 * share:.1f}" for share in found)] for name, found in views.shares.items()
    ]
    how = (
        f"Share of {views.drawn:,} drawn views that each operation changes; every view is also a "
        "random crop. Where it is 0, the settings switch the operation off."
    )
    return Table("How often each operation acts", head, rows, how=how)


def sheet(views: Views) -> Picture:
    """A row per image: whole, and then its views."""
    grid = np.stack([views.images, *views.views], axis=1)
    heads = ["image", *(f"view {n + 1}" for n in range(len(views.views)))]
    how = (
        "Each row is one training image and what the encoder sees of it: views of one image must "
        "stay recognizable as the same thing, and differ in all else."
    )
    rows = [(name, *share) for name, share in views.shares.items()]
    head = ("operation", *(f"fraction of view {n + 1}" for n in range(len(views.views))))
    figure = mosaic(grid, heads)
    return Picture("views", "Augmented views", how, figure, head, rows)


def nearest(
    features: NDArray[np.float32], queries: Sequence[int], k: int = NEIGHBORS
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The ``k`` other rows of ``features`` (n, d) with the largest cosine to each query, and it.

    Both are (queries, k), the most similar first; of equal ones the earlier row.
    """
    rows = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    cosines = rows[list(queries)] @ rows.T
    cosines[np.arange(len(queries)), list(queries)] = -np.inf
    order = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
    return order, np.take_along_axis(cosines, order, 1)


def neighbors(found: Embedded, queries: Sequence[int]) -> Picture:
    """A row per query: the image, and then its nearest neighbors; a bar below those of its class.

    There must be more images than neighbors.
    """
    order, cosines = nearest(found.features, queries)
    order = np.concatenate([np.asarray(queries)[:, None], order], axis=1)
    names = [*found.classes, "no label"]
    same = (found.labels[order] == found.labels[order[:, :1]]) & (found.labels[order] >= 0)
    same[:, 0] = False
    figure = mosaic(found.images[order], ["image", *map(str, range(1, order.shape[1]))], same)
    rows = [
        (names[found.labels[line[0]]], rank, names[found.labels[at]], float(cosine))
        for line, scores in zip(order, cosines, strict=True)
        for rank, (at, cosine) in enumerate(zip(line[1:], scores, strict=True), start=1)
    ]
    right = float(same[:, 1:].mean())
    how = (
        f"First a val image, then the {order.shape[1] - 1} of {len(found.features):,} val images "
        "whose features have the largest cosine with its own, a bar below those of its class "
        f"({right:.0%} here)."
    )
    head = ("class", "rank", "class of neighbor", "cosine")
    return Picture("neighbors", "Nearest neighbors", how, figure, head, rows)


@in_style
def embedding(found: Embedded) -> Picture:
    """Features in two dimensions by scikit-learn's t-SNE, seeded, by class."""
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(found.features) - 1) / 3)
    tsne = TSNE(perplexity=perplexity, init="pca", random_state=0)
    flat = tsne.fit_transform(found.features.astype(np.float64))
    counts = np.bincount(found.labels[found.labels >= 0], minlength=len(found.classes))
    shown = sorted(np.argsort(-counts, kind="stable")[:CLASSES].tolist())
    groups = {
        found.classes[label]: (flat[found.labels == label, 0], flat[found.labels == label, 1])
        for label in shown
        if counts[label]
    }
    rest = ~np.isin(found.labels, shown)
    if rest.any():
        groups[OTHERS] = (flat[rest, 0], flat[rest, 1])
    how = (
        f"Features of {len(found.features):,} of {found.of:,} val images under {found.weights} in "
        f"two dimensions (t-SNE, perplexity {perplexity:.0f}): classes in clusters of their own "
        "can be told apart; distances between clusters and their sizes mean nothing."
    )
    picture = scatter(
        "embedding", "Map of the features", how, ("t-SNE 1 (no unit)", "t-SNE 2 (no unit)"),
        {name: (x.tolist(), y.tolist()) for name, (x, y) in groups.items()}, size=(4.4, 4.4),
    )  # fmt: skip
    for name, (x, y) in groups.items():  # where most of a class are: color alone tells too little
        if name != OTHERS:
            picture.figure.axes[0].text(
                np.median(x), np.median(y), name, ha="center", va="center", fontweight="bold"
            )
    return picture


@in_style
def mosaic(grid: Images, heads: Sequence[str], marked: NDArray[np.bool_] | None = None) -> Figure:
    """Images uint8 (rows, columns, h, w, 3) side by side, with heads; ``marked`` get a bar."""
    rows, columns, h, w, _ = grid.shape
    gap = max(1, w // 12)
    tiles = np.zeros((rows * (h + gap), columns * (w + gap), 4), np.uint8)  # transparent between
    for row in range(rows):
        for column in range(columns):
            top, left = row * (h + gap), column * (w + gap)
            tiles[top : top + h, left : left + w, :3] = grid[row, column]
            tiles[top : top + h, left : left + w, 3] = 255
    figure = Figure((4.4, 4.4 * rows * (h + gap) / (columns * (w + gap)) + 0.25))
    axes = figure.add_axes((0, 0, 1, 1 - 0.25 / figure.get_figheight()))
    height, width = tiles.shape[:2]
    axes.imshow(tiles, interpolation="nearest", extent=(0, width, height, 0), aspect="auto")
    axes.axis("off")
    for column, head in enumerate(heads):
        axes.text((column + 0.5) * (w + gap) - gap / 2, -gap, head, ha="center", va="bottom")
    for row, column in zip(*np.nonzero(marked), strict=True) if marked is not None else ():
        y, x = row * (h + gap) + h + gap / 2, column * (w + gap)
        axes.plot([x, x + w], [y, y], color="#009e73", linewidth=2.5, solid_capstyle="butt")
    return figure
