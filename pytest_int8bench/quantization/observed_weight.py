"""Weights that observe the inputs of their matmuls during calibration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from pytest_int8bench.kernels.weight import QuantizedWeight


class ObservedWeight(QuantizedWeight, torch.Tensor):  # type: ignore[misc]
    """Unquantized weight that observes the inputs of exactly the matmuls that will run quantized,
    because it dispatches like a quantized weight.

    Args:
        held: the original weight.
        observe: called with the input of each matmul.
    """

    factor: torch.Tensor | None = None
    observe: Callable[[torch.Tensor], None]

    @staticmethod
    def __new__(cls, held: torch.Tensor, observe: Callable[[torch.Tensor], None]) -> Any:
        return torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), dtype=held.dtype, device=held.device
        )

    def __init__(self, held: torch.Tensor, observe: Callable[[torch.Tensor], None]) -> None:
        self.held, self.observe = held, observe

    def quantized_matmul(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        self.observe(x)
        return nn.functional.linear(x, self.held, bias)

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        return self.held.to(dtype or self.dtype)

    def rows(self, start: int, stop: int) -> ObservedWeight:
        return ObservedWeight(self.held[start:stop], self.observe)

    def cast(self, dtype: torch.dtype) -> ObservedWeight:
        return ObservedWeight(self.held.to(dtype), self.observe)

    def __tensor_flatten__(self) -> tuple[list[str], Callable[[torch.Tensor], None]]:
        return ["held"], self.observe

    @staticmethod
    def __tensor_unflatten__(tensors: Any, context: Any, size: Any, stride: Any) -> ObservedWeight:
        return ObservedWeight(tensors["held"], context)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"ObservedWeight({self.held})"
