"""What the compiler generates for an H100 may not grow unnoticed; counted without a GPU.

The counts are of the pinned torch. Bytes are those that Inductor counts: what each kernel and each
library call reads and writes, as if no cache held anything. docs/scaling.md shows them.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastproj.augment import chain
from fastproj.loaders import crop
from fastproj.models.encoders import build_encoder
from fastproj.models.projector import build_projector
from fastproj.objective import build_objective
from fastproj.training.learner import Learner

try:
    from tests.support.kernels import Counted, count
except ImportError as error:  # Inductor's inner names, which other versions have not
    pytest.skip(f"for the pinned torch: {error}", allow_module_level=True)

TORCH = "2.15."
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.__version__.startswith(TORCH), reason=f"counts of torch {TORCH}x"),
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


def crops(batch: int, side: int) -> Counted:
    """Two crops to 224 pixels of ``batch`` images of ``side`` pixels."""
    with FakeTensorMode():
        images = torch.empty(batch, side, side, 3, dtype=torch.uint8).movedim(-1, 1)
        boxes = torch.empty(2, batch, 4, dtype=torch.int64)
        return count(
            lambda i, b: crop.crop_batch(i, b, 224, torch.float16), images, boxes,
            options=crop.OPTIONS,
        )  # fmt: skip


def learner(stem: str, side: int, pool: nn.Module | None = None) -> Counted:
    """ResNet-18, projector, SimCLR's loss and online probe, forward and backward, in bfloat16."""
    with FakeTensorMode():
        encoder = build_encoder("resnet18", stem)
        if pool is not None:
            encoder.maxpool = pool
        projector = build_projector("mlp", 512, hidden=512, out=128)
        model = Learner(encoder, projector, build_objective("simclr", 128), 100)
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


# Kernels generated, library calls, bytes.
COUNTS: dict[str, tuple[Callable[..., Counted], tuple[Any, ...], tuple[int, int, int]]] = {
    "256 photographs of 400 px, two crops of 224": (crops, (256, 400), (5, 2, 2_467_790_848)),
    "1,024 squares of 160 px, two crops of 224": (crops, (1024, 160), (5, 2, 4_283_564_032)),
    "views, 32 px": (views, (32,), (3, 0, 30_041_624)),
    "views, 224 px": (views, (224,), (3, 0, 1_464_493_592)),
    "ResNet-18, 32 px": (learner, ("cifar", 32), (273, 51, 15_313_974_548)),
    "ResNet-18, 224 px": (learner, ("imagenet", 224), (272, 53, 52_842_460_436)),
    "ResNet-18, 224 px, max-pool decomposed": (
        learner, ("imagenet", 224, nn.MaxPool2d(3, 2, padding=1)), (276, 51, 57_567_861_780),
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.soak) if n.startswith("ResNet") else n for n in COUNTS],
)
def test_no_more_kernels_and_bytes_than_were_committed(name: str) -> None:
    make, given, (kernels, library, size) = COUNTS[name]
    found = make(*given)
    assert found.kernels <= kernels and found.library <= library and found.bytes <= size, found[:3]
    row = f"| {name} | {kernels} | {library} | {size / 1e9:.2f} GB |"
    assert f"\n{row}\n" in PAGE
    assert ("max_pool_backward" in found.code) == (name == "ResNet-18, 224 px")
    assert ("tl.atomic_add" in found.code) == name.endswith("decomposed")
    assert ("div_rn" in found.code) == (make is crops)  # rounded as eager divisions are
