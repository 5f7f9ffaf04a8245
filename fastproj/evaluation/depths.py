"""Features at several depths of one forward pass: encoder stages, h, hidden layers, z."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastproj.core.errors import InputError
from fastproj.models.projector import Projector

STAGES = ("layer1", "layer2", "layer3", "layer4")  # a ResNet's


def depths_of(encoder: nn.Module, projector: nn.Module | None) -> list[str]:
    """The depths there are, first to last.

    ``layer1`` … ``layer4``: a ResNet's stages, averaged over the image. ``h``: the encoder's
    output. ``hidden1``, …: the output of each hidden layer of the projector, after its batch norm
    and nonlinearity. ``z``: its output.
    """
    found = [stage for stage in STAGES if hasattr(encoder, stage)] + ["h"]
    if isinstance(projector, Projector):
        found += [f"hidden{number}" for number, _ in enumerate(_blocks(projector), 1)] + ["z"]
    return found


class AtDepths(nn.Module):
    """Images (B, 3, h, w) -> the features of all ``depths`` side by side, (B, sum of ``widths``).

    ``widths``, one per depth, are known after the first forward pass. Raises ``InputError`` for a
    depth that there is not.
    """

    def __init__(
        self, encoder: nn.Module, depths: Sequence[str], projector: nn.Module | None = None
    ) -> None:
        super().__init__()
        there = depths_of(encoder, projector)
        if missing := [depth for depth in depths if depth not in there]:
            raise InputError(
                f"eval.depths: this encoder has no {missing[0]}; it has {', '.join(there)}"
                + ("" if "z" in there else " (no projector is in the file)")
            )
        self.encoder, self.depths = encoder, tuple(depths)
        self.projector = projector if {*depths} - {*STAGES, "h"} else None
        self.widths: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        found: dict[str, Tensor] = {}

        def keep(name: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
            if output.ndim != 4:
                shape = tuple(output.shape)
                raise InputError(f"eval.depths: {name} gives {shape}, not (B, c, h, w)")
            found[name] = output.mean((2, 3))

        hooks = [
            getattr(self.encoder, stage).register_forward_hook(partial(keep, stage))
            for stage in STAGES
            if stage in self.depths
        ]
        try:
            x = found["h"] = self.encoder(images)
        finally:
            for hook in hooks:
                hook.remove()
        if isinstance(self.projector, Projector):
            for number, block in enumerate(_blocks(self.projector), 1):
                x = found[f"hidden{number}"] = block(x)
            found["z"] = self.projector.head(x)
        self.widths = [found[depth].shape[1] for depth in self.depths]
        return torch.cat([found[depth] for depth in self.depths], 1)


def _blocks(projector: Projector) -> list[nn.Sequential]:
    """The hidden layers: each begins at a linear layer of the trunk and ends before the next."""
    blocks: list[list[nn.Module]] = []
    for layer in projector.trunk:
        if isinstance(layer, nn.Linear) or not blocks:
            blocks.append([])
        blocks[-1].append(layer)
    return [nn.Sequential(*block) for block in blocks]
