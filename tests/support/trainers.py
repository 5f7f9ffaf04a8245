"""Small trainers of any kind for tests, put together from the library's parts."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from fastproj.augment.draw import View
from fastproj.augment.views import Augmentation
from fastproj.core import dist
from fastproj.core.table import hyperparameters
from fastproj.data.beton import Beton
from fastproj.loaders import Crop, open_loader
from fastproj.models.encoders import build_encoder
from fastproj.models.noise import Noise
from fastproj.models.norm import synchronize
from fastproj.models.projector import build_projector
from fastproj.objective import OBJECTIVES, build_objective
from fastproj.training.learner import Learner
from fastproj.training.optim import build_optimizer, parameter_groups, probe_group
from fastproj.training.penalties import divergence, information, sparsity
from fastproj.training.trainer import Trainer

# Nothing is drawn but the crops, which are the same on any number of ranks.
PLAIN = View(flip_prob=0, jitter_prob=0, gray_prob=0, blur_prob=0, solarize_prob=0)
HEAD: dict[str, Any] = {
    "hidden": 32, "out": 16, "depth": 2, "batch_norm": True, "dropout": 0.0,
    "latents": None, "k": 0.01, "levels": None,
}  # fmt: skip
OBJECTIVE: dict[str, Any] = {
    "temperature": 0.2, "off_diagonal": 0.0051, "scale": 0.1, "invariance": 25.0, "variance": 25.0,
    "covariance": 1.0, "predictor_hidden": 16, "queue": 24, "queue_epoch": 1, "prototypes": 6,
    "sinkhorn_steps": 3, "epsilon": 0.05, "freeze_epochs": 1,
    "momentum": 0.9, "momentum_end": 1.0, "weight_norm": False,
}  # fmt: skip
SCALE, LOCAL_SCALE = (0.08, 1.0), (0.05, 0.14)


def small_trainer(
    beton: Beton,
    objective: str = "simclr",
    *,
    head: Mapping[str, Any] | None = None,
    loss: Mapping[str, Any] | None = None,
    view: View = PLAIN,
    size: int = 8,
    sizes: Sequence[int] = (),
    local_crops: int = 0,
    noise: str | None = None,
    sigma: float = 0.1,
    penalties: Mapping[str, Sequence[float]] | None = None,
    groups: str = "columns",
    proximal: bool = False,
    bn_per_view: bool = False,
    batch_size: int = 16,
    optimizer: str = "sgd",
    engine: str = "auto",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    backend: str | None = None,
    **trainer: Any,
) -> Trainer:
    """Two epochs of ``objective`` on the small ResNet, on this rank; sizes of ``HEAD``.

    ``head`` changes ``HEAD``, ``loss`` ``OBJECTIVE``, ``view`` both augmentations; ``sizes`` are
    those of each epoch, where crops grow; ``penalties``: weights by name; ``dtype`` of weights and
    views; ``backend`` compiles the learner with it. What is left goes to ``Trainer``.
    """
    torch.manual_seed(0)
    encoder = build_encoder("resnet_small", "cifar")
    projector = build_projector("mlp", encoder.num_features, **{**HEAD, **(head or {})})
    named = hyperparameters(OBJECTIVES[objective])
    choices = {**OBJECTIVE, **(loss or {})}
    options = {name: value for name, value in choices.items() if name in named}
    known = {
        "matrix_information": lambda: information(2.0),
        "sparsehead": lambda: sparsity(projector, groups),
        "superfluous_a": lambda: divergence(0, 1),
        "superfluous_b": lambda: divergence(1, 0),
    }
    weights = dict(penalties or {})
    with_gradient = [name for name in weights if not (proximal and name == "sparsehead")]
    learner = Learner(
        encoder,
        projector,
        build_objective(objective, projector.out_features, len(beton.classes), **options),
        len(beton.classes),
        Noise(encoder.num_features, noise, sigma) if noise else None,
        {name: known[name]() for name in with_gradient},
        bn_per_view,
    ).to(dtype)
    if dist.world_size() > 1:
        synchronize(learner)
    modules = [encoder, projector, *([learner.noise] if learner.noise else [])]
    own = parameter_groups([learner.objective], 1e-4)
    for group in own:
        group["constant"] = learner.objective.constant_rate
    every = [*parameter_groups(modules, 1e-4), *own]
    rate = batch_size / 256
    optimized = [group for group in every if group["params"]]
    optimized.append(probe_group(learner.probe, 0.1 * rate))
    if backend:
        learner.compile(dynamic=False, backend=backend)

    def crops(epoch: int) -> list[Crop]:
        large = Crop(sizes[epoch] if sizes else size, 2, SCALE)
        return [large, *([Crop(8, local_crops, LOCAL_SCALE)] if local_crops else [])]

    loader = open_loader(
        beton, crops(0), batch_size // dist.world_size(), device=device, engine=engine, workers=1,
        rank=dist.rank(), world_size=dist.world_size(),
    )  # fmt: skip
    mean, std = beton.manifest.mean, beton.manifest.std
    augmentations = [
        Augmentation([replace(view)] * crop.num_views, mean, std, dtype) for crop in crops(0)
    ]
    given = {"epochs": 2, "warmup_epochs": 0, **trainer}
    return Trainer(
        learner,
        loader,
        build_optimizer(optimizer, optimized, 0.1 * rate),
        augmentations,
        crops=crops,
        penalty_weights=weights,
        proximal=groups if proximal else None,
        precision=given.pop("precision", torch.float32),
        **given,
    )
