"""The parts of a learner that have weights: encoders, projectors, normalization, noise.

A new encoder or projector is a function and one line in its table.
"""

from fastproj.core.table import Table

ENCODERS = Table(
    "model.encoder",
    {
        "resnet18": "fastproj.models.encoders:resnet18",
        "resnet34": "fastproj.models.encoders:resnet34",
        "resnet50": "fastproj.models.encoders:resnet50",
        "resnet_small": "fastproj.models.encoders:resnet_small",
    },
)
"""Each a function ``f(stem) -> Encoder``."""

PROJECTORS = Table(
    "projector.kind",
    {
        "none": "fastproj.models.projector:none",
        "direct": "fastproj.models.projector:direct",
        "linear": "fastproj.models.projector:linear",
        "mlp": "fastproj.models.projector:mlp",
        "barlow": "fastproj.models.projector:barlow",
    },
)
"""Each a function ``f(num_features, *, option=default, …) -> Stages``."""
