"""Weights that are numbers."""

from collections.abc import Mapping

from torch import Tensor

from fastproj.core.errors import InputError


def require_finite(weights: Mapping[str, Tensor], where: str) -> None:
    """Raises ``InputError``, which begins with ``where``, for a tensor with NaN or infinity."""
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise InputError(
                f"{where}: {name} holds NaN or infinity: the run diverged or the file was altered; "
                "take an older checkpoint, or train again with a lower --optim.lr"
            )
