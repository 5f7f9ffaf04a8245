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
        "published_in100_simclr": "fastproj.evaluation.published:published_in100_simclr",
        "published_in100_barlow": "fastproj.evaluation.published:published_in100_barlow",
        "published_cifar_simclr": "fastproj.evaluation.published:published_cifar_simclr",
        "published_cifar_barlow": "fastproj.evaluation.published:published_cifar_barlow",
        "solo": "fastproj.evaluation.published:solo",
        "finetune": "fastproj.evaluation.finetune:finetune",
        "corruptions": "fastproj.evaluation.corruptions:corruptions",
    },
)
"""Each a function ``f(train, val, num_classes, *, option=default, …) -> ProbeResult`` of features.

One that runs the encoder itself is ``f(encoder, train, val, num_classes, *, mean, std, …)``, with a
``Loader`` of random crops and one of center crops; one whose second parameter is called
``train_features`` gets the features of train instead of the first loader. ``mean``, ``std``,
``precision``, ``seed`` and ``device`` are given by the caller; every other option is a setting,
``eval.<probe>_<option>``.
"""
