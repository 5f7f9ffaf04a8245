"""Sums and ReLUs inside bfloat16 convolutions: the same features, in fewer operations."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fastproj.evaluation.fold import folded
from fastproj.evaluation.fuse import fused
from fastproj.models.encoders import build_encoder

pytestmark = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN has no bfloat16 here"
)


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def lively(module: nn.Module) -> nn.Module:
    """In eval mode, with batch norms that do something."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    return module.eval()


def away(module: nn.Module, x: Tensor, exact: Tensor) -> float:
    """The relative distance of what autocast to bfloat16 gives from ``exact``."""
    with torch.autocast("cpu", torch.bfloat16):
        return ((module(x).double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize(
    ("name", "stem", "relus", "sums", "in_place"),
    [
        ("resnet_small", "cifar", 9, 4, 4),
        # What the stem's max-pool gave is not overwritten: it is no convolution's output.
        ("resnet18", "imagenet", 17, 8, 7),
        ("resnet50", "imagenet", 49, 16, 16),
    ],
)
def test_fused_encoders_are_as_exact_as_bfloat16_is(
    name: str, stem: str, relus: int, sums: int, in_place: int
) -> None:
    plain = folded(lively(build_encoder(name, stem)))
    x = torch.randn(4, 3, 36, 36)
    quick, exact = fused(plain, x), plain.double()(x.double())
    assert away(quick, x, exact) < 1.1 * away(plain.float(), x, exact) < 0.02
    assert not any(isinstance(m, nn.Conv2d) for m in quick.modules())
    assert quick.code.count("relu = True") == relus
    assert quick.code.count("added = ") == sums
    assert quick.code.count("in_place = True") == in_place


class Joined(nn.Module):
    """Sums and ReLUs that must stay as they are, beside one sum that need not."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 3, padding=1)
        self.same = nn.Conv2d(8, 8, 3, padding=1)
        self.pooled = nn.Conv2d(3, 8, 1, padding="valid")
        self.grouped = nn.Conv2d(8, 8, 3, padding="same", groups=4)
        self.dropout, self.place = nn.Dropout(0.5), nn.Parameter(torch.randn(1, 8, 9, 9))
        self.mirrored = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.one(x), self.two(x)
        if self.kind == "sum":
            return torch.relu(a + b).mean((2, 3))
        if self.kind == "twice":  # both are read after the sum
            return (torch.relu(a + b) + a * b).mean((2, 3))
        if self.kind == "later":  # what is added is read again
            return ((self.same(torch.relu(a)) + b) * b).mean((2, 3))
        if self.kind == "alias":  # in eval mode dropout gives its input itself
            kept = self.dropout(b)
            return ((self.same(torch.relu(a)) + b) * kept).mean((2, 3))
        if self.kind == "every image":  # the same is added to each
            return (a + self.place).mean((2, 3))
        if self.kind == "before":  # the output of the first is read by the ReLU and by the sum
            return (functional.relu(a) + a).mean((2, 3))
        if self.kind == "input":  # a convolution of what is added to it
            return (self.same(a) + a).mean((2, 3))
        if self.kind == "shapes":  # one of the two is broadcast
            return (a + self.pooled(x.mean((2, 3), keepdim=True))).relu().mean((2, 3))
        if self.kind == "shared":
            return (self.same(torch.relu(self.same(a))) + self.same(b)).mean((2, 3))
        if self.kind == "scaled":
            return torch.add(a, b, alpha=3).mean((2, 3))
        if self.kind == "others":
            return self.mirrored(self.grouped(a)).relu().mean((2, 3))
        if self.kind == "constant":
            return (a + 1).mean((2, 3))
        return a.mean((2, 3)) if x.sum() > 0 else b.mean((2, 3))  # cannot be traced


SUMS = {"sum": (1, 1), "later": (1, 0), "alias": (1, 0), "input": (1, 0), "shared": (1, 1)}
"""Kind -> how many sums a convolution does, and how many of these in place."""
KINDS = (
    "sum", "twice", "later", "alias", "every image", "before", "input", "shapes", "shared",
    "scaled", "others", "constant", "branching",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_nothing_else_reads_is_fused(kind: str) -> None:
    plain = Joined(kind).eval()
    x = torch.randn(4, 3, 9, 9)
    quick, exact = fused(plain, x), plain.double()(x.double())
    plain.float()
    for _ in range(2):  # nothing of the first call is left in the second
        assert away(quick, x, exact) < max(0.005, 1.5 * away(plain, x, exact))
    if kind == "branching":
        assert quick is plain
    else:
        done = quick.code.count("added = "), quick.code.count("in_place = True")
        assert done == SUMS.get(kind, (0, 0))


def test_batches_and_sizes_may_differ_from_the_first() -> None:
    plain = Joined("sum").eval()
    quick = fused(plain, torch.randn(4, 3, 9, 9))
    for shape in ((1, 3, 9, 9), (7, 3, 9, 9), (2, 3, 16, 12)):
        x = torch.randn(shape)
        assert away(quick, x, plain(x).double()) < 0.005
