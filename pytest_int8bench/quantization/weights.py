"""Subclasses of TorchAO's quantized weights that any code can read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torchao.quantization import Float8Tensor, Int8Tensor

from pytest_int8bench.kernels.weight import DTYPES, QuantizedWeight


class _TorchAOWeight(QuantizedWeight):
    """Mixin for subclasses of TorchAO's weight types."""

    torchao: Any
    """TorchAO's type, used only for the quantized matmul and to dequantize."""

    @property
    def factor(self) -> torch.Tensor | None:  # type: ignore[override]
        return getattr(self, "act_pre_scale", None)

    def quantized_matmul(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        kind, weight = self.torchao, _as(self.torchao, self)
        out: torch.Tensor = kind.__torch_function__(
            nn.functional.linear, (kind,), (x, weight, bias), {}
        )
        return out

    def scaled(self, dtype: torch.dtype) -> torch.Tensor:
        # TorchAO does not dequantize to FP64.
        values = self.torchao.dequantize(self, dtype if dtype in DTYPES else torch.float32)
        out: torch.Tensor = values.to(dtype)
        return out

    def rows(self, start: int, stop: int) -> Any:
        this: Any = self
        count, columns = this.shape
        names, context = this.__tensor_flatten__()
        held = {name: getattr(self, name) for name in names}
        for name in ("qdata", "scale", "zero_point"):
            tensor = held.get(name)
            if tensor is None or tensor.numel() == 1:
                continue
            if tensor.dim() != 2 or tensor.shape[0] != count:
                return NotImplemented
            held[name] = tensor[start:stop]
        size = [min(this.block_size[0], stop - start), *this.block_size[1:]]
        context = {**context, "block_size": size}
        shape = (stop - start, columns)
        return type(this).__tensor_unflatten__(held, context, shape, this.stride())

    def cast(self, dtype: torch.dtype) -> Any:
        this: Any = self
        names, context = this.__tensor_flatten__()
        held = {name: getattr(self, name) for name in names}
        if self.factor is not None:
            held["act_pre_scale"] = self.factor.to(dtype)
        context = {**context, "dtype": dtype}
        return type(this).__tensor_unflatten__(held, context, this.shape, this.stride())


class Int8Weight(_TorchAOWeight, Int8Tensor):  # type: ignore[misc]
    """INT8 weight (N, K), quantized and multiplied by TorchAO."""

    torchao = Int8Tensor


class DequantizedInt8Weight(Int8Weight):
    """INT8 weight that is dequantized before the device library's 16-bit matmul.

    It does the same as :class:`~pytest_int8bench.kernels.linear.WeightOnlyLinear`, for layers that
    cannot be replaced by one. TorchAO's own weight-only matmul is ``mm(x, w.to(bf16)) * scale``,
    which Inductor rewrites to ``aten::_weight_int8pack_mm``. Its naive CUDA kernel took 252 ms for
    one 196608x768x768 matmul that cuBLAS computes in 0.32 ms (H200, torch 2.11).
    """

    def quantized_matmul(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if self.act_pre_scale is not None:
            x = x * self.act_pre_scale
        return nn.functional.linear(x, self.scaled(x.dtype), bias)


class Float8Weight(_TorchAOWeight, Float8Tensor):  # type: ignore[misc]
    """FP8 weight (N, K), quantized and multiplied by TorchAO."""

    torchao = Float8Tensor


_OWN: dict[type, Callable[..., Any]] = {Int8Tensor: Int8Weight, Float8Tensor: Float8Weight}

torch.serialization.add_safe_globals([Int8Weight, DequantizedInt8Weight, Float8Weight])


def weight_of(layer: nn.Linear) -> torch.Tensor | None:
    """Return the weight of a layer; None if the layer computes it on each call, as after
    ``weight_norm``, pruning or ``register_parametrization``."""
    if isinstance(getattr(type(layer), "weight", None), property):
        return None
    return layer._parameters.get("weight")


def weight_problem(layer: nn.Linear) -> str | None:
    """Return why the weight of an unquantized layer cannot be quantized, or None if it can."""
    weight = weight_of(layer)
    if weight is None:
        parts = [name for name, _ in layer.named_parameters() if "bias" not in name.split(".")]
        return f"weight: computed when the layer is called ({', '.join(parts) or 'no parameters'})"
    if type(weight) not in (torch.Tensor, nn.Parameter):
        return f"weight: {type(weight).__name__}"
    if weight.layout != torch.strided:
        return f"weight: {str(weight.layout).removeprefix('torch.')}"
    if weight.dtype not in DTYPES:
        return f"dtype: {str(weight.dtype).removeprefix('torch.')}"
    if weight.numel() == 0:
        return f"shape: a {layer.in_features}x{layer.out_features} layer has no weights"
    return None


def _as(kind: Any, weight: Any) -> Any:
    """Return a weight of another type that holds the tensors of ``weight``."""
    names, context = weight.__tensor_flatten__()
    held = {name: getattr(weight, name) for name in names}
    return kind.__tensor_unflatten__(held, context, weight.shape, weight.stride())


def make_readable(model: nn.Module) -> None:
    """Replace TorchAO's weights of linear layers by our subclasses, in place."""
    for module in model.modules():
        if not isinstance(module, nn.Linear):
            continue
        weight = weight_of(module)
        if (kind := _OWN.get(type(weight))) is not None:
            set_weight(module, kind, weight)
            vars(module).pop("extra_repr", None)  # set by TorchAO; cannot be pickled


def set_weight(layer: Any, kind: Any, weight: Any) -> None:
    """Set the weight of ``layer`` to a weight of another type that holds the tensors of
    ``weight``."""
    layer.weight = nn.Parameter(_as(kind, weight), requires_grad=False)
