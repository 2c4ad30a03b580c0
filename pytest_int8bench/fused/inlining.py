"""Handing the kernels to Inductor, in place of operators that launch them.

An operator is a call of Python into the dispatcher and back for each launch. A kernel that Inductor
knows it launches like its own: sooner, with buffers that it plans, from a compile
cache that holds the kernel, and compiled in parallel with the others. What has a shape that is not
known, or memory that is not dense, stays an operator; kernels of others that stay are compiled
ahead.

The nodes are those that ``torch.compile`` makes of a kernel that a user calls.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from pytest_int8bench.fused import configs
from pytest_int8bench.fused.configs import Problem
from pytest_int8bench.fused.nodes import (
    LINEAR,
    QUANTIZE,
    Node,
    begins_aligned,
    may_be_laid_out_anew,
    value_of,
)
from pytest_int8bench.fused.operators import MAX_COLUMNS

#: The number under which torch finds constants beside the arguments: none.
_NO_CONSTANTS = 1 << 60


def put_kernels(graph: fx.Graph, *, inline: bool) -> None:
    """Replace the operators of a graph by their kernels, where all is known that they need.

    Args:
        inline: if not, the kernels are only compiled ahead.
    """
    for node in list(graph.nodes):
        if node.target is QUANTIZE:
            _put_rows(graph, node, inline)
        elif node.target is LINEAR:
            _put_product(graph, node, inline)


def _put_rows(graph: fx.Graph, node: Node, inline: bool) -> None:
    from pytest_int8bench.fused import launches

    x, norm, activation, gate, weight, bias, eps, factor, keep = node.args
    shape = _known_shape(x)
    inputs = [part for part in (x, gate, weight, bias, factor) if part is not None]
    if shape is None or shape[-1] > MAX_COLUMNS or not all(map(_dense, inputs)):
        return
    value = value_of(x)
    columns = shape[-1]
    count = value.numel() // columns
    strides = columns, 0 if gate is None else columns
    there = [part is not None for part in (gate, weight, bias, factor)]
    rows = launches.of_rows(
        (count, columns), strides, norm, activation, eps, keep, there, value.device
    )
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
        called = _call(graph, rows, tensors, ["q", "scale", *(["kept"] if keep else [])])
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


def _put_product(graph: fx.Graph, node: Node, inline: bool) -> None:
    from pytest_int8bench.fused import launch

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
    kernel = launch.kernel_for(
        problem, configs.product_kernel(device), stride, value_of(residual), dtype, aligned
    )
    there = (bias is not None, gamma is not None)

    operands = functools.cache(
        functools.partial(launch.operands_like, problem, *there, dtype, device)
    )
    product = launch.chosen_product(problem, *there, kernel, stride, device, operands)
    # Inductor does not know Gluon.
    if not inline or any(described.layout for described in product.descriptors):
        rest = (residual, scale, weight_scale, bias, gamma)
        product.compile_ahead((*map(_dtype, (q, weight)), dtype, *map(_dtype, rest)), device)
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
        (out,) = _call(graph, product, tensors, ["c"])
        whole = graph.call_method("view", (out, (*shape[:-1], n)))
    whole.meta = dict(node.meta)
    node.replace_all_uses_with(whole)
    graph.erase_node(node)


def _call(
    graph: fx.Graph, launch: Any, tensors: Sequence[Node], written: Sequence[str]
) -> list[Node]:
    """Insert a launch, and return the tensors that it has written, by the names of parameters.

    Inductor takes it for one that copies them first, sees that nobody else reads them, and does
    not copy. Told what is written, it need not compile the kernel to find out.
    """
    # Not at the top: it imports what few sessions need.
    from torch._higher_order_ops.triton_kernel_wrap import (
        create_tma_stable_metadata,
        triton_kernel_wrapper_functional,
    )

    names = launch.kernel.arg_names
    given = dict(zip(names, (*tensors, *launch.numbers), strict=False)) | launch.constants
    call = graph.call_function(
        triton_kernel_wrapper_functional,
        kwargs={
            "kernel_idx": _index(launch.kernel, **launch.options),
            "constant_args_idx": _NO_CONSTANTS,
            "grid": [(launch.programs, 1, 1)],
            "tma_descriptor_metadata": {
                name: create_tma_stable_metadata(described.block)
                for name, described in zip(names, launch.descriptors, strict=False)
                if given[name] is not None
            },
            "kwargs": given,
            "tensors_to_clone": list(written),
        },
    )
    return [graph.call_function(operator.getitem, (call, name)) for name in written]


def _index(kernel: Any, num_warps: int, num_stages: int) -> int:
    """Return the number under which torch finds a kernel with options of the compiler.

    It is made of the code of the kernels and the options. Torch itself numbers kernels as they
    come, and the key of AOTAutograd's cache has the number and not the code: another process would
    not find what it kept, or find it for other code.
    """
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    from pytest_int8bench.fused import kernels

    code = inspect.getsource(kernels)  # with all that the kernel calls
    name = f"{kernel.fn.__name__}, {num_warps} warps, {num_stages} stages, {code}"
    index = int(hashlib.sha256(name.encode()).hexdigest()[:15], 16)
    if index not in kernel_side_table.id_to_kernel:
        with_options = _with_options(kernel, num_warps, num_stages)
        kernel_side_table.id_to_kernel[index] = with_options
        kernel_side_table.kernel_to_id[with_options] = index
    kernel_side_table.constant_args.setdefault(_NO_CONSTANTS, {})
    return index


@functools.cache
def _with_options(kernel: Any, num_warps: int, num_stages: int) -> Any:
    """Return a kernel with options of the compiler, which come as an only configuration."""
    import triton

    config = triton.Config({}, num_warps=num_warps, num_stages=num_stages)
    return triton.autotune(configs=[config], key=[])(kernel)


def _empty(
    graph: fx.Graph, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Node:
    return graph.call_function(torch.empty, (shape,), {"dtype": dtype, "device": device})


def _known_shape(node: Node) -> tuple[int, ...] | None:
    """Return the shape of a tensor on CUDA that has elements, None if it is none or not known."""
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
    """Say whether a tensor has no gaps, as Dynamo sees it, and gets none. It is made contiguous all
    the same: what traces the graph next may lay it out otherwise, and drops that where it does
    not."""
    value = value_of(node)
    dense = isinstance(value, torch.Tensor) and value.is_contiguous()
    return dense and not may_be_laid_out_anew(node)
