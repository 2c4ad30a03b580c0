"""Launches of the Triton kernels: what a kernel is called with, but for its tensors."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from pytest_int8bench.kernels import device as kernels_device
from pytest_int8bench.kernels import precompile, tile_types
from pytest_int8bench.kernels import tiles as kernels_tiles
from pytest_int8bench.kernels.schema import ACTIVATIONS, NORMS
from pytest_int8bench.kernels.tile_types import (
    SPECIALIZED_TILE,
    Problem,
    Product,
    Specialized,
)
from pytest_int8bench.kernels.triton import dequantize, int8_matmul, quantize_rows

#: Weights that one launch dequantizes.
AT_ONCE = 4
# Of software pipelining, Triton's own number: the rows have no loop that it would apply to.
_STAGES = 3


class Launch:
    """A kernel with all that does not change from one call to the next of the same kind.

    Args:
        kernel: a function of :mod:`kernels` or :mod:`specialized`.
        programs: how many there are.
        numbers: its arguments after the tensors.
        constants: its compile-time constants.
        options: of the compiler.
        descriptors: of the first tensors, those that it reads and writes through TMA.
    """

    def __init__(
        self,
        kernel: Any,
        programs: int,
        numbers: tuple[int, ...],
        constants: dict[str, Any],
        options: dict[str, int],
        descriptors: tuple[_Described, ...] = (),
    ) -> None:
        self.kernel, self.programs, self.numbers = kernel, programs, numbers
        self.constants, self.options, self.descriptors = constants, options, descriptors
        names = kernel.arg_names[len(kernel.arg_names) - len(constants) :]
        self._values = (*numbers, *(constants[name] for name in names))
        self._run: Any = None

    def __call__(self, *tensors: Any) -> None:
        """Run it with its tensors, in the order of the kernel's parameters."""
        if self.descriptors:
            tensors = self._described(tensors)
        if self._run is not None:
            self._run(*tensors, *self._values)
            return
        precompile.finish()
        compiled = self.kernel[(self.programs,)](
            *tensors, *self.numbers, **self.constants, **self.options
        )
        if compiled is not None:  # Triton's interpreter returns none
            self._run = compiled[(self.programs, 1, 1)]

    def compile_ahead(self, dtypes: Sequence[torch.dtype | None], device: torch.device) -> None:
        """Compile the kernel in a thread, for tensors at aligned addresses.

        Args:
            dtypes: of its tensors, None for those that are not there.
            device: where it is going to run.
        """
        values = (*self.constants.values(), *self.options.values())
        key = (self.kernel, self.programs, *self.numbers, *values, *dtypes, device)
        precompile.start(key, functools.partial(self._compile, dtypes), device)

    def _compile(self, dtypes: Sequence[torch.dtype | None]) -> None:
        from triton.runtime.jit import MockTensor

        mocks = self._described([None if dtype is None else MockTensor(dtype) for dtype in dtypes])
        grid = (self.programs,)
        self.kernel.warmup(*mocks, *self.numbers, grid=grid, **self.constants, **self.options)

    def _described(self, tensors: Sequence[Any]) -> tuple[Any, ...]:
        described = [
            None if tensor is None else descriptor.of(tensor)
            for tensor, descriptor in zip(tensors, self.descriptors, strict=False)
        ]
        return (*described, *tensors[len(described) :])


class _Described(NamedTuple):
    """What a descriptor says of a tensor beside its address."""

    shape: tuple[int, int]
    strides: tuple[int, int]
    block: list[int]
    layout: Any = None
    """How a block lies in shared memory, for kernels in Gluon, which are told."""

    def of(self, tensor: torch.Tensor) -> TensorDescriptor:
        if self.layout is None:
            return _Descriptor(tensor, self.shape, self.strides, self.block)
        return _of_gluon()(tensor, self.shape, self.strides, self.block, self.layout)


class _Descriptor(TensorDescriptor):  # type: ignore[misc]
    """A descriptor of a tensor that is known to fit: Triton's checks cost as much as a launch."""

    def __post_init__(self) -> None:
        pass


@functools.cache
def _of_gluon() -> Any:
    from pytest_int8bench.kernels.triton.int8_matmul_sm90 import Descriptor

    return Descriptor


def of_rows(
    shape: tuple[int, int],
    strides: tuple[int, int],
    norm: str,
    activation: str,
    eps: float,
    keep: bool,
    there: Sequence[bool],
    device: torch.device,
) -> Launch:
    """Return the launch that quantizes rows.

    Args:
        shape: of the rows.
        strides: from row to row of the input, and of its gate.
        there: whether there are a gate, a weight, a bias and a factor.
        device: where they are.
    """
    count, columns = shape
    has_gate, has_weight, has_bias, has_factor = there
    cut = kernels_tiles.rows(count, columns, kernels_device.multiprocessors(device))
    return Launch(
        quantize_rows.quantize_rows,
        ceil(count, cut.rows),
        (count, *strides),
        {
            "EPS": eps,
            "K": columns,
            "ROWS": cut.rows,
            "BLOCK": cut.block,
            "CHUNKS": cut.chunks,
            "NORM": NORMS.index(norm),
            "ACTIVATION": ACTIVATIONS.index(activation),
            "HAS_GATE": has_gate,
            "HAS_WEIGHT": has_weight,
            "HAS_BIAS": has_bias,
            "HAS_FACTOR": has_factor,
            "KEEP": keep,
        },
        {"num_warps": cut.warps, "num_stages": _STAGES},
    )


def of_weights(sizes: Sequence[tuple[int, ...]]) -> Launch:
    """Return the launch that dequantizes weights of given sizes, at most ``AT_ONCE``."""
    rows, columns = tile_types.DEQUANTIZED_TILE
    padded = [*sizes, *[(0, 0)] * (AT_ONCE - len(sizes))]
    ends = list(itertools.accumulate(ceil(n, rows) * ceil(k, columns) for n, k in padded))
    return Launch(
        dequantize.dequantize,
        ends[-1],
        (*(n for n, _ in padded), *ends[:-1]),
        {**{f"K{i}": k for i, (_, k) in enumerate(padded)}, "ROWS": rows, "COLUMNS": columns},
        {"num_warps": 4, "num_stages": _STAGES},
    )


def of_product(
    problem: Problem,
    has_bias: bool,
    has_gamma: bool,
    kernel: str,
    stride: int,
    tile: Product | Specialized,
    device: torch.device,
) -> Launch:
    """Return the launch of a product with given tiles.

    Args:
        stride: from row to row of the residual, 0 where there is none.
    """
    if isinstance(tile, Specialized):
        assert kernel == "specialized"
        return _specialized(problem, has_bias, has_gamma, stride, tile)
    m, n, k = problem.m, problem.n, problem.k
    tiles = ceil(m, tile.bm) * ceil(n, tile.bn)
    constants: dict[str, Any] = {
        "BM": tile.bm,
        "BN": tile.bn,
        "BK": tile.bk,
        "GROUP": tile.group,
        "HAS_BIAS": has_bias,
        "HAS_GAMMA": has_gamma,
        "HAS_RESIDUAL": problem.residual,
    }
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    if kernel == "pointers":
        constants["EVEN_K"] = k % tile.bk == 0
        return Launch(
            int8_matmul.int8_product_pointers, tiles, (m, n, k, stride), constants, options
        )
    programs = tile.programs_per_sm * kernels_device.multiprocessors(device)
    constants |= {
        "PROGRAMS": programs,
        "PARTS": tile.parts,
        "FLATTEN": tile.flatten,
        "EARLY": tile.early,
    }
    part = [tile.bm, tile.bn // tile.parts]
    descriptors = (
        _Described((m, k), (k, 1), [tile.bm, tile.bk]),
        _Described((n, k), (k, 1), [tile.bn, tile.bk]),
        _Described((m, n), (n, 1), part),
        _Described((m, n), (stride or n, 1), part),
    )
    return Launch(
        int8_matmul.int8_product_tma,
        min(tiles, programs),
        (m, n, k),
        constants,
        options,
        descriptors,
    )


def _specialized(
    problem: Problem, has_bias: bool, has_gamma: bool, stride: int, shared_out: Specialized
) -> Launch:
    """Return the launch of a product by warps that have roles."""
    from pytest_int8bench.kernels.triton.int8_matmul_sm90 import int8_product_specialized, layout

    m, n, k = problem.m, problem.n, problem.k
    tile = SPECIALIZED_TILE
    depth = ceil(k, tile)
    inputs, halves = layout(8), layout(8 * problem.out_bytes)
    half = [tile, tile // 2]
    descriptors = (
        _Described((m, k), (k, 1), [tile, tile], inputs),
        _Described((n, k), (k, 1), [tile, tile], inputs),
        _Described((m, n), (n, 1), half, halves),
        _Described((m, n), (stride or n, 1), half, halves),
    )
    return Launch(
        int8_product_specialized,
        shared_out.slots * shared_out.groups,
        (m, shared_out.slots, shared_out.groups, shared_out.passes, depth),
        {
            "K_TILES": depth if shared_out.stationary else 0,
            "STAGES": shared_out.stages,
            "BUFFERS": shared_out.buffers,
            "STATIONARY": shared_out.stationary,
            "HAS_BIAS": has_bias,
            "HAS_GAMMA": has_gamma,
            "HAS_RESIDUAL": problem.residual,
        },
        {"num_warps": 4},
        descriptors,
    )


def ceil(count: int, size: int) -> int:
    """Return how many times ``size`` fits into ``count``, rounded up."""
    return -(-count // size)


Operands: TypeAlias = tuple[
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor | None,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor | None,
    torch.Tensor | None,
]


def operands_like(
    problem: Problem, has_bias: bool, has_gamma: bool, dtype: torch.dtype, device: torch.device
) -> Operands:
    """Return random operands of a product, to time it with."""
    m, n, k = problem.m, problem.n, problem.k

    def row(there: bool) -> torch.Tensor | None:
        return torch.randn(n, dtype=dtype, device=device) if there else None

    return (
        torch.randint(-127, 128, (m, k), dtype=torch.int8, device=device),
        torch.randint(-127, 128, (n, k), dtype=torch.int8, device=device),
        torch.empty((m, n), dtype=dtype, device=device),
        torch.randn((m, n), dtype=dtype, device=device) if problem.residual else None,
        torch.rand(m, device=device),
        torch.rand(n, device=device),
        row(has_bias),
        row(has_gamma),
    )
