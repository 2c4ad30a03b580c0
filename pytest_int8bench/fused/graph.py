"""Joining the fused operators with what stands around them, in the graph that Dynamo made.

A norm or an activation in front of a linear layer becomes part of the pass that quantizes its
rows, layers that share an input become one product, and a layer scale and a residual behind a
layer become part of the product. The patterns are those of the graph, not of a model: whatever
does not fit stays as it is, and runs as it did.
"""

from __future__ import annotations

import functools
import inspect
import operator
from typing import Any, TypeAlias

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.nn import functional as F

from pytest_int8bench.fused import operators as operators  # registers them

# An fx.Node, whose arguments are typed as anything that a graph can hold.
Node: TypeAlias = Any

_QUANTIZE = torch.ops.int8bench.quantize_rows.default
_LINEAR = torch.ops.int8bench.linear.default
# Positions in the operators' arguments.
_X, _FACTOR, _KEEP = 0, 7, 8
_WEIGHTS, _SCALES, _BIASES, _GAMMA, _RESIDUAL, _DTYPE = 2, 3, 4, 5, 6, 7

_ADD = (operator.add, torch.add)
_MULTIPLY = (operator.mul, torch.mul)
_MUTATING = {operator.setitem, operator.delitem} | {
    getattr(operator, "i" + name)
    for name in (
        *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul"),
        *("and", "or", "xor", "lshift", "rshift"),
    )
}
_NORMS: dict[Any, str] = {
    F.layer_norm: "layer",
    torch.layer_norm: "layer",
    F.rms_norm: "rms",
    torch.rms_norm: "rms",
}
_GELU = torch._C._nn.gelu
# Of built-in functions, which do not tell them.
_PARAMETERS: dict[Any, tuple[str, ...]] = {
    _GELU: ("input", "approximate"),
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
# Operators that read any tensor by its strides, and return new ones.
_READERS = {
    ("call_method", name)
    for name in (
        *("contiguous", "clone", "to", "float", "half", "bfloat16", "type_as", "size"),
        *("add", "sub", "mul", "div", "neg", "abs", "pow", "square", "matmul", "softmax"),
        *("mean", "sum", "norm", "sin", "cos", "rsqrt"),
    )
} | {
    ("call_function", function)
    for function in (
        *(operator.add, operator.sub, operator.mul, operator.truediv, operator.neg),
        *(operator.pow, operator.matmul, torch.add, torch.sub, torch.mul, torch.div, torch.neg),
        *(torch.matmul, torch.bmm, torch.baddbmm, torch.einsum, torch.cat, torch.stack),
        *(torch.softmax, torch.sin, torch.cos, F.softmax, F.normalize, F.silu, F.relu, _GELU),
        *(F.scaled_dot_product_attention, *_NORMS, _QUANTIZE, _LINEAR),
    )
}
_ACTIVATIONS: dict[Any, str] = {
    F.silu: "silu",
    F.relu: "relu",
    torch.relu: "relu",
}


def fuse(module: fx.GraphModule) -> fx.GraphModule:
    """Join operators in the graph of ``module``, and in those of the regions it calls, in place."""
    for part in module.modules():
        if isinstance(part, fx.GraphModule) and _has_linear(part.graph):
            graph = part.graph
            _drop_inactive_dropout(graph)
            _share_quantization(graph)
            _join_products(graph)
            _absorb_scale_and_residual(graph)
            _absorb_norms_and_activations(graph)
            _erase_unused(graph)
            graph.lint()
            part.recompile()
    return module


class FusingInductor(torch._TorchCompileInductorWrapper):
    """Backend of ``torch.compile``: :func:`fuse`, then Inductor.

    Args:
        mode: the mode of ``torch.compile``.
        dynamic: as in ``torch.compile``.
    """

    def __init__(self, mode: str, dynamic: bool | None) -> None:
        super().__init__(mode, None, dynamic)  # type: ignore[no-untyped-call]

    def __call__(self, model_: Any, inputs_: Any, **kwargs: Any) -> Any:
        fuse(model_)
        _check_regions(model_)
        return super().__call__(model_, inputs_, **kwargs)  # type: ignore[no-untyped-call]


def _check_regions(module: fx.GraphModule) -> None:
    """Raise if a region returns a view from the middle of a tensor: Inductor adds its offset twice
    and reads what lies behind (``InvokeSubgraph.create`` of torch 2.13)."""
    for part in module.modules():
        if part is module or not isinstance(part, fx.GraphModule):
            continue
        inputs = [_value(node) for node in part.graph.find_nodes(op="placeholder")]
        mode = next((value.fake_mode for value in inputs if isinstance(value, FakeTensor)), None)
        if mode is None:
            continue
        FakeTensorProp(part, mode).propagate_dont_convert_inputs(*inputs)
        for node in part.graph.output_node().all_input_nodes:
            value = node.meta.get("val")
            if isinstance(value, torch.Tensor) and value.storage_offset() != 0:
                raise RuntimeError("a block returns a view from the middle of a tensor")


def _has_linear(graph: fx.Graph) -> bool:
    return any(node.target is _LINEAR for node in graph.nodes)


def _erase_unused(graph: fx.Graph) -> None:
    """Erase what joining left without a reader. Not all that nobody reads: torch takes calls that
    write to a tensor, and whose return value is not used, for dead."""
    for node in reversed(graph.nodes):
        ours = node.target in (_QUANTIZE, _LINEAR, operator.getitem)
        if not node.users and (ours or _activation_name(node) is not None):
            graph.erase_node(node)


def _drop_inactive_dropout(graph: fx.Graph) -> None:
    """Take out dropout that does nothing in ``eval`` mode: it stands between operators."""
    for node in list(graph.nodes):
        if node.target is not F.dropout:
            continue
        given = _given(node)
        if not given.get("training", True) or given.get("p", 0.5) == 0:
            node.replace_all_uses_with(given["input"])
            graph.erase_node(node)


def _share_quantization(graph: fx.Graph) -> None:
    """Quantize an input that several layers take once."""
    first: dict[tuple[Any, ...], Node] = {}
    for node in list(graph.nodes):
        if node.target is _QUANTIZE:
            kept = first.setdefault(node.args, node)
            if kept is not node and _nothing_mutated(kept, node):
                _replace_outputs(node, kept)


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
    written = any(map(_writes, graph.nodes))
    groups: dict[tuple[Any, ...], list[Node]] = {}
    for node in graph.nodes:
        if node.target is _LINEAR and node.args[_GAMMA] is None and node.args[_RESIDUAL] is None:
            groups.setdefault((*node.args[:2], node.args[_DTYPE]), []).append(node)
    for nodes in groups.values():
        if len(nodes) < 2:
            continue
        sizes = [_value(weight).shape[0] for node in nodes for weight in node.args[_WEIGHTS]]
        lists = [
            [item for node in nodes for item in node.args[position]]
            for position in (_WEIGHTS, _SCALES, _BIASES)
        ]
        operands = {item for part in lists for item in part if isinstance(item, fx.Node)}
        if not all(_moved_before(operand, nodes[0]) for operand in operands):
            continue
        with graph.inserting_before(nodes[0]):
            args = (*nodes[0].args[:2], *lists, None, None, nodes[0].args[_DTYPE])
            whole = graph.call_function(_LINEAR, args)
            parts = graph.call_function(torch.split, (whole, sizes), {"dim": -1})
            columns = [graph.call_function(operator.getitem, (parts, i)) for i in range(len(nodes))]
        for node, column in zip(nodes, columns, strict=True):
            column.meta = dict(node.meta)
            node.replace_all_uses_with(column)
            graph.erase_node(node)
            # A column of the joined rows is not dense, as the layer's output was.
            views = None if written else _views_read_by_strides(column)
            if views is None:
                with graph.inserting_after(column):
                    dense = graph.call_method("contiguous", (column,))
                dense.meta = dict(node.meta)
                for user in list(column.users):
                    if user is not dense:
                        user.replace_input_with(column, dense)
                continue
            for view in views:
                if view.target == "view":
                    view.target = "reshape"


def _views_read_by_strides(node: Node) -> list[Node] | None:
    """Return all views of ``node``, or None if something else reads one of them than what is known
    to go by strides: a kernel may have been promised rows without gaps."""
    views: list[Node] = []
    for user in node.users:
        dtypes = any(isinstance(argument, torch.dtype) for argument in user.args)
        if (user.op, user.target) in _VIEWS and not dtypes:
            inner = _views_read_by_strides(user)
            if inner is None:
                return None
            views += [user, *inner]
        elif (user.op, user.target) not in _READERS:
            return None
    return views


def _moved_before(operand: Node, node: Node) -> bool:
    """Move a layer's rows of a block to before ``node``, if they are not there; say whether they
    are."""
    if operand < node:
        return True
    if operand.target is not operator.getitem or not operand.args[0] < node:
        return False
    node.prepend(operand)
    return True


def _absorb_scale_and_residual(graph: fx.Graph) -> None:
    """Let products multiply with a layer scale and add a residual."""
    for node in list(graph.nodes):
        if node.target is not _LINEAR:
            continue
        user = _only_user(node)
        if user is not None and user.target in _MULTIPLY and not user.kwargs:
            gamma = _other(user, node)
            if gamma is not node and _is_row_of(gamma, node) and _same_dtype(user, node):
                node = _replaced(graph, user, node, _GAMMA, gamma)
                user = _only_user(node)
        if user is not None and user.target in _ADD and not user.kwargs:
            residual = _other(user, node)
            if node.args[_GAMMA] is not None and not _nothing_mutated(node, user):
                continue
            if _alike(residual, node) and _same_dtype(user, node):
                _replaced(graph, user, node, _RESIDUAL, residual)


def _replaced(graph: fx.Graph, user: Node, node: Node, position: int, value: Node) -> Node:
    """Replace ``user`` of the product ``node`` by a product with one argument changed."""
    args = list(node.args)
    args[position] = value
    with graph.inserting_before(user):
        product = graph.call_function(_LINEAR, tuple(args))
    product.meta = dict(user.meta)
    user.replace_all_uses_with(product)
    graph.erase_node(user)
    graph.erase_node(node)
    return product


def _absorb_norms_and_activations(graph: fx.Graph) -> None:
    """Let the pass that quantizes rows normalize or activate them first."""
    for node in list(graph.nodes):
        if node.target is not _QUANTIZE or not isinstance(node.args[_X], fx.Node):
            continue
        source = node.args[_X]
        others = [user for user in source.users if user is not node]
        start, before = source, _norm(source)
        if before is None and not others:
            start, before = _activation(source)
        if before is None or not _nothing_mutated(start, node):
            continue
        if not all(node < user for user in others):
            continue  # something reads the row before it is quantized
        with graph.inserting_before(node):
            joined = graph.call_function(_QUANTIZE, (*before, node.args[_FACTOR], bool(others)))
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
    if node.op != "call_function" or node.target not in _NORMS:
        return None
    given = _given(node)
    x = given["input"]
    layer = _NORMS[node.target] == "layer"
    if len(given["normalized_shape"]) != 1 or not _same_dtype(x, node):
        return None
    eps = given.get("eps", 1e-5 if layer else None)
    if eps is None:
        # As torch has it: that of the dtype it computes in.
        eps = torch.finfo(torch.promote_types(_value(x).dtype, torch.float32)).eps
    weight, bias = given.get("weight"), given.get("bias")
    return (x, _NORMS[node.target], "none", None, weight, bias, eps)


def _activation(node: Node) -> tuple[Node, tuple[Any, ...] | None]:
    """Return the first arguments of ``quantize_rows`` for an activation, also one that is
    multiplied with a gate, and the node that reads its input."""
    if node.op != "call_function":
        return node, None
    if node.target in _MULTIPLY and not node.kwargs:
        for source, gate in (node.args, node.args[::-1]):
            name = _activation_name(source)
            if name is not None and _only_user(source) is node and _alike(gate, source):
                x = _given(source)["input"]
                return source, (x, "none", name, gate, None, None, 0.0)
        return node, None
    name = _activation_name(node)
    if name is None:
        return node, None
    return node, (_given(node)["input"], "none", name, None, None, None, 0.0)


def _activation_name(node: Any) -> str | None:
    """Return which activation ``node`` is, if it writes to no tensor and is one that is known."""
    if not isinstance(node, fx.Node) or node.op != "call_function" or _writes(node):
        return None
    if node.target is _GELU:
        return "gelu_tanh" if _given(node).get("approximate") == "tanh" else "gelu"
    return _ACTIVATIONS.get(node.target)


def _given(node: Node) -> dict[str, Any]:
    """Return the arguments of a call of ``torch.nn.functional`` by name, those left out left
    out."""
    given: dict[str, Any] = dict(zip(_parameters(node.target), node.args, strict=False))
    return {**given, **node.kwargs}


@functools.cache
def _parameters(function: Any) -> tuple[str, ...]:
    """Return the names of the parameters of a function."""
    if function in _PARAMETERS:
        return _PARAMETERS[function]
    try:
        return tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return ("input",)


def _nothing_mutated(start: Node, end: Node) -> bool:
    """Say whether no operator between two nodes writes to a tensor: what is read at ``start`` may
    then be read at ``end``."""
    node = start.next
    while node is not end:
        if _writes(node):
            return False
        node = node.next
    return True


def _writes(node: Node) -> bool:
    """Say whether a call may write to one of its arguments."""
    if node.op not in ("call_function", "call_method"):
        return False
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return bool(target._schema.is_mutable)
    if isinstance(target, torch._ops.HigherOrderOperator):
        return True  # what is inside is not looked at
    if target in _MUTATING or node.kwargs.get("out") is not None:
        return True
    name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
    if name.endswith("_") and not name.endswith("__"):
        return True
    return node.op == "call_function" and bool(_given(node).get("inplace"))


def _only_user(node: Node) -> Node:
    users = list(node.users)
    return users[0] if len(users) == 1 else None


def _other(user: Node, node: Node) -> Any:
    """Return the other operand of ``user``; ``node`` itself where it is both."""
    left, right = user.args
    return right if left is node else left


def _value(node: Any) -> Any:
    return node.meta.get("example_value") if isinstance(node, fx.Node) else None


def _alike(one: Any, other: Any) -> bool:
    """Say whether two nodes are tensors of one shape and dtype."""
    if one is other:
        return False
    a, b = _value(one), _value(other)
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return False
    return a.dtype == b.dtype and a.shape == b.shape


def _same_dtype(one: Any, other: Any) -> bool:
    a, b = _value(one), _value(other)
    return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.dtype == b.dtype


def _is_row_of(vector: Any, node: Node) -> bool:
    value = _value(vector)
    return isinstance(value, torch.Tensor) and value.shape == _value(node).shape[-1:]
