"""Passes for layers that quantize only their weights (W8).

:mod:`.passes` joins layers that share an input into one matmul. The passes here dequantize the
weights of several layers in one launch, and Inductor compiles the rest.
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

# Largest number of weight elements in one launch. Larger launches are not faster, and all their
# weights stay in memory until the last one is used.
_MAX_ELEMENTS = 1 << 24
_X = 0  # position of the input in the operator's arguments


def share_scaled_inputs(graph: fx.Graph) -> None:
    """Multiply an input by a SmoothQuant factor only once if several layers share both."""
    first: dict[tuple[Any, ...], Node] = {}
    for node in graph.find_nodes(op="call_function", target=operator.mul):
        if all(user.target is DEQUANTIZED for user in node.users):
            kept = first.setdefault(node.args, node)
            if kept is not node and nothing_written(kept, node):
                node.replace_all_uses_with(kept)
                graph.erase_node(node)


def dequantize_together(graph: fx.Graph) -> None:
    """Dequantize the weights of several layers in one launch, because starting a launch takes
    longer than dequantizing a single weight."""
    layers: dict[tuple[Any, ...], list[Node]] = {}
    for node in graph.find_nodes(op="call_function", target=DEQUANTIZED):
        weight, scale, _ = layer_tensors(node)
        (block, *rows), (scales, *same) = rows_of(weight), rows_of(scale)
        x = value_of(node.args[_X])
        if rows == same and value_of(block).numel() <= _MAX_ELEMENTS:
            layers.setdefault((block, scales, (x.dtype, x.device)), []).append(node)
    blocks = [key for key, nodes in layers.items() if _use_all(key[0], nodes)]
    while blocks:
        together = _pop_batch(blocks)
        nodes = sorted(node for key in together for node in layers[key])
        placed = all(tensor < nodes[0] for *tensors, _ in together for tensor in tensors)
        if len(nodes) > 1 and placed and nothing_written(nodes[0], nodes[-1]):
            _dequantize(graph, together, layers, nodes[0])


def _use_all(block: Node, nodes: list[Node]) -> bool:
    """Return whether layers together use all rows of a block."""
    rows = {rows_of(layer_weight(node))[1:] for node in nodes}
    return bool(sum(stop - start for start, stop in rows) >= value_of(block).shape[0])


def _pop_batch(blocks: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Remove and return the first blocks of one dtype and device that fit into one launch."""
    taken: list[tuple[Any, ...]] = []
    elements = 0
    while blocks and (not taken or blocks[0][2] == taken[0][2]):
        elements += value_of(blocks[0][0]).numel()
        if taken and elements > _MAX_ELEMENTS:
            break
        taken.append(blocks.pop(0))
    return taken


def _dequantize(
    graph: fx.Graph,
    blocks: list[tuple[Any, ...]],
    layers: dict[tuple[Any, ...], list[Node]],
    first: Node,
) -> None:
    """Insert the launch before the first layer, and multiply by the dequantized weights."""
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


def decompose_layers(graph: fx.Graph) -> None:
    """Replace the remaining operators by torch functions: autocast does not apply inside an
    operator in a region."""
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
    """Replace the operator of a layer by a matmul with its dequantized weight."""
    _, _, bias = layer_tensors(node)
    with graph.inserting_before(node):
        matmul = graph.call_function(F.linear, (node.args[_X], weight, bias))
    matmul.meta = dict(node.meta)
    node.replace_all_uses_with(matmul)
    graph.erase_node(node)
