"""What Inductor would run for an H100, counted where there is none.

A function is traced on tensors without data, its graphs are lowered for an H100's properties and
the code for it is generated, but neither compiled nor run.
"""

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch._dynamo.device_interface import CudaInterface
from torch._guards import tracing
from torch._inductor import config as inductor
from torch._inductor.compile_fx import (
    _recursive_post_grad_passes,
    _recursive_record_original_output_strides,
    compile_fx,
)
from torch._inductor.debug import DebugContext
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map
from torch.utils._triton import has_triton

GPU = torch.device("cuda", 0)
H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132,
    total_memory=80 * 2**30, max_threads_per_multi_processor=2048, max_threads_per_block=1024,
    regs_per_multiprocessor=65536, warp_size=32, L2_cache_size=50 * 2**20, gcnArchName="",
    shared_memory_per_block=48 * 2**10, shared_memory_per_block_optin=227 * 2**10,
    shared_memory_per_multiprocessor=228 * 2**10, is_integrated=0, is_multi_gpu_board=0,
)  # fmt: skip


class Counted(NamedTuple):
    """Of all graphs together: generated kernels launched, library calls, bytes read and written."""

    kernels: int
    library: int
    bytes: int
    code: str


@contextmanager
def an_h100() -> Iterator[None]:
    """Inductor asks for a device's properties, and Triton for its driver."""
    said: dict[str, Any] = {
        "is_available": True, "current_device": 0, "device_count": 1, "is_triton_capable": True,
        "get_compute_capability": 90, "raise_if_triton_unavailable": None,
        "get_device_properties": H100,
    }  # fmt: skip
    with ExitStack() as stack:
        for name, answer in said.items():
            always = staticmethod(lambda *_, answer=answer: answer)
            stack.enter_context(mock.patch.object(CudaInterface, name, always))
        for owner, name, answer in (
            (CudaInterface.Worker, "get_device_properties", H100),
            (CudaInterface.Worker, "current_device", 0),
            (torch.cuda, "get_device_properties", H100),
            (torch.cuda, "get_device_capability", (9, 0)),
            (torch.cuda, "is_available", True),
            (torch.cuda, "current_device", 0),
            (torch.cuda, "device_count", 1),
            (torch.utils._triton, "triton_hash_with_backend", "none"),
        ):
            stack.enter_context(
                mock.patch.object(owner, name, lambda *_, answer=answer, **__: answer)
            )
        has_triton.cache_clear()  # other tests have asked on the real machine
        stack.callback(has_triton.cache_clear)
        yield


def count(
    function: Callable[..., Any],
    *inputs: Any,
    backward: bool = False,
    options: dict[str, Any] | None = None,
    after: Sequence[tuple[Any, ...]] = (),
) -> Counted:
    """Compile ``function`` of ``inputs``, tensors without data on a CPU, as if for an H100.

    ``backward``: the result is a scalar, and its backward pass is compiled as well. ``options``:
    Inductor's, as ``torch.compile`` takes them. ``after``: inputs of other shapes that come first
    and are not counted; what is counted is the code for shapes that change, and ``inputs`` are
    those whose bytes are counted.
    """
    found: list[tuple[int, str]] = []

    def lower(graph: GraphModule, example: list[Any], **_: Any) -> Callable[..., Any]:
        with _disable_current_modes():  # two modes of tensors without data do not mix
            found.append(_lowered(graph, example))
        return graph

    def backend(graph: GraphModule, example: list[Any]) -> Callable[..., Any]:
        return compile_fx(graph, example, inner_compile=lower)

    torch.compiler.reset()
    with inductor.patch(options or {}):
        dynamic = None if after else False
        compiled = torch.compile(function, backend=backend, dynamic=dynamic, fullgraph=True)
        for others in after:
            compiled(*others)
        found.clear()
        result = compiled(*inputs)
        if backward:
            result.backward()
    torch.compiler.reset()
    code = "\n".join(text for _, text in found)
    return Counted(
        len(re.findall(r"^ +triton_\w+\.run\(", code, re.M)),
        len(re.findall(r"^ +(?:\w+ = )?(?:extern_kernels|torch\.ops|aten)\.[\w.]+\(", code, re.M)),
        sum(bytes_ for bytes_, _ in found),
        code,
    )


def _lowered(graph: GraphModule, example: list[Any]) -> tuple[int, str]:
    """Bytes and code of one graph, moved to the GPU."""
    sizes = [x.node.shape_env for x in example if isinstance(x, torch.SymInt)]
    shapes = sizes[0] if sizes else None
    mode = FakeTensorMode(shape_env=shapes)

    def moved(x: Any) -> Any:
        if isinstance(x, Tensor):
            with mode:
                return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=GPU)
        return GPU if isinstance(x, torch.device) and x.type == "cpu" else x

    there = copy.deepcopy(graph)
    for node in there.graph.nodes:
        node.args, node.kwargs = tree_map(moved, node.args), tree_map(moved, node.kwargs)
    there.recompile()
    inputs = [moved(x) for x in example]
    FakeTensorProp(there, mode).propagate_dont_convert_inputs(*inputs)
    # Inductor's rewriting would find the mode of the traced tensors in the tracing context.
    with tracing(None), an_h100(), V.set_fake_mode(mode), V.set_debug_handler(DebugContext()):
        _recursive_record_original_output_strides(there)
        _recursive_post_grad_passes(there, is_inference=False)
        lowering = GraphLowering(there, example_inputs=inputs, shape_env=shapes)
        with V.set_graph_handler(lowering):
            lowering.run(*inputs)
            code = lowering.codegen()[0]
            return lowering.count_bytes()[0], getattr(code, "value", code)
