"""Replace attention by attention on INT8 queries and keys, in a graph or in an eager forward."""

from __future__ import annotations

import contextlib
import operator
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.nn.functional import multi_head_attention_forward, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from pytest_int8bench.compiler.fusion.nodes import (
    INT8_ATTENTION,
    QUANTIZE_HEADS,
    SHORT_ATTENTION,
    Node,
    given_arguments,
    subgraphs,
    value_of,
    with_value,
)
from pytest_int8bench.compiler.fusion.rotation import rotations_of
from pytest_int8bench.kernels import ops
from pytest_int8bench.kernels.tile_types import SHORT_ROWS

#: Names of the first arguments of ``scaled_dot_product_attention``.
PARAMETERS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
#: Function whose attention call neither Dynamo nor a torch function mode sees.
UNTRACED = multi_head_attention_forward
#: The reason for leaving its calls to torch.
INSIDE = "inside nn.MultiheadAttention"
#: The reason for skipping calls that another pass already replaced.
SHORT = f"of up to {SHORT_ROWS} tokens, which attention=short computes"
#: The largest number of columns of a head that the kernels hold in registers.
MAX_WIDTH = 128


@dataclass
class AttentionCoverage:
    """Counts of replaced and remaining calls of ``scaled_dot_product_attention``."""

    replaced: int = 0
    """Calls that run on INT8 queries and keys."""
    left: Counter[str] = field(default_factory=Counter)
    """Calls that were left to torch, by reason."""

    def to_dict(self) -> dict[str, Any]:
        """Return the counts as JSON-serializable values."""
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
        return f"{text}; left out: {self.reasons()}" if self.left else text

    def reasons(self) -> str:
        """Return the reasons for leaving calls to torch, with counts; empty if there are none."""
        return ", ".join(f"{n} {why}" for why, n in self.left.items())


def replace_attention(module: fx.GraphModule, coverage: AttentionCoverage) -> None:
    """Replace the attention calls that can run in INT8, in place.

    Args:
        module: a graph of Dynamo, including its regions.
        coverage: counts replaced and remaining calls.
    """
    replace_calls(module, _refusal, _replace, coverage)


def replace_calls(
    module: fx.GraphModule,
    refusal: Callable[[Node], str | None],
    replace: Callable[[fx.Graph, Node], None],
    coverage: AttentionCoverage,
) -> None:
    """Replace calls of attention in place.

    Args:
        module: a graph of Dynamo, including its regions.
        refusal: returns why to keep a call, or None to replace it.
        replace: replaces a call.
        coverage: counts replaced and remaining calls.
    """
    parts = [part for part in module.modules() if isinstance(part, fx.GraphModule)]
    refusals: dict[Node, str | None] = {}
    for part in parts:
        nodes = part.graph.find_nodes(op="call_function", target=scaled_dot_product_attention)
        refusals |= {node: refusal(node) for node in nodes}
        for target, reason in ((UNTRACED, INSIDE), (SHORT_ATTENTION, SHORT)):
            left = part.graph.find_nodes(op="call_function", target=target)
            refusals |= dict.fromkeys(left, reason)
    _count(module, refusals, coverage)
    for part in parts:
        for node in [node for node in part.graph.nodes if refusals.get(node, "") is None]:
            replace(part.graph, node)
        part.recompile()


def _refusal(node: Node) -> str | None:
    given = given_arguments(node)
    q, k, v = (value_of(given.get(name)) for name in PARAMETERS[:3])
    return refusal_of(q, k, v, given)


def _count(
    part: fx.GraphModule, refusals: dict[Node, str | None], coverage: AttentionCoverage
) -> None:
    """Count the calls in a graph, and the calls in its regions once per call of the region."""
    for node in part.graph.nodes:
        if node in refusals:
            coverage.note(refusals[node])
        for called in subgraphs(part, node):
            _count(called, refusals, coverage)


def _replace(graph: fx.Graph, node: Node) -> None:
    given = given_arguments(node)
    q, k, v = (given[name] for name in ("query", "key", "value"))
    scale = scale_of(value_of(q), given)
    dtype = value_of(node).dtype
    with graph.inserting_before(node):
        if value_of(v).dtype != dtype:  # autocast does not apply inside the operator
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


def scale_of(q: Any, given: dict[str, Any]) -> float:
    """Return the factor by which a call multiplies its scores."""
    scale = given.get("scale")
    return float(q.shape[-1] ** -0.5 if scale is None else scale)


def refusal_of(
    q: Any, k: Any, v: Any, given: Mapping[str, Any], *, takes_causal: bool = False
) -> str | None:
    """Return why our kernels cannot compute a call, or None if they can.

    Args:
        q: the queries.
        k: the keys.
        v: the values.
        given: the other arguments of ``scaled_dot_product_attention``, by name.
        takes_causal: whether the kernel supports causal masking.
    """
    if not all(isinstance(x, torch.Tensor) and x.dim() == 4 for x in (q, k, v)):
        return "without batch and head dimensions"
    if given.get("attn_mask") is not None:
        return "with a mask"
    if given.get("is_causal") and not (takes_causal and given["is_causal"] is True):
        return "causal"
    if given.get("dropout_p"):
        return "with dropout"
    if isinstance(given.get("scale"), fx.Node):
        return "with a computed scale"
    width = q.shape[-1]
    if v.shape[-1] != width or width > MAX_WIDTH or width % 2:
        return f"of heads with {max(width, v.shape[-1])} columns"
    same = q.shape[0] == k.shape[0] and k.shape[:3] == v.shape[:3]
    if not same or 0 in (*q.shape, *k.shape):
        return "of broadcast or empty shapes"
    if q.shape[1] % k.shape[1] or (q.shape[1] != k.shape[1] and not given.get("enable_gqa")):
        return "of broadcast or empty shapes"
    if not all(x.is_floating_point() and x.itemsize <= 4 for x in (q, k, v)):
        return f"in {str(q.dtype).removeprefix('torch.')}"
    return None


def eager_attention(
    coverage: AttentionCoverage | None,
) -> contextlib.AbstractContextManager[object]:
    """Return a context in which eager attention runs in INT8, counted in ``coverage``. If that is
    None, the context does nothing."""
    return contextlib.nullcontext() if coverage is None else EagerInt8Attention(coverage)


class EagerInt8Attention(TorchFunctionMode):
    """Run eager attention on INT8 queries and keys.

    Args:
        coverage: counts replaced and remaining calls.
    """

    def __init__(self, coverage: AttentionCoverage) -> None:
        super().__init__()
        self._coverage = coverage

    def refusal(self, q: Any, k: Any, v: Any, given: Mapping[str, Any]) -> str | None:
        """Return why to leave a call to torch, or None to run it in INT8."""
        return refusal_of(q, k, v, given)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = dict(zip(PARAMETERS, args, strict=False)) | (kwargs or {})
        if func in (UNTRACED, SHORT_ATTENTION):
            self._coverage.note(INSIDE if func is UNTRACED else SHORT)
        if func is not scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        q, k, v = (given[name] for name in PARAMETERS[:3])
        reason = self.refusal(q, k, v, given)
        self._coverage.note(reason)
        if reason is not None:
            return func(*args, **(kwargs or {}))
        if torch.is_autocast_enabled(q.device.type):
            v = v.to(torch.get_autocast_dtype(q.device.type))
        return ops.int8_attention(*ops.quantize_heads(q, k), v, scale_of(q, given))
