"""Fuse INT8 layers with the operators around them in Dynamo's graph.

A norm or an activation before a linear layer moves into the kernel that quantizes its rows, layers
that share an input become one matmul, and a layer scale and a residual after a layer move into the
matmul's epilogue. Passes for layers that quantize only their weights are in :mod:`.weight_only`.
The patterns match graphs of any model. Operators that do not match stay unchanged.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from pytest_int8bench.compiler.fusion import weight_only
from pytest_int8bench.compiler.fusion.inline_triton import insert_kernels
from pytest_int8bench.compiler.fusion.nodes import (
    ADD,
    LINEAR,
    MULTIPLY,
    NORMS,
    QUANTIZE,
    Node,
    activation_name,
    alike,
    given_arguments,
    is_layer,
    is_row_of,
    layer_operands,
    layer_tensors,
    layer_weight,
    nothing_written,
    only_user,
    other_operand,
    rows_of,
    same_dtype,
    sliced,
    value_of,
    views_read_by_strides,
    writes,
)
from pytest_int8bench.compiler.fusion.resize import resize_by_matmuls
from pytest_int8bench.compiler.fusion.rotation import fuse_rotations

# Positions in the operators' arguments.
_X, _FACTOR = 0, 7
_GAMMA, _RESIDUAL = 5, 6


def fuse(module: fx.GraphModule, *, inline: bool = False, always: bool = False) -> fx.GraphModule:
    """Fuse operators in the graph of ``module`` and of the regions that it calls, in place.

    Args:
        module: Dynamo's graph.
        inline: replace our operators by their kernels (:mod:`.inline_triton`); otherwise, only
            compile their kernels in threads.
        always: resize images by matmuls (:mod:`.resize`) and rotate queries and keys in one pass
            (:mod:`.rotation`) even in graphs without INT8 layers.
    """
    parts = [part for part in module.modules() if isinstance(part, fx.GraphModule)]
    have_linear = [_has_linear(part.graph) for part in parts]
    if always or any(have_linear):
        resize_by_matmuls(module)
    for part, has_linear in zip(parts, have_linear, strict=True):
        if always or has_linear:
            fuse_rotations(part.graph)
        if has_linear:
            _fuse_layers(part.graph, inline)
        if always or has_linear:
            part.graph.lint()
            part.recompile()
    return module


def _fuse_layers(graph: fx.Graph, inline: bool) -> None:
    _drop_inactive_dropout(graph)
    _share_quantization(graph)
    weight_only.share_scaled_inputs(graph)
    _join_matmuls(graph)
    weight_only.dequantize_together(graph)
    weight_only.decompose_layers(graph)
    _absorb_scale_and_residual(graph)
    _absorb_norms_and_activations(graph)
    _erase_unused(graph)
    insert_kernels(graph, inline=inline)


def _has_linear(graph: fx.Graph) -> bool:
    return any(map(is_layer, graph.nodes))


def _erase_unused(graph: fx.Graph) -> None:
    """Erase operators that fusion left without users. ``eliminate_dead_code`` would also erase
    calls that write to a tensor and whose return value is not used."""
    for node in reversed(graph.nodes):
        ours = node.target in (QUANTIZE, LINEAR, operator.getitem)
        if not node.users and (ours or activation_name(node) is not None):
            graph.erase_node(node)


def _drop_inactive_dropout(graph: fx.Graph) -> None:
    """Erase dropout that is inactive in ``eval`` mode, because it prevents fusion."""
    for node in list(graph.nodes):
        if node.target is not F.dropout:
            continue
        given = given_arguments(node)
        if not given.get("training", True) or given.get("p", 0.5) == 0:
            node.replace_all_uses_with(given["input"])
            graph.erase_node(node)


def _share_quantization(graph: fx.Graph) -> None:
    """Quantize an input only once if several layers share it."""
    first: dict[tuple[Any, ...], Node] = {}
    for node in list(graph.nodes):
        if node.target is QUANTIZE:
            kept = first.setdefault(node.args, node)
            if kept is not node and nothing_written(kept, node):
                _replace_outputs(node, kept)


def _replace_outputs(node: Node, kept: Node) -> None:
    """Replace the outputs of ``node`` by the same outputs of ``kept``."""
    mine = {user.args[1]: user for user in kept.users}
    for user in list(node.users):
        same = mine.get(user.args[1])
        if same is None:
            user.replace_input_with(node, kept)
        else:
            user.replace_all_uses_with(same)
            user.graph.erase_node(user)
    node.graph.erase_node(node)


def _join_matmuls(graph: fx.Graph) -> None:
    """Join layers that share an input into one matmul, and split its output."""
    written = any(map(writes, graph.nodes))
    groups: dict[tuple[Any, ...], list[Node]] = {}
    for node in graph.nodes:
        if is_layer(node):
            blocks = tuple(rows_of(part)[0] for part in layer_tensors(node))
            rows = {rows_of(part)[1:] for part in layer_tensors(node) if part is not None}
            if len(rows) > 1 or not all(block is None or block < node for block in blocks):
                continue
            groups.setdefault((node.target, *layer_operands(node), blocks), []).append(node)
    for nodes in groups.values():
        if not nothing_written(nodes[0], nodes[-1]):
            continue  # the joined matmul would read tensors before they are written to
        for neighbours in _neighbours(nodes):
            _join(graph, neighbours, written)


def _neighbours(nodes: list[Node]) -> list[list[Node]]:
    """Group layers that use adjacent rows of a block, whatever the order of their calls."""
    runs: list[list[Node]] = []
    end = None
    for node in sorted(nodes, key=lambda node: rows_of(layer_weight(node))[1]):
        _, start, stop = rows_of(layer_weight(node))
        if start == end:
            runs[-1].append(node)
        else:
            runs.append([node])
        end = stop
    return [run for run in runs if len(run) > 1]


def _join(graph: fx.Graph, nodes: list[Node], written: bool) -> None:
    """Join layers of adjacent rows of a block, sorted by row, into one matmul."""
    sizes = [value_of(layer_weight(node)).shape[0] for node in nodes]
    start, stop = rows_of(layer_weight(nodes[0]))[1], rows_of(layer_weight(nodes[-1]))[2]
    first = min(nodes)
    with graph.inserting_before(first):
        tensors = [
            None if part is None else sliced(graph, rows_of(part)[0], start, stop)
            for part in layer_tensors(first)
        ]
        before, after = layer_operands(first)
        whole = graph.call_function(first.target, (*before, *tensors, *after))
        parts = graph.call_function(torch.split, (whole, sizes), {"dim": -1})
        columns = [graph.call_function(operator.getitem, (parts, i)) for i in range(len(nodes))]
    value = value_of(first)
    wide = value.new_empty((*value.shape[:-1], sum(sizes)))
    for node, column, part in zip(nodes, columns, wide.split(sizes, -1), strict=True):
        column.meta = dict(node.meta) | {"example_value": part}
        node.replace_all_uses_with(column)
        graph.erase_node(node)
        # Columns of the joined output are not contiguous, but the layer's output was.
        views = None if written else views_read_by_strides(column)
        if views is None:
            with graph.inserting_after(column):
                # clone, because contiguous() returns the view if it has one row.
                memory: dict[str, Any] = {"memory_format": torch.contiguous_format}
                dense = graph.call_method("clone", (column,), memory)
            dense.meta = dict(node.meta)
            for user in list(column.users):
                if user is not dense:
                    user.replace_input_with(column, dense)
            continue
        for view in views:
            if view.target == "view":
                view.target = "reshape"


def _absorb_scale_and_residual(graph: fx.Graph) -> None:
    """Move a layer scale and a residual into the matmul's epilogue. The matmul then runs where its
    result was used, so nothing may write to its tensors in between."""
    for node in list(graph.nodes):
        if node.target is not LINEAR:
            continue
        user = only_user(node)
        if user is not None and user.target in MULTIPLY and not user.kwargs:
            gamma = other_operand(user, node)
            fits = gamma is not node and is_row_of(gamma, node) and same_dtype(user, node)
            if fits and nothing_written(node, user):
                node = _replaced(graph, user, node, _GAMMA, gamma)
                user = only_user(node)
        if user is not None and user.target in ADD and not user.kwargs:
            residual = other_operand(user, node)
            fits = alike(residual, node) and same_dtype(user, node)
            if fits and nothing_written(node, user):
                _replaced(graph, user, node, _RESIDUAL, residual)


def _replaced(graph: fx.Graph, user: Node, node: Node, position: int, value: Node) -> Node:
    """Replace ``user`` of the matmul ``node`` by a matmul with one argument changed."""
    args = list(node.args)
    args[position] = value
    with graph.inserting_before(user):
        matmul = graph.call_function(LINEAR, tuple(args))
    matmul.meta = dict(user.meta)
    user.replace_all_uses_with(matmul)
    graph.erase_node(user)
    graph.erase_node(node)
    return matmul


def _absorb_norms_and_activations(graph: fx.Graph) -> None:
    """Move norms and activations into the kernel that quantizes rows."""
    for node in list(graph.nodes):
        if node.target is not QUANTIZE or not isinstance(node.args[_X], fx.Node):
            continue
        source = node.args[_X]
        others = [user for user in source.users if user is not node]
        start, before = source, _norm(source)
        if before is None and not others:
            start, before = _activation(source)
        if before is None or not nothing_written(start, node):
            continue
        if not all(node < user for user in others):
            continue  # another operator reads the norm's output before it is quantized
        with graph.inserting_before(node):
            joined = graph.call_function(QUANTIZE, (*before, node.args[_FACTOR], bool(others)))
            kept = graph.call_function(operator.getitem, (joined, 2)) if others else None
        for user in list(node.users):
            user.replace_input_with(node, joined)
        graph.erase_node(node)
        if kept is not None:
            kept.meta = dict(source.meta)
            source.replace_all_uses_with(kept)
        graph.erase_node(source)


def _norm(node: Node) -> tuple[Any, ...] | None:
    """Return the first arguments of ``quantize_rows`` for a norm over the last dimension."""
    if node.op != "call_function" or node.target not in NORMS:
        return None
    given = given_arguments(node)
    x = given["input"]
    layer = NORMS[node.target] == "layer"
    if len(given["normalized_shape"]) != 1 or not same_dtype(x, node):
        return None
    eps = given.get("eps", 1e-5 if layer else None)
    if eps is None:
        # torch's default is the eps of the dtype in which it computes.
        eps = torch.finfo(torch.promote_types(value_of(x).dtype, torch.float32)).eps
    weight, bias = given.get("weight"), given.get("bias")
    return (x, NORMS[node.target], "none", None, weight, bias, eps)


def _activation(node: Node) -> tuple[Node, tuple[Any, ...] | None]:
    """Return the node that reads the input of an activation (gated or not), and the first arguments
    of ``quantize_rows``, or None if there is no activation."""
    if node.op != "call_function":
        return node, None
    if node.target in MULTIPLY and not node.kwargs:
        for source, gate in (node.args, node.args[::-1]):
            name = activation_name(source)
            if name is not None and only_user(source) is node and alike(gate, source):
                x = given_arguments(source)["input"]
                return source, (x, "none", name, gate, None, None, 0.0)
        return node, None
    name = activation_name(node)
    if name is None:
        return node, None
    return node, (given_arguments(node)["input"], "none", name, None, None, None, 0.0)
