"""Replace attention on short sequences by our kernel, in a graph or in an eager forward."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import fx
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from pytest_int8bench.attention import allowed_backends
from pytest_int8bench.compiler.fusion.int8_attention import (
    INSIDE,
    PARAMETERS,
    UNTRACED,
    AttentionCoverage,
    refusal_of,
    replace_calls,
    scale_of,
)
from pytest_int8bench.compiler.fusion.nodes import (
    SHORT_ATTENTION,
    Node,
    given_arguments,
    value_of,
    with_value,
)
from pytest_int8bench.compiler.torch_workarounds.names import CHOOSE_ATTENTION
from pytest_int8bench.kernels import ops
from pytest_int8bench.kernels.dispatch import attention_problem
from pytest_int8bench.kernels.tile_types import SHORT_ROWS

_CHOSEN = "under a backend that the model chooses"


class NothingShortError(RuntimeError):
    """Our kernel was requested but supports no attention call of the model."""

    def __init__(self, coverage: AttentionCoverage) -> None:
        left = coverage.reasons() or "it never calls scaled_dot_product_attention"
        super().__init__(
            "attention=short replaces no attention call of this model (it supports 16-bit "
            f"sequences of up to {SHORT_ROWS} tokens): {left}"
        )


def replace_short(module: fx.GraphModule, coverage: AttentionCoverage) -> None:
    """Replace the attention calls that our kernel supports, in place.

    Args:
        module: a graph of Dynamo, including its regions.
        coverage: counts replaced and remaining calls.
    """
    parts = (part for part in module.modules() if isinstance(part, fx.GraphModule))
    chooses = any(node.target is CHOOSE_ATTENTION for part in parts for node in part.graph.nodes)
    replace_calls(module, lambda node: _CHOSEN if chooses else _refusal(node), _replace, coverage)


def _refusal(node: Node) -> str | None:
    given = given_arguments(node)
    q, k, v = (value_of(given.get(name)) for name in PARAMETERS[:3])
    return short_refusal(q, k, v, given, getattr(value_of(node), "dtype", None))


def _replace(graph: fx.Graph, node: Node) -> None:
    given, dtype = given_arguments(node), value_of(node).dtype
    q, k, v = (given[name] for name in PARAMETERS[:3])
    rest = scale_of(value_of(q), given), given.get("is_causal", False)
    with graph.inserting_before(node):
        # Autocast does not apply inside the operator.
        operands = [_in_dtype(graph, operand, dtype) for operand in (q, k, v)]
        out = graph.call_function(SHORT_ATTENTION, (*operands, *rest))
    out.meta = dict(node.meta)
    with_value(out, SHORT_ATTENTION(*map(value_of, operands), *rest))
    node.replace_all_uses_with(out)
    graph.erase_node(node)


def _in_dtype(graph: fx.Graph, node: Node, dtype: torch.dtype) -> Node:
    value = value_of(node)
    if value.dtype == dtype:
        return node
    return with_value(graph.call_method("to", (node, dtype)), value.to(dtype))


def short_refusal(
    q: Any,
    k: Any,
    v: Any,
    given: dict[str, Any],
    dtype: torch.dtype | None,
    device: torch.device | None = None,
) -> str | None:
    """Return why our kernel cannot compute a call, or None if it can.

    Args:
        q: the queries.
        k: the keys.
        v: the values.
        given: the other arguments of ``scaled_dot_product_attention``, by name.
        dtype: the dtype of the computation, after autocast.
        device: the device of the computation; the device of ``q`` by default.
    """
    if reason := refusal_of(q, k, v, given, takes_causal=True):
        return reason
    sizes = (*q.shape[2:], k.shape[2])
    if not all(isinstance(size, int) for size in sizes):
        return "of dynamic length"
    if max(sizes[0], sizes[-1]) > SHORT_ROWS:
        return f"of more than {SHORT_ROWS} tokens"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"in {str(dtype).removeprefix('torch.')}"
    return attention_problem(device or q.device)


def eager_short(
    coverage: AttentionCoverage | None,
) -> contextlib.AbstractContextManager[object]:
    """Return a context in which eager attention on short sequences runs on our kernel, counted in
    ``coverage``. If that is None, the context does nothing."""
    return contextlib.nullcontext() if coverage is None else EagerShortAttention(coverage)


class EagerShortAttention(TorchFunctionMode):
    """Replace eager attention on short sequences by our kernel.

    Args:
        coverage: counts replaced and remaining calls.
    """

    def __init__(self, coverage: AttentionCoverage) -> None:
        super().__init__()
        self._coverage = coverage
        self._allowed = allowed_backends()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is UNTRACED:
            self._coverage.note(INSIDE)
        if func is not scaled_dot_product_attention:
            return func(*args, **kwargs)
        given = dict(zip(PARAMETERS, args, strict=False)) | kwargs
        q, k, v = (given[name] for name in PARAMETERS[:3])
        kind = q.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else q.dtype
        reason = short_refusal(q, k, v, given, dtype)
        if allowed_backends() != self._allowed:
            reason = _CHOSEN
        self._coverage.note(reason)
        if reason is not None:
            return func(*args, **kwargs)
        scale, causal = scale_of(q, given), given.get("is_causal", False)
        return ops.short_attention(q.to(dtype), k.to(dtype), v.to(dtype), scale, causal)
