"""Frozen features and the probes that score them."""

from fastproj.core.table import Table

PROBES = Table(
    "eval.probes",
    {
        "logistic": "fastproj.evaluation.probes.regression:logistic",
        "knn": "fastproj.evaluation.probes.neighbors:knn",
        "sgd": "fastproj.evaluation.probes.sgd:linear_probe",
        "ridge": "fastproj.evaluation.probes.least_squares:ridge",
        "mlp": "fastproj.evaluation.probes.perceptron:mlp",
        "few_shot": "fastproj.evaluation.probes.shots:few_shot",
    },
)
"""Each a function ``f(train, val, num_classes, *, option=default, …) -> ProbeResult``.

``seed`` and ``device`` are given by the caller; every other option is a setting,
``eval.<probe>_<option>``.
"""
