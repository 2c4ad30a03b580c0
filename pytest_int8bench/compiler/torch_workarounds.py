"""Workarounds for bugs and costs of torch, and the private names of torch that the compiler needs.

Each docstring names the problem, the versions of torch that have it, and the upstream issue or the
place in torch's source. Delete a workaround when the oldest supported torch no longer needs it.

Two things stand elsewhere, because they configure or observe and do not patch: the settings that
:mod:`.compiled_model` and :mod:`.cache` take from ``torch._dynamo.config`` and
``torch._functorch.config``, and the counters that they read in ``torch._dynamo.utils``.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import itertools
import logging
import sys
import types
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch._dynamo
import torch._guards
import torch.amp.autocast_mode
import torch.nn.attention
from torch import fx
from torch._ops import HigherOrderOperator as HigherOrderOperator
from torch._ops import OpOverload as OpOverload
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor

#: What ``torch.compile(backend="inductor")`` calls. Torch 2.11 to 2.13 has no public class to
#: extend (torch/__init__.py).
InductorBackend = torch._TorchCompileInductorWrapper
#: The function that Dynamo puts into a graph where ``torch.no_grad`` begins or ends, in torch 2.11
#: to 2.13 (``GradModeVariable`` in torch/_dynamo/variables/ctx_manager.py).
SET_GRAD_ENABLED = torch._C._set_grad_enabled
#: The function that Dynamo puts into a graph where a choice of attention backends begins or ends,
#: and those of autocast, in torch 2.11 to 2.15 (torch/_dynamo/variables/ctx_manager.py).
CHOOSE_ATTENTION = torch.nn.attention._sdpa_kernel
SETTING_CALLS = (
    torch.amp.autocast_mode._enter_autocast,
    torch.amp.autocast_mode._exit_autocast,
    torch.nn.attention._backend_from_string,
    CHOOSE_ATTENTION,
)

#: Objects allocated between two garbage collections while a model compiles.
COLLECTION_THRESHOLD = 20_000


# -- what watches a model ----------------------------------------------------------------------


def active_watchers() -> list[str]:
    """Return what torch calls around each operator of this thread: profilers and modes, such as
    that of a counter of operations.

    Torch 2.11 to 2.13 has no public way to list them (torch/_C/_autograd.pyi, torch/overrides.py,
    torch/utils/_python_dispatch.py), and none to pause a profiler that another owns.
    """
    from torch.overrides import _get_current_function_mode_stack
    from torch.utils._device import DeviceContext
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    modes = [*_get_current_function_mode_stack(), *_get_current_dispatch_mode_stack()]
    # That of torch.set_default_device is a setting of the model's process.
    found = [type(mode).__name__ for mode in modes if not isinstance(mode, DeviceContext)]
    return (["torch.profiler"] if torch._C._autograd._profiler_enabled() else []) + found


def version_of(tensor: torch.Tensor) -> int:
    """Return how often a tensor, or a view of it, was written to.

    Autograd's notes name this counter; torch 2.11 to 2.13 has no public way to read it. Inference
    tensors have none.
    """
    return 0 if tensor.is_inference() else int(tensor._version)


def made_in_inference_mode(tensor: torch.Tensor) -> bool:
    """Return whether a tensor was made in inference mode, so that autograd refuses it.

    Setting ``data``, as ``Module.to`` does, makes ``is_inference()`` false, but gives the tensor no
    version counter (c10/core/TensorImpl.cpp, ``shallow_copy_from``, torch 2.11 to 2.13).
    """
    if tensor.is_inference():
        return True
    try:
        _ = tensor._version
    except RuntimeError:
        return True
    return False


# -- Dynamo -------------------------------------------------------------------------------------


def register_tensor_types_with_einops() -> None:
    """Call einops once for each type of tensor, so that the second call does not recompile.

    Einops records the backend of each type of tensor on its first call (``_type2backend`` in
    einops/_backends.py). A Dynamo that traces into einops guards on that record, sees it change
    during the first call, and compiles again at the second.

    Affects torch 2.13, which prepares einops for ``torch.Tensor``, but not for ``nn.Parameter``;
    torch 2.11 does not trace into einops. We know of no upstream issue.
    """
    einops = sys.modules.get("einops")
    if einops is not None:
        for tensor in (torch.empty(1), torch.nn.Parameter(torch.empty(1))):
            einops.rearrange(tensor, "i -> i")


def set_region_reuse(allowed: bool) -> None:
    """Turn Dynamo's reuse of regions without tracing on or off, for the whole process.

    Dynamo's reuse mixes up arguments that are passed by name in one call and by position in
    another, or by name in another order, and so computes wrong numbers silently. It also raises at
    the ninth kind of block (``max_reuse_entries``). Functions that users marked with a
    ``reuse_hash_fn`` keep their reuse.

    Affects torch 2.13 (``has_reuse_entries`` and ``is_reuse_eligible`` in
    torch/_dynamo/variables/invoke_subgraph.py); torch 2.11 traces every call. We know of no
    upstream issue.
    """
    for name, (original, refuses) in _reuse_functions().items():
        setattr(_invoke_subgraph_module(), name, original if allowed else refuses)


@functools.cache
def _invoke_subgraph_module() -> Any:
    return importlib.import_module("torch._dynamo.variables.invoke_subgraph")


@functools.cache
def _reuse_functions() -> dict[str, tuple[Any, Any]]:
    """Return torch's functions that decide about reuse by name, each with a replacement that
    refuses it; none for a torch that traces every call."""
    try:
        module = _invoke_subgraph_module()
    except ImportError:
        return {}

    def refusing(original: Any) -> Any:
        def refuses(*args: Any, has_reuse_hash_fn: bool = False) -> bool:
            return has_reuse_hash_fn and original(*args, has_reuse_hash_fn=True)

        return refuses

    originals = {name: getattr(module, name) for name in ("has_reuse_entries", "is_reuse_eligible")}
    return {name: (original, refusing(original)) for name, original in originals.items()}


def without_compilation(model: torch.nn.Module) -> torch.nn.Module:
    """Take ``torch.compile`` off ``model`` and the modules and methods in it, in place.

    Return the module that was compiled, which may be another one than ``model``.
    ``torch.compiler.disable`` is kept. torch has no public way to undo a compilation.

    Affects torch 2.11 to 2.13 (``OptimizedModule``, ``innermost_fn`` and ``DisableContext`` in
    torch/_dynamo/eval_frame.py; ``Module.compile`` in torch/nn/modules/module.py). We know of no
    upstream issue.

    Raises:
        ValueError: if a compiled module has hooks of its own, which would be lost.
    """
    model = _compiled_module(model)
    for module in list(model.modules()):
        if module._compiled_call_impl is not None:
            module._compiled_call_impl = None
        for name, child in list(module._modules.items()):
            if child is not None:
                module._modules[name] = _compiled_module(child)
        for name, value in list(vars(module).items()):
            if isinstance(value, types.FunctionType) and (inner := _innermost(value)) is not value:
                if getattr(inner, "__self__", None) is module:
                    del vars(module)[name]
                if getattr(module, name, None) != inner:
                    vars(module)[name] = inner
    return model


def _compiled_module(module: torch.nn.Module) -> torch.nn.Module:
    while isinstance(module, torch._dynamo.OptimizedModule):
        wrapper, module = module, module._orig_mod
        if any(value for name, value in vars(wrapper).items() if name.endswith("_hooks")):
            raise ValueError(f"a compiled {type(module).__name__} has hooks")
        if _is_disabled(wrapper.forward):
            module.forward = torch.compiler.disable(module.forward)
    return module


def _innermost(function: Any) -> Any:
    """Return what ``torch.compile`` was given; attributes that ``functools.wraps`` copied to
    another function do not count."""
    while getattr(function, "_torchdynamo_wrapper_id", None) == id(function):
        if _is_disabled(function):
            break
        function = function._torchdynamo_orig_callable
    return function


def _is_disabled(function: Any) -> bool:
    return bool(getattr(function, "_torchdynamo_disable", False))


@contextlib.contextmanager
def hide_metrics_error() -> Iterator[None]:
    """Keep a harmless error of torch's compile metrics out of the log.

    Torch sorts the functions in ``torch._dynamo.config.ignore_logging_functions`` to write its
    configuration into the metrics, and logs a ``TypeError``, because functions have no order.

    Affects torch 2.11 (logger ``torch._dynamo.metrics_context``, torch/_dynamo/metrics_context.py).
    We know of no upstream issue.
    """
    logger = logging.getLogger("torch._dynamo.metrics_context")

    def is_another(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        return not (isinstance(error, TypeError) and "'function' and 'function'" in str(error))

    logger.addFilter(is_another)
    try:
        yield
    finally:
        logger.removeFilter(is_another)


@contextlib.contextmanager
def hide_trace_records() -> Iterator[None]:
    """Keep pytest from capturing torch's structured trace, and torch from writing it for nobody.

    The logger is at level DEBUG and does not propagate; torch formats records, graphs included, as
    soon as it has a handler. Pytest 9.1 adds those that capture logs to loggers that do not
    propagate (``catching_logs`` in _pytest/logging.py), so that a test that fails after it compiled
    is reported with a hundred empty lines and more. Handlers of torch (``TORCH_TRACE``) and of
    users stay.

    Affects torch 2.11 to 2.15 (``trace_structured`` in torch/_logging/_internal.py).
    """
    logger = logging.getLogger("torch.__trace")
    hidden = [handler for handler in logger.handlers if _is_of_pytest(handler)]
    for handler in hidden:
        logger.removeHandler(handler)
    try:
        yield
    finally:
        for handler in hidden:
            logger.addHandler(handler)


def _is_of_pytest(handler: logging.Handler) -> bool:
    return type(handler).__module__.partition(".")[0] == "_pytest"


@contextlib.contextmanager
def hide_compiler_warnings(model: torch.nn.Module) -> Iterator[None]:
    """Keep warnings of torch that are not about the user's model from the user, while it compiles.

    - Dynamo tries to trace ``_thread.get_ident``, which the ``repr`` of a dataclass calls in an
      argument of a logger, and does without (torch 2.14 and 2.15, ``SkipFunctionVariable`` in
      torch/_dynamo/variables/functions.py).
    - AOTAutograd's cache asks authors of tensor subclasses, here those of torchao, for a method
      (torch 2.13 to 2.15, ``_reduce_tensor_subclass`` in
      torch/_functorch/_aot_autograd/autograd_cache.py).
    - Autotuning calls a deprecated method of tensors (torch 2.11, ``select_algorithm.py`` in
      torch/_inductor).
    - Each attention backend says why it does not take the inputs (all versions, sdp_utils.cpp in
      aten/src/ATen/native/transformers/); where none does, an error says so.
    """
    of_torchao = {
        type(tensor).__name__
        for tensor in itertools.chain(model.parameters(), model.buffers())
        if type(tensor).__module__.partition(".")[0] == "torchao"
    }
    patterns = [
        r"Dynamo does not know how to trace the builtin `_thread\.get_ident",
        *(rf"{name} does not implement _stable_hash_for_caching" for name in sorted(of_torchao)),
        r"(?s).*\(Triggered internally at \S*/sdp_utils",
    ]
    with warnings.catch_warnings():
        for pattern in patterns:
            warnings.filterwarnings("ignore", pattern, UserWarning)
        warnings.filterwarnings(
            "ignore", "TypedStorage is deprecated", UserWarning, r"torch\._inductor\."
        )
        yield


@contextlib.contextmanager
def infrequent_garbage_collection() -> Iterator[None]:
    """Collect garbage less often while a model compiles, still often enough to free GPU memory.

    The compiler allocates millions of objects that stay alive, and the collector visits each of
    them many times: with the threshold of Python 3.11, 700, this took 7 % of the first call.

    Affects every version of torch; Dynamo 2.15 raises the threshold of full collections itself
    (``deferred_full_gc`` in torch/_dynamo/utils.py), inside of this. A garbage collection that the
    user turned off, or made rarer than this, stays as it is.
    """
    before = gc.get_threshold()
    if 0 < before[0] < COLLECTION_THRESHOLD:  # 0 turns collection off
        gc.set_threshold(COLLECTION_THRESHOLD, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


# -- FP32 matmuls -------------------------------------------------------------------------------

_FP32_DEFAULTS = ("generic", "all"), ("cuda", "all"), ("mkldnn", "all")
_FP32_MATMULS = ("cuda", "matmul"), ("mkldnn", "matmul")


@contextlib.contextmanager
def float32_matmul_precision(precision: str) -> Iterator[None]:
    """Set the precision of FP32 matmuls as ``torch.set_float32_matmul_precision`` does, and put
    back on leaving what either of torch's two APIs had set.

    ``torch.get_float32_matmul_precision`` raises after a user has set a precision by the newer API
    (``torch.backends.cuda.matmul.fp32_precision``), and ``torch.set_float32_matmul_precision``
    turns ``"none"``, which follows the precision of the backend, into ``"ieee"``, which does not.
    The public getters of the newer API return the precision that a matmul follows, not whether it
    follows another, and mkldnn's public setter sets the precision of all backends.

    Affects torch 2.11 to 2.13 (``float32MatmulPrecision``, ``float32Precision`` and
    ``setFloat32MatmulPrecision`` in aten/src/ATen/Context.cpp; ``MkldnnModule`` in
    torch/backends/mkldnn/__init__.py). We know of no upstream issue.
    """
    get, put = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter
    defaults: dict[tuple[str, str], str] = {}
    matmuls: dict[tuple[str, str], str] = {}
    try:
        for key in _FP32_DEFAULTS:  # the generic one first, which the other two follow
            defaults[key] = get(*key)
            put(*key, "none")
        for key in _FP32_MATMULS:
            matmuls[key] = get(*key)
            put(*key, "ieee")  # which agrees with each precision of the older API
        older = torch.get_float32_matmul_precision()
    finally:
        for key, value in (defaults | matmuls).items():
            put(*key, value)
    try:
        torch.set_float32_matmul_precision(precision)
        yield
    finally:
        torch.set_float32_matmul_precision(older)
        for key, value in matmuls.items():
            put(*key, value)


# -- AOTAutograd --------------------------------------------------------------------------------


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


# -- CUDA graphs --------------------------------------------------------------------------------


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


# -- Triton kernels in graphs -------------------------------------------------------------------

#: Torch keeps constants that a graph cannot hold in a table; this entry of it is empty.
_NO_CONSTANTS = 1 << 60


def register_triton_kernel(index: int, kernel: Any) -> None:
    """Make a kernel known to torch under a number that we choose.

    The key of AOTAutograd's cache contains this number but not the kernel's source, and torch
    numbers kernels in the order in which it meets them. Another process would miss what this one
    cached, or load it for a kernel whose source has changed.

    Affects torch 2.11 to 2.13 (``KernelSideTable`` in
    torch/_higher_order_ops/triton_kernel_wrap.py). We know of no upstream issue.
    """
    # Imported late, also below: this loads modules of torch that few sessions need.
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    kernel_side_table.id_to_kernel[index] = kernel
    kernel_side_table.constant_args.setdefault(_NO_CONSTANTS, {})


def insert_triton_call(
    graph: fx.Graph,
    index: int,
    programs: int,
    arguments: Mapping[str, Any],
    blocks: Mapping[str, Sequence[int]],
    written: Sequence[str],
) -> fx.Node:
    """Insert the node that ``torch.compile`` makes of a launch of a user's Triton kernel.

    The node stands for a kernel that first copies the tensors it writes; Inductor drops the copies,
    as nothing else reads the originals. The other kind of node does not name outputs: AOTAutograd
    parses the kernel to find them, each time it traces the launch.

    The public way to these nodes, ``wrap_triton``, drops launches with TMA descriptors in torch
    2.11 to 2.13 (see :mod:`.fusion.inline_triton`). We know of no upstream issue.

    Args:
        graph: where to insert the node.
        index: the number of the kernel (:func:`register_triton_kernel`).
        programs: how many programs to launch.
        arguments: all arguments of the kernel by name.
        blocks: shapes of the blocks of those tensors that the kernel addresses by TMA.
        written: names of the arguments that the kernel writes to.
    """
    from torch._higher_order_ops.triton_kernel_wrap import (
        create_tma_stable_metadata,
        triton_kernel_wrapper_functional,
    )

    return graph.call_function(
        triton_kernel_wrapper_functional,
        kwargs={
            "kernel_idx": index,
            "constant_args_idx": _NO_CONSTANTS,
            "grid": [(programs, 1, 1)],
            "tma_descriptor_metadata": {
                name: create_tma_stable_metadata(list[int | torch.SymInt](block))
                for name, block in blocks.items()
            },
            "kwargs": dict(arguments),
            "tensors_to_clone": list(written),
        },
    )
