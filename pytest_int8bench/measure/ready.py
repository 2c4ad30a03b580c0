"""Cost of getting a model ready, and a description of its output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from pytest_int8bench.measure.timing import WarmUp
from pytest_int8bench.tensors import tensors_of

Outputs: TypeAlias = tuple[tuple[tuple[int, ...], torch.dtype], ...]


@dataclass(frozen=True)
class Ready:
    """The costs of getting a model ready, and the form of its output."""

    compile_s: float | None
    warm_up: WarmUp
    peak_memory_bytes: int | None
    tokens: int | None
    outputs: Outputs
    """Shape and dtype of each output tensor."""
    finite: bool
    """Whether all outputs are free of NaN and infinity."""
    has_nan: bool
    """Whether any output holds NaN."""
    compile_cache: str | None = None
    """State of the compile cache at the first call, ``warm`` or ``cold``; None if unknown."""
    cuda_graphs_skipped: bool = False
    """Whether Inductor skipped the CUDA graphs that the compile mode requests."""
    regions: int = 0
    """Repeated blocks that were compiled once for all."""
    regions_refused: str | None = None
    """Why repeated blocks were compiled separately; None if they were not."""
    remark: str | None = None
    """Remark on how the model treats its inputs and its state."""


def describe(output: Any) -> Outputs:
    """Return shape and dtype of each tensor of an output."""
    return tuple((tuple(tensor.shape), tensor.dtype) for tensor in tensors_of(output))


def listed(outputs: Outputs) -> str:
    """Format outputs for an error message."""
    return ", ".join(f"{list(shape)} {dtype}" for shape, dtype in outputs) or "no tensor"
