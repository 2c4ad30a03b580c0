"""Match rotary position embedding (RoPE) in a graph, and fuse it into one operator."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.nn.functional import scaled_dot_product_attention

from pytest_int8bench.compiler.fusion.nodes import (
    ADD,
    ROTATE_HEADS,
    SHORT_ATTENTION,
    Node,
    given_arguments,
    is_call,
    nothing_written,
    operands_of_product,
    same_value,
    value_of,
    without_cast,
)
from pytest_int8bench.compiler.fusion.rotation_tables import concatenated, position_tables
from pytest_int8bench.kernels import dispatch

_NEGATE = (operator.neg, torch.neg)


@dataclass(frozen=True)
class Rotation:
    """The rotation of a tensor (B, H, N, D), as arguments of :func:`.ops.rotate_heads`."""

    x: Node
    """The tensor to rotate."""
    kind: str
    """One of ``schema.ROTATIONS``."""
    turn: tuple[Node, ...]
    """The angles, positions and frequencies, or cosines and sines, depending on ``kind``."""
    first_reader: Node
    """The first operator whose inputs are read later if the rotation moves."""

    def can_move_to(self, node: Node) -> bool:
        """Return whether nothing writes to the rotation's inputs before ``node``."""
        return nothing_written(min(self.x, self.first_reader), node)


def fuse_rotations(graph: fx.Graph) -> None:
    """Rotate queries and keys of attention by one operator if there is a kernel for the device. It
    computes each sine and cosine once for both columns of a pair, and once for a query and a key
    with equal angles.

    Rotations of halves by precomputed sines and cosines stay with Inductor, whose kernel moves as
    much memory as ours would.
    """
    targets = (scaled_dot_product_attention, SHORT_ATTENTION)
    for node in [n for n in graph.nodes if n.target in targets]:
        named = node.target is scaled_dot_product_attention
        given = given_arguments(node) if named else {}
        sides = [given["query"], given["key"]] if named else list(node.args[:2])
        if not all(_is_supported(side) and list(side.users) == [node] for side in sides):
            continue
        with graph.inserting_before(node):
            found = rotations_of(sides[0], sides[1], node)
            if found is None or found[0].kind == "halves":
                continue
            if any(
                value_of(one.x).dtype != value_of(side).dtype
                for one, side in zip(found, sides, strict=True)
            ):
                continue
            together = _are_alike(*sides) and all(map(same_value, found[0].turn, found[1].turn))
            for group in [[0, 1]] if together else [[0], [1]]:
                _rotate(graph, [found[i] for i in group], [sides[i] for i in group])


def rotations_of(q: Node, k: Node, node: Node) -> tuple[Rotation, Rotation] | None:
    """Return the rotations of queries and keys if one operator can do both at ``node``, or None."""
    one, other = rotated(q), rotated(k)
    if one is None or other is None or one.kind != other.kind:
        return None
    return (one, other) if one.can_move_to(node) and other.can_move_to(node) else None


def _is_supported(node: Node) -> bool:
    value = value_of(node)
    return (
        isinstance(value, torch.Tensor)
        and value.dim() == 4
        and 0 not in value.shape
        and dispatch.fused_problem(value.device) is None
    )


def _are_alike(q: Node, k: Node) -> bool:
    one, other = value_of(q), value_of(k)
    return one.shape == other.shape and _rows_first(one) == _rows_first(other)


def _rows_first(value: torch.Tensor) -> bool:
    """Return whether the heads of a row are adjacent in memory."""
    return bool(value.stride(1) <= value.stride(2))


def _rotate(graph: fx.Graph, found: list[Rotation], sides: list[Node]) -> None:
    """Replace rotations that have equal angles with one operator."""
    tensors, turn = [one.x for one in found], list(found[0].turn)
    rest = (found[0].kind, turn, _rows_first(value_of(sides[0])))
    outs: Any = graph.call_function(ROTATE_HEADS, (tensors, *rest))
    for i, side in enumerate(sides):
        out = graph.call_function(operator.getitem, (outs, i))
        out.meta = dict(side.meta)
        side.replace_all_uses_with(out)


def rotated(node: Node) -> Rotation | None:
    """Return the rotation that a node computes, or None if it computes no rotation.

    A rotation of adjacent columns is ``x * cos(a) + stack((-x[..., 1::2], x[..., ::2]),
    -1).flatten(-2) * sin(a)``, where ``repeat_interleave(2, -1)`` repeats sine and cosine for both
    columns of a pair, or a concatenation of such rotations of parts of the columns. A rotation of
    halves is ``x * cosines + cat((-second half, first half), -1) * sines``, where all heads share a
    row of cosines and sines.
    """
    inner = without_cast(node)
    if (node.op, node.target) == ("call_method", "contiguous"):
        inner = node.args[0]
    if inner is not node:
        return rotated(inner)
    chunks = _chunks(node)
    if chunks is not None:
        return _joined(node, chunks)
    rotation = _by_angles(node)
    if rotation is None:
        return _of_halves(node)
    tables = position_tables(rotation.turn[0])
    if tables is None:
        return rotation
    return Rotation(rotation.x, "positions", tables[:2], tables[2])


def _factors_of_sum(node: Node) -> list[tuple[Node, Node, Node, Node]]:
    """Return the factors of a sum of two products, in every possible order."""
    if not is_call(node, ADD) or len(node.args) != 2 or node.kwargs:
        return []
    return [
        (*one, *other)
        for straight, crossed in (node.args, node.args[::-1])
        for one in operands_of_product(straight)
        for other in operands_of_product(crossed)
    ]


def _by_angles(node: Node) -> Rotation | None:
    for x, cosine, swapped, sine in _factors_of_sum(node):
        cosines, sines = _angles(cosine, torch.cos), _angles(sine, torch.sin)
        if cosines is None or sines is None or cosines[0] is not sines[0]:
            continue
        source, angles = _source(x), cosines[0]
        if _is_swapped(swapped, source) and _fits(source, angles):
            return Rotation(source, "angles", (angles,), min(cosines[1], sines[1]))
    return None


def _of_halves(node: Node) -> Rotation | None:
    for x, cosines, swapped, sines in _factors_of_sum(node):
        source, of = _source(x), value_of(_source(x))
        tables = value_of(cosines), value_of(sines)
        if (
            of.dim() == 4
            and of.itemsize <= 4
            and all(t.is_floating_point() and t.dim() == 4 for t in tables)
            and all(t.shape[1] == 1 and t.shape[-1] == of.shape[-1] for t in tables)
            and all(t.itemsize <= 4 and _broadcasts(t, of) for t in tables)
            and _is_half_swapped(swapped, source)
        ):
            return Rotation(source, "halves", (cosines, sines), source)
    return None


def _fits(x: Node, angles: Node) -> bool:
    """Return whether there is an FP32 angle for each pair of columns of each row."""
    value, of = value_of(angles), value_of(x)
    return (
        value.dtype == torch.float32
        and of.itemsize <= 4
        and value.dim() == of.dim()
        and value.shape[-1] * 2 == of.shape[-1]
        and _broadcasts(value, of)
    )


def _broadcasts(value: torch.Tensor, of: torch.Tensor) -> bool:
    pairs = zip(value.shape[:-1], of.shape[:-1], strict=True)
    return all(size in (1, whole) for size, whole in pairs)


def _joined(node: Node, chunks: list[Node]) -> Rotation | None:
    """Return the rotation of a whole tensor whose columns ``chunks`` rotate part by part, or
    None."""
    found = [one for chunk in chunks if (one := _by_angles(chunk)) is not None]
    sources = {one.x.args[0] if is_call(one.x, (operator.getitem,)) else None for one in found}
    source = sources.pop() if len(found) == len(chunks) else None
    if sources or source is None:
        return None
    start = 0
    for one in found:
        bounds = one.x.args[1]
        if not (isinstance(bounds, tuple) and len(bounds) == 2 and bounds[0] is Ellipsis):
            return None
        columns = bounds[1]
        if not isinstance(columns, slice) or columns.step not in (None, 1):
            return None
        if (columns.start or 0) != start:
            return None
        start += value_of(one.x).shape[-1]
    if start != value_of(source).shape[-1]:
        return None
    whole = concatenated(node.graph, [one.turn[0] for one in found], -1)
    return Rotation(source, "angles", (whole,), min(one.first_reader for one in found))


def _chunks(node: Node) -> list[Node] | None:
    """Return the tensors that a node concatenates along their columns; None for other nodes."""
    if not is_call(node, (torch.cat,)):
        return None
    tensors = node.args[0] if node.args else node.kwargs.get("tensors")
    axis = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    last = axis in (-1, value_of(node).dim() - 1)
    return list(tensors) if last and isinstance(tensors, list | tuple) else None


def _angles(node: Node, function: Any) -> tuple[Node, Node] | None:
    """Return the angles of a node that repeats their sine or cosine for both columns of each pair,
    and the operator that computes the sine or cosine; None for other nodes."""
    node = without_cast(node)
    if not is_call(node, (torch.repeat_interleave,)):
        return None
    given = {"repeats": None, "dim": None} | dict(
        zip(("input", "repeats", "dim"), node.args, strict=False)
    )
    given |= node.kwargs
    if given["repeats"] != 2 or given["dim"] not in (-1, value_of(node).dim() - 1):
        return None
    inner = without_cast(given["input"])
    return (given_arguments(inner)["input"], inner) if is_call(inner, (function,)) else None


def _source(x: Node) -> Node:
    """Return ``x`` before a cast to FP32, or ``x`` itself."""
    source = without_cast(x)
    if source is x or value_of(x).dtype != torch.float32 or value_of(source).itemsize > 4:
        return x
    return source


def _is_swapped(node: Node, x: Node) -> bool:
    """Return whether a node is ``x`` with the columns of each pair swapped and the first of them
    negated."""
    if not (node.op == "call_method" and node.target == "flatten" and node.args[1:] == (-2,)):
        return False
    stacked = node.args[0]
    if not is_call(stacked, (torch.stack,)) or (*stacked.args[1:], *stacked.kwargs.values()) != (
        -1,
    ):
        return False
    first, second = stacked.args[0]
    return (
        is_call(first, _NEGATE)
        and _is_columns(first.args[0], x, slice(1, None, 2))
        and _is_columns(second, x, slice(0, None, 2))
    )


def _is_half_swapped(node: Node, x: Node) -> bool:
    """Return whether a node is ``x`` with its halves swapped and the first of them negated."""
    chunks = _chunks(node)
    if chunks is None or len(chunks) != 2 or not is_call(chunks[0], _NEGATE):
        return False
    width = value_of(x).shape[-1]
    if not isinstance(width, int) or width % 2:
        return False
    halves = slice(width // 2, width), slice(0, width // 2)
    parts = chunks[0].args[0], chunks[1]
    return all(
        _is_columns(part, x, half) or _is_chunk(part, x, 1 - i)
        for i, (part, half) in enumerate(zip(parts, halves, strict=True))
    )


def _is_columns(node: Node, x: Node, columns: slice) -> bool:
    """Return whether a node is the slice ``columns`` of the columns of ``x``."""
    if not is_call(node, (operator.getitem,)) or _source(node.args[0]) is not x:
        return False
    bounds, width = node.args[1], value_of(x).shape[-1]
    return (
        isinstance(bounds, tuple)
        and len(bounds) == 2
        and bounds[0] is Ellipsis
        and isinstance(bounds[1], slice)
        and bounds[1].indices(width) == columns.indices(width)
    )


def _is_chunk(node: Node, x: Node, index: int) -> bool:
    """Return whether a node is half ``index`` of ``x``, from a call of ``chunk``."""
    if not is_call(node, (operator.getitem,)) or node.args[1] != index:
        return False
    whole = node.args[0]
    calls = ("call_method", "chunk"), ("call_function", torch.chunk)
    if (whole.op, whole.target) not in calls or _source(whole.args[0]) is not x:
        return False
    given = dict(zip(("chunks", "dim"), whole.args[1:], strict=False)) | whole.kwargs
    last = given.get("dim", 0) in (-1, value_of(x).dim() - 1)
    return bool(given.get("chunks") == 2 and last)
