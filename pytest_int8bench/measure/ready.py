"""What getting a model ready took, and what its output looks like."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from pytest_int8bench.measure.timing import WarmUp
from pytest_int8bench.tensors import tensors_of

Outputs: TypeAlias = tuple[tuple[tuple[int, ...], torch.dtype], ...]


@dataclass(frozen=True)
class Ready:
    """What getting a model ready took, and what its output looks like."""

    compile_s: float | None
    warm_up: WarmUp
    peak_memory_bytes: int | None
    tokens: int | None
    outputs: Outputs
    """Shape and dtype of each output tensor."""
    finite: bool
    """No output holds NaN or infinity."""
    has_nan: bool
    """An output holds NaN."""
    compile_cache: str | None = None
    """``warm`` or ``cold``, as the first call found the compile cache; None where unknown."""
    cuda_graphs_skipped: bool = False
    """The compile mode asks for CUDA graphs, and Inductor did without."""
    regions: int = 0
    """Repeated blocks that were compiled once for all."""
    regions_refused: str | None = None
    """Why blocks that repeat were compiled one by one; None if they were not."""
    remark: str | None = None
    """What the reader should know about how the model treats its inputs and its state."""


def describe(output: Any) -> Outputs:
    """Return shape and dtype of each tensor of an output."""
    return tuple((tuple(tensor.shape), tensor.dtype) for tensor in tensors_of(output))


def listed(outputs: Outputs) -> str:
    """Return outputs as an error names them."""
    return ", ".join(f"{list(shape)} {dtype}" for shape, dtype in outputs) or "no tensor"
