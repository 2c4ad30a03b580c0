"""The backend that models are compiled with: Inductor, behind what it needs and does not do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch._guards
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from pytest_int8bench.fused import graph
from pytest_int8bench.fused.nodes import begins_aligned, value_of


class FusingInductor(torch._TorchCompileInductorWrapper):
    """Backend of ``torch.compile``: :func:`~pytest_int8bench.fused.graph.fuse`, then Inductor.

    Args:
        mode: the mode of ``torch.compile``.
        dynamic: as in ``torch.compile``.
        inline: hand kernels to Inductor where it can launch them itself
            (:mod:`~pytest_int8bench.fused.inlining`).
    """

    def __init__(self, mode: str, dynamic: bool | None, inline: bool = False) -> None:
        super().__init__(mode, None, dynamic)  # type: ignore[no-untyped-call]
        self._inline = inline

    def __call__(self, model_: Any, inputs_: Any, **kwargs: Any) -> Any:
        graph.fuse(model_, inline=self._inline)
        _check_regions(model_)
        _check_alignment(model_)
        with _schemas_kept():
            return super().__call__(model_, inputs_, **kwargs)  # type: ignore[no-untyped-call]


def load_inductor(device_type: str) -> None:
    """Load Inductor, and for a GPU let the processes start in which it compiles kernels. These take
    seconds to import torch; what is needed until they have is compiled in this process."""
    import torch._inductor.compile_fx  # noqa: F401  of which torch.compile puts off the import
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.runtime import compile_tasks

    if device_type == "cuda":
        # Those assemble with torch's own ptxas, and this process with Triton's until it compiles a
        # kernel of Inductor. The version is part of the key of Triton's cache, and asked for once:
        # a process that found its graph in the cache found no kernel there.
        use_ptxas_of_torch = getattr(compile_tasks, "_set_triton_ptxas_path", None)
        if use_ptxas_of_torch is not None:
            use_ptxas_of_torch()
        AsyncCompile.wakeup()


def _check_regions(module: fx.GraphModule) -> None:
    """Raise if a region returns a view from the middle of a tensor: Inductor adds its offset twice
    and reads what lies behind (``InvokeSubgraph.create`` of torch 2.13)."""
    for part in module.modules():
        if part is module or not isinstance(part, fx.GraphModule):
            continue
        inputs = [value_of(node) for node in part.graph.find_nodes(op="placeholder")]
        mode = next((value.fake_mode for value in inputs if isinstance(value, FakeTensor)), None)
        if mode is None:
            continue
        FakeTensorProp(part, mode).propagate_dont_convert_inputs(*inputs)
        for node in part.graph.output_node().all_input_nodes:
            value = node.meta.get("val")
            if isinstance(value, torch.Tensor) and value.storage_offset() != 0:
                raise RuntimeError("a block returns a view from the middle of a tensor")


def _check_alignment(module: fx.GraphModule) -> None:
    """Raise if a region is given memory at aligned addresses first and at others later: it is
    compiled for the first call, and for what its addresses can be divided by."""
    first: dict[Any, list[bool]] = {}
    for part in module.modules():
        if not isinstance(part, fx.GraphModule):
            continue
        region = torch.ops.higher_order.invoke_subgraph
        for node in part.graph.find_nodes(op="call_function", target=region):
            aligned = [begins_aligned(operand) for operand in node.args[2:]]
            before = first.setdefault(node.args[1], aligned)
            if any(was and not now for was, now in zip(before, aligned, strict=False)):
                raise RuntimeError("blocks are given memory at addresses of different alignment")


@contextlib.contextmanager
def _schemas_kept() -> Iterator[None]:
    """Let AOTAutograd look once at what a region writes to. Some versions of torch (2.11) trace the
    region for that twice at each of its calls, which took 1.8 s for the twelve blocks of a base
    encoder."""
    if _torch_keeps_schemas():
        yield
        return
    # Typed as anything: to mypy, a method of an operator is not to be replaced.
    region: Any = torch.ops.higher_order.invoke_subgraph
    make, own = region.gen_schema, vars(region).get("gen_schema")
    # By identity, as torch 2.13 does it. The region is held, so that nothing else gets its address.
    kept: dict[tuple[Any, ...], tuple[Any, Any]] = {}

    def gen_schema(subgraph: Any, identifier: Any, *operands: Any) -> Any:
        key = (id(subgraph), identifier, *map(type, operands))
        if key not in kept:
            kept[key] = subgraph, make(subgraph, identifier, *operands)
        return kept[key][1]

    region.gen_schema = gen_schema
    try:
        yield
    finally:
        if own is None:
            del region.gen_schema
        else:
            region.gen_schema = own


def _torch_keeps_schemas() -> bool:
    return hasattr(torch._guards.InvokeSubgraphCache, "get_functionalize_schema_entry")
