"""The operators of the fused backend, registered in ``torch.ops.int8bench``.

They run Triton kernels on CUDA (:mod:`.cuda`) and plain torch (:mod:`.reference`) elsewhere. They
work with ``torch.compile(fullgraph=True)`` and dynamic shapes. They support inference only: a
backward pass raises an error.

Two operators are plain torch on every device. ``read_weight`` is an operator so that it shows in
profiles. ``dequantized_linear`` is an operator so that graph passes can find the layers; compilers
decompose it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from pytest_int8bench.kernels import implementations as run
from pytest_int8bench.kernels import reference
from pytest_int8bench.kernels.schema import DEQUANTIZED_LINEAR, SCHEMAS, Four, Three

# torch.library.custom_op wraps each call in Python: it cost 30 us a call, these operators cost 8.
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
    """Apply a norm or an activation to rows, then quantize them to INT8 with one scale per row.

    Args:
        x: floating (..., K).
        norm: ``none``, ``layer`` or ``rms``.
        activation: ``none``, ``gelu``, ``gelu_tanh``, ``silu`` or ``relu``; must be ``none`` with
            a norm.
        gate: like ``x``; multiplies the activated row.
        weight: (K,) of the norm.
        bias: (K,) of the norm.
        eps: of the norm.
        factor: (K,) that multiplies the row just before it is quantized (SmoothQuant).
        keep: whether to return the row from before ``factor`` as well.

    Returns:
        INT8 values (..., K); symmetric FP32 scales (...), so that ``value * scale`` approximates
        the row; and the row in the dtype of ``x``, empty without ``keep``. The scale of a row is 0
        if the row is all zero, and NaN if it contains NaN or infinity.
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
    """Multiply INT8 rows by an INT8 weight.

    Args:
        q: INT8 (..., K).
        scale: FP32 (...), row scales.
        weight: INT8 (N, K).
        weight_scale: FP32 (N,), channel scales.
        bias: (N,) or None.
        gamma: (N,) that multiplies the result, or None.
        residual: (..., N), added last, or None.
        dtype: of the result.

    Returns:
        (..., N): ``(q @ weight.T * scale * weight_scale + bias) * gamma + residual``. The matmul
        accumulates in INT32; the epilogue computes in FP32.
    """
    out: torch.Tensor = torch.ops.int8bench.linear.default(
        q, scale, weight, weight_scale, bias, gamma, residual, dtype
    )
    return out


def dequantize(
    weights: list[torch.Tensor], weight_scales: list[torch.Tensor], dtype: torch.dtype
) -> list[torch.Tensor]:
    """Dequantize weights, up to four per kernel launch.

    Args:
        weights: INT8 (N, K) each.
        weight_scales: FP32 (N,) each.
        dtype: of the results.

    Returns:
        ``weight * weight_scale[:, None]`` (N, K) for each weight, rounded once.
    """
    out: list[torch.Tensor] = torch.ops.int8bench.dequantize.default(weights, weight_scales, dtype)
    return out


def dequantized_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Dequantize an INT8 weight and multiply floating-point rows by it.

    Called as ``torch.ops.int8bench.dequantized_linear``, it stays one node in a Dynamo graph.

    Args:
        x: floating (..., K).
        weight: INT8 (N, K).
        weight_scale: FP32 (N,).
        bias: (N,) or None.

    Returns:
        (..., N): ``x @ (weight * weight_scale[:, None]).T + bias``, computed by ``F.linear`` in the
        dtype of ``x``, to which the weight is rounded first.
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
        rotation: rotation applied to both first (RoPE): ``none``, or as in :func:`rotate_heads`.
        q_turn: rotation of the queries, like ``turn`` in :func:`rotate_heads`.
        k_turn: rotation of the keys.

    Returns:
        INT8 queries (B, H, N, P), with the even columns before the odd ones (in their original
        order if ``rotation`` is ``halves``), each half padded with zeros to a power of two; FP32
        row scales (B, H, N); INT8 keys (B, G, K, P) in the same column order, after subtracting
        the mean of a sample of the keys, with M padded with zeros to K, a multiple of 64; and FP32
        (B, G, K / 64, 2) with the scale of each block of 64 keys and the largest norm of its keys.
        A scale is NaN if its query or its block of keys contains NaN or infinity.
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
    """Rotate queries, or queries and keys, of attention (RoPE) in FP32, rounding once.

    Args:
        heads: one or two floating (B, H, N, D) of the same shape and dtype, where D is even.
        rotation: ``angles`` rotates pairs of adjacent columns by angles, ``positions`` by angles
            that are sums of positions times frequencies. ``halves``, only for
            :func:`quantize_heads`, returns
            ``x * cosines + cat(-second half of x, first half of x) * sines``.
        turn: for ``angles``, FP32 radians (B, H, N, D / 2); for ``positions``, floating positions
            (B, 1, N, T) and frequencies (1, H, T, D / 2), multiplied in FP32; for ``halves``,
            cosines and sines (B, H, N, D). Sizes may also be 1, to broadcast.
        rows_first: memory order of the result: (B, N, H, D) if true, else (B, H, N, D).

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
    """Compute attention on the queries and keys that :func:`quantize_heads` returned.

    Scores are INT8 matmuls that accumulate in INT32, softmax is computed in FP32, and its weights
    are multiplied by the values in the dtype of ``v``.

    Args:
        q: INT8 (B, H, N, P).
        q_scale: FP32 (B, H, N).
        k: INT8 (B, G, K, P).
        k_scale: FP32 (B, G, K / 64, 2).
        v: floating (B, G, M, D).
        scale: multiplies the scores.

    Returns:
        (B, H, N, D) in the dtype of ``v``, stored in the order (B, N, H, D).
    """
    out: torch.Tensor = torch.ops.int8bench.int8_attention.default(q, q_scale, k, k_scale, v, scale)
    return out


def short_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool = False
) -> torch.Tensor:
    """Compute attention for up to ``tile_types.SHORT_ROWS`` queries and keys, with FP32 softmax.

    Args:
        q: floating (B, H, N, D).
        k: (B, G, M, D) in the dtype of ``q``, where G divides H.
        v: like ``k``.
        scale: multiplies the scores.
        causal: whether query i attends only to keys 0 to i.

    Returns:
        (B, H, N, D) in the dtype of ``q``, stored in the order (B, N, H, D).
    """
    out: torch.Tensor = torch.ops.int8bench.short_attention.default(q, k, v, scale, causal)
    return out


def _no_gradient(context: Any, *gradients: torch.Tensor) -> None:
    raise RuntimeError(
        "the INT8 operators of the fused backend support inference only and have no gradient"
    )


def _register() -> None:
    for schema, in_torch, on_cuda, fake in (
        (SCHEMAS[0], run.quantize_rows, run.quantize_rows_on_cuda, run.quantize_rows_fake),
        (SCHEMAS[1], run.linear, run.linear_on_cuda, run.linear_fake),
        (SCHEMAS[2], run.dequantize, run.dequantize_on_cuda, run.dequantize_fake),
        (SCHEMAS[3], run.read_weight, run.read_weight, run.read_weight_fake),
        (SCHEMAS[4], run.quantize_heads, run.quantize_heads_on_cuda, run.quantize_heads_fake),
        (SCHEMAS[5], run.int8_attention, run.int8_attention_on_cuda, run.int8_attention_fake),
        (SCHEMAS[6], reference.rotate_heads, run.rotate_heads_on_cuda, run.rotate_heads_fake),
        (
            SCHEMAS[7],
            run.short_attention,
            run.short_attention_on_cuda,
            run.short_attention_fake,
        ),
    ):
        name = _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, in_torch, "CompositeExplicitAutograd")
        _LIBRARY.impl(name, on_cuda, "CUDA")
        torch.library.register_fake(f"int8bench::{name}", fake, lib=_LIBRARY)
        torch.library.register_autograd(f"int8bench::{name}", _no_gradient, lib=_LIBRARY)
    name = _LIBRARY.define(DEQUANTIZED_LINEAR, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, dequantized_linear, "CompositeImplicitAutograd")


# torch keeps the operators if this module is imported again: an in-process run of pytester drops
# the modules that it imported.
if not hasattr(torch.ops.int8bench, "linear"):
    _register()
