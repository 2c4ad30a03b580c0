"""The operators of the fused backend in plain torch.

Devices without Triton kernels run it, and tests compare the kernels with it.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

#: Half the range of INT8: the largest value of a row becomes this, as in torchao.
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
    """Return INT8 values and shape (..., K), FP32 scales (...), and the FP32 rows before
    ``factor``; the arguments are those of :func:`.ops.quantize_rows`."""
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
    """Return an INT8 weight (N, K) times its scales (N,), rounded once, to ``dtype``."""
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
    """Return the matmul of INT8 rows and INT8 weights; the arguments are those of
    :func:`.ops.linear`. Sums are exact: INT8 products in FP64."""
    out = (q.double() @ weight.double().T).float() * scale.unsqueeze(-1) * weight_scale
    if bias is not None:
        out = out + bias.float()
    if gamma is not None:
        out = out * gamma.float()
    if residual is not None:
        out = out + residual.float()
    return out.to(dtype)
