"""Find the positions and frequencies that the angles of rotary position embedding are computed
from. The kernel then computes the angles, because reading an angle takes as much memory traffic as
two columns in BF16."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from pytest_int8bench.compiler.fusion.nodes import (
    ADD,
    Node,
    is_call,
    operands_of_product,
    value_of,
    with_value,
    without_cast,
)

# How a position for each row (B, N), and a frequency for each pair of columns (H, D / 2), are
# broadcast to angles (B, H, N, D / 2).
_OF_ROWS = (slice(None), None, slice(None), None)
_OF_COLUMNS = (None, slice(None), None, slice(None))


def position_tables(angles: Node) -> tuple[Node, Node, Node] | None:
    """Insert the positions (B, 1, N, T) and frequencies (1, H, T, D / 2) that angles are computed
    from.

    Returns:
        Both, and the first operator whose inputs are read later if they replace the angles; None if
        the angles are not sums of products of positions and frequencies.
    """
    terms: list[Node] = []
    node = angles
    while is_call(node, ADD) and len(node.args) == 2 and not node.kwargs:
        node, term = node.args
        terms.insert(0, term)
    terms.insert(0, node)
    factors = [_position_and_frequency(term) for term in terms]
    if not all(factors):
        return None
    positions, frequencies = (list(side) for side in zip(*factors, strict=True))
    graph, first = angles.graph, list(terms)
    table, selected = _selected_in_order(positions, _OF_ROWS, -1)
    if table is None:
        rows = concatenated(graph, positions, -1)
    else:
        first += selected
        rows = _view(graph, operator.getitem, table, (slice(None), None))
    table, selected = _selected_in_order(frequencies, _OF_COLUMNS, 0)
    if table is None:
        columns = concatenated(graph, frequencies, -2)
    else:
        first += selected
        swapped = _view(graph, torch.transpose, table, 0, 1)
        columns = _view(graph, torch.unsqueeze, swapped, 0)
    return rows, columns, min(first)


def _selected_in_order(
    parts: list[Node], view: tuple[Any, ...], dim: int
) -> tuple[Node | None, list[Node]]:
    """Return the three-dimensional tensor that ``parts`` were selected from and the operators that
    selected them, or None if the parts in their order are not the whole tensor. Reading the tensor
    saves a copy of the parts.

    Args:
        parts: views of the selected parts, which may have been cast.
        view: index of each view.
        dim: the dimension that they were selected along, 0 or -1.
    """
    selected: list[Node] = []
    for i, part in enumerate(parts):
        inner: Node = without_cast(part.args[0]) if is_call(part, (operator.getitem,)) else None
        if not is_call(inner, (operator.getitem,)):
            return None, []
        if part.args[1] != view or inner.args[1] != (i if dim == 0 else (Ellipsis, i)):
            return None, []
        selected.append(inner)
    table = selected[0].args[0]
    of = value_of(table)
    is_whole = of.dim() == 3 and of.shape[dim] == len(parts) and of.itemsize <= 4
    if not is_whole or any(one.args[0] is not table for one in selected):
        return None, []
    return table, selected


def _view(graph: fx.Graph, function: Any, *args: Any) -> Node:
    """Insert a view of the tensor ``args[0]``."""
    value = function(value_of(args[0]), *args[1:])
    return with_value(graph.call_function(function, args), value)


def concatenated(graph: fx.Graph, parts: list[Node], dim: int) -> Node:
    """Insert a concatenation of tensors (B, H, N, D) that broadcasts the other dimensions."""
    shapes = [list(value_of(part).shape) for part in parts]
    own = [shape[dim] for shape in shapes]
    for shape in shapes:
        shape[dim] = 1
    common = list(torch.broadcast_shapes(*shapes))
    wide = []
    for part, size in zip(parts, own, strict=True):
        shape = list(common)
        shape[dim] = size
        value = value_of(part).expand(shape)
        wide.append(with_value(graph.call_method("expand", (part, tuple(shape))), value))
    value = torch.cat([value_of(part) for part in wide], dim)
    return with_value(graph.call_function(torch.cat, (wide, dim)), value)


def _position_and_frequency(node: Node) -> tuple[Node, Node] | None:
    """Return the factors of a product of a number per row and a number per pair of columns."""
    for row, column in operands_of_product(node):
        one, other = value_of(row), value_of(column)
        if (
            {one.dtype, other.dtype} == {torch.float32}
            and one.dim() == other.dim() == 4
            and one.shape[1] == one.shape[3] == 1
            and other.shape[0] == other.shape[2] == 1
        ):
            return row, column
    return None
