"""Find the plain tensors that store the weight of a linear layer."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from pytest_int8bench.kernels.linear import Int8Linear


def stored_weight(layer: Any) -> torch.Tensor:
    """Return the plain tensor that stores a linear layer's weight (integers if quantized)."""
    if isinstance(layer, Int8Linear):
        return layer.int8_weight
    # Scales and zero points are smaller than the weight, unless K is 1.
    return max(plain_tensors(layer.weight), key=lambda tensor: (tensor.numel(), -tensor.itemsize))


def plain_tensors(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return the tensors that a tensor subclass wraps, or the tensor itself."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [plain for name in names for plain in plain_tensors(getattr(tensor, name))]
