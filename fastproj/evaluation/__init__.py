"""Frozen features and the probes that score them."""

from fastproj.core.table import Table

PROBES = Table(
    "probe",
    {
        "sgd": "fastproj.evaluation.probes:linear_probe",
        "knn": "fastproj.evaluation.probes:knn",
    },
)
"""Each a function ``f(train, val, num_classes, *, option=default, …) -> ProbeResult``."""
