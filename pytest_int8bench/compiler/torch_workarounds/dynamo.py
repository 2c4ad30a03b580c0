"""Workarounds for Dynamo, and removal of ``torch.compile`` from a model."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
import torch._dynamo

#: Threshold of the garbage collector's youngest generation while a model compiles.
COLLECTION_THRESHOLD = 20_000


def register_tensor_types_with_einops() -> None:
    """Call einops once per tensor type, so that the model's second call does not recompile.

    On its first call with a type of tensor, einops records the type's backend (``_type2backend`` in
    einops/_backends.py). If Dynamo traces into einops, it guards on that record, which the first
    call changes, so that the second call recompiles.

    Affects torch 2.13, which prepares einops for ``torch.Tensor``, but not for ``nn.Parameter``;
    torch 2.11 does not trace into einops. We know of no upstream issue.
    """
    einops = sys.modules.get("einops")
    if einops is not None:
        for tensor in (torch.empty(1), torch.nn.Parameter(torch.empty(1))):
            einops.rearrange(tensor, "i -> i")


def set_region_reuse(allowed: bool) -> None:
    """Turn Dynamo's reuse of traced regions on or off, for the whole process.

    If a later call passes arguments by name instead of position, or by name in another order,
    Dynamo mixes them up and silently computes wrong numbers. It also raises an error at the ninth
    kind of block (``max_reuse_entries``). Reuse stays on for functions that users marked with a
    ``reuse_hash_fn``.

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
    """Return name -> function of torch that decides about reuse, and a replacement that refuses
    it. The result is empty if this torch traces every call."""
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
    """Undo ``torch.compile`` on ``model``, its submodules and their methods, in place.

    Return the original module, which may not be ``model`` itself. ``torch.compiler.disable`` stays
    in effect. torch has no public way to undo a compilation.

    Affects torch 2.11 to 2.13 (``OptimizedModule``, ``innermost_fn`` and ``DisableContext`` in
    torch/_dynamo/eval_frame.py; ``Module.compile`` in torch/nn/modules/module.py). We know of no
    upstream issue.

    Raises:
        ValueError: if the compiled wrapper of a module has hooks, which would be lost.
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
    """Return the function that was passed to ``torch.compile``. Ignore attributes that
    ``functools.wraps`` copied from a compiled function."""
    while getattr(function, "_torchdynamo_wrapper_id", None) == id(function):
        if _is_disabled(function):
            break
        function = function._torchdynamo_orig_callable
    return function


def _is_disabled(function: Any) -> bool:
    return bool(getattr(function, "_torchdynamo_disable", False))


@contextlib.contextmanager
def infrequent_garbage_collection() -> Iterator[None]:
    """Collect garbage less often while a model compiles, but often enough to free GPU memory.

    The compiler allocates millions of objects that stay alive, and the collector visits each of
    them many times: with Python 3.11's threshold of 700, this took 7 % of the first call.

    Affects every version of torch. Inside this context, Dynamo 2.15 also raises the threshold of
    full collections (``deferred_full_gc`` in torch/_dynamo/utils.py). If the user turned garbage
    collection off or made it rarer, this changes nothing.
    """
    before = gc.get_threshold()
    if 0 < before[0] < COLLECTION_THRESHOLD:  # 0 turns collection off
        gc.set_threshold(COLLECTION_THRESHOLD, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
