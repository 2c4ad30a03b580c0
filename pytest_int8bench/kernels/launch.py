"""Launches of Triton kernels: a kernel with all its arguments except the tensors."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from pytest_int8bench.kernels import precompile
from pytest_int8bench.kernels.tile_types import Problem

#: Triton's default number of pipeline stages, for kernels without a loop to pipeline.
DEFAULT_STAGES = 3


class Launch:
    """A kernel with all arguments except the tensors; calls of the same kind share a launch.

    Args:
        kernel: a Triton or Gluon function from :mod:`.triton`.
        programs: number of programs to launch.
        numbers: arguments that follow the tensors.
        constants: compile-time constants, by parameter name.
        options: compiler options such as ``num_warps``.
        descriptors: TMA descriptors of the first tensors, which the kernel accesses through TMA.
    """

    def __init__(
        self,
        kernel: Any,
        programs: int,
        numbers: tuple[int, ...],
        constants: dict[str, Any],
        options: dict[str, int],
        descriptors: tuple[Described, ...] = (),
    ) -> None:
        self.kernel, self.programs, self.numbers = kernel, programs, numbers
        self.constants, self.options, self.descriptors = constants, options, descriptors
        names = kernel.arg_names[len(kernel.arg_names) - len(constants) :]
        self._values = (*numbers, *(constants[name] for name in names))
        self._run: Any = None

    def __call__(self, *tensors: Any) -> None:
        """Run the kernel on tensors given in the order of its parameters."""
        if self.descriptors:
            tensors = self._described(tensors)
        if self._run is not None:
            self._run(*tensors, *self._values)
            return
        precompile.finish()
        compiled = self.kernel[(self.programs,)](
            *tensors, *self.numbers, **self.constants, **self.options
        )
        if compiled is not None:  # Triton's interpreter returns None
            self._run = compiled[(self.programs, 1, 1)]

    def compile_ahead(self, dtypes: Sequence[torch.dtype | None], device: torch.device) -> None:
        """Compile the kernel in a thread, assuming tensors at aligned addresses.

        Args:
            dtypes: of its tensors, None for each absent one.
            device: where the kernel will run.
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


class Described(NamedTuple):
    """Everything in a TMA descriptor except the address of the tensor."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block: list[int]
    layout: Any = None
    """Shared-memory layout of a block, for Gluon; None for Triton, which chooses it."""

    def of(self, tensor: torch.Tensor) -> TensorDescriptor:
        if self.layout is None:
            return _Descriptor(tensor, self.shape, self.strides, self.block)
        return _gluon_descriptor()(tensor, self.shape, self.strides, self.block, self.layout)


class _Descriptor(TensorDescriptor):  # type: ignore[misc]
    """A descriptor without Triton's checks, which take as long as a launch.

    :mod:`.dispatch` has checked the strides and addresses already.
    """

    def __post_init__(self) -> None:
        pass


@functools.cache
def _gluon_descriptor() -> Any:
    # Gluon is imported only for kernels written in it.
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor

    class Descriptor(GluonDescriptor):  # type: ignore[misc]
        def __post_init__(self) -> None:
            pass

    return Descriptor


def ceil(count: int, size: int) -> int:
    """Return ``count / size``, rounded up."""
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
    """Return random operands of a matmul, to time tiles or to compare kernels."""
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
