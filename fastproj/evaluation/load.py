"""An encoder to evaluate, from any checkpoint: ours, or another library's."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastproj.core.errors import InputError, SettingError
from fastproj.evaluation.pretrained import (
    Pretrained,
    is_checkpoint,
    is_export,
    load_pretrained,
    of_checkpoint,
)
from fastproj.evaluation.resnets import is_resnet, of_resnet
from fastproj.evaluation.weights import as_state, describe, find_weights, groups, read_weights
from fastproj.models.architectures import (
    Architecture,
    build_architecture,
    is_address,
    source_sha256,
)
from fastproj.objective import OBJECTIVES


@dataclass(frozen=True)
class LoadedEncoder:
    """An encoder with its weights, on the CPU, and what it expects of images.

    ``module``: images (B, 3, h, w) -> features (B, d). ``projector``: features -> projections,
    where the file has one. ``about``: what the protocol says of it. ``weights``: where they are
    from, in one line. ``mean`` and ``std``: per channel, of pixels in [0, 1]; None where nothing
    says. ``size``: side of its images, pixels; None where nothing says. ``step`` and ``epoch``: how
    long it was trained, or None. ``build``: the same architecture with new random weights.
    ``labeled``: the content digest of the images whose labels it was trained with, or None.
    """

    module: nn.Module
    about: Mapping[str, Any]
    weights: str
    build: Callable[[], nn.Module]
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    size: int | None = None
    projector: nn.Module | None = None
    step: int | None = None
    epoch: int | None = None
    labeled: str | None = None

    def describe(self) -> str:
        """One line: its name, where its weights are from, and what they do not show."""
        padding = self.about.get("padding")
        guess = "" if padding is None else f"; conv1 padding {padding}, which no weight shows"
        return f"{self.about['name']}: {self.weights}{guess}"

    def at_random(self, seed: int) -> "LoadedEncoder":
        """The same encoder as initialized from ``seed``, without a projector.

        Raises ``InputError`` where the seed changes nothing: a function may give trained weights.
        """
        torch.manual_seed(seed + 1)
        other = self.build().state_dict().values()
        torch.manual_seed(seed)
        module = self.build()
        if all(map(torch.equal, other, module.state_dict().values())):
            raise InputError(
                f"{self.about['name']} has the same weights whatever the seed, so there is none at "
                "random to compare with: leave out eval.baselines or encoder.weights random, or "
                "name a function that draws its weights"
            )
        weights = f"as initialized from seed {seed}"
        return LoadedEncoder(
            module, self.about, weights, self.build, self.mean, self.std, self.size
        )


def load_encoder(
    path: Path | None,
    name: str | None = None,
    size: int | None = None,
    setting: str = "eval.encoder",
) -> LoadedEncoder:
    """The encoder with the weights in the file ``path``, of the architecture ``name``.

    ``name`` None: what a checkpoint or export of ours says, or a ResNet that the weights show.
    Otherwise as ``build_architecture`` takes it. ``path`` None: a function's module keeps the
    weights that it comes with. ``size``: side of the images, pixels, for which another library's
    model is built. ``setting``: what gives the
    name, for the messages.

    Raises ``InputError`` for a file that is missing, damaged or of another architecture, and
    ``SettingError`` for a name that does not exist.
    """
    if name is not None:
        if not is_address(name):
            raise SettingError(
                f"{setting}: no {name!r}; give timm:NAME, torchvision:NAME or "
                "package.module:function; a run folder or a ResNet's checkpoint needs none"
            )
        built = build_architecture(name, size)
        again = partial(build_architecture, name, size)
        if path is not None:
            return _with_weights(built, again, path, read_weights(path), setting)
        if not built.has_weights:
            raise InputError(
                f"{setting} {name} has random weights: give its own as "
                f"--{setting.partition('.')[0]}.checkpoint FILE"
            )
        return _loaded(built, again, "as the function gives them")
    assert path is not None  # a command finds one, or has refused
    if is_export(path):
        return _of_ours(load_pretrained(path))
    state = read_weights(path)
    if is_checkpoint(state):
        return _of_ours(of_checkpoint(state, path))
    group = next((g for g in groups(state) if is_resnet(g)), None)
    if group is None:
        raise InputError(
            f"{path} is no export of fastproj, no checkpoint of fastproj.train, and no ResNet that "
            f"its weights show: give --{setting} timm:NAME, torchvision:NAME or "
            "package.module:function"
        )
    # The first ResNet says the architecture; of all that fit it, ``find_weights`` takes the right.
    again = partial(of_resnet, group)
    return _with_weights(again(), again, path, state, setting)


def _with_weights(
    built: Architecture,
    again: Callable[[], Architecture],
    path: Path,
    state: Mapping[str, Any],
    setting: str,
) -> LoadedEncoder:
    return _loaded(built, again, _fill(built.module, path, state, setting))


def load_weights(encoder: nn.Module, path: Path) -> str:
    """Give ``encoder`` the weights in any file that ``load_encoder`` reads, and nothing else of it.

    Returns one line: how many were found, where, and what in the file was not used. Raises
    ``InputError`` for a file that is missing, damaged or of another architecture.
    """
    state = load_pretrained(path).weights if is_export(path) else read_weights(path)
    return _fill(encoder, path, state, "model.encoder")


def _fill(module: nn.Module, path: Path, state: Mapping[str, Any], setting: str) -> str:
    wanted = module.state_dict()
    group = find_weights(path, state, wanted, setting)
    module.load_state_dict(as_state(group, wanted))
    return f"{path}: {describe(group, wanted)}"


def _loaded(built: Architecture, again: Callable[[], Architecture], weights: str) -> LoadedEncoder:
    return LoadedEncoder(
        built.module, built.about, weights, lambda: again().module, built.mean, built.std,
        built.size,
    )  # fmt: skip


def _of_ours(found: Pretrained) -> LoadedEncoder:
    module = found.build()
    about: Mapping[str, Any] = {"name": found.encoder, "stem": found.stem}
    if is_address(found.encoder):
        about = build_architecture(found.encoder, found.size).about
    elif source := source_sha256(module):  # a plugin's
        about = {**about, "source_sha256": source}
    objective = found.settings.get("objective.name", "")
    by_labels = objective in OBJECTIVES and getattr(OBJECTIVES[objective], "needs_labels", False)
    return LoadedEncoder(
        module,
        about,
        "of the checkpoint",
        found.build_at_random,
        found.mean,
        found.std,
        found.size,
        projector=found.build_projector(),
        step=found.step,
        epoch=found.epoch,
        labeled=found.data if by_labels else None,
    )
