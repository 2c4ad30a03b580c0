"""Linear layers that hold INT8 weights in plain tensors and call the operators on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pytest_int8bench.kernels.fused_weight import FusedWeight
from pytest_int8bench.kernels.weight import autocast_dtype


@dataclass(frozen=True)
class Quantized:
    """The plain tensors of a quantized linear layer."""

    weight: torch.Tensor
    """INT8 (N, K)."""
    weight_scale: torch.Tensor
    """FP32 (N,): the layer's weight is ``weight * weight_scale[:, None]``."""
    bias: torch.Tensor | None
    """(N,)."""
    factor: torch.Tensor | None
    """(K,) that multiplies the input (SmoothQuant)."""
    dtype: torch.dtype = torch.bfloat16
    """Dtype of the weight before quantization."""


class Block(nn.Module):
    """The concatenated tensors of neighboring linear layers.

    The tensors are buffers, so that code that looks up the dtype of a model's parameters does not
    find INT8. The block is a module, so that layers still share it after the model is moved.

    Args:
        layers: layers that agree in input width, dtype of the weights, dtype of the biases (or no
            biases), and factor (or no factor).
    """

    weight: torch.Tensor
    """INT8 (sum of N, K)."""
    scale: torch.Tensor
    """FP32 (sum of N,)."""
    bias: torch.Tensor | None
    """(sum of N,)."""
    factor: torch.Tensor | None
    """(K,) that multiplies the input (SmoothQuant)."""
    dtype: torch.dtype
    """Dtype of the weights before quantization, or the one that the model was cast to since."""

    def __init__(self, layers: list[Quantized]) -> None:
        super().__init__()
        self.dtype = layers[0].dtype
        self.register_buffer("weight", torch.cat([layer.weight for layer in layers]))
        self.register_buffer("scale", torch.cat([layer.weight_scale for layer in layers]))
        biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
        self.register_buffer("bias", torch.cat(biases) if biases else None)
        self.register_buffer("factor", layers[0].factor)

    def _apply(self, fn: Any, recurse: bool = True) -> Block:
        """Move or cast the tensors; scales stay FP32 when the model is cast."""
        scale = self.scale
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.scale.dtype != scale.dtype:
            self.dtype = self.scale.dtype
            self.scale = scale.to(self.scale.device)
        return self


class Int8Linear(nn.Linear):
    """A linear layer with INT8 weights that quantizes each row of its input.

    Its tensors are rows of a block that it may share with neighboring layers, so that one matmul
    can serve all layers with the same input. A compiled graph takes the whole block as one input,
    because inputs of a compiled region must not overlap. The layer runs two operators;
    ``compile_for_a100`` fuses them with the operators before and after the layer.

    Args:
        block: the tensors that this layer shares with others.
        start: first row of this layer in the block.
        stop: end of its rows, exclusive.
    """

    quantizes_rows = True

    def __init__(self, block: Block, start: int, stop: int) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = block.weight.shape[1], stop - start
        self._rows = None if stop - start == len(block.weight) else slice(start, stop)
        self.block = block

    @property
    def int8_weight(self) -> torch.Tensor:
        """INT8 (N, K)."""
        return self._tensors()[0]

    @property
    def weight_scale(self) -> torch.Tensor:
        """FP32 (N,): the layer's weight is ``int8_weight * weight_scale[:, None]``."""
        return self._tensors()[1]

    @property
    def weight(self) -> FusedWeight:  # type: ignore[override]
        """The weight (N, K) as a tensor subclass in the block's ``dtype``, made on each access."""
        block = self.block
        int8, scale, _ = self._tensors()
        return FusedWeight(int8, scale, block.factor, block.dtype, self.quantizes_rows)

    @property
    def bias(self) -> torch.Tensor | None:  # type: ignore[override]
        """(N,), or None."""
        return self._tensors()[2]

    @property
    def factor(self) -> torch.Tensor | None:
        """(K,) that multiplies the input, or None."""
        return self.block.factor

    def _tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return the weight, its scale and the bias."""
        block, rows = self.block, self._rows
        if rows is None:
            return block.weight, block.scale, block.bias
        bias = block.bias
        return block.weight[rows], block.scale[rows], None if bias is None else bias[rows]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return (..., N) in the dtype of ``input`` (..., K)."""
        # Call the operators directly, not through their wrappers in ops.py: Dynamo traces every
        # Python function that a layer calls, in each layer of a model.
        q, scale, _ = torch.ops.int8bench.quantize_rows.default(
            input, "none", "none", None, None, None, 0.0, self.block.factor, False
        )
        out: torch.Tensor = torch.ops.int8bench.linear.default(
            q, scale, *self._tensors(), None, None, autocast_dtype(input)
        )
        return out

    def extra_repr(self) -> str:
        has_bias = self.block.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={has_bias}"


class WeightOnlyLinear(Int8Linear):
    """A linear layer that dequantizes its INT8 weight and multiplies in the dtype of its input."""

    quantizes_rows = False

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return (..., N) in the dtype of ``input`` (..., K)."""
        factor = self.block.factor
        if factor is not None:
            input = input * factor
        out: torch.Tensor = torch.ops.int8bench.dequantized_linear.default(input, *self._tensors())
        return out


def replace_linears(
    model: nn.Module, layers: Mapping[str, Quantized], kind: type[Int8Linear] = Int8Linear
) -> None:
    """Replace each named layer of ``model`` by a layer with plain tensors.

    Layers of the same parent share a block, in the parent's order, if they agree in input width,
    device, dtypes and factor (the same tensor, or none).

    Args:
        model: changed in place.
        layers: tensors by dotted name; for a layer with several names, one of them is enough.
        kind: class of the new layers.
    """
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    shared: dict[str, list[str]] = {}
    for same in names.values():
        for name in same:
            if name in layers:
                shared[name] = same
                break
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name in shared:
        weight, bias = layers[name].weight, layers[name].bias
        key = (
            name.rpartition(".")[0],
            weight.shape[1],
            weight.device,
            layers[name].dtype,
            getattr(bias, "dtype", None),
            id(layers[name].factor),
        )
        groups.setdefault(key, []).append(name)
    for group in groups.values():
        members = [layers[name] for name in group]
        block = Block(members)
        start = 0
        for name, tensors in zip(group, members, strict=True):
            stop = start + len(tensors.weight)
            layer = kind(block, start, stop)
            layer.train(model.training)
            # Keep attributes that the user set, but not torchao's extra_repr of the old layer.
            for attribute, value in vars(model.get_submodule(name)).items():
                if attribute != "extra_repr":
                    vars(layer).setdefault(attribute, value)
            start = stop
            for alias in shared[name]:
                model.set_submodule(alias, layer)
