"""The operators of the fused backend, as ``torch.ops.int8bench``.

All but the last have fake implementations, so that ``torch.compile(fullgraph=True)`` and dynamic
shapes accept them. They run Triton kernels on CUDA (:mod:`.cuda`) and plain torch
(:mod:`.reference`) elsewhere; all are for inference: a backward pass through them is an error.
``read_weight`` is plain torch, and an operator so that profiles show it.
``dequantized_linear`` is plain torch, which compilers see into; it is an operator so that passes
find the layers in a graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from pytest_int8bench.kernels import implementations as run
from pytest_int8bench.kernels import reference
from pytest_int8bench.kernels.schema import DEQUANTIZED_LINEAR, SCHEMAS, Four, Three

# Not torch.library.custom_op, which wraps each call in Python: that cost 30 us, these cost 8.
_LIBRARY = torch.library.Library("int8bench", "FRAGMENT")


def quantize_rows(
    x: torch.Tensor,
    norm: str = "none",
    activation: str = "none",
    gate: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 0.0,
    factor: torch.Tensor | None = None,
    keep: bool = False,
) -> Three:
    """Quantize rows to INT8, one symmetric scale each, after what stands before a linear layer.

    Args:
        x: floating (..., K).
        norm: ``none``, ``layer`` or ``rms``.
        activation: ``none``, ``gelu``, ``gelu_tanh``, ``silu`` or ``relu``; not with a norm.
        gate: like ``x``; multiplies the activated row.
        weight: (K,) of the norm.
        bias: (K,) of the norm.
        eps: of the norm.
        factor: (K,) that the row is multiplied by last (SmoothQuant).
        keep: also return the row as it was before ``factor``.

    Returns:
        INT8 values (..., K); FP32 scales (...), so that value x scale is the row; and the row in
        the dtype of ``x``, empty without ``keep``. A row that is all zero has scale 0, one that
        holds NaN or infinity has scale NaN.
    """
    out: Three = torch.ops.int8bench.quantize_rows.default(
        x, norm, activation, gate, weight, bias, eps, factor, keep
    )
    return out


def linear(
    q: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    gamma: torch.Tensor | None,
    residual: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Multiply INT8 rows with INT8 weights.

    Args:
        q: INT8 (..., K).
        scale: FP32 (...), of the rows.
        weight: INT8 (N, K).
        weight_scale: FP32 (N,).
        bias: (N,) or None.
        gamma: (N,) that the result is multiplied by.
        residual: (..., N) that is added last.
        dtype: of the result.

    Returns:
        (..., N): ``(q @ weight.T * scale * weight_scale + bias) * gamma + residual``, computed in
        INT32 and FP32.
    """
    out: torch.Tensor = torch.ops.int8bench.linear.default(
        q, scale, weight, weight_scale, bias, gamma, residual, dtype
    )
    return out


def dequantize(
    weights: list[torch.Tensor], weight_scales: list[torch.Tensor], dtype: torch.dtype
) -> list[torch.Tensor]:
    """Dequantize weights, several in one pass over memory.

    Args:
        weights: INT8 (N, K) each.
        weight_scales: FP32 (N,) each.
        dtype: of the results.

    Returns:
        For each, ``weight * weight_scale`` (N, K), rounded once.
    """
    out: list[torch.Tensor] = torch.ops.int8bench.dequantize.default(weights, weight_scales, dtype)
    return out


def dequantized_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Multiply floating-point rows with an INT8 weight that is dequantized before; as
    ``torch.ops.int8bench.dequantized_linear`` it stays one node in a graph of Dynamo.

    Args:
        x: floating (..., K).
        weight: INT8 (N, K).
        weight_scale: FP32 (N,).
        bias: (N,) or None.

    Returns:
        (..., N): ``x @ (weight * weight_scale).T + bias``, the weight rounded to the dtype of
        ``x``, in which the library of the device multiplies.
    """
    return F.linear(x, reference.dequantized(weight, weight_scale, x.dtype), bias)


def quantize_heads(
    q: torch.Tensor,
    k: torch.Tensor,
    rotation: str = "none",
    q_turn: Sequence[torch.Tensor] = (),
    k_turn: Sequence[torch.Tensor] = (),
) -> Four:
    """Quantize the queries and keys of attention.

    Args:
        q: floating (B, H, N, D), where D is even.
        k: floating (B, G, M, D), where G divides H.
        rotation: how both are rotated before (RoPE): ``none``, or as in :func:`rotate_heads`.
        q_turn: by what queries are rotated.
        k_turn: by what keys are rotated.

    Returns:
        INT8 queries (B, H, N, P), even columns before odd ones (in their order, where halves are
        rotated), each half padded with zeros to a power of two; FP32 scales (B, H, N); INT8 keys
        (B, G, K, P) in the same order, less a mean over some keys, M padded with zeros to blocks of
        64; FP32 (B, G, K / 64, 2): the scale of a block, and the largest norm of its keys. Scales
        are NaN where a query or a block of keys holds NaN or infinity.
    """
    out: Four = torch.ops.int8bench.quantize_heads.default(
        q, k, rotation, list(q_turn), list(k_turn)
    )
    return out


def rotate_heads(
    heads: Sequence[torch.Tensor],
    rotation: str,
    turn: Sequence[torch.Tensor],
    rows_first: bool = True,
) -> list[torch.Tensor]:
    """Rotate queries, or queries and keys, of attention (RoPE), computed in FP32 and rounded once.

    Args:
        heads: one or two floating (B, H, N, D) of one shape and dtype, where D is even.
        rotation: ``angles`` rotates adjacent columns by angles, ``positions`` by angles that are
            sums of positions times frequencies. ``halves``, for :func:`quantize_heads` only,
            multiplies by cosines, and ``cat(-second half, first half)`` by sines.
        turn: FP32 angles in radians (B, H, N, D / 2); floating positions (B, 1, N, T) and
            frequencies (1, H, T, D / 2), computed with in FP32; or cosines and sines (B, H, N, D).
            Other sizes may be 1.
        rows_first: the heads of a row stand beside each other in memory; the rows of a head, if
            not.

    Returns:
        The rotated heads in their dtype.
    """
    out: list[torch.Tensor] = torch.ops.int8bench.rotate_heads.default(
        list(heads), rotation, list(turn), rows_first
    )
    return out


def int8_attention(
    q: torch.Tensor,
    q_scale: torch.Tensor,
    k: torch.Tensor,
    k_scale: torch.Tensor,
    v: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Attend with what :func:`quantize_heads` returned: scores of INT8 products summed in INT32,
    softmax in FP32, weights and values multiplied in the dtype of ``v``.

    Args:
        q: INT8 (B, H, N, P).
        q_scale: FP32 (B, H, N).
        k: INT8 (B, G, K, P).
        k_scale: FP32 (B, G, K / 64, 2).
        v: floating (B, G, M, D).
        scale: that the scores are multiplied by.

    Returns:
        (B, H, N, D) in the dtype of ``v``; in memory, heads stand beside each other.
    """
    out: torch.Tensor = torch.ops.int8bench.int8_attention.default(q, q_scale, k, k_scale, v, scale)
    return out


def short_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool = False
) -> torch.Tensor:
    """Attend to short sequences, of up to ``tile_types.SHORT_ROWS`` queries and keys, with softmax
    in FP32.

    Args:
        q: floating (B, H, N, D).
        k: like ``q`` (B, G, M, D), where G divides H.
        v: like ``k``.
        scale: that the scores are multiplied by.
        causal: a query sees the keys up to its own number only.

    Returns:
        (B, H, N, D) in the dtype of ``q``; in memory, heads stand beside each other.
    """
    out: torch.Tensor = torch.ops.int8bench.short_attention.default(q, k, v, scale, causal)
    return out


def _no_gradient(context: Any, *gradients: torch.Tensor) -> None:
    raise RuntimeError(
        "INT8 operators of the fused backend are for inference: they have no gradient"
    )


def _register() -> None:
    for schema, anywhere, on_cuda, of_fakes in (
        (SCHEMAS[0], run.quantize_rows, run.quantize_rows_on_cuda, run.quantize_rows_of_fakes),
        (SCHEMAS[1], run.linear, run.linear_on_cuda, run.linear_of_fakes),
        (SCHEMAS[2], run.dequantize, run.dequantize_on_cuda, run.dequantize_of_fakes),
        (SCHEMAS[3], run.read_weight, run.read_weight, run.read_weight_of_fakes),
        (SCHEMAS[4], run.quantize_heads, run.quantize_heads_on_cuda, run.quantize_heads_of_fakes),
        (SCHEMAS[5], run.int8_attention, run.int8_attention_on_cuda, run.int8_attention_of_fakes),
        (SCHEMAS[6], reference.rotate_heads, run.rotate_heads_on_cuda, run.rotate_heads_of_fakes),
        (
            SCHEMAS[7],
            run.short_attention,
            run.short_attention_on_cuda,
            run.short_attention_of_fakes,
        ),
    ):
        name = _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, anywhere, "CompositeExplicitAutograd")
        _LIBRARY.impl(name, on_cuda, "CUDA")
        torch.library.register_fake(f"int8bench::{name}", of_fakes, lib=_LIBRARY)
        torch.library.register_autograd(f"int8bench::{name}", _no_gradient, lib=_LIBRARY)
    name = _LIBRARY.define(DEQUANTIZED_LINEAR, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, dequantized_linear, "CompositeImplicitAutograd")


# The process may hold them from an import before this one: pytester forgets in its own process what
# a session imported, and torch does not.
if not hasattr(torch.ops.int8bench, "linear"):
    _register()
