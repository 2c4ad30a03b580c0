"""Launching the Triton kernels behind the operators.

Triton looks at every argument of every call to find the kernel that was compiled for it, which
takes the host longer than the launch, and often longer than the GPU computes. Here it does so once
for each kind of call; what it found is kept as a :class:`Launch` and repeated.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from pytest_int8bench.fused import configs, kernels, reference
from pytest_int8bench.fused.configs import Problem, Product
from pytest_int8bench.fused.operators import ACTIVATIONS, NORMS, Three

#: Triton compiles for addresses in multiples of this, and TMA takes no others, nor other strides.
_ALIGNMENT = 16
#: Kinds of calls that are kept: models with a dynamic batch have one for each of its sizes.
_KEPT = 4096
_kept: dict[tuple[Any, ...], Launch] = {}

_Operands: TypeAlias = tuple[
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor | None,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor | None,
    torch.Tensor | None,
]


class Launch:
    """A kernel with all that does not change from one call to the next of the same kind.

    Args:
        kernel: a function of :mod:`kernels`.
        programs: how many there are.
        numbers: its arguments after the tensors.
        constants: its compile-time constants.
        options: of the compiler.
        blocks: blocks of the tensors that it takes as descriptors, the first ones.
    """

    def __init__(
        self,
        kernel: Any,
        programs: int,
        numbers: tuple[int | float, ...],
        constants: dict[str, Any],
        options: dict[str, int],
        blocks: tuple[list[int], ...] = (),
    ) -> None:
        self.kernel, self.programs, self.numbers = kernel, programs, numbers
        self.constants, self.options, self.blocks = constants, options, blocks
        names = kernel.arg_names[len(kernel.arg_names) - len(constants) :]
        self._values = (*numbers, *(constants[name] for name in names))
        self._run: Any = None

    def __call__(self, *tensors: Any) -> None:
        if self._run is not None:
            self._run(*tensors, *self._values)
            return
        compiled = self.kernel[(self.programs,)](
            *tensors, *self.numbers, **self.constants, **self.options
        )
        if compiled is not None:  # Triton's interpreter returns none
            self._run = compiled[(self.programs, 1, 1)]


class _Descriptor(TensorDescriptor):  # type: ignore[misc]
    """A descriptor of a tensor that is known to fit: Triton's checks cost as much as a launch."""

    def __post_init__(self) -> None:
        pass


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
) -> Three:
    """Run the kernel of :func:`operators.quantize_rows`; x on the current device."""
    q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    kept = torch.empty(x.shape if keep else (0,), dtype=x.dtype, device=x.device)
    if q.numel() == 0:
        return q, scale.zero_(), kept
    x, stride = _rows(x)
    other, other_stride = (x, 0) if gate is None else _rows(gate)
    vectors = [None if part is None else part.contiguous() for part in (weight, bias, factor)]
    tensors = (x, other, q, scale, *(x if part is None else part for part in vectors), kept)
    aligned = _aligned(tensors)
    key = (
        *(q.shape, stride, other_stride, x.dtype, x.get_device()),
        *(norm, activation, eps, keep, None if gate is None else gate.dtype),
        *(None if part is None else part.dtype for part in vectors),
    )
    launch = _kept.get(key) if aligned else None
    if launch is None:
        columns = q.shape[-1]
        count = q.numel() // columns
        cut = configs.rows(count, columns, configs.multiprocessors(x.device))
        launch = Launch(
            kernels.quantize_rows,
            _ceil(count, cut.rows),
            (count, stride, other_stride, eps),
            {
                "K": columns,
                "ROWS": cut.rows,
                "BLOCK": cut.block,
                "CHUNKS": cut.chunks,
                "NORM": NORMS.index(norm),
                "ACTIVATION": ACTIVATIONS.index(activation),
                "HAS_GATE": gate is not None,
                "HAS_WEIGHT": weight is not None,
                "HAS_BIAS": bias is not None,
                "HAS_FACTOR": factor is not None,
                "KEEP": keep,
            },
            {"num_warps": cut.warps},
        )
        if aligned:
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
    tile: Product | None = None,
) -> torch.Tensor:
    """Run the kernel of :func:`operators.linear`; q on the current device.

    Args:
        kernel: ``tma`` or ``pointers``; tensors that TMA cannot address take pointers.
        tile: the tiles, instead of those of :mod:`configs`.
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
    operands: _Operands = (
        q.contiguous(),
        weight.contiguous(),
        out,
        residual,
        scale.contiguous(),
        weight_scale.contiguous(),
        None if bias is None else bias.contiguous(),
        None if gamma is None else gamma.contiguous(),
    )
    aligned = _aligned(operands)
    key = (
        *(kernel, q.numel() // k, n, k, stride, dtype, q.get_device()),
        *(None if part is None else part.dtype for part in (residual, bias, gamma)),
    )
    launch = _kept.get(key) if aligned and tile is None else None
    if launch is None:
        problem = Problem(q.numel() // k, n, k, out.element_size(), residual is not None)
        if kernel == "tma" and not (aligned and _tma_addressable(operands, problem, stride)):
            kernel = "pointers"
        recording = q.is_cuda and torch.cuda.is_current_stream_capturing()
        chosen = tile or configs.product(
            problem,
            kernel,
            q.device,
            None if recording else lambda one: _seconds(operands, problem, kernel, stride, one),
        )
        launch = _product(operands, problem, kernel, stride, chosen)
        # While a CUDA graph is recorded, the tiles may be a guess.
        if aligned and tile is None and not recording:
            _keep(key, launch)
    _run_product(launch, operands, stride)
    return out


def _product(
    operands: _Operands, problem: Problem, kernel: str, stride: int, tile: Product
) -> Launch:
    """Return the launch of a product with given tiles."""
    _, _, _, residual, _, _, bias, gamma = operands
    m, n, k = problem.m, problem.n, problem.k
    tiles = _ceil(m, tile.bm) * _ceil(n, tile.bn)
    constants: dict[str, Any] = {
        "BM": tile.bm,
        "BN": tile.bn,
        "BK": tile.bk,
        "GROUP": tile.group,
        "HAS_BIAS": bias is not None,
        "HAS_GAMMA": gamma is not None,
        "HAS_RESIDUAL": residual is not None,
    }
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    if kernel == "pointers":
        constants["EVEN_K"] = k % tile.bk == 0
        return Launch(kernels.int8_product_pointers, tiles, (m, n, k, stride), constants, options)
    programs = tile.programs_per_sm * configs.multiprocessors(operands[0].device)
    constants |= {
        "PROGRAMS": programs,
        "PARTS": tile.parts,
        "FLATTEN": tile.flatten,
        "EARLY": tile.early,
    }
    part = [tile.bm, tile.bn // tile.parts]
    blocks = ([tile.bm, tile.bk], [tile.bn, tile.bk], part, part)
    return Launch(
        kernels.int8_product_tma, min(tiles, programs), (m, n, k), constants, options, blocks
    )


def _run_product(launch: Launch, operands: _Operands, stride: int) -> None:
    a, b, c, residual, row_scale, column_scale, bias, gamma = operands
    moved: tuple[Any, ...] = (a, b, c, c if residual is None else residual)
    if launch.blocks:
        m, n, k = launch.numbers
        whole = ((m, k), (k, 1)), ((n, k), (k, 1)), ((m, n), (n, 1))
        shapes = (*whole, whole[2] if residual is None else ((m, n), (stride, 1)))
        moved = tuple(
            _Descriptor(tensor, *shape, block)
            for tensor, shape, block in zip(moved, shapes, launch.blocks, strict=True)
        )
    launch(
        *moved,
        row_scale,
        column_scale,
        row_scale if bias is None else bias,
        row_scale if gamma is None else gamma,
    )


def _seconds(
    operands: _Operands, problem: Problem, kernel: str, stride: int, tile: Product
) -> float:
    """Return seconds of a product with given tiles, infinite where they do not fit."""
    from triton.errors import TritonError
    from triton.testing import do_bench

    launch = _product(operands, problem, kernel, stride, tile)
    try:
        milliseconds = do_bench(
            lambda: _run_product(launch, operands, stride), warmup=5, rep=20, return_mode="median"
        )
    except TritonError:  # too large for this GPU, or not to be compiled for it
        return math.inf
    return float(milliseconds) / 1e3


def _keep(key: tuple[Any, ...], launch: Launch) -> None:
    if len(_kept) >= _KEPT:
        _kept.clear()
    _kept[key] = launch


def _rows(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return ``x`` with adjacent columns, a copy where it must be, and the stride of its rows."""
    if x.is_contiguous():
        return x, x.shape[-1]
    rows = x.reshape(-1, x.shape[-1])
    if rows.stride(-1) != 1 and rows.shape[-1] != 1:
        rows = rows.contiguous()
    return rows, rows.stride(0)


def _aligned(tensors: tuple[torch.Tensor | None, ...]) -> bool:
    addresses = 0
    for tensor in tensors:
        if tensor is not None:
            addresses |= tensor.data_ptr()
    return addresses % _ALIGNMENT == 0


def _tma_addressable(operands: _Operands, problem: Problem, stride: int) -> bool:
    """Say whether the strides of rows are multiples of what TMA takes; none may be zero."""
    residual = operands[3]
    return (
        problem.k % _ALIGNMENT == 0
        and problem.n * problem.out_bytes % _ALIGNMENT == 0
        and (
            residual is None or (stride > 0 and stride * residual.element_size() % _ALIGNMENT == 0)
        )
    )


def _ceil(count: int, size: int) -> int:
    return -(-count // size)
