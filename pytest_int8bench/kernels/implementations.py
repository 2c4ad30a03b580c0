"""Implementations of the operators in :mod:`.ops` for CUDA, plain torch and fake tensors."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from pytest_int8bench.kernels import dispatch, reference
from pytest_int8bench.kernels.schema import Four, Three
from pytest_int8bench.kernels.tile_types import KEY_BLOCK, Heads


def quantize_rows(x: torch.Tensor, *rest: Any) -> Three:
    *before, keep = rest
    q, scale, kept = reference.quantize_rows(x, *before)
    kept = kept.to(x.dtype).contiguous() if keep else x.new_empty(0)
    if kept.data_ptr() == x.data_ptr():  # an operator must not return an alias of its input
        kept = kept.clone()
    return q.contiguous(), scale.contiguous(), kept


def quantize_rows_on_cuda(x: torch.Tensor, *rest: Any) -> Three:
    from pytest_int8bench.kernels import cuda

    with _current_device(x.device):
        out = cuda.quantize_rows(x, *rest)
    return quantize_rows(x, *rest) if out is None else out


def quantize_rows_fake(x: torch.Tensor, *rest: Any) -> Three:
    *_, keep = rest
    q = x.new_empty(x.shape, dtype=torch.int8)
    scale = x.new_empty(x.shape[:-1], dtype=torch.float32)
    return q, scale, x.new_empty(x.shape if keep else (0,))


def linear(q: torch.Tensor, *rest: Any) -> torch.Tensor:
    return reference.linear(q, *rest).contiguous()


def linear_on_cuda(q: torch.Tensor, *rest: Any) -> torch.Tensor:
    from pytest_int8bench.kernels import cuda

    with _current_device(q.device):
        return cuda.linear(q, *rest, kernel=dispatch.matmul_kernel(q.device))


def linear_fake(
    q: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, *rest: Any
) -> torch.Tensor:
    *_, dtype = rest
    return q.new_empty((*q.shape[:-1], weight.shape[0]), dtype=dtype)


def dequantize(
    weights: list[torch.Tensor], weight_scales: list[torch.Tensor], dtype: torch.dtype
) -> list[torch.Tensor]:
    pairs = zip(weights, weight_scales, strict=True)
    return [reference.dequantized(weight, scale, dtype).contiguous() for weight, scale in pairs]


def dequantize_on_cuda(
    weights: list[torch.Tensor], weight_scales: list[torch.Tensor], dtype: torch.dtype
) -> list[torch.Tensor]:
    from pytest_int8bench.kernels import cuda

    with _current_device(weights[0].device):
        return cuda.dequantize(weights, weight_scales, dtype)


def dequantize_fake(
    weights: list[torch.Tensor], weight_scales: list[torch.Tensor], dtype: torch.dtype
) -> list[torch.Tensor]:
    return [weight.new_empty(weight.shape, dtype=dtype) for weight in weights]


def quantize_heads(q: torch.Tensor, k: torch.Tensor, *rotation: Any) -> Four:
    one, two, three, four = reference.quantize_heads(q, k, *rotation)
    return one.contiguous(), two.contiguous(), three.contiguous(), four.contiguous()


def quantize_heads_on_cuda(q: torch.Tensor, k: torch.Tensor, *rotation: Any) -> Four:
    from pytest_int8bench.kernels import cuda

    with _current_device(q.device):
        return cuda.quantize_heads(q, k, *rotation)


def quantize_heads_fake(q: torch.Tensor, k: torch.Tensor, *rotation: Any) -> Four:
    heads = Heads.of(q, k)
    blocks = heads.k_blocks
    return (
        q.new_empty((*q.shape[:3], heads.padded), dtype=torch.int8),
        q.new_empty(q.shape[:3], dtype=torch.float32),
        k.new_empty((*k.shape[:2], blocks * KEY_BLOCK, heads.padded), dtype=torch.int8),
        k.new_empty((*k.shape[:2], blocks, 2), dtype=torch.float32),
    )


def rotate_heads_on_cuda(heads: list[torch.Tensor], *rest: Any) -> list[torch.Tensor]:
    from pytest_int8bench.kernels import cuda

    with _current_device(heads[0].device):
        return cuda.rotate_heads(heads, *rest)


def rotate_heads_fake(
    heads: list[torch.Tensor], rotation: str, turn: list[torch.Tensor], rows_first: bool
) -> list[torch.Tensor]:
    return [reference.empty_heads(x, rows_first) for x in heads]


def int8_attention(q: torch.Tensor, *rest: Any) -> torch.Tensor:
    return _rows_first(reference.int8_attention(q, *rest))


def _rows_first(out: torch.Tensor) -> torch.Tensor:
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def int8_attention_on_cuda(q: torch.Tensor, *rest: Any) -> torch.Tensor:
    from pytest_int8bench.kernels import cuda

    with _current_device(q.device):
        return cuda.int8_attention(q, *rest)


def int8_attention_fake(q: torch.Tensor, *rest: Any) -> torch.Tensor:
    v: torch.Tensor = rest[-2]
    batch, heads, rows, _ = q.shape
    return v.new_empty((batch, rows, heads, v.shape[-1])).transpose(1, 2)


def short_attention(q: torch.Tensor, *rest: Any) -> torch.Tensor:
    return _rows_first(reference.short_attention(q, *rest))


def short_attention_on_cuda(q: torch.Tensor, *rest: Any) -> torch.Tensor:
    from pytest_int8bench.kernels import cuda

    with _current_device(q.device):
        return cuda.short_attention(q, *rest)


def short_attention_fake(q: torch.Tensor, *rest: Any) -> torch.Tensor:
    batch, heads, rows, width = q.shape
    return q.new_empty((batch, rows, heads, width)).transpose(1, 2)


def read_weight(values: torch.Tensor, factor: torch.Tensor | None) -> torch.Tensor:
    """Return ``values * factor``, the weight that applies to an input not scaled by ``factor``."""
    return values.clone() if factor is None else (values * factor).to(values.dtype)


def read_weight_fake(values: torch.Tensor, factor: torch.Tensor | None) -> torch.Tensor:
    return torch.empty_like(values)


def _current_device(device: torch.device) -> AbstractContextManager[Any]:
    """Make ``device`` current: Triton launches on the current GPU, wherever the tensors are."""
    if device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)
