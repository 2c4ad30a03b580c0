"""Passes for layers that quantize only their weights (W8).

Layers that share an input become one matmul in :mod:`.passes`. Here their weights are dequantized
in one pass over memory, and Inductor compiles the rest.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx
from torch.nn import functional as F

from pytest_int8bench.compiler.fusion.nodes import (
    DEQUANTIZE,
    DEQUANTIZED,
    Node,
    layer_tensors,
    layer_weight,
    nothing_written,
    rows_of,
    value_of,
)

# Elements of weights that one pass dequantizes. Larger passes are not faster, and keep all weights
# in memory until the last one is used.
_AT_ONCE = 1 << 24
_X = 0  # position of the input in the operator's arguments


def share_scaled_inputs(graph: fx.Graph) -> None:
    """Multiply an input only once by the factor that several layers share."""
    first: dict[tuple[Any, ...], Node] = {}
    for node in graph.find_nodes(op="call_function", target=operator.mul):
        if all(user.target is DEQUANTIZED for user in node.users):
            kept = first.setdefault(node.args, node)
            if kept is not node and nothing_written(kept, node):
                node.replace_all_uses_with(kept)
                graph.erase_node(node)


def dequantize_at_once(graph: fx.Graph) -> None:
    """Dequantize weights of several layers in one pass: a launch takes longer to start than a
    single weight takes."""
    layers: dict[tuple[Any, ...], list[Node]] = {}
    for node in graph.find_nodes(op="call_function", target=DEQUANTIZED):
        weight, scale, _ = layer_tensors(node)
        (block, *rows), (scales, *same) = rows_of(weight), rows_of(scale)
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
    """Return whether layers use all rows of a block."""
    rows = {rows_of(layer_weight(node))[1:] for node in nodes}
    return bool(sum(stop - start for start, stop in rows) >= value_of(block).shape[0])


def _taken(blocks: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Remove from a list the first blocks of one dtype and device that fit into one pass."""
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
    """Insert the pass before the first layer, and multiply by the weights that it returns."""
    weights, scales, kinds = ([key[part] for key in blocks] for part in range(3))
    with graph.inserting_before(first):
        whole = graph.call_function(DEQUANTIZE, (weights, scales, kinds[0][0]))
        outs = [graph.call_function(operator.getitem, (whole, i)) for i in range(len(blocks))]
    for key, out in zip(blocks, outs, strict=True):
        for node in layers[key]:
            _, start, stop = rows_of(layer_weight(node))
            with graph.inserting_before(node):
                own = out
                if (start, stop) != (0, value_of(key[0]).shape[0]):
                    own = graph.call_function(operator.getitem, (out, slice(start, stop)))
            _multiply_with(graph, node, own)


def open_matmuls(graph: fx.Graph) -> None:
    """Replace the remaining operators by the functions of torch that they call: autocast does not
    see into an operator in a region."""
    for node in graph.find_nodes(op="call_function", target=DEQUANTIZED):
        weight, scale, _ = layer_tensors(node)
        with graph.inserting_before(node):
            column = graph.call_method("unsqueeze", (scale, -1))
            exact = graph.call_function(
                operator.mul, (graph.call_method("float", (weight,)), column)
            )
            rounded = graph.call_method("to", (exact, value_of(node.args[_X]).dtype))
        _multiply_with(graph, node, rounded)


def _multiply_with(graph: fx.Graph, node: Node, weight: Node) -> None:
    """Replace a layer's operator by a matmul with a dequantized weight."""
    _, _, bias = layer_tensors(node)
    with graph.inserting_before(node):
        matmul = graph.call_function(F.linear, (node.args[_X], weight, bias))
    matmul.meta = dict(node.meta)
    node.replace_all_uses_with(matmul)
    graph.erase_node(node)
