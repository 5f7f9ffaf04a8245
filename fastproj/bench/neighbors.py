"""Nearest neighbors: the whole probe, beside a brute-force index."""

from collections.abc import Callable

import numpy as np
import torch

from fastproj.bench import Engine, Plan, Row, compare, limits
from fastproj.bench.logistic import correlated
from fastproj.evaluation.features import Features
from fastproj.evaluation.probes.neighbors import knn

K, TEMPERATURE = 20, 0.07


def run(
    plan: Plan, images: int = 50_000, queries: int = 10_000, features: int = 512, classes: int = 10
) -> list[Row]:
    """Classify ``queries`` rows by their ``K`` nearest of ``images`` rows by cosine similarity.

    All weigh a vote by exp(similarity / ``TEMPERATURE``) and must agree on 99.9 % of the classes.
    The limit is the matrix product that gives the similarities.
    """
    x, y = correlated(images + queries, features, classes)
    bank = Features(x[:images].to(plan.device), y[:images].to(plan.device))
    asked = Features(x[images:].to(plan.device), y[images:].to(plan.device))
    unit = torch.nn.functional.normalize(x, dim=1).numpy()
    near, far, labels = unit[:images], unit[images:], y[:images].numpy()
    expected = knn(bank, asked, classes, k=K, temperature=TEMPERATURE).predictions.cpu().numpy()

    def agreeing(call: Callable[[], np.ndarray]) -> Callable[[], object]:
        if (share := (call() == expected).mean()) < 0.999:
            raise AssertionError(f"only {share:.2%} of the classes are ours")
        return call

    def faiss_flat() -> Callable[[], object]:
        import faiss

        def call() -> np.ndarray:
            index = faiss.IndexFlatIP(features)
            index.add(near)
            similarity, rows = index.search(far, K)
            votes = np.exp(similarity / TEMPERATURE)[:, :, None] * np.eye(classes)[labels[rows]]
            return votes.sum(1).argmax(1)

        return agreeing(call)

    def scikit_learn() -> Callable[[], object]:
        from sklearn.neighbors import KNeighborsClassifier

        model = KNeighborsClassifier(  # of unit vectors, 1 - distance² / 2 is the similarity
            K, algorithm="brute", weights=lambda d: np.exp((1 - d**2 / 2) / TEMPERATURE), n_jobs=-1
        )
        return agreeing(lambda: model.fit(near, labels).predict(far))

    engines = [
        Engine("knn", "ours", queries,
               lambda: lambda: knn(bank, asked, classes, k=K, temperature=TEMPERATURE)),
        Engine("scikit-learn", "peer", queries, scikit_learn, "KNeighborsClassifier, brute force"),
        Engine("faiss", "peer", queries, faiss_flat, "IndexFlatIP"),
        limits.products(10, queries // 10, features, images, plan.device, queries),
    ]  # fmt: skip
    case = f"{queries:,} of {images:,} x {features}, k = {K}"
    return compare("neighbors", case, "queries", engines, 1, plan.repeats)
