"""Replacement for the fast path of ``nn.TransformerEncoderLayer`` with quantized weights.

In ``eval`` mode torch computes the layer in one function that takes all weights. Eager torch skips
this fast path if a weight is a tensor subclass, but Dynamo does not (torch 2.11 to 2.13:
``has_torch_function`` is False for wrapper subclasses in Dynamo).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

#: Name of the function in torch.
NAME = "_transformer_encoder_layer_fwd"
_ATTENTION, _PADDING = 0, 1  # torch's mask types; shapes (queries, keys) and (batch, keys)


def forward(
    src: torch.Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: torch.Tensor,
    qkv_bias: torch.Tensor,
    proj_weight: torch.Tensor,
    proj_bias: torch.Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm1_weight: torch.Tensor,
    norm1_bias: torch.Tensor,
    norm2_weight: torch.Tensor,
    norm2_bias: torch.Tensor,
    linear1_weight: torch.Tensor,
    linear1_bias: torch.Tensor,
    linear2_weight: torch.Tensor,
    linear2_bias: torch.Tensor,
    mask: torch.Tensor | None = None,
    mask_type: int | None = None,
) -> torch.Tensor:
    """Return the output of a layer; takes the same parameters as torch's function."""

    def attention(x: torch.Tensor) -> torch.Tensor:
        heads = F.linear(x, qkv_weight, qkv_bias).unflatten(-1, (3, num_heads, -1))
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=_allowed(mask, mask_type))
        return F.linear(mixed.transpose(1, 2).flatten(2), proj_weight, proj_bias)

    def mlp(x: torch.Tensor) -> torch.Tensor:
        hidden = F.linear(x, linear1_weight, linear1_bias)
        hidden = F.gelu(hidden) if use_gelu else F.relu(hidden)
        return F.linear(hidden, linear2_weight, linear2_bias)

    def norm1(x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, (embed_dim,), norm1_weight, norm1_bias, eps)

    def norm2(x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, (embed_dim,), norm2_weight, norm2_bias, eps)

    if norm_first:
        x = src + attention(norm1(src))
        return x + mlp(norm2(x))
    x = norm1(src + attention(src))
    return norm2(x + mlp(x))


def _allowed(mask: Any, mask_type: int | None) -> torch.Tensor | None:
    """Convert a mask for SDPA: True (boolean) or 0 (additive) where a query attends to a key."""
    if mask is None:
        return None
    allowed: torch.Tensor = ~mask if mask.dtype == torch.bool else mask
    if mask_type == _PADDING:
        return allowed[:, None, None, :]
    return allowed[None, None] if mask_type == _ATTENTION else allowed
