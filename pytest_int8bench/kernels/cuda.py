"""Run the operators on a CUDA device, and keep the launch of each kind of call to repeat it.

Triton inspects every argument of every call to find the kernel that was compiled for it. On the
host, that takes longer than the launch, and often longer than the GPU needs to run the kernel. Here
it does so once per kind of call; the result is kept as a :class:`.launch.Launch` and repeated.
:mod:`.dispatch` decides which kernel runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from pytest_int8bench.kernels import dispatch, reference
from pytest_int8bench.kernels.launch import Launch, Operands
from pytest_int8bench.kernels.schema import Four, Three
from pytest_int8bench.kernels.tile_types import ALIGNMENT, KEY_BLOCK, Heads, Problem, Tile
from pytest_int8bench.kernels.triton.dequantize import AT_ONCE

#: Number of launches to keep: a model with a dynamic batch size has one per size and kind of call.
_KEPT = 4096
_kept: dict[tuple[Any, ...], Launch] = {}


def quantize_rows(
    x: torch.Tensor,
    norm: str,
    activation: str,
    gate: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    factor: torch.Tensor | None,
    keep: bool,
) -> Three | None:
    """Run the kernel of :func:`.ops.quantize_rows`; ``x`` must be on the current device. Return
    None if no kernel accepts rows of that length."""
    q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    kept = torch.empty(x.shape if keep else (0,), dtype=x.dtype, device=x.device)
    if q.numel() == 0:
        return q, scale.zero_(), kept
    x, stride = _rows(x)
    other, other_stride = (None, 0) if gate is None else _rows(gate)
    vectors = [None if part is None else part.contiguous() for part in (weight, bias, factor)]
    tensors = (x, other, q, scale, *vectors, kept if keep else None)
    key = (q.shape, stride, other_stride, norm, activation, eps, x.get_device(), _kinds(tensors))
    launch = _kept.get(key)
    if launch is None:
        columns = q.shape[-1]
        there = [part is not None for part in (gate, *vectors)]
        launch = dispatch.rows_launch(
            (q.numel() // columns, columns),
            (stride, other_stride),
            norm,
            activation,
            eps,
            keep,
            there,
            x.device,
        )
        if launch is None:
            return None
        _keep(key, launch)
    launch(*tensors)
    return q, scale, kept


def linear(
    q: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    gamma: torch.Tensor | None,
    residual: torch.Tensor | None,
    dtype: torch.dtype,
    *,
    kernel: str,
    tile: Tile | None = None,
) -> torch.Tensor:
    """Run a kernel of :func:`.ops.linear`; ``q`` must be on the current device.

    Args:
        kernel: the name of the preferred kernel; if it does not accept the operands, the next one
            that does runs instead.
        tile: the tiles to use instead of those that :mod:`.tiles` chooses.
    """
    n, k = weight.shape
    out = torch.empty((*q.shape[:-1], n), dtype=dtype, device=q.device)
    if out.numel() == 0:
        return out
    if k == 0:
        return reference.linear(q, scale, weight, weight_scale, bias, gamma, residual, dtype)
    stride = 0
    if residual is not None:
        residual, stride = _rows(residual)
    operands: Operands = (
        q.contiguous(),
        weight.contiguous(),
        out,
        residual,
        scale.contiguous(),
        weight_scale.contiguous(),
        None if bias is None else bias.contiguous(),
        None if gamma is None else gamma.contiguous(),
    )
    key = (kernel, q.numel() // k, n, k, stride, q.get_device(), _kinds(operands))
    launch = _kept.get(key) if tile is None else None
    if launch is None:
        problem = Problem(q.numel() // k, n, k, out.element_size(), residual is not None)
        kernels = dispatch.accepting(
            kernel, q.device, problem, stride, residual, dtype, _aligned(operands[:4])
        )
        what = problem, bias is not None, gamma is not None, stride
        recording = q.is_cuda and torch.cuda.is_current_stream_capturing()
        if tile is not None:
            launch = kernels[0].launch(*what, tile, q.device)
        else:
            timed = None if recording else lambda: operands
            launch = dispatch.matmul_launch(kernels, q.device, *what, timed)
        # Do not keep tiles chosen while a CUDA graph is recorded: they may be a guess.
        if tile is None and not recording:
            _keep(key, launch)
    launch(*operands)
    return out


def dequantize(
    weights: Sequence[torch.Tensor], scales: Sequence[torch.Tensor], dtype: torch.dtype
) -> list[torch.Tensor]:
    """Run the kernel of :func:`.ops.dequantize`; the tensors must be on the current device."""
    outs = [torch.empty(weight.shape, dtype=dtype, device=weight.device) for weight in weights]
    whole = [
        (weight.contiguous(), scale.contiguous(), out)
        for weight, scale, out in zip(weights, scales, outs, strict=True)
        if out.numel()
    ]
    for start in range(0, len(whole), AT_ONCE):
        there = whole[start : start + AT_ONCE]
        none = [None] * 3 * (AT_ONCE - len(there))
        tensors = [*(tensor for part in there for tensor in part), *none]
        sizes = tuple(tuple(out.shape) for _, _, out in there)
        key = ("dequantize", sizes, there[0][2].get_device(), _kinds(tensors))
        launch = _kept.get(key)
        if launch is None:
            launch = dispatch.weights_launch(sizes, weights[0].device)
            _keep(key, launch)
        launch(*tensors)
    return outs


def quantize_heads(
    q: torch.Tensor,
    k: torch.Tensor,
    rotation: str,
    q_turn: Sequence[torch.Tensor],
    k_turn: Sequence[torch.Tensor],
) -> Four:
    """Run the kernel of :func:`.ops.quantize_heads`; the tensors must be on the current device."""
    heads = Heads.of(q, k)
    q, k = _adjacent(q), _adjacent(k)
    q8 = torch.empty((*q.shape[:3], heads.padded), dtype=torch.int8, device=q.device)
    q_scale = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    rows = heads.k_blocks * KEY_BLOCK
    k8 = torch.empty((*k.shape[:2], rows, heads.padded), dtype=torch.int8, device=q.device)
    k_scale = torch.empty((*k.shape[:2], heads.k_blocks, 2), dtype=torch.float32, device=q.device)
    (one, other), (k_one, k_other) = _turn(q_turn, q), _turn(k_turn, k)
    tensors = (q, k, one, k_one, other, k_other, q8, q_scale, k8, k_scale)
    _launch_heads("quantize_heads", heads, rotation, q_turn, tensors, 6)
    return q8, q_scale, k8, k_scale


def rotate_heads(
    heads: Sequence[torch.Tensor], rotation: str, turn: Sequence[torch.Tensor], rows_first: bool
) -> list[torch.Tensor]:
    """Run the kernel of :func:`.ops.rotate_heads`; the tensors must be on the current device."""
    q, k = [*map(_adjacent, heads), None][:2]
    assert q is not None
    outs = [reference.empty_heads(x, rows_first) for x in heads]
    tensors = (q, k, *_turn(turn, q), *outs, None)[:6]
    _launch_heads("rotate_heads", Heads.of(q, q), rotation, turn, tensors, 5)
    return outs


def _turn(turn: Sequence[torch.Tensor], x: torch.Tensor) -> list[torch.Tensor | None]:
    """Return the two tensors that describe the rotation of ``x``, broadcast to its rows; None for
    each that is missing."""
    sizes = [x.shape[2] if part.shape[2] == 1 else -1 for part in turn]
    parts = zip(turn, sizes, strict=True)
    whole = [_adjacent(part.expand(*x.shape[:2], rows, -1)) for part, rows in parts]
    return [*whole, None, None][:2]


def _launch_heads(
    operator: str,
    heads: Heads,
    rotation: str,
    turn: Sequence[torch.Tensor],
    tensors: Sequence[torch.Tensor | None],
    count: int,
) -> None:
    """Launch a kernel that takes the strides of the first ``count`` tensors."""
    strides = tuple((0, 0, 0) if x is None else x.stride()[:3] for x in tensors[:count])
    terms = turn[0].shape[-1] if rotation == "positions" else 0
    device = next(x.device for x in tensors if x is not None)
    key = (operator, heads, rotation, terms, strides, device.index, _kinds(tensors))
    launch = _kept.get(key)
    if launch is None:
        launch = dispatch.heads_launch(operator, heads, rotation, terms, strides, device)
        _keep(key, launch)
    launch(*tensors)


def int8_attention(
    q: torch.Tensor,
    q_scale: torch.Tensor,
    k: torch.Tensor,
    k_scale: torch.Tensor,
    v: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Run the kernel of :func:`.ops.int8_attention`; the tensors must be on the current device."""
    v = _adjacent(v)
    batch, count, rows, _ = q.shape
    heads = Heads(batch, count, v.shape[1], rows, v.shape[2], v.shape[3])
    out = torch.empty((batch, rows, count, heads.width), dtype=v.dtype, device=q.device)
    tensors = (k, v, q, q_scale, k_scale, out)
    key = ("int8_attention", heads, scale, v.stride(), q.get_device(), _kinds(tensors))
    launch = _kept.get(key)
    if launch is None:
        launch = dispatch.attention_launch(
            heads, scale * math.log2(math.e), v, _aligned((k, v)), q.device
        )
        _keep(key, launch)
    launch(*tensors)
    return out.transpose(1, 2)


def short_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool
) -> torch.Tensor:
    """Run the kernel of :func:`.ops.short_attention`; the tensors must be on the current device."""
    q, k, v = map(_adjacent, (q, k, v))
    heads = Heads.of(q, k)
    out = torch.empty(
        (heads.batch, heads.q_rows, heads.heads, heads.width), dtype=q.dtype, device=q.device
    )
    tensors = (q, k, v, out)
    strides = tuple(x.stride()[:3] for x in (q, k, v))
    key = ("short_attention", heads, scale, causal, strides, q.get_device(), _kinds(tensors))
    launch = _kept.get(key)
    if launch is None:
        launch = dispatch.short_launch(heads, scale * math.log2(math.e), causal, strides, q.device)
        _keep(key, launch)
    if out.numel():
        launch(*tensors)
    return out.transpose(1, 2)


def _adjacent(x: torch.Tensor) -> torch.Tensor:
    """Return ``x`` with adjacent columns, as a copy only if necessary."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _keep(key: tuple[Any, ...], launch: Launch) -> None:
    if len(_kept) >= _KEPT:
        _kept.clear()
    _kept[key] = launch


def _rows(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return ``x`` with adjacent columns, as a copy only if necessary, and its row stride."""
    if x.is_contiguous():
        return x, x.shape[-1]
    rows = x.reshape(-1, x.shape[-1])
    if rows.stride(-1) != 1 and rows.shape[-1] != 1:
        rows = rows.contiguous()
    return rows, rows.stride(0)


def _kinds(tensors: Sequence[torch.Tensor | None]) -> tuple[Any, ...]:
    """Return the properties of tensors for which Triton compiles separate kernels: which tensors
    are given, their dtypes, and whether their addresses are aligned."""
    return tuple(
        [
            None if tensor is None else (tensor.dtype, tensor.data_ptr() % ALIGNMENT == 0)
            for tensor in tensors
        ]
    )


def _aligned(tensors: Sequence[torch.Tensor | None]) -> bool:
    return all(tensor is None or tensor.data_ptr() % ALIGNMENT == 0 for tensor in tensors)
