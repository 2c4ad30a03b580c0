"""Find rotary position embedding (RoPE) in a graph, by what it computes."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from pytest_int8bench.compiler.fusion.nodes import ADD, MULTIPLY, Node, given_arguments, value_of

_NEGATE = (operator.neg, torch.neg)


def rotated(node: Node) -> tuple[Node, Node]:
    """Return what a node rotates in pairs of adjacent columns, and the angles; the node itself and
    None if it does no such thing.

    A rotation is ``x * cos(a) + stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2) * sin(a)``,
    sine and cosine with ``repeat_interleave(2, -1)`` for both columns of a pair; or several of
    parts of the columns, side by side.
    """
    chunks = _chunks(node)
    if chunks is not None:
        return _joined(node, chunks)
    if not _is(node, ADD) or len(node.args) != 2 or node.kwargs:
        return node, None
    for straight, crossed in (node.args, node.args[::-1]):
        for x, cosine in _products(straight):
            for swapped, sine in _products(crossed):
                angles = _angles(cosine, torch.cos)
                same = angles is not None and _angles(sine, torch.sin) is angles
                if same and _is_swapped(swapped, x) and _fits(x, angles):
                    return x, angles
    return node, None


def _fits(x: Node, angles: Node) -> bool:
    """Return whether there is an FP32 angle for each pair of each row."""
    value, of = value_of(angles), value_of(x)
    return (
        value.dtype == torch.float32
        and value.dim() == of.dim()
        and value.shape[-1] * 2 == of.shape[-1]
        and all(a in (1, b) for a, b in zip(value.shape[:-1], of.shape[:-1], strict=True))
    )


def _joined(node: Node, chunks: list[Node]) -> tuple[Node, Node]:
    """Return the tensor of which ``chunks`` rotate all columns, in order, and all angles."""
    found = [rotated(chunk) for chunk in chunks]
    sources = {x.args[0] if _is(x, (operator.getitem,)) else None for x, _ in found}
    source = sources.pop()
    if sources or source is None or any(angles is None for _, angles in found):
        return node, None
    start = 0
    for x, _ in found:
        bounds = x.args[1]
        if not (isinstance(bounds, tuple) and len(bounds) == 2 and bounds[0] is Ellipsis):
            return node, None
        columns = bounds[1]
        if not isinstance(columns, slice) or columns.step not in (None, 1):
            return node, None
        if (columns.start or 0) != start:
            return node, None
        start += value_of(x).shape[-1]
    if start != value_of(source).shape[-1]:
        return node, None
    shape = torch.broadcast_shapes(*(value_of(a).shape[:-1] for _, a in found))
    graph = node.graph
    parts = []
    for _, angles in found:
        part = graph.call_method("expand", (angles, (*shape, -1)))
        part.meta["example_value"] = value_of(angles).expand(*shape, -1)
        parts.append(part)
    whole = graph.call_function(torch.cat, (parts, -1))
    whole.meta["example_value"] = torch.cat([value_of(part) for part in parts], -1)
    return source, whole


def _chunks(node: Node) -> list[Node] | None:
    """Return the tensors that a node joins along their columns."""
    if not _is(node, (torch.cat,)):
        return None
    tensors = node.args[0] if node.args else node.kwargs.get("tensors")
    axis = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    last = axis in (-1, value_of(node).dim() - 1)
    return list(tensors) if last and isinstance(tensors, list | tuple) else None


def _products(node: Node) -> list[tuple[Node, Node]]:
    """Return both orders of the operands of a product."""
    if not _is(node, MULTIPLY) or len(node.args) != 2 or node.kwargs:
        return []
    one, other = node.args
    both = isinstance(one, fx.Node) and isinstance(other, fx.Node)
    return [(one, other), (other, one)] if both else []


def _angles(node: Node, function: Any) -> Node | None:
    """Return the angles of which a node is the sine or cosine, once for each column of a pair; of
    a sine and cosine that are computed from equal angles, the same ones."""
    node = _without_cast(node)
    if not _is(node, (torch.repeat_interleave,)):
        return None
    given = {"repeats": None, "dim": None} | dict(
        zip(("input", "repeats", "dim"), node.args, strict=False)
    )
    given |= node.kwargs
    if given["repeats"] != 2 or given["dim"] not in (-1, value_of(node).dim() - 1):
        return None
    inner = _without_cast(given["input"])
    if not _is(inner, (function,)):
        return None
    angles: Node = given_arguments(inner)["input"]
    return angles


def _without_cast(node: Node) -> Node:
    """Return what a node casts from one floating dtype to another; the node itself if nothing."""
    if node.op == "call_method" and node.target == "to" and len(node.args) <= 2:
        source = node.args[0]
        if value_of(source).is_floating_point() and value_of(node).is_floating_point():
            return source
    return node


def _is_swapped(node: Node, x: Node) -> bool:
    """Return whether a node is ``x`` with the columns of each pair swapped and one negated."""
    if not (node.op == "call_method" and node.target == "flatten" and node.args[1:] == (-2,)):
        return False
    stacked = node.args[0]
    if not _is(stacked, (torch.stack,)) or (*stacked.args[1:], *stacked.kwargs.values()) != (-1,):
        return False
    first, second = stacked.args[0]
    return (
        _is(first, _NEGATE)
        and _is_every_second(first.args[0], x, 1)
        and _is_every_second(second, x, 0)
    )


def _is_every_second(node: Node, x: Node, start: int) -> bool:
    bounds = (slice(start, None, 2), *([slice(None, None, 2)] if start == 0 else []))
    return (
        _is(node, (operator.getitem,))
        and node.args[0] is x
        and any(node.args[1] == (Ellipsis, columns) for columns in bounds)
    )


def _is(node: Any, targets: tuple[Any, ...]) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets
