"""The folder of a run: its journal and where else that goes, its checkpoints, its environment."""

from fastproj.core.table import Table

SINKS = Table(
    "train.log_to",
    {
        "tensorboard": "fastproj.runs.sinks:TensorBoard",
        "wandb": "fastproj.runs.sinks:WandB",
    },
)
"""Each a class with the methods of ``fastproj.runs.sinks.Sink``."""
