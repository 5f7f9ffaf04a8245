"""Build a run from its settings: every part, and the trainer that holds them."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from fastproj.augment.draw import PRESETS, View
from fastproj.augment.views import Augmentation
from fastproj.core import dist
from fastproj.core.device import choose_precision
from fastproj.core.errors import InputError, SettingError
from fastproj.core.machine import cores
from fastproj.data.beton import Beton, open_beton
from fastproj.loaders import Crop, Loader, open_loader
from fastproj.models.architectures import is_address, output_width
from fastproj.models.encoders import build_encoder, freeze_patch_embedding, num_features
from fastproj.models.noise import Noise
from fastproj.models.norm import synchronize
from fastproj.models.projector import Projector, build_projector
from fastproj.objective import barlow_twins, build_objective
from fastproj.settings import Settings
from fastproj.training.crops import crop_size
from fastproj.training.diagnostics import Diagnostics
from fastproj.training.learner import LARGE, Learner, Penalty
from fastproj.training.optim import Group, build_optimizer, parameter_groups, probe_group
from fastproj.training.penalties import divergence, information, sparsity
from fastproj.training.trainer import Trainer


def build_trainer(
    settings: Settings, rank: dist.Rank, device: torch.device, beton: Beton | None = None
) -> Trainer:
    """The trainer of the run that ``settings`` describe, with all its parts.

    ``beton``: the set, already open; None: the one that ``settings.data.train`` names. Raises
    ``InputError`` if the beton cannot be used or settings contradict each other.
    """
    optim, train = settings.optim, settings.train
    beton = open_beton(settings.data.train) if beton is None else beton
    if optim.batch_size % (rank.world_size * optim.accumulate):
        raise InputError(
            f"optim.batch_size {optim.batch_size} cannot be split over {rank.world_size} rank(s) "
            f"and {optim.accumulate} part(s): make it a multiple of their product"
        )
    crops = build_crops(settings, 0)
    augmentations = build_augmentations(settings, beton, crops)
    unlabeled = int((beton.label < 0).sum())
    if len(beton.classes) < 2 and unlabeled < len(beton):
        raise InputError(f"{beton.path} has {len(beton.classes)} class: probing needs at least 2")
    # Without labels the online probe exists all the same, and never trains.
    learner = build_learner(settings, max(1, len(beton.classes))).to(device)
    if learner.objective.needs_labels and unlabeled:
        raise InputError(
            f"objective {settings.objective.name} needs labels, and {unlabeled} of {len(beton)} "
            f"images of {beton.path} have none: choose another objective or a labeled split"
        )
    if settings.model.sync_bn and rank.world_size > 1:
        synchronize(learner)
    optimizer = build_optimizer(
        optim.optimizer,
        build_groups(settings, learner),
        lr=optim.lr * optim.batch_size / 256,
        **optim.options,
    )
    sparse = settings.sparsehead
    return Trainer(
        learner,
        # Opened with the last epoch's crops, the largest: what it says of its memory.
        build_loader(settings, beton, build_crops(settings, optim.epochs - 1), rank, device),
        optimizer,
        augmentations,
        epochs=optim.epochs,
        warmup_epochs=optim.warmup_epochs,
        warmup_lr=optim.warmup_lr,
        penalty_weights=penalty_weights(settings),
        proximal=sparse.groups if sparse.proximal and any(sparse.weight) else None,
        accumulate=optim.accumulate,
        crops=partial(build_crops, settings),
        diagnostics=build_diagnostics(settings, learner.projector),
        diagnostics_every=train.diagnostics_every,
        precision=choose_precision(train.precision, device),
        compile=train.compile == "true" or (train.compile == "auto" and device.type == "cuda"),
        graphs=train.compile == "graphs",
        seed=settings.run.seed,
    )


def build_learner(settings: Settings, classes: int) -> Learner:
    """The model that the settings describe, initialized from ``run.seed``."""
    torch.manual_seed(settings.run.seed)
    encoder = build_run_encoder(settings)
    head, noise = settings.projector, settings.superfluous
    projector = build_projector(
        head.kind,
        num_features(encoder),
        latents=head.latents,
        k=head.k,
        levels=head.levels,
        output_norm=head.output_norm,
        **head.options,
    )
    chosen = settings.objective
    objective = build_objective(chosen.name, projector.out_features, classes, **chosen.options)
    if settings.views.local_crops and not objective.local_crops:
        raise InputError(
            f"objective {chosen.name} compares two crops: leave views.local_crops at 0"
        )
    return Learner(
        encoder,
        projector,
        objective,
        classes,
        None if noise.noise == "none" else Noise(num_features(encoder), noise.noise, noise.sigma),
        build_penalties(settings, projector),
        settings.model.bn_per_view,
    )


def build_run_encoder(settings: Settings) -> nn.Module:
    """The encoder, once it is known to take crops of every size that the run and its probes use."""
    model, views = settings.model, settings.views
    encoder = build_encoder(model.encoder, model.stem, views.size)
    if is_address(model.encoder):
        epochs = range(settings.optim.epochs)
        sizes = {crop.size for epoch in epochs for crop in build_crops(settings, epoch)}
        if settings.train.online_every and settings.eval.size:
            sizes.add(settings.eval.size)
        for size in sorted(sizes - {views.size}):
            output_width(encoder, model.encoder, size)
    if model.freeze_patch_embedding:
        freeze_patch_embedding(encoder)
    return encoder


def run_stem(settings: Settings) -> str | None:
    """The stem of an encoder of ours; another library's has its own first layers."""
    return None if is_address(settings.model.encoder) else settings.model.stem


def penalty_weights(settings: Settings) -> dict[str, tuple[float, ...]]:
    """The weight of each penalty that is on: one number, or its first and last value."""
    weights = {
        "matrix_information": settings.matrix_information.weight,
        "sparsehead": settings.sparsehead.weight,
        "superfluous_a": settings.superfluous.lambda_a,
        "superfluous_b": settings.superfluous.lambda_b,
    }
    return {name: weight for name, weight in weights.items() if any(weight)}


def build_penalties(settings: Settings, projector: Projector) -> dict[str, Penalty]:
    """Each penalty that is on and has a gradient, by name (a proximal step has none)."""
    wanted, sparse = penalty_weights(settings), settings.sparsehead
    penalties = {
        "matrix_information": information(settings.matrix_information.alpha),
        "superfluous_a": divergence(0, 1),
        "superfluous_b": divergence(1, 0),
    }
    if "sparsehead" in wanted:
        penalties["sparsehead"] = sparsity(projector, sparse.groups, sparse.scale_free)
        if sparse.proximal:
            if sparse.groups == "activations":
                raise SettingError(
                    "sparsehead.proximal shrinks weights: give --sparsehead.groups columns or rows"
                )
            wanted.pop("sparsehead")
    return {name: penalties[name] for name in wanted}


def build_groups(settings: Settings, learner: Learner) -> list[Group]:
    """All trained parameters, in groups by weight decay, LARS adaptation and peak learning rate."""
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


def build_crops(settings: Settings, epoch: int) -> list[Crop]:
    """Per image two large crops, sized for ``epoch``, and ``views.local_crops`` small ones."""
    views = settings.views
    for low, high in (("scale_min", "scale_max"), ("local_scale_min", "local_scale_max")):
        if getattr(views, low) > getattr(views, high):
            raise InputError(
                f"views.{low} {getattr(views, low)} is above views.{high} {getattr(views, high)}"
            )
    size = crop_size(epoch, settings.optim.epochs, views.size_start, views.size, run_stem(settings))
    large = Crop(size, LARGE, (views.scale_min, views.scale_max))
    scale = (views.local_scale_min, views.local_scale_max)
    small = [Crop(views.local_size, views.local_crops, scale)] if views.local_crops else []
    return [large, *small]


def build_augmentations(
    settings: Settings, beton: Beton, crops: Sequence[Crop]
) -> list[Augmentation]:
    """One augmentation per crop size: the preset's views, with the settings' overrides.

    The set's mean and standard deviation normalize the pixels. Small crops use the preset's first
    view; a third value in a list is theirs.
    """
    preset = PRESETS[settings.views.preset]
    small = settings.views.local_crops > 0
    lengths = (1, LARGE, LARGE + 1) if small else (1, LARGE)
    views: list[View] = []
    for number, view in enumerate([*preset, preset[0]]):
        changes = {}
        for name in ("flip_prob", "jitter_prob", "brightness", "contrast", "saturation", "hue",
                     "gray_prob", "blur_prob", "solarize_prob"):  # fmt: skip
            given = getattr(settings.views, name)
            if given is not None:
                if len(given) not in lengths:
                    third = ", or a third one for the small crops" * small
                    raise InputError(
                        f"views.{name} has {len(given)} values: give one, or one for each of the "
                        f"{LARGE} views{third}"
                    )
                changes[name] = given[number % len(given)]
        views.append(replace(view, **changes))
    *large, local = views
    mean, std = beton.manifest.mean, beton.manifest.std
    return [
        Augmentation(large if crop is crops[0] else [local] * crop.num_views, mean, std)
        for crop in crops
    ]


def build_loader(
    settings: Settings,
    beton: Beton,
    crops: Sequence[Crop],
    rank: dist.Rank,
    device: torch.device,
) -> Loader:
    """This rank's loader. With ``data.workers`` 0 the ranks of a machine divide its cores."""
    data = settings.data
    return open_loader(
        beton,
        crops,
        settings.optim.batch_size // rank.world_size,
        device=device,
        engine=data.engine,
        seed=settings.run.seed,
        rank=rank.rank,
        world_size=rank.world_size,
        workers=data.workers or max(1, cores() // rank.local_world_size),
        memory_share=data.memory_share,
    )


def build_diagnostics(settings: Settings, projector: Projector) -> Diagnostics:
    """Diagnostics that apply Barlow Twins' loss to the features of Barlow Twins, else NT-Xent.

    The authors plot the same. NT-Xent has the objective's temperature where it names one.
    """
    objective, groups = settings.objective, settings.sparsehead.groups
    barlow = objective.name == "barlow"
    return Diagnostics(
        projector,
        partial(barlow_twins, **objective.options) if barlow else None,
        groups="rows" if groups == "rows" else "columns",
        **{name: x for name, x in objective.options.items() if name == "temperature"},
    )
