"""A learner's penalties: functions of one forward pass, with ``objective.penalties``' formulas."""

from torch import Tensor

from fastproj.core.errors import SettingError
from fastproj.models.projector import Projector
from fastproj.objective.penalties import (
    activation_sparsity,
    gaussian_kl,
    group_sparsity,
    matrix_information,
)
from fastproj.training.learner import LARGE, Activations, Penalty


def information(alpha: float = 2.0) -> Penalty:
    """Matrix information of order ``alpha`` between features and projections of the large crops."""

    def penalty(seen: Activations) -> Tensor:
        features, projections = seen.features[:LARGE], seen.projections[:LARGE]
        return matrix_information(features.flatten(0, 1), projections.flatten(0, 1), alpha)

    return penalty


def sparsity(projector: Projector, groups: str = "columns", scale_free: bool = True) -> Penalty:
    """Group sparsity of the projector's first weight or of its hidden activations.

    ``groups``: ``columns`` (one per feature) or ``rows`` of the weight, or ``activations``. Raises
    ``InputError`` if the projector has no such weight or activations.
    """
    if groups == "activations":
        if not len(projector.trunk):
            raise SettingError(
                "sparsehead.groups: this projector has no hidden activations, and those of the "
                "encoder are not the head's: give columns or rows, or a deeper projector"
            )
        return lambda seen: activation_sparsity(seen.hidden.flatten(0, 1), scale_free)
    projector.first_weight()  # raises now if there is none
    return lambda seen: group_sparsity(projector.first_weight(), groups, scale_free)


def divergence(one: int, other: int) -> Penalty:
    """KL divergence KL(view ``one`` ‖ view ``other``) of the feature distributions; needs noise."""

    def penalty(seen: Activations) -> Tensor:
        assert seen.sigma is not None
        sigma = seen.sigma if seen.sigma.ndim == 3 else seen.sigma.expand(LARGE)
        return gaussian_kl(seen.mean[one], sigma[one], seen.mean[other], sigma[other])

    return penalty
