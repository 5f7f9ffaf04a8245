"""From settings to the parts of a run: the learner, its views, the crops they are made of."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from fastproj.encoder import build_encoder
from fastproj.errors import InputError, SettingError
from fastproj.learner import Learner, Pass, Penalty
from fastproj.loaders import Crop
from fastproj.manifest import Beton
from fastproj.objective import build_objective
from fastproj.optim import Group, parameter_groups, probe_group
from fastproj.projector import Projector, build_projector
from fastproj.regulariser import (
    Noise,
    activation_sparsity,
    gaussian_kl,
    group_sparsity,
    matrix_information,
)
from fastproj.settings import Settings
from fastproj.views import PRESETS, View, Views

LARGE = 2  # crops of views.size: every objective compares two
STAGES = 4  # sizes of a crop that grows, the first and the last included
GRID = {"cifar": 4, "imagenet": 32}  # pixels, of which the sizes between are multiples


def build_learner(settings: Settings, classes: int) -> Learner:
    """The model that the settings describe, initialised from ``run.seed``."""
    torch.manual_seed(settings.run.seed)
    encoder = build_encoder(settings.model.encoder, settings.model.stem)
    head, noise = settings.projector, settings.superfluous
    projector = build_projector(
        head.kind,
        encoder.features,
        hidden=head.hidden,
        out=head.out,
        depth=head.depth,
        batch_norm=head.batch_norm,
        dropout=head.dropout,
        latents=head.latents,
        k=head.k,
        levels=head.levels,
    )
    chosen = settings.objective._asdict()
    objective = build_objective(chosen.pop("name"), projector.out_features, **chosen)
    if settings.views.local_crops and not objective.local_crops:
        raise InputError(
            f"objective {settings.objective.name} compares two crops: leave views.local_crops at 0"
        )
    return Learner(
        encoder,
        projector,
        objective,
        classes,
        None if noise.noise == "none" else Noise(encoder.features, noise.noise, noise.sigma),
        build_penalties(settings, projector),
    )


def penalty_weights(settings: Settings) -> dict[str, tuple[float, ...]]:
    """The weight of each penalty that is switched on: one number, or first and last."""
    weights = {
        "matrix_information": settings.matrix_information.weight,
        "sparsehead": settings.sparsehead.weight,
        "superfluous_a": settings.superfluous.lambda_a,
        "superfluous_b": settings.superfluous.lambda_b,
    }
    return {name: weight for name, weight in weights.items() if any(weight)}


def build_penalties(settings: Settings, projector: Projector) -> dict[str, Penalty]:
    """Each penalty that is switched on and has a gradient, as a function of a forward pass."""
    alpha, sparse = settings.matrix_information.alpha, settings.sparsehead

    def information(seen: Pass) -> torch.Tensor:
        features, projections = seen.features[:LARGE], seen.projections[:LARGE]
        return matrix_information(features.flatten(0, 1), projections.flatten(0, 1), alpha)

    def sparsity(seen: Pass) -> torch.Tensor:
        if sparse.groups == "activations":
            return activation_sparsity(seen.hidden.flatten(0, 1), sparse.scale_free)
        return group_sparsity(projector.first_weight(), sparse.groups, sparse.scale_free)

    def divergence(seen: Pass, one: int, other: int) -> torch.Tensor:
        assert seen.sigma is not None
        sigma = seen.sigma if seen.sigma.ndim == 3 else seen.sigma.expand(LARGE)
        return gaussian_kl(seen.mean[one], sigma[one], seen.mean[other], sigma[other])

    known: dict[str, Penalty] = {
        "matrix_information": information,
        "sparsehead": sparsity,
        "superfluous_a": lambda seen: divergence(seen, 0, 1),
        "superfluous_b": lambda seen: divergence(seen, 1, 0),
    }
    wanted = penalty_weights(settings)
    if settings.superfluous.noise == "none" and any(n.startswith("superfluous") for n in wanted):
        raise SettingError(
            "superfluous.lambda_a and lambda_b weigh divergences of stochastic features: give "
            "--superfluous.noise fixed or learned as well"
        )
    if "sparsehead" in wanted:
        if sparse.groups != "activations":
            projector.first_weight()  # complain now where there is none
        elif not len(projector.trunk):
            raise SettingError(
                "sparsehead.groups: this projector has no hidden activations, and those of the "
                "encoder are not the head's: give columns or rows, or a deeper projector"
            )
        elif sparse.proximal:
            raise SettingError(
                "sparsehead.proximal shrinks weights: give --sparsehead.groups columns or rows"
            )
        if sparse.proximal:
            wanted.pop("sparsehead")
    return {name: known[name] for name in wanted}


def build_optimised(settings: Settings, learner: Learner) -> list[Group]:
    """Every trained parameter in a group with its own decay, adaptation and peak rate."""
    optim = settings.optim
    trained: list[nn.Module] = [learner.encoder, learner.projector]
    if learner.noise is not None:
        trained.append(learner.noise)
    own = parameter_groups([learner.objective], optim.weight_decay)
    for group in own:
        group["constant"] = learner.objective.constant_rate
    groups = [
        *parameter_groups(trained, optim.weight_decay),
        *own,
        probe_group(learner.probe, optim.probe_lr * optim.batch_size / 256),
    ]
    return [group for group in groups if group["params"]]


def crop_size(settings: Settings, epoch: int) -> int:
    """Side in pixels of the large crops in ``epoch``, counted from 0.

    ``views.size``, or growing to it from ``views.size_start`` in ``STAGES`` equal parts of the run,
    so that a model is compiled for few sizes; a run of fewer epochs leaves out the first of them.
    Small crops first is FFCV's "progressive resizing" (Leclerc et al. 2023, arXiv 2306.12517);
    the last epochs are of the size that is evaluated (FixRes, Touvron et al. 2019, arXiv
    1906.06423). Raises ``InputError`` where the crops would shrink.
    """
    first, last = settings.views.size_start, settings.views.size
    if first is None:
        return int(last)
    if first > last:
        raise InputError(f"views.size_start {first} is above views.size {last}")
    stage = (STAGES * (epoch + 1) - 1) // settings.optim.epochs
    grid = GRID[settings.model.stem]
    between = round((first + (last - first) * stage / (STAGES - 1)) / grid) * grid
    return {0: first, STAGES - 1: last}.get(stage, min(max(between, first), last))


def build_crops(settings: Settings, epoch: int) -> list[Crop]:
    """Two large crops an image and, where asked for, ``views.local_crops`` small ones."""
    views = settings.views
    for low, high in (("scale_min", "scale_max"), ("local_scale_min", "local_scale_max")):
        if getattr(views, low) > getattr(views, high):
            raise InputError(
                f"views.{low} {getattr(views, low)} is above views.{high} {getattr(views, high)}"
            )
    large = Crop(crop_size(settings, epoch), LARGE, (views.scale_min, views.scale_max))
    scale = (views.local_scale_min, views.local_scale_max)
    small = [Crop(views.local_size, views.local_crops, scale)] if views.local_crops else []
    return [large, *small]


def build_views(settings: Settings, beton: Beton, crops: Sequence[Crop]) -> list[Views]:
    """For each crop size its views: the preset's with the settings' overrides.

    Pixels are normalised by the set's own statistics. Small crops are augmented as the first view.
    """
    preset = PRESETS[settings.views.preset]
    views: list[View] = []
    for number, view in enumerate(preset):
        changes = {}
        for name in ("flip", "jitter", "brightness", "contrast", "saturation", "hue", "gray",
                     "blur", "solarise"):  # fmt: skip
            given = getattr(settings.views, name)
            if given is not None:
                if len(given) not in (1, len(preset)):
                    raise InputError(
                        f"views.{name} has {len(given)} values: give one, or one for each of the "
                        f"{len(preset)} views"
                    )
                changes[name] = given[number % len(given)]
        views.append(replace(view, **changes))
    mean, std = beton.manifest.mean, beton.manifest.std
    return [
        Views(views if crop is crops[0] else views[:1] * crop.views, mean, std) for crop in crops
    ]
