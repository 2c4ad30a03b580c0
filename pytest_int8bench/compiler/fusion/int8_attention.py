"""Replace attention by attention on INT8 queries and keys, in a graph or in an eager forward."""

from __future__ import annotations

import contextlib
import operator
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.nn.functional import multi_head_attention_forward, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from pytest_int8bench.compiler.fusion.nodes import (
    INT8_ATTENTION,
    QUANTIZE_HEADS,
    Node,
    given_arguments,
    subgraphs,
    value_of,
    with_value,
)
from pytest_int8bench.compiler.fusion.rotation import rotations_of
from pytest_int8bench.kernels import ops

_PARAMETERS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
# Dynamo does not look inside, nor does a mode of torch functions.
_LEFT_WHOLE = multi_head_attention_forward
#: Why calls that nobody sees are left to torch.
INSIDE = "inside nn.MultiheadAttention"
#: Columns of a head that the kernels hold in registers.
MAX_WIDTH = 128


@dataclass
class AttentionCoverage:
    """What became of the calls of ``scaled_dot_product_attention``."""

    replaced: int = 0
    """Calls that run on INT8 queries and keys."""
    left: Counter[str] = field(default_factory=Counter)
    """Calls that were left to torch, by reason."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {"int8": self.replaced, "left_out": dict(self.left)}

    def note(self, reason: str | None) -> None:
        """Count a call: replaced, or left for ``reason``."""
        if reason is None:
            self.replaced += 1
        else:
            self.left[reason] += 1

    def __str__(self) -> str:
        total = self.replaced + self.left.total()
        text = f"{self.replaced} of {total} attention calls on INT8 queries and keys"
        if self.left:
            text += "; left out: " + ", ".join(f"{n} {why}" for why, n in self.left.items())
        return text


def replace_attention(module: fx.GraphModule, coverage: AttentionCoverage) -> None:
    """Replace the attention that INT8 can compute, in a graph of Dynamo and in the regions that it
    calls, in place.

    Args:
        module: what Dynamo traced.
        coverage: where to count what was replaced.
    """
    parts = [part for part in module.modules() if isinstance(part, fx.GraphModule)]
    refusals: dict[Node, str | None] = {}
    for part in parts:
        nodes = part.graph.find_nodes(op="call_function", target=scaled_dot_product_attention)
        refusals |= {node: _refusal(node) for node in nodes}
        whole = part.graph.find_nodes(op="call_function", target=_LEFT_WHOLE)
        refusals |= dict.fromkeys(whole, INSIDE)
    _count(module, refusals, coverage)
    for part in parts:
        for node in [node for node in part.graph.nodes if refusals.get(node, "") is None]:
            _replace(part.graph, node, given_arguments(node))
        part.recompile()


def _refusal(node: Node) -> str | None:
    given = given_arguments(node)
    q, k, v = (value_of(given.get(name)) for name in _PARAMETERS[:3])
    return refusal_of(q, k, v, given)


def _count(
    part: fx.GraphModule, refusals: dict[Node, str | None], coverage: AttentionCoverage
) -> None:
    """Count the calls in a graph, and in the regions it calls as often as it does."""
    for node in part.graph.nodes:
        if node in refusals:
            coverage.note(refusals[node])
        for called in subgraphs(part, node):
            _count(called, refusals, coverage)


def _replace(graph: fx.Graph, node: Node, given: dict[str, Any]) -> None:
    q, k, v = (given[name] for name in ("query", "key", "value"))
    scale = _scale(value_of(q), given)
    dtype = value_of(node).dtype
    with graph.inserting_before(node):
        if value_of(v).dtype != dtype:  # autocast does not see into the operator
            v = with_value(graph.call_method("to", (v, dtype)), value_of(v).to(dtype))
        operands: tuple[Any, ...] = (q, k, "none", [], [])
        if (both := rotations_of(q, k, node)) is not None:
            (q, k), turns = (one.x for one in both), (list(one.turn) for one in both)
            operands = (q, k, both[0].kind, *turns)
        whole = graph.call_function(QUANTIZE_HEADS, operands)
        parts = [graph.call_function(operator.getitem, (whole, i)) for i in range(4)]
        for part, value in zip(parts, QUANTIZE_HEADS(*fx.map_arg(operands, value_of)), strict=True):
            with_value(part, value)
        out = graph.call_function(INT8_ATTENTION, (*parts, v, scale))
    values = (*map(value_of, parts), value_of(v), scale)
    out.meta = dict(node.meta) | {"example_value": INT8_ATTENTION(*values)}
    node.replace_all_uses_with(out)
    graph.erase_node(node)


def _scale(q: Any, given: dict[str, Any]) -> float:
    scale = given.get("scale")
    return float(q.shape[-1] ** -0.5 if scale is None else scale)


def refusal_of(q: Any, k: Any, v: Any, given: Mapping[str, Any]) -> str | None:
    """Return why INT8 cannot compute a call, None if it can.

    Args:
        q: the queries.
        k: the keys.
        v: the values.
        given: the other arguments of ``scaled_dot_product_attention``, by name.
    """
    if not all(isinstance(x, torch.Tensor) and x.dim() == 4 for x in (q, k, v)):
        return "without a batch and heads"
    if given.get("attn_mask") is not None:
        return "with a mask"
    if given.get("is_causal"):
        return "causal"
    if given.get("dropout_p"):
        return "with dropout"
    if isinstance(given.get("scale"), fx.Node):
        return "with a scale that is computed"
    width = q.shape[-1]
    if v.shape[-1] != width or width > MAX_WIDTH or width % 2:
        return f"of heads with {max(width, v.shape[-1])} columns"
    batches = {x.shape[0] for x in (q, k, v)}
    if len(batches) > 1 or k.shape[1:3] != v.shape[1:3] or 0 in (*q.shape, *k.shape):
        return "of shapes that are broadcast, or empty"
    if q.shape[1] % k.shape[1] or (q.shape[1] != k.shape[1] and not given.get("enable_gqa")):
        return "of shapes that are broadcast, or empty"
    if not all(x.is_floating_point() and x.itemsize <= 4 for x in (q, k, v)):
        return f"in {str(q.dtype).removeprefix('torch.')}"
    return None


def eager_attention(
    coverage: AttentionCoverage | None,
) -> contextlib.AbstractContextManager[object]:
    """Return the context for eager calls: attention in INT8, counted in ``coverage``, or as it is
    where that is None."""
    return contextlib.nullcontext() if coverage is None else EagerInt8Attention(coverage)


class EagerInt8Attention(TorchFunctionMode):
    """Runs attention on INT8 queries and keys where eager code calls it.

    Args:
        coverage: where to count what was replaced.
    """

    def __init__(self, coverage: AttentionCoverage) -> None:
        super().__init__()
        self._coverage = coverage

    def refusal(self, q: Any, k: Any, v: Any, given: Mapping[str, Any]) -> str | None:
        """Return why a call is left to torch, None if it runs in INT8."""
        return refusal_of(q, k, v, given)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = dict(zip(_PARAMETERS, args, strict=False)) | (kwargs or {})
        if func is _LEFT_WHOLE:
            self._coverage.note(INSIDE)
        if func is not scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        q, k, v = (given[name] for name in _PARAMETERS[:3])
        reason = self.refusal(q, k, v, given)
        self._coverage.note(reason)
        if reason is not None:
            return func(*args, **(kwargs or {}))
        if torch.is_autocast_enabled(q.device.type):
            v = v.to(torch.get_autocast_dtype(q.device.type))
        return ops.int8_attention(*ops.quantize_heads(q, k), v, _scale(q, given))
