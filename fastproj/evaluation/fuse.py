"""A frozen encoder's convolutions in bfloat16, with their ReLUs and sums in the same operation.

Under autocast alone torch converts the weights at every call, and reads and writes each activation
once more for a ReLU or a sum. oneDNN does both while it writes a convolution's output, which torch
uses under ``torch.compile`` only.
"""

import operator
from collections.abc import Mapping
from typing import TypeGuard

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn import functional

SUMS = {operator.add, operator.iadd, torch.add}
RELUS = {functional.relu, torch.relu, torch.relu_, "relu", "relu_"}


class Convolution(nn.Module):
    """``conv`` in bfloat16 on a CPU, its weight laid out by oneDNN for inputs of ``shape``.

    Gradients do not pass.
    """

    def __init__(self, conv: nn.Conv2d, shape: torch.Size) -> None:
        super().__init__()
        padding = (0, 0) if conv.padding == "valid" else conv.padding
        self.settings = [*padding], [*conv.stride], [*conv.dilation], conv.groups
        self.bias = None if conv.bias is None else conv.bias.detach().bfloat16()
        self.weight = torch.ops.mkldnn._reorder_convolution_weight(
            conv.weight.detach().bfloat16(), *self.settings, [*shape]
        )

    def forward(
        self, x: Tensor, added: Tensor | None = None, in_place: bool = False, relu: bool = False
    ) -> Tensor:
        """The convolution of ``x`` (N, c, h, w), bfloat16; ``in_place``: ``added`` gets the sum."""
        x, onednn = _bfloat16(x), torch.ops.mkldnn
        given = self.weight, self.bias, *self.settings
        if added is None:
            return onednn._convolution_pointwise(x, *given, "relu" if relu else "none", [], "")
        after: tuple[object, ...] = ("add", 1.0, "relu" if relu else None, [], "")
        if in_place:
            return onednn._convolution_pointwise_.binary(added, x, *given, *after)
        return onednn._convolution_pointwise.binary(x, _bfloat16(added), *given, *after)


def fused(module: nn.Module, images: Tensor) -> nn.Module:
    """``module``, in eval mode, with its convolutions as ``Convolution``; for evaluation alone.

    ``images`` (N, c, h, w) are like those to come. Batch norm should be ``folded`` before. What is
    not a convolution computes as it did. A module that cannot be traced is returned as it is, and
    so is every one where oneDNN has no bfloat16.
    """
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return module
    try:
        traced = fx.symbolic_trace(module)
        with torch.no_grad():  # two, so that what is added to every image has another shape
            ShapeProp(traced).propagate(images[:1].expand(2, -1, -1, -1))
    except Exception:  # data-dependent control flow, and whatever a forward pass does with a proxy
        return module
    graph, parts = traced.graph, dict(traced.named_modules())
    for node in list(graph.nodes):
        part = parts.get(str(node.target)) if node.op == "call_module" else None
        if type(part) is nn.Identity:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif type(part) is nn.Conv2d and part.padding_mode == "zeros" and part.padding != "same":
            shape = node.args[0].meta["tensor_meta"].shape
            parts[str(node.target)] = Convolution(part, torch.Size((len(images), *shape[1:])))
            traced.set_submodule(str(node.target), parts[str(node.target)])
    for node in list(graph.nodes):
        _take_sum(node, parts)
        _take_relu(node, parts)
    traced.recompile()
    return traced


def _take_sum(node: fx.Node, parts: Mapping[str, nn.Module]) -> None:
    """Let a convolution do the sum ``node`` of its output and another tensor of that shape.

    The other is overwritten if it is a convolution's output too, which nothing but convolutions
    reads, and none of them afterwards.
    """
    if node.target not in SUMS or len(node.args) != 2 or node.kwargs:
        return
    for conv, other in (node.args, node.args[::-1]):
        if not _convolved(conv, parts) or len(conv.users) != 1 or conv.kwargs:
            continue
        if isinstance(other, fx.Node) and _shape(conv) == _shape(other):
            read = other in conv.args or any(
                node < user or not (user is node or _convolved(user, parts)) for user in other.users
            )
            with node.graph.inserting_before(node):
                found = node.graph.call_module(str(conv.target), conv.args)
            found.kwargs = {"added": other, "in_place": _convolved(other, parts) and not read}
            found.meta = node.meta
            node.replace_all_uses_with(found)
            node.graph.erase_node(node)
            node.graph.erase_node(conv)
            return


def _take_relu(node: fx.Node, parts: Mapping[str, nn.Module]) -> None:
    """Let a convolution do the ReLU ``node``, if nothing else reads its output."""
    module = type(parts.get(str(node.target))) if node.op == "call_module" else None
    if module is not nn.ReLU and node.target not in RELUS:
        return
    conv = node.args[0]
    if _convolved(conv, parts) and len(conv.users) == 1:
        conv.kwargs = {**conv.kwargs, "relu": True}
        node.replace_all_uses_with(conv)
        node.graph.erase_node(node)


def _convolved(node: object, parts: Mapping[str, nn.Module]) -> TypeGuard[fx.Node]:
    return (
        isinstance(node, fx.Node)
        and node.op == "call_module"
        and type(parts[str(node.target)]) is Convolution
    )


def _shape(node: fx.Node) -> torch.Size | None:
    return getattr(node.meta.get("tensor_meta"), "shape", None)


def _bfloat16(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16, memory_format=torch.channels_last)
