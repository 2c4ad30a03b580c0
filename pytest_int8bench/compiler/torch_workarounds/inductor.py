"""Workarounds for AOTAutograd, Inductor and CUDA graphs, and Inductor's folder and compiler."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch._guards


@contextlib.contextmanager
def cached_region_schemas() -> Iterator[None]:
    """Determine only once per region to which of its inputs it writes.

    Otherwise AOTAutograd traces a region twice for each of its calls (``gen_schema`` of
    ``torch.ops.higher_order.invoke_subgraph``, in torch/_higher_order_ops/invoke_subgraph.py),
    which took 1.8 s for the twelve blocks of a base encoder.

    Affects torch 2.11. Torch 2.13 caches the schemas
    (``InvokeSubgraphCache.get_functionalize_schema_entry`` in torch/_guards.py), so this does
    nothing there. We know of no upstream issue.
    """
    if torch_caches_region_schemas():
        yield
        return
    # mypy does not allow replacing a method of an operator, hence Any.
    region: Any = torch.ops.higher_order.invoke_subgraph
    make, own = region.gen_schema, vars(region).get("gen_schema")
    # Keyed by identity, as in torch 2.13. Values hold the subgraph so that its id is not reused.
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
    """Return whether this version of torch caches the schemas of regions."""
    return hasattr(torch._guards.InvokeSubgraphCache, "get_functionalize_schema_entry")


def reset_failed_cuda_graph_warm_up() -> None:
    """Make CUDA graphs usable again after a call failed during their warm-up.

    The failed warm-up node stays the manager's current node, without outputs. The next call of any
    CUDA graph in the process then fails an assertion that the numbers of outputs and of their stack
    traces are equal.

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

    Recording a CUDA graph also frees them (``clear_cublas_manager`` in
    torch/_inductor/cudagraph_trees.py of torch 2.11 to 2.13). A memory reading taken before the
    recording would count them, and one taken afterwards would not.
    """
    if torch.cuda.is_initialized():
        torch._C._cuda_clearCublasWorkspaces()


def inductor_folder() -> str:
    """Return the folder where Inductor keeps compiled code if ``TORCHINDUCTOR_CACHE_DIR`` is unset.

    In torch 2.11 to 2.13: ``default_cache_dir`` in torch/_inductor/runtime/cache_dir_utils.py.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    return default_cache_dir()


def cpp_compiler() -> str:
    """Return the C++ compiler that Inductor calls. If there is none, the error lists what it tried.

    In torch 2.11 to 2.13: ``get_cpp_compiler`` in torch/_inductor/cpp_builder.py.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler

    return get_cpp_compiler()


def start_compile_workers() -> None:
    """Start Inductor's compile workers, and use the same ``ptxas`` in this process as they do.

    The workers take seconds to import torch; until they are ready, this process compiles. They use
    torch's own ``ptxas``, while this process uses Triton's until it compiles one of Inductor's
    kernels. Triton looks up the version of ``ptxas`` only once and makes it part of its cache key,
    so a process that found its graph in the cache would not find the kernels.

    Affects torch 2.11 to 2.13 (``_set_triton_ptxas_path`` in
    torch/_inductor/runtime/compile_tasks.py). We know of no upstream issue.
    """
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.runtime import compile_tasks

    use_ptxas_of_torch = getattr(compile_tasks, "_set_triton_ptxas_path", None)
    if use_ptxas_of_torch is not None:
        use_ptxas_of_torch()
    AsyncCompile.wakeup()
