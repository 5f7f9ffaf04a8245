"""Pre-training: building a run, the training step, optimizers, penalties and diagnostics."""

from fastproj.core.table import Table

OPTIMIZERS = Table(
    "optim.optimizer",
    {
        "lars": "fastproj.training.optim:lars",
        "sgd": "fastproj.training.optim:sgd",
        "adamw": "fastproj.training.optim:adamw",
    },
)
"""Each a function ``f(groups, lr, *, option=default, …) -> torch.optim.Optimizer``."""
