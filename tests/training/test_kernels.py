"""What the compiler generates for an H100 may not grow unnoticed; counted without a GPU.

The counts are of the pinned torch and of the oldest that we support. Bytes are those that Inductor
counts: what each kernel and each library call reads and writes, as if no cache held anything.
docs/scaling.md shows them.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fastproj.augment import chain
from fastproj.loaders import crop
from fastproj.models.encoders import build_encoder
from fastproj.models.projector import build_projector
from fastproj.objective import build_objective
from fastproj.training.learner import Learner

try:
    from tests.support.kernels import Counted, count
except ImportError as error:  # Inductor's inner names, which other versions have not
    pytest.skip(f"for other versions of torch: {error}", allow_module_level=True)

VERSIONS = ("2.15.", "2.11.")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not torch.__version__.startswith(VERSIONS),
        reason=f"counts of torch {' and '.join(VERSIONS)}",
    ),
]
PAGE = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text("utf-8")
VIEWS = 512  # two of each of 256 images


def views(side: int) -> Counted:
    """The pixels' graph of the augmentation, to bfloat16."""
    with FakeTensorMode():
        pixels = torch.empty(VIEWS, side, side, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
        flags = [torch.empty(VIEWS, 1, 1, dtype=torch.bool) for _ in range(3)]
        jitter = [
            chain._Jitter(torch.empty(VIEWS, 4, 3), torch.empty(VIEWS), torch.empty(VIEWS, 4, 3))
            for _ in range(2)
        ]
        taps, scale, shift = torch.empty(VIEWS, 13), torch.empty(3), torch.empty(3)
        return count(
            chain.pixels, pixels, flags[0], *jitter, flags[1], taps, flags[2], scale, shift,
            torch.bfloat16, options=chain.pixels_options(),
        )  # fmt: skip


def crops(batch: int, side: int, after: int = 0) -> Counted:
    """Two crops to 224 pixels of ``batch`` images of ``side`` pixels, or of sides that change.

    ``after``: the side of the batch before, which was compiled for its own size.
    """
    with FakeTensorMode(shape_env=ShapeEnv()):

        def batch_of(side: int) -> tuple[Tensor, Tensor]:
            images = torch.empty(batch, side, side, 3, dtype=torch.uint8).movedim(-1, 1)
            return images, torch.empty(2, batch, 4, dtype=torch.int64)

        return count(
            lambda i, b: crop.crop_batch(i, b, 224, torch.float16), *batch_of(side),
            options=crop.OPTIONS, after=[batch_of(after)] if after else (),
        )  # fmt: skip


def learner(stem: str, side: int, pool: nn.Module | None = None, per_view: bool = False) -> Counted:
    """ResNet-18, projector, SimCLR's loss and online probe, forward and backward, in bfloat16."""
    with FakeTensorMode():
        encoder = build_encoder("resnet18", stem)
        if pool is not None:
            encoder.maxpool = pool
        projector = build_projector("mlp", 512, hidden=512, out=128)
        objective = build_objective("simclr", 128)
        model = Learner(encoder, projector, objective, 100, bn_per_view=per_view)
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                weight = torch.empty(module.weight.shape).to(memory_format=torch.channels_last)
                module.weight = nn.Parameter(weight)

        def loss(x: Tensor, labels: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                seen = model((x,), labels)
            return seen.terms["objective"] + seen.probe_loss

        x = torch.empty(VIEWS, 3, side, side).to(memory_format=torch.channels_last)
        return count(loss, x, torch.empty(VIEWS // 2, dtype=torch.int64), backward=True)


Count = tuple[int, int, int]
# Kernels generated, library calls, bytes, of each of VERSIONS.
COUNTS: dict[str, tuple[Callable[..., Counted], tuple[Any, ...], Count, Count]] = {
    "256 photographs of 400 px, two crops of 224": (
        crops, (256, 400), (5, 2, 2_467_790_848), (5, 2, 2_467_790_848)
    ),
    "1,024 squares of 160 px, two crops of 224": (
        crops, (1024, 160), (5, 2, 4_283_564_032), (5, 2, 4_283_564_032)
    ),
    "256 photographs of up to 375 px, after others of 400": (
        crops, (256, 375, 400), (5, 2, 2_301_640_448), (5, 2, 2_301_640_448)
    ),
    "views, 32 px": (views, (32,), (3, 0, 30_041_624), (4, 0, 42_624_536)),
    "views, 224 px": (views, (224,), (3, 0, 1_464_493_592), (4, 0, 2_081_056_280)),
    "ResNet-18, 32 px": (
        learner, ("cifar", 32), (273, 51, 15_313_974_548), (272, 51, 15_288_054_548)
    ),
    "ResNet-18, 224 px": (
        learner, ("imagenet", 224), (272, 53, 52_842_460_436), (279, 51, 50_890_306_324)
    ),
    "ResNet-18, 224 px, max-pool decomposed": (
        learner, ("imagenet", 224, nn.MaxPool2d(3, 2, padding=1)),
        (276, 51, 57_567_861_780), (279, 51, 50_890_306_324),
    ),
    "ResNet-18, 32 px, batch norm per view": (
        learner, ("cifar", 32, None, True), (419, 97, 15_409_453_060), (419, 97, 15_397_202_948)
    ),
    "ResNet-18, 224 px, batch norm per view": (
        learner, ("imagenet", 224, None, True),
        (424, 101, 53_521_243_396), (428, 97, 51_235_680_516),
    ),
}  # fmt: skip
LIBRARY_POOL = ("ResNet-18, 224 px", "ResNet-18, 224 px, batch norm per view")
# Half a minute each: layers of the others once more, and what the page compares them with.
LONG = [name for name in COUNTS if name.endswith(("per view", "decomposed"))]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.soak) if n in LONG else n for n in COUNTS]
)
def test_no_more_kernels_and_bytes_than_were_committed(name: str) -> None:
    make, given, *counts = COUNTS[name]
    found = make(*given)
    pinned = torch.__version__.startswith(VERSIONS[0])
    kernels, library, size = counts[0] if pinned else counts[1]
    committed = (kernels, library, size)
    for counted, most in zip(found[:3], committed, strict=True):
        assert 0.9 * most <= counted <= most, (found[:3], committed)  # fewer: commit the new ones
    cells = [f"{kernels} | {library} | {size / 1e9:.2f} GB" for kernels, library, size in counts]
    assert f"\n| {name} | {' | '.join(cells)} |" in PAGE
    # torch 2.11 decomposes any max-pool, but without atomics.
    assert ("max_pool_backward" in found.code) == (pinned and name in LIBRARY_POOL)
    assert ("tl.atomic_add" in found.code) == (pinned and name.endswith("decomposed"))
    assert ("div_rn" in found.code) == (make is crops)  # rounded as eager divisions are
