"""The max-pool of a compiled ImageNet stem: the library's kernels, and their bits."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.fx import GraphModule

from fastproj.models.encoders import build_encoder
from fastproj.models.pool import MaxPool2d, _max_pool


def image(memory: torch.memory_format) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    # Few values, so that windows hold equal ones.
    x = torch.randint(0, 4, (2, 3, 9, 12), generator=generator).float()
    return x.contiguous(memory_format=memory).requires_grad_()


def passes(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and the gradient of a sum with other weights everywhere."""
    out = module(x)
    (out * torch.arange(out.numel()).view_as(out)).sum().backward()
    assert x.grad is not None
    return out, x.grad


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_compiled_it_has_torchs_bits_and_keeps_the_library_kernels(
    memory: torch.memory_format,
) -> None:
    called: list[str] = []

    def record(graph: GraphModule, inputs: Any) -> GraphModule:
        called.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    ours = MaxPool2d(3, 2, padding=1)
    ours.compile(backend=aot_autograd(fw_compiler=record, bw_compiler=record))
    out, gradient = passes(ours, image(memory))
    wanted, wanted_gradient = passes(nn.MaxPool2d(3, 2, padding=1), image(memory))
    assert torch.equal(out, wanted) and torch.equal(gradient, wanted_gradient)
    assert out.stride() == wanted.stride() and gradient.stride() == wanted_gradient.stride()
    assert {"fastproj.max_pool.default", "fastproj.max_pool_backward.default"} <= {*called}
    assert not [name for name in called if "max_pool2d" in name]


def test_the_operator_is_as_it_says() -> None:
    torch.library.opcheck(_max_pool, (image(torch.channels_last), 3, 2, 1))


@pytest.mark.parametrize("name", ["resnet18", "resnet_small"])
def test_an_imagenet_stem_has_it_and_is_the_same_eager(name: str) -> None:
    encoder = build_encoder(name, "imagenet")
    assert isinstance(encoder.maxpool, MaxPool2d)
    x = image(torch.contiguous_format).detach()
    assert torch.equal(encoder.maxpool(x), nn.MaxPool2d(3, 2, padding=1)(x))
    assert not [key for key in encoder.state_dict() if "maxpool" in key]
    assert isinstance(build_encoder(name, "cifar").maxpool, nn.Identity)
