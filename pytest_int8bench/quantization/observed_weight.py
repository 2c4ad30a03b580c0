"""Weights that show what they are multiplied by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from pytest_int8bench.kernels.weight import QuantizedWeight


class ObservedWeight(QuantizedWeight, torch.Tensor):  # type: ignore[misc]
    """Weight of a layer during calibration. It is not quantized, but is read as a quantized weight
    is, so that it observes the inputs of exactly the matmuls that will run quantized.

    Args:
        values: the weight.
        observe: called with the input of each matmul.
    """

    factor = None

    @staticmethod
    def __new__(cls, values: torch.Tensor, observe: Callable[[torch.Tensor], None]) -> Any:
        return torch.Tensor._make_wrapper_subclass(
            cls, values.shape, strides=values.stride(), dtype=values.dtype, device=values.device
        )

    def __init__(self, values: torch.Tensor, observe: Callable[[torch.Tensor], None]) -> None:
        self.values, self.observe = values, observe

    def quantized_matmul(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        self.observe(x)
        return nn.functional.linear(x, self.values, bias)

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        return self.values.to(dtype or self.dtype)

    def rows(self, start: int, stop: int) -> ObservedWeight:
        return ObservedWeight(self.values[start:stop], self.observe)

    def cast(self, dtype: torch.dtype) -> ObservedWeight:
        return ObservedWeight(self.values.to(dtype), self.observe)

    def __tensor_flatten__(self) -> tuple[list[str], Callable[[torch.Tensor], None]]:
        return ["values"], self.observe

    @staticmethod
    def __tensor_unflatten__(held: Any, context: Any, size: Any, stride: Any) -> ObservedWeight:
        return ObservedWeight(held["values"], context)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"ObservedWeight({self.values})"
