"""Helpers for nodes of Dynamo's graph, shared by the passes."""

from __future__ import annotations

import functools
import inspect
import operator
from typing import Any, TypeAlias

import torch
from torch import fx
from torch.nn import functional as F

from pytest_int8bench.compiler.torch_workarounds.names import HigherOrderOperator, OpOverload
from pytest_int8bench.kernels import ops as _ops  # noqa: F401  registers torch.ops.int8bench
from pytest_int8bench.kernels.tile_types import ALIGNMENT

# An fx.Node. Any, because the type of its arguments is the union of all that a graph can hold.
Node: TypeAlias = Any

QUANTIZE = torch.ops.int8bench.quantize_rows.default
LINEAR = torch.ops.int8bench.linear.default
DEQUANTIZE = torch.ops.int8bench.dequantize.default
QUANTIZE_HEADS = torch.ops.int8bench.quantize_heads.default
ROTATE_HEADS = torch.ops.int8bench.rotate_heads.default
INT8_ATTENTION = torch.ops.int8bench.int8_attention.default
SHORT_ATTENTION = torch.ops.int8bench.short_attention.default
DEQUANTIZED = torch.ops.int8bench.dequantized_linear.default

# Positions of weight, weight scale and bias in an operator's arguments.
_LAYER_TENSORS = {LINEAR: slice(2, 5), DEQUANTIZED: slice(1, 4)}

ADD = (operator.add, torch.add)
MULTIPLY = (operator.mul, torch.mul)
_MUTATING = {operator.setitem, operator.delitem} | {
    getattr(operator, "i" + name)
    for name in (
        *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul"),
        *("and", "or", "xor", "lshift", "rshift"),
    )
}
NORMS: dict[Any, str] = {
    F.layer_norm: "layer",
    torch.layer_norm: "layer",
    F.rms_norm: "rms",
    torch.rms_norm: "rms",
}
# Parameters of built-in functions, which inspect.signature does not support.
_PARAMETERS: dict[Any, tuple[str, ...]] = {
    F.gelu: ("input", "approximate"),
    F.scaled_dot_product_attention: (
        *("query", "key", "value", "attn_mask", "dropout_p", "is_causal"),
    ),
    torch.layer_norm: ("input", "normalized_shape", "weight", "bias", "eps"),
    torch.rms_norm: ("input", "normalized_shape", "weight", "eps"),
}
# Operators that return a view of their first argument.
_VIEWS = {
    ("call_method", name)
    for name in (
        *("reshape", "view", "transpose", "permute", "unflatten", "flatten", "unsqueeze"),
        *("squeeze", "movedim", "swapaxes", "chunk", "split", "unbind"),
    )
} | {
    ("call_function", function)
    for function in (
        *(torch.reshape, torch.transpose, torch.permute, torch.unflatten, torch.flatten),
        *(torch.unsqueeze, torch.squeeze, torch.movedim, torch.swapaxes, torch.chunk),
        *(torch.split, torch.unbind, operator.getitem),
    )
}
# Operators that may return their input, if it already has the requested dtype.
_CASTS = {
    ("call_method", name) for name in ("to", "float", "half", "bfloat16", "double", "type_as")
}
# Operators that support any strides and return new tensors.
_READERS = {
    ("call_method", name)
    for name in (
        *("contiguous", "clone", "size"),
        *("add", "sub", "mul", "div", "neg", "abs", "pow", "square", "matmul", "softmax"),
        *("mean", "sum", "norm", "sin", "cos", "rsqrt"),
    )
} | {
    ("call_function", function)
    for function in (
        *(operator.add, operator.sub, operator.mul, operator.truediv, operator.neg),
        *(operator.pow, operator.matmul, torch.add, torch.sub, torch.mul, torch.div, torch.neg),
        *(torch.matmul, torch.bmm, torch.baddbmm, torch.einsum, torch.cat, torch.stack),
        *(torch.softmax, torch.sin, torch.cos, F.softmax, F.normalize, F.silu, F.relu, F.gelu),
        *(F.scaled_dot_product_attention, *NORMS, QUANTIZE, LINEAR, DEQUANTIZED),
        *(QUANTIZE_HEADS, ROTATE_HEADS, INT8_ATTENTION, SHORT_ATTENTION),
    )
}
# The readers for whose inputs Inductor may choose another layout.
_LAYING_OUT = {
    *(torch.cat, torch.stack, torch.matmul, torch.bmm, torch.baddbmm, torch.einsum),
    *(operator.matmul, "matmul", F.scaled_dot_product_attention),
}
_ACTIVATIONS: dict[Any, str] = {
    F.silu: "silu",
    F.relu: "relu",
    torch.relu: "relu",
}


def views_read_by_strides(node: Node) -> list[Node] | None:
    """Return all views of ``node``; None if an operator that may not support strides reads one of
    them, such as a kernel that requires rows without gaps."""
    views: list[Node] = []
    for user in node.users:
        dtypes = any(isinstance(argument, torch.dtype) for argument in user.args)
        if _is_cast(user) or (_is_view(user) and not dtypes):
            inner = views_read_by_strides(user)
            if inner is None:
                return None
            views += [user, *inner]
        elif (user.op, user.target) not in _READERS:
            return None
    return views


def may_change_layout(node: Node) -> bool:
    """Return whether Inductor may leave gaps between the rows of a tensor, because it places it
    inside the output of ``torch.cat`` or ``torch.stack``, or pads it for a matmul. A kernel that
    requires rows without gaps would read wrong data (torch 2.11)."""
    while _is_view(node) or _is_cast(node):
        node = node.all_input_nodes[0]
    ours = node.target in (QUANTIZE, LINEAR, INT8_ATTENTION, SHORT_ATTENTION)
    if ours or node.op in ("placeholder", "get_attr") or _is_higher_order(node):
        return False  # Inductor does not choose their layout
    return not all(map(_keeps_layout, node.users))


def _keeps_layout(user: Node) -> bool:
    """Return whether a reader, and all readers of it if it is a view, are known to leave the layout
    of their input unchanged."""
    if _is_view(user) or _is_cast(user):
        return all(map(_keeps_layout, user.users))
    if user.op == "output" or _is_higher_order(user):
        return True
    return user.target not in _LAYING_OUT and (user.op, user.target) in _READERS


def _is_higher_order(node: Node) -> bool:
    """Return whether a node is a region or a kernel."""
    return isinstance(node.target, HigherOrderOperator)


def _is_cast(node: Node) -> bool:
    return (node.op, node.target) in _CASTS


def _is_view(node: Node) -> bool:
    """Return whether a call may return a view of its first argument and supports its strides."""
    if (node.op, node.target) in _VIEWS:
        return True
    # Torch 2.11 does not trace into einops, which reshapes and transposes.
    name = getattr(node.target, "__module__", None), getattr(node.target, "__name__", None)
    return name == ("einops.einops", "rearrange")


def activation_name(node: Any) -> str | None:
    """Return the name of the activation that ``node`` computes; None if it is not a known one or
    writes to a tensor."""
    if not isinstance(node, fx.Node) or node.op != "call_function" or writes(node):
        return None
    if node.target is F.gelu:
        return "gelu_tanh" if given_arguments(node).get("approximate") == "tanh" else "gelu"
    return _ACTIVATIONS.get(node.target)


def given_arguments(node: Node) -> dict[str, Any]:
    """Return the explicit arguments of a call of ``torch.nn.functional``, by name."""
    given: dict[str, Any] = dict(zip(_parameters(node.target), node.args, strict=False))
    return {**given, **node.kwargs}


@functools.cache
def _parameters(function: Any) -> tuple[str, ...]:
    if function in _PARAMETERS:
        return _PARAMETERS[function]
    try:
        return tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return ("input",)


def nothing_written(start: Node, end: Node) -> bool:
    """Return whether no operator between two nodes writes to a tensor, so that reads can move from
    ``start`` to ``end``."""
    node = start.next
    while node is not end:
        if writes(node):
            return False
        node = node.next
    return True


def writes(node: Node) -> bool:
    """Return whether a call may write to one of its arguments."""
    if node.op not in ("call_function", "call_method"):
        return False
    target = node.target
    if isinstance(target, OpOverload):
        return bool(target._schema.is_mutable)
    if isinstance(target, HigherOrderOperator):
        return True  # conservative: its subgraph is not inspected
    if target in _MUTATING or node.kwargs.get("out") is not None:
        return True
    name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
    if name.endswith("_") and not name.endswith("__"):
        return True
    return node.op == "call_function" and bool(given_arguments(node).get("inplace"))


def is_call(node: Any, targets: tuple[Any, ...]) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def operands_of_product(node: Node) -> list[tuple[Node, Node]]:
    """Return the operands of a product of tensors in both orders; empty for other nodes."""
    if not is_call(node, MULTIPLY) or len(node.args) != 2 or node.kwargs:
        return []
    one, other = node.args
    both = isinstance(value_of(one), torch.Tensor) and isinstance(value_of(other), torch.Tensor)
    return [(one, other), (other, one)] if both else []


def without_cast(node: Node) -> Node:
    """Return the input of a cast between floating dtypes, and any other node unchanged."""
    if _is_cast(node) and len(node.args) <= 2:
        source = node.args[0]
        before, after = value_of(source), value_of(node)
        floating = before.is_floating_point() and after.is_floating_point()
        if floating and before.device == after.device:
            return source
    return node


def only_user(node: Node) -> Node:
    users = list(node.users)
    return users[0] if len(users) == 1 else None


def other_operand(user: Node, node: Node) -> Any:
    """Return the operand of ``user`` that is not ``node``, or ``node`` if both are."""
    left, right = user.args
    return right if left is node else left


def value_of(node: Any) -> Any:
    return node.meta.get("example_value") if isinstance(node, fx.Node) else None


def with_value(node: Node, value: Any) -> Node:
    """Set the example value of a new node, and return the node."""
    node.meta["example_value"] = value
    return node


def same_value(one: Any, other: Any) -> bool:
    """Return whether two arguments are equal, because known operators compute them in the same way
    from the same nodes, and nothing writes to a tensor in between."""
    if not isinstance(one, fx.Node) or not isinstance(other, fx.Node):
        if isinstance(one, list | tuple) and type(one) is type(other):
            return len(one) == len(other) and all(map(same_value, one, other))
        return type(one) is type(other) and bool(one == other)
    if one is other:
        return True
    kind = one.op, one.target
    known = _is_view(one) or kind in _CASTS or kind in _READERS or one.target is torch.arange
    return (
        (known or kind == ("call_method", "expand"))
        and kind == (other.op, other.target)
        and one.kwargs.keys() == other.kwargs.keys()
        and nothing_written(*sorted((one, other)))
        and same_value(one.args, other.args)
        and all(same_value(value, other.kwargs[name]) for name, value in one.kwargs.items())
    )


def begins_aligned(node: Any) -> bool:
    """Return whether a tensor's offset in its storage is aligned. Return True for other values, and
    if the offset is unknown."""
    value = value_of(node)
    if not isinstance(value, torch.Tensor):
        return True
    offset = value.storage_offset()
    return not isinstance(offset, int) or offset * value.element_size() % ALIGNMENT == 0


def alike(one: Any, other: Any) -> bool:
    """Return whether two different nodes are tensors of the same shape and dtype."""
    if one is other:
        return False
    a, b = value_of(one), value_of(other)
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return False
    return a.dtype == b.dtype and a.shape == b.shape


def same_dtype(one: Any, other: Any) -> bool:
    a, b = value_of(one), value_of(other)
    return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.dtype == b.dtype


def is_row_of(vector: Any, node: Node) -> bool:
    value = value_of(vector)
    return isinstance(value, torch.Tensor) and value.shape == value_of(node).shape[-1:]


def subgraphs(part: fx.GraphModule, node: Node) -> list[fx.GraphModule]:
    """Return the graphs that a node calls, such as a region."""
    names = [str(operand.target) for operand in node.all_input_nodes if operand.op == "get_attr"]
    attributes = [getattr(part, name, None) for name in names]
    return [attribute for attribute in attributes if isinstance(attribute, fx.GraphModule)]


# -- layers -------------------------------------------------------------------------------------


def is_layer(node: Node) -> bool:
    """Return whether a node multiplies by the INT8 weight of a layer."""
    return node.target in _LAYER_TENSORS


def layer_tensors(node: Node) -> tuple[Node, ...]:
    """Return weight, weight scale and bias of a layer."""
    return tuple(node.args[_LAYER_TENSORS[node.target]])


def layer_weight(node: Node) -> Node:
    """Return the INT8 weight of a layer."""
    return layer_tensors(node)[0]


def layer_operands(node: Node) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Return the arguments of a layer before and after its tensors."""
    where = _LAYER_TENSORS[node.target]
    return tuple(node.args[: where.start]), tuple(node.args[where.stop :])


def rows_of(tensor: Node) -> tuple[Node, int, int]:
    """Return the block of which a layer's tensor is a slice, and the slice's first row and end. A
    tensor that is not a slice is its own block."""
    if tensor is None:
        return None, 0, 0
    if tensor.target is operator.getitem and isinstance(tensor.args[1], slice):
        block, rows = tensor.args
        if all(bound is None or isinstance(bound, int) for bound in (rows.start, rows.stop)):
            start, stop, step = rows.indices(value_of(block).shape[0])
            if step == 1:
                return block, start, stop
    return tensor, 0, value_of(tensor).shape[0]


def sliced(graph: fx.Graph, block: Node, start: int, stop: int) -> Node:
    """Return a node for rows of a block: the block itself if these are all its rows."""
    value = value_of(block)
    if (start, stop) == (0, value.shape[0]):
        return block
    node = graph.call_function(operator.getitem, (block, slice(start, stop)))
    node.meta["example_value"] = value[start:stop]
    return node
