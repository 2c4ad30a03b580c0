"""Workarounds for AOTAutograd, Inductor and its CUDA graphs, and where Inductor finds things."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch._guards


@contextlib.contextmanager
def cached_region_schemas() -> Iterator[None]:
    """Find out once for each region which of its inputs it writes to.

    Without this, AOTAutograd traces the region twice for each of its calls
    (``gen_schema`` of ``torch.ops.higher_order.invoke_subgraph``, in
    torch/_higher_order_ops/invoke_subgraph.py), which took 1.8 s for the twelve blocks of a base
    encoder.

    Affects torch 2.11. Torch 2.13 keeps the schemas itself
    (``InvokeSubgraphCache.get_functionalize_schema_entry`` in torch/_guards.py), so this does
    nothing there. We know of no upstream issue.
    """
    if torch_caches_region_schemas():
        yield
        return
    # Any, because mypy does not allow replacing a method of an operator.
    region: Any = torch.ops.higher_order.invoke_subgraph
    make, own = region.gen_schema, vars(region).get("gen_schema")
    # Keyed by identity, as in torch 2.13; holding the subgraph keeps its id from being reused.
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


def torch_caches_region_schemas() -> bool:
    """Return whether this torch keeps the schemas of regions itself."""
    return hasattr(torch._guards.InvokeSubgraphCache, "get_functionalize_schema_entry")


def reset_failed_cuda_graph_warm_up() -> None:
    """Make CUDA graphs usable again after a call failed while it warmed up for one.

    The failed warm-up node stays the manager's current node and has no outputs. The next call of
    any CUDA graph in the process then fails an assertion that there are as many outputs as stack
    traces of outputs.

    Affects torch before 2.12 (``CUDAWarmupNode`` in torch/_inductor/cudagraph_trees.py;
    pytorch/pytorch#175562).
    """
    if not torch.cuda.is_available():
        return
    from torch._inductor import cudagraph_trees

    device = torch.cuda.current_device()
    manager = cudagraph_trees.get_manager(device, create_if_none_exists=False)
    node = None if manager is None else manager.current_node
    if isinstance(node, cudagraph_trees.CUDAWarmupNode) and node.stack_traces is not None:
        node.stack_traces = node.stack_traces[: len(node.tensor_weakrefs)]


def free_matmul_workspaces() -> None:
    """Free the workspaces that cuBLAS keeps for the next matmul.

    Recording a CUDA graph frees them (``clear_cublas_manager`` in
    torch/_inductor/cudagraph_trees.py of torch 2.11 to 2.13), so that memory which was taken before
    would be missing afterwards.
    """
    if torch.cuda.is_initialized():
        torch._C._cuda_clearCublasWorkspaces()


def inductor_folder() -> str:
    """Return where Inductor keeps compiled code when ``TORCHINDUCTOR_CACHE_DIR`` is not set.

    In torch 2.11 to 2.13: ``default_cache_dir`` in torch/_inductor/runtime/cache_dir_utils.py.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    return default_cache_dir()


def cpp_compiler() -> str:
    """Return the C++ compiler that Inductor calls; it raises an error that says what it looked for.

    In torch 2.11 to 2.13: ``get_cpp_compiler`` in torch/_inductor/cpp_builder.py.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler

    return get_cpp_compiler()


def start_compile_workers() -> None:
    """Start the processes in which Inductor compiles kernels, with the right ``ptxas``.

    The processes take seconds to import torch; until they are ready, this process compiles. The
    processes assemble with torch's own ``ptxas``, this process with Triton's until it compiles a
    kernel of Inductor. The version of ``ptxas`` is part of the key of Triton's cache and is looked
    up once, so a process that found its graph in the cache did not find the kernels there.

    Affects torch 2.11 to 2.13 (``_set_triton_ptxas_path`` in
    torch/_inductor/runtime/compile_tasks.py). We know of no upstream issue.
    """
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.runtime import compile_tasks

    use_ptxas_of_torch = getattr(compile_tasks, "_set_triton_ptxas_path", None)
    if use_ptxas_of_torch is not None:
        use_ptxas_of_torch()
    AsyncCompile.wakeup()
