"""Replace our operators by the Triton kernels that they launch, so that Inductor launches them.

Calling an operator costs a round trip through the dispatcher. If Inductor knows the kernel, it
launches it like one of its own: faster, with planned buffers, from its compile cache, and compiled
in parallel with the others. Operators with unknown sizes or non-contiguous memory stay; their
kernels are compiled in threads (:mod:`pytest_int8bench.kernels.precompile`).

The new nodes are the same as ``torch.compile`` creates for a user's Triton kernel. We do not use
the public API for them, ``torch.library.triton_op`` with ``wrap_triton``, for two reasons:

- Outside Dynamo, ``wrap_triton`` does not pass the metadata of TMA descriptors
  (``TracingTritonHOPifier.call_HOP`` in torch/_higher_order_ops/triton_kernel_wrap.py, torch 2.11
  to 2.13). A launch with descriptors made on the host disappears from the graph without an error,
  and its output is uninitialized memory.
- The cache key of ``triton_op`` does not cover tiles that are chosen inside the operator.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import operator
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

from pytest_int8bench.compiler.fusion.nodes import (
    LINEAR,
    QUANTIZE,
    Node,
    begins_aligned,
    may_change_layout,
    value_of,
)
from pytest_int8bench.compiler.torch_workarounds.triton_calls import (
    insert_triton_call,
    register_triton_kernel,
)
from pytest_int8bench.kernels import dispatch
from pytest_int8bench.kernels.tile_types import Problem


def insert_kernels(graph: fx.Graph, *, inline: bool) -> None:
    """Replace operators by their kernels where shapes, strides and tiles are known.

    Args:
        graph: a graph of Dynamo, changed in place.
        inline: whether to replace operators; otherwise, only compile their kernels in threads.
    """
    for node in list(graph.nodes):
        if node.target is QUANTIZE:
            _inline_quantize_rows(graph, node, inline)
        elif node.target is LINEAR:
            _inline_linear(graph, node, inline)


def _inline_quantize_rows(graph: fx.Graph, node: Node, inline: bool) -> None:
    x, norm, activation, gate, weight, bias, eps, factor, keep = node.args
    shape = _known_shape(x)
    inputs = [part for part in (x, gate, weight, bias, factor) if part is not None]
    if shape is None or not all(map(_dense, inputs)):
        return
    value = value_of(x)
    columns = shape[-1]
    count = value.numel() // columns
    strides = columns, 0 if gate is None else columns
    has = [part is not None for part in (gate, weight, bias, factor)]
    rows = dispatch.rows_launch(
        (count, columns), strides, norm, activation, eps, keep, has, value.device
    )
    if rows is None:
        return
    if not inline:
        written = torch.int8, torch.float32
        kinds = (*map(_dtype, (x, gate)), *written, *map(_dtype, (weight, bias, factor)))
        rows.compile_ahead((*kinds, value.dtype if keep else None), value.device)
        return
    with graph.inserting_before(node):
        x, gate, weight, bias, factor = (
            None if part is None else graph.call_method("contiguous", (part,))
            for part in (x, gate, weight, bias, factor)
        )
        q = _empty(graph, (count, columns), torch.int8, value.device)
        scale = _empty(graph, (count,), torch.float32, value.device)
        kept = _empty(graph, (count, columns), value.dtype, value.device) if keep else None
        x, gate = (
            None if part is None else graph.call_method("view", (part, (count, columns)))
            for part in (x, gate)
        )
        tensors = (x, gate, q, scale, weight, bias, factor, kept)
        called = _insert_launch(graph, rows, tensors, ["q", "scale", *(["kept"] if keep else [])])
        shapes = shape, shape[:-1], shape
        outputs = [graph.call_method("view", pair) for pair in zip(called, shapes, strict=False)]
        if not keep:
            outputs.append(_empty(graph, (0,), value.dtype, value.device))
    for user in list(node.users):
        assert user.target is operator.getitem
        out = outputs[user.args[1]]
        out.meta = dict(user.meta)
        user.replace_all_uses_with(out)
        graph.erase_node(user)
    graph.erase_node(node)


def _inline_linear(graph: fx.Graph, node: Node, inline: bool) -> None:
    from pytest_int8bench.kernels.launch import operands_like  # needs Triton

    q, scale, weight, weight_scale, bias, gamma, residual, dtype = node.args
    shape = _known_shape(q)
    given = (weight, weight_scale, bias, gamma, residual)
    if shape is None or not all(_dense(part) for part in given if part is not None):
        return
    device = value_of(q).device
    n, k = value_of(weight).shape
    m = value_of(q).numel() // k
    problem = Problem(m, n, k, dtype.itemsize, residual is not None)
    stride = 0 if residual is None else n
    aligned = all(map(begins_aligned, (weight, residual)))
    preferred = dispatch.matmul_kernel(device)
    kernels = dispatch.accepting(
        preferred, device, problem, stride, value_of(residual), dtype, aligned
    )
    has = bias is not None, gamma is not None
    operands = functools.cache(functools.partial(operands_like, problem, *has, dtype, device))
    matmul = dispatch.matmul_launch(kernels, device, problem, *has, stride, operands)
    # Only Gluon's descriptors have a layout, and Inductor would compile Gluon as plain Triton.
    if not inline or any(described.layout for described in matmul.descriptors):
        rest = (residual, scale, weight_scale, bias, gamma)
        matmul.compile_ahead((*map(_dtype, (q, weight)), dtype, *map(_dtype, rest)), device)
        return
    with graph.inserting_before(node):
        rows: Node = graph.call_method("reshape", (q, (m, k)))
        flat_scale: Node = graph.call_method("reshape", (scale, (m,)))
        rows, flat_scale, weight, weight_scale, bias, gamma = (
            None if part is None else graph.call_method("contiguous", (part,))
            for part in (rows, flat_scale, weight, weight_scale, bias, gamma)
        )
        if residual is not None:
            dense = graph.call_method("contiguous", (residual,))
            residual = graph.call_method("view", (dense, (m, n)))
        out = _empty(graph, (m, n), dtype, device)
        tensors = (rows, weight, out, residual, flat_scale, weight_scale, bias, gamma)
        (out,) = _insert_launch(graph, matmul, tensors, ["c"])
        whole = graph.call_method("view", (out, (*shape[:-1], n)))
    whole.meta = dict(node.meta)
    node.replace_all_uses_with(whole)
    graph.erase_node(node)


def _insert_launch(
    graph: fx.Graph, launch: Any, tensors: Sequence[Node], written: Sequence[str]
) -> list[Node]:
    """Insert a launch of a kernel with ``tensors`` as its first arguments. Return the tensors that
    it writes: its parameters named in ``written``."""
    names = launch.kernel.arg_names
    given = dict(zip(names, (*tensors, *launch.numbers), strict=False)) | launch.constants
    blocks = {
        name: described.block
        for name, described in zip(names, launch.descriptors, strict=False)
        if given[name] is not None
    }
    index = _index(launch.kernel, **launch.options)
    call = insert_triton_call(graph, index, launch.programs, given, blocks, written)
    return [graph.call_function(operator.getitem, (call, name)) for name in written]


def _index(kernel: Any, num_warps: int, num_stages: int) -> int:
    """Register a kernel with compiler options, and return its index: a hash of the options and the
    kernel's source, by which torch's caches distinguish kernels."""
    name = f"{kernel.fn.__name__}, {num_warps} warps, {num_stages} stages, {_source(kernel)}"
    index = int(hashlib.sha256(name.encode()).hexdigest()[:15], 16)
    register_triton_kernel(index, _with_options(kernel, num_warps, num_stages))
    return index


@functools.cache
def _source(kernel: Any) -> str:
    """Return the source of all files that define ``kernel`` and the functions that it calls, and
    the constants that these functions read.

    Triton's own ``cache_key`` is not sufficient: in Triton 3.6 it depends on which kernel was
    hashed first, and no version includes constants that are read as attributes of a module.
    """
    import triton.language as tl

    constants: set[str] = set()
    functions = [kernel.fn]
    for function in functions:  # grows while we iterate: transitive closure over calls
        for name, value in _globals_of(function):
            called = getattr(value, "fn", None)
            if isinstance(value, tl.constexpr):
                constants.add(f"{name} = {value.value!r}")
            elif inspect.isfunction(called) and called not in functions:
                functions.append(called)
    files = {inspect.getsourcefile(function) or "" for function in functions}
    return "\n".join([*sorted(constants), *sorted(Path(file).read_text() for file in files)])


def _globals_of(function: Any) -> Iterator[tuple[str, Any]]:
    """Yield names and values of the globals that a function reads, and of attributes of modules
    among them."""
    names = function.__code__.co_names
    for name in names:
        value = function.__globals__.get(name)
        yield name, value
        # torch's cache keys already contain Triton's version.
        if inspect.ismodule(value) and value.__name__.partition(".")[0] != "triton":
            yield from ((attribute, getattr(value, attribute, None)) for attribute in names)


@functools.cache
def _with_options(kernel: Any, num_warps: int, num_stages: int) -> Any:
    """Wrap a kernel in an autotuner with a single configuration, to set its compiler options."""
    import triton

    config = triton.Config({}, num_warps=num_warps, num_stages=num_stages)
    return triton.autotune(configs=[config], key=[])(kernel)


def _empty(
    graph: fx.Graph, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Node:
    return graph.call_function(torch.empty, (shape,), {"dtype": dtype, "device": device})


def _known_shape(node: Node) -> tuple[int, ...] | None:
    """Return the shape of a nonempty CUDA tensor; None for others, or if a size is unknown."""
    value = value_of(node)
    if not isinstance(value, torch.Tensor) or not _has_kernels(value.device):
        return None
    shape = tuple(value.shape)
    return shape if all(isinstance(size, int) and size > 0 for size in shape) else None


def _dtype(node: Node) -> torch.dtype | None:
    return None if node is None else value_of(node).dtype


def _has_kernels(device: torch.device) -> bool:
    return device.type == "cuda"


def _dense(node: Node) -> bool:
    """Return whether a tensor is contiguous in Dynamo's graph and stays so in Inductor.

    Callers still insert ``contiguous()`` because tracing may change the layout. If it does not,
    tracing drops the call.
    """
    value = value_of(node)
    dense = isinstance(value, torch.Tensor) and value.is_contiguous()
    return dense and not may_change_layout(node)
