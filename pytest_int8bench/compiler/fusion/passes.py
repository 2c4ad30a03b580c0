"""Joining the fused operators with what stands around them, in the graph that Dynamo made.

A norm or an activation in front of a linear layer becomes part of the pass that quantizes its
rows, layers that share an input become one product, and a layer scale and a residual behind a
layer become part of the product. Of layers whose weights alone are INT8, those that share an input
become one product, and their weights are dequantized in one pass; the rest is Inductor's.
The patterns are those of the graph, not of a model: whatever does not fit stays as it is, and runs
as it did.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from pytest_int8bench.compiler.fusion.inline_triton import put_kernels
from pytest_int8bench.compiler.fusion.nodes import (
    ADD,
    DEQUANTIZE,
    DEQUANTIZED,
    LINEAR,
    MULTIPLY,
    NORMS,
    QUANTIZE,
    Node,
    activation_name,
    alike,
    given_arguments,
    is_row_of,
    nothing_written,
    only_user,
    other_operand,
    same_dtype,
    value_of,
    views_read_by_strides,
    writes,
)

# Positions in the operators' arguments.
_X, _FACTOR = 0, 7
_GAMMA, _RESIDUAL = 5, 6
# Where weight, weight scale and bias are.
_TENSORS = {LINEAR: slice(2, 5), DEQUANTIZED: slice(1, 4)}
# Elements of weights that are dequantized in one pass: more are not over sooner, and all are kept
# until the last one is used.
_AT_ONCE = 1 << 24


def fuse(module: fx.GraphModule, *, inline: bool = False) -> fx.GraphModule:
    """Join operators in the graph of ``module``, and in those of the regions it calls, in place.

    Args:
        inline: put kernels in the place of the operators that are left (:mod:`inlining`); they are
            compiled ahead in any case.
    """
    for part in module.modules():
        if isinstance(part, fx.GraphModule) and _has_linear(part.graph):
            graph = part.graph
            _drop_inactive_dropout(graph)
            _share_quantization(graph)
            _share_scaled_inputs(graph)
            _join_products(graph)
            _dequantize_at_once(graph)
            _open_products_of_w8(graph)
            _absorb_scale_and_residual(graph)
            _absorb_norms_and_activations(graph)
            _erase_unused(graph)
            put_kernels(graph, inline=inline)
            graph.lint()
            part.recompile()
    return module


def _has_linear(graph: fx.Graph) -> bool:
    return any(node.target in _TENSORS for node in graph.nodes)


def _erase_unused(graph: fx.Graph) -> None:
    """Erase what joining left without a reader. Not all that nobody reads: torch takes calls that
    write to a tensor, and whose return value is not used, for dead."""
    for node in reversed(graph.nodes):
        ours = node.target in (QUANTIZE, LINEAR, operator.getitem)
        if not node.users and (ours or activation_name(node) is not None):
            graph.erase_node(node)


def _drop_inactive_dropout(graph: fx.Graph) -> None:
    """Take out dropout that does nothing in ``eval`` mode: it stands between operators."""
    for node in list(graph.nodes):
        if node.target is not F.dropout:
            continue
        given = given_arguments(node)
        if not given.get("training", True) or given.get("p", 0.5) == 0:
            node.replace_all_uses_with(given["input"])
            graph.erase_node(node)


def _share_quantization(graph: fx.Graph) -> None:
    """Quantize an input that several layers take once."""
    first: dict[tuple[Any, ...], Node] = {}
    for node in list(graph.nodes):
        if node.target is QUANTIZE:
            kept = first.setdefault(node.args, node)
            if kept is not node and nothing_written(kept, node):
                _replace_outputs(node, kept)


def _share_scaled_inputs(graph: fx.Graph) -> None:
    """Multiply an input once by the factor of several layers whose weights alone are INT8."""
    first: dict[tuple[Any, ...], Node] = {}
    for node in graph.find_nodes(op="call_function", target=operator.mul):
        if all(user.target is DEQUANTIZED for user in node.users):
            kept = first.setdefault(node.args, node)
            if kept is not node and nothing_written(kept, node):
                node.replace_all_uses_with(kept)
                graph.erase_node(node)


def _replace_outputs(node: Node, kept: Node) -> None:
    """Use the outputs of ``kept`` for those of ``node``."""
    mine = {user.args[1]: user for user in kept.users}
    for user in list(node.users):
        same = mine.get(user.args[1])
        if same is None:
            user.replace_input_with(node, kept)
        else:
            user.replace_all_uses_with(same)
            user.graph.erase_node(user)
    node.graph.erase_node(node)


def _join_products(graph: fx.Graph) -> None:
    """Make layers of one input one product, and split its output."""
    written = any(map(writes, graph.nodes))
    groups: dict[tuple[Any, ...], list[Node]] = {}
    for node in graph.nodes:
        if node.target in _TENSORS:
            blocks = tuple(_rows_of(part)[0] for part in _tensors(node))
            rows = {_rows_of(part)[1:] for part in _tensors(node) if part is not None}
            if len(rows) > 1 or not all(block is None or block < node for block in blocks):
                continue
            groups.setdefault((node.target, *_around(node), blocks), []).append(node)
    for nodes in groups.values():
        if not nothing_written(nodes[0], nodes[-1]):
            continue  # the one product would read what is there at the first layer
        for neighbours in _neighbours(nodes):
            _join(graph, neighbours, written)


def _neighbours(nodes: list[Node]) -> list[list[Node]]:
    """Return layers that share a block in groups of adjacent rows, whatever the order of calls."""
    runs: list[list[Node]] = []
    end = None
    for node in sorted(nodes, key=lambda node: _rows_of(_weight(node))[1]):
        _, start, stop = _rows_of(_weight(node))
        if start == end:
            runs[-1].append(node)
        else:
            runs.append([node])
        end = stop
    return [run for run in runs if len(run) > 1]


def _join(graph: fx.Graph, nodes: list[Node], written: bool) -> None:
    """Make layers of adjacent rows of a block, in their order, one product."""
    sizes = [value_of(_weight(node)).shape[0] for node in nodes]
    start, stop = _rows_of(_weight(nodes[0]))[1], _rows_of(_weight(nodes[-1]))[2]
    first = min(nodes)
    with graph.inserting_before(first):
        tensors = [
            None if part is None else _sliced(graph, _rows_of(part)[0], start, stop)
            for part in _tensors(first)
        ]
        before, after = _around(first)
        whole = graph.call_function(first.target, (*before, *tensors, *after))
        parts = graph.call_function(torch.split, (whole, sizes), {"dim": -1})
        columns = [graph.call_function(operator.getitem, (parts, i)) for i in range(len(nodes))]
    value = value_of(first)
    wide = value.new_empty((*value.shape[:-1], sum(sizes)))
    for node, column, part in zip(nodes, columns, wide.split(sizes, -1), strict=True):
        column.meta = dict(node.meta) | {"example_value": part}
        node.replace_all_uses_with(column)
        graph.erase_node(node)
        # A column of the joined rows is not dense, as the layer's output was.
        views = None if written else views_read_by_strides(column)
        if views is None:
            with graph.inserting_after(column):
                # Of one row, contiguous() would return the view.
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


def _dequantize_at_once(graph: fx.Graph) -> None:
    """Dequantize weights of several layers in one pass: alone each is over sooner than the next one
    starts."""
    layers: dict[tuple[Any, ...], list[Node]] = {}
    for node in graph.find_nodes(op="call_function", target=DEQUANTIZED):
        weight, scale, _ = _tensors(node)
        (block, *rows), (scales, *same) = _rows_of(weight), _rows_of(scale)
        x = value_of(node.args[_X])
        if rows == same and value_of(block).numel() <= _AT_ONCE:
            layers.setdefault((block, scales, (x.dtype, x.device)), []).append(node)
    blocks = [key for key, nodes in layers.items() if _use_all(key[0], nodes)]
    while blocks:
        together = _taken(blocks)
        nodes = sorted(node for key in together for node in layers[key])
        placed = all(tensor < nodes[0] for *tensors, _ in together for tensor in tensors)
        if len(nodes) > 1 and placed and nothing_written(nodes[0], nodes[-1]):
            _dequantize(graph, together, layers, nodes[0])


def _use_all(block: Node, nodes: list[Node]) -> bool:
    """Say whether layers use all rows of a block."""
    rows = {_rows_of(_weight(node))[1:] for node in nodes}
    return bool(sum(stop - start for start, stop in rows) >= value_of(block).shape[0])


def _taken(blocks: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Take the first blocks out of a list, of one dtype and device, that are small together."""
    taken: list[tuple[Any, ...]] = []
    elements = 0
    while blocks and (not taken or blocks[0][2] == taken[0][2]):
        elements += value_of(blocks[0][0]).numel()
        if taken and elements > _AT_ONCE:
            break
        taken.append(blocks.pop(0))
    return taken


def _dequantize(
    graph: fx.Graph,
    blocks: list[tuple[Any, ...]],
    layers: dict[tuple[Any, ...], list[Node]],
    first: Node,
) -> None:
    """Insert the pass before the first layer, and multiply with what it gives."""
    weights, scales, kinds = ([key[part] for key in blocks] for part in range(3))
    with graph.inserting_before(first):
        whole = graph.call_function(DEQUANTIZE, (weights, scales, kinds[0][0]))
        outs = [graph.call_function(operator.getitem, (whole, i)) for i in range(len(blocks))]
    for key, out in zip(blocks, outs, strict=True):
        for node in layers[key]:
            _, start, stop = _rows_of(_weight(node))
            with graph.inserting_before(node):
                own = out
                if (start, stop) != (0, value_of(key[0]).shape[0]):
                    own = graph.call_function(operator.getitem, (out, slice(start, stop)))
            _multiply_with(graph, node, own)


def _open_products_of_w8(graph: fx.Graph) -> None:
    """Put in place of what is left of the operator what it does, in functions of torch: autocast,
    which sees those, does not see into an operator in a region."""
    for node in graph.find_nodes(op="call_function", target=DEQUANTIZED):
        weight, scale, _ = _tensors(node)
        with graph.inserting_before(node):
            column = graph.call_method("unsqueeze", (scale, -1))
            exact = graph.call_function(
                operator.mul, (graph.call_method("float", (weight,)), column)
            )
            rounded = graph.call_method("to", (exact, value_of(node.args[_X]).dtype))
        _multiply_with(graph, node, rounded)


def _multiply_with(graph: fx.Graph, node: Node, weight: Node) -> None:
    """Put a product with a dequantized weight in the place of a layer's operator."""
    _, _, bias = _tensors(node)
    with graph.inserting_before(node):
        product = graph.call_function(F.linear, (node.args[_X], weight, bias))
    product.meta = dict(node.meta)
    node.replace_all_uses_with(product)
    graph.erase_node(node)


def _tensors(node: Node) -> tuple[Node, ...]:
    """Return weight, weight scale and bias of a layer."""
    return tuple(node.args[_TENSORS[node.target]])


def _weight(node: Node) -> Node:
    return _tensors(node)[0]


def _around(node: Node) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Return the arguments of a layer before and after its tensors."""
    where = _TENSORS[node.target]
    return tuple(node.args[: where.start]), tuple(node.args[where.stop :])


def _rows_of(tensor: Node) -> tuple[Node, int, int]:
    """Return the block that a layer's tensor is rows of, the first row, and that after the last;
    the tensor itself and all its rows where it is no slice."""
    if tensor is None:
        return None, 0, 0
    if tensor.target is operator.getitem and isinstance(tensor.args[1], slice):
        block, rows = tensor.args
        if all(bound is None or isinstance(bound, int) for bound in (rows.start, rows.stop)):
            start, stop, step = rows.indices(value_of(block).shape[0])
            if step == 1:
                return block, start, stop
    return tensor, 0, value_of(tensor).shape[0]


def _sliced(graph: fx.Graph, block: Node, start: int, stop: int) -> Node:
    """Return rows of a block as a node."""
    value = value_of(block)
    if (start, stop) == (0, value.shape[0]):
        return block
    node = graph.call_function(operator.getitem, (block, slice(start, stop)))
    node.meta["example_value"] = value[start:stop]
    return node


def _absorb_scale_and_residual(graph: fx.Graph) -> None:
    """Let products multiply with a layer scale and add a residual. A product then runs where its
    result was used, and must find its tensors there as they were."""
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
    """Replace ``user`` of the product ``node`` by a product with one argument changed."""
    args = list(node.args)
    args[position] = value
    with graph.inserting_before(user):
        product = graph.call_function(LINEAR, tuple(args))
    product.meta = dict(user.meta)
    user.replace_all_uses_with(product)
    graph.erase_node(user)
    graph.erase_node(node)
    return product


def _absorb_norms_and_activations(graph: fx.Graph) -> None:
    """Let the pass that quantizes rows normalize or activate them first."""
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
            continue  # something reads the row before it is quantized
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
        # As torch has it: that of the dtype it computes in.
        eps = torch.finfo(torch.promote_types(value_of(x).dtype, torch.float32)).eps
    weight, bias = given.get("weight"), given.get("bias")
    return (x, NORMS[node.target], "none", None, weight, bias, eps)


def _activation(node: Node) -> tuple[Node, tuple[Any, ...] | None]:
    """Return the first arguments of ``quantize_rows`` for an activation, also one that is
    multiplied with a gate, and the node that reads its input."""
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
