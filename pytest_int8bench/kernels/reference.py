"""The operators of the fused backend in plain torch.

They run on devices without Triton kernels, and tests compare the kernels with them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from pytest_int8bench.kernels.schema import Four
from pytest_int8bench.kernels.tile_types import KEY_BLOCK, KEY_SAMPLE, Heads

#: Half the range of INT8. The largest magnitude of a row is scaled to it, as in torchao.
HALF_RANGE = 127.5
_TINY = 1e-36


def quantize_rows(
    x: torch.Tensor,
    norm: str,
    activation: str,
    gate: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    factor: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize rows; takes the same arguments as :func:`.ops.quantize_rows`, except ``keep``.

    Returns:
        INT8 values (..., K), FP32 scales (...), and the FP32 rows before ``factor``.
    """
    rows = activated(x.float(), activation)
    if gate is not None:
        rows = rows * gate.float()
    shape = x.shape[-1:]
    w, b = (None if part is None else part.float() for part in (weight, bias))
    if norm == "layer":
        rows = F.layer_norm(rows, shape, w, b, eps)
    elif norm == "rms":
        rows = F.rms_norm(rows, shape, w, eps)
    kept = rows
    if factor is not None:
        rows = rows * factor.float()
    peak = rows.abs().amax(-1) if rows.shape[-1] else rows.new_zeros(rows.shape[:-1])
    scale = torch.where(peak > _TINY, peak / HALF_RANGE, torch.zeros_like(peak))
    scale = torch.where(peak.isfinite(), scale, torch.full_like(peak, torch.nan))
    inverse = torch.where(scale > 0, HALF_RANGE / peak, torch.zeros_like(peak))
    levels = torch.nan_to_num((rows * inverse.unsqueeze(-1)).round(), 0, 127, -128)
    return levels.clamp(-128, 127).to(torch.int8), scale, kept


def activated(x: torch.Tensor, activation: str) -> torch.Tensor:
    """Return ``x`` after an activation of :data:`.schema.ACTIVATIONS`."""
    if activation == "gelu":
        return F.gelu(x)
    if activation == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if activation == "silu":
        return F.silu(x)
    if activation == "relu":
        return F.relu(x)
    return x


def dequantized(
    weight: torch.Tensor, weight_scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Return an INT8 weight (N, K) times its scales (N,), rounded once to ``dtype``."""
    return (weight.float() * weight_scale.unsqueeze(-1)).to(dtype)


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
    """Multiply INT8 rows by an INT8 weight; takes the same arguments as :func:`.ops.linear`.

    The matmul runs in FP64, where sums of INT8 products are exact.
    """
    out = (q.double() @ weight.double().T).float() * scale.unsqueeze(-1) * weight_scale
    if bias is not None:
        out = out + bias.float()
    if gamma is not None:
        out = out * gamma.float()
    if residual is not None:
        out = out + residual.float()
    return out.to(dtype)


def quantize_heads(
    q: torch.Tensor,
    k: torch.Tensor,
    rotation: str,
    q_turn: Sequence[torch.Tensor],
    k_turn: Sequence[torch.Tensor],
) -> Four:
    """Quantize queries and keys; same arguments and results as :func:`.ops.quantize_heads`."""
    heads = Heads.of(q, k)
    queries, keys = _pairs(q, rotation, q_turn), _pairs(k, rotation, k_turn)
    q_levels, q_scale = _levels(queries, queries.abs().amax(-1, keepdim=True))
    sample = torch.arange(KEY_SAMPLE, device=k.device) * heads.k_rows // KEY_SAMPLE
    keys = keys - keys[..., sample, :].mean(-2, keepdim=True)
    rows = heads.k_blocks * KEY_BLOCK
    blocks = F.pad(keys, (0, 0, 0, rows - heads.k_rows)).unflatten(-2, (-1, KEY_BLOCK))
    k_levels, k_scale = _levels(blocks, blocks.abs().amax((-2, -1), keepdim=True))
    norm = k_levels.float().norm(dim=-1).amax(-1) * k_scale[..., 0, 0]
    halves = (0, (heads.padded - heads.width) // 2)
    return (
        F.pad(q_levels.unflatten(-1, (2, -1)), halves).flatten(-2),
        q_scale[..., 0],
        F.pad(k_levels.flatten(-3, -2).unflatten(-1, (2, -1)), halves).flatten(-2),
        torch.stack([k_scale[..., 0, 0], norm], -1),
    )


def rotate_heads(
    heads: Sequence[torch.Tensor], rotation: str, turn: Sequence[torch.Tensor], rows_first: bool
) -> list[torch.Tensor]:
    """Rotate heads; same arguments and results as :func:`.ops.rotate_heads`."""
    return [
        empty_heads(x, rows_first).copy_(
            _pairs(x, rotation, turn).unflatten(-1, (2, -1)).mT.flatten(-2)
        )
        for x in heads
    ]


def empty_heads(x: torch.Tensor, rows_first: bool) -> torch.Tensor:
    """Return an empty tensor like ``x`` (B, H, N, D), stored as (B, N, H, D) if ``rows_first``."""
    batch, heads, rows, width = x.shape
    if not rows_first:
        return x.new_empty((batch, heads, rows, width))
    return x.new_empty((batch, rows, heads, width)).transpose(1, 2)


def _pairs(x: torch.Tensor, rotation: str, turn: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return rotated FP32 rows, with the even columns before the odd ones unless halves rotate."""
    if rotation == "halves":
        first, second = x.float().chunk(2, -1)
        cosine, sine = (part.float() for part in turn)
        return x.float() * cosine + torch.cat([-second, first], -1) * sine
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    if rotation != "none":
        angles = turn[0] if rotation == "angles" else turn[0].float() @ turn[1].float()
        sine, cosine = angles.sin(), angles.cos()
        even, odd = even * cosine - odd * sine, odd * cosine + even * sine
    return torch.cat([even, odd], -1)


def _levels(x: torch.Tensor, peak: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the INT8 values of ``x`` and their scale, which is NaN where ``peak`` is not finite.

    ``peak`` is the largest magnitude of the elements that share a scale.
    """
    scale = torch.where(peak > _TINY, peak / 127, torch.zeros_like(peak))
    scale = torch.where(peak.isfinite(), scale, torch.full_like(peak, torch.nan))
    inverse = torch.where(peak > _TINY, 127 / peak, torch.zeros_like(peak))
    return torch.nan_to_num((x * inverse).round(), 0, 127, -127).to(torch.int8), scale


def int8_attention(
    q: torch.Tensor,
    q_scale: torch.Tensor,
    k: torch.Tensor,
    k_scale: torch.Tensor,
    v: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Compute attention with exact scores; same arguments as :func:`.ops.int8_attention`."""
    group = q.shape[1] // v.shape[1]
    rows = v.shape[-2]
    k, k_scale, v = (x.repeat_interleave(group, 1) for x in (k[..., :rows, :], k_scale, v))
    # Sums of INT8 products stay below 2**24, which FP32 holds exactly.
    scores = q.float() @ k.float().transpose(-1, -2)
    each = k_scale[..., 0].repeat_interleave(KEY_BLOCK, -1)[..., None, :rows]
    weights = (scores * q_scale[..., None] * each * scale).softmax(-1)
    return (weights @ v.float()).to(v.dtype)


def short_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool
) -> torch.Tensor:
    """Compute attention; same arguments as :func:`.ops.short_attention`."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.float().repeat_interleave(group, 1) for x in (k, v))
    scores = q.float() @ k.transpose(-1, -2) * scale
    if causal:
        unseen = torch.ones_like(scores, dtype=torch.bool).triu(1)
        scores = scores.masked_fill(unseen, -torch.inf)
    return (scores.softmax(-1) @ v).to(q.dtype)
