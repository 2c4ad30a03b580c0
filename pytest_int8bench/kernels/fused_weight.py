"""Weights of the fused backend's layers as tensors, for code that accesses ``layer.weight``."""

from __future__ import annotations

from typing import Any

import torch

from pytest_int8bench.kernels import ops, reference
from pytest_int8bench.kernels.weight import DTYPES, QuantizedWeight


class FusedWeight(QuantizedWeight, torch.Tensor):  # type: ignore[misc]
    """Weight (N, K) of a layer of the fused backend.

    Args:
        int8: INT8 (N, K).
        scale: FP32 (N,).
        factor: (K,) or None.
        dtype: of the dequantized values.
        dynamic: quantize the rows of the input (W8A8) instead of dequantizing the weight (W8).
    """

    @staticmethod
    def __new__(
        cls,
        int8: torch.Tensor,
        scale: torch.Tensor,
        factor: torch.Tensor | None,
        dtype: torch.dtype,
        dynamic: bool,
    ) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, int8.shape, dtype=dtype, device=int8.device)

    def __init__(
        self,
        int8: torch.Tensor,
        scale: torch.Tensor,
        factor: torch.Tensor | None,
        dtype: torch.dtype,
        dynamic: bool,
    ) -> None:
        self.int8, self.scale, self.factor, self.dynamic = int8, scale, factor, dynamic

    def quantized_matmul(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        tensors = self.int8, self.scale, bias
        if self.dynamic:
            q, scale, _ = torch.ops.int8bench.quantize_rows.default(
                x, "none", "none", None, None, None, 0.0, self.factor, False
            )
            args = (q, scale, *tensors, None, None, x.dtype)
            out: torch.Tensor = torch.ops.int8bench.linear.default(*args)
        else:
            x = x if self.factor is None else x * self.factor
            out = torch.ops.int8bench.dequantized_linear.default(x, *tensors)
        return out

    def scaled(self, dtype: torch.dtype) -> torch.Tensor:
        if dtype not in DTYPES:
            return reference.dequantized(self.int8, self.scale, dtype)
        return ops.dequantize([self.int8], [self.scale], dtype)[0]

    def rows(self, start: int, stop: int) -> FusedWeight:
        held = self.int8[start:stop], self.scale[start:stop]
        return FusedWeight(*held, self.factor, self.dtype, self.dynamic)

    def cast(self, dtype: torch.dtype) -> FusedWeight:
        factor = None if self.factor is None else self.factor.to(dtype)
        return FusedWeight(self.int8, self.scale, factor, dtype, self.dynamic)

    def __tensor_flatten__(self) -> tuple[list[str], tuple[torch.dtype, bool]]:
        names = ["int8", "scale"] + ([] if self.factor is None else ["factor"])
        return names, (self.dtype, self.dynamic)

    @staticmethod
    def __tensor_unflatten__(held: Any, context: Any, size: Any, stride: Any) -> FusedWeight:
        return FusedWeight(held["int8"], held["scale"], held.get("factor"), *context)

    def __repr__(self) -> str:  # type: ignore[override]
        parts = f"int8={self.int8}, scale={self.scale}, factor={self.factor}, dtype={self.dtype}"
        return f"FusedWeight({parts})"
