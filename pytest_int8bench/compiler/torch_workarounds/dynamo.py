"""Workarounds for Dynamo, and what it leaves on a model."""

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

#: Objects allocated between two garbage collections while a model compiles.
COLLECTION_THRESHOLD = 20_000


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
