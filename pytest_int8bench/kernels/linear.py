"""Linear layers with INT8 weights in plain tensors, which the operators take."""

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
    """The plain tensors of a linear layer."""

    weight: torch.Tensor
    """INT8 (N, K)."""
    weight_scale: torch.Tensor
    """FP32 (N,): weight x scale is the layer's weight."""
    bias: torch.Tensor | None
    """(N,)."""
    factor: torch.Tensor | None
    """(K,) that the input is multiplied by (SmoothQuant)."""
    dtype: torch.dtype = torch.bfloat16
    """Of the weight that was quantized."""


class Block(nn.Module):
    """Tensors of neighbouring layers, one after another.

    Buffers: code that asks for the dtype of a model's parameters is not to find INT8. A module, so
    that the layers go on sharing it where a model is moved.

    Args:
        layers: the layers, with inputs of one width, weights of one dtype, biases of one dtype,
            or none, and one factor, or none.
    """

    weight: torch.Tensor
    """INT8 (sum of N, K)."""
    scale: torch.Tensor
    """FP32 (sum of N,)."""
    bias: torch.Tensor | None
    """(sum of N,)."""
    factor: torch.Tensor | None
    """(K,) that the input is multiplied by (SmoothQuant)."""
    dtype: torch.dtype
    """Of the weights, before they were quantized or where the model was cast since."""

    def __init__(self, layers: list[Quantized]) -> None:
        super().__init__()
        self.dtype = layers[0].dtype
        self.register_buffer("weight", torch.cat([layer.weight for layer in layers]))
        self.register_buffer("scale", torch.cat([layer.weight_scale for layer in layers]))
        biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
        self.register_buffer("bias", torch.cat(biases) if biases else None)
        self.register_buffer("factor", layers[0].factor)

    def _apply(self, fn: Any, recurse: bool = True) -> Block:
        """Move the tensors; a model that is cast casts biases, and no scales."""
        scale = self.scale
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.scale.dtype != scale.dtype:
            self.dtype = self.scale.dtype
            self.scale = scale.to(self.scale.device)
        return self


class Int8Linear(nn.Linear):
    """A linear layer with INT8 weights that quantizes each row of its input.

    Its tensors are rows of a block that it may share with layers beside it, so that one matmul can
    serve all layers of the same input. The whole block is one input of a compiled graph, because
    inputs of a compiled region must not overlap. The layer runs two operators;
    ``compile_for_a100`` joins them with the operators before and after the layer.

    Args:
        block: the tensors of the layers that share them.
        start: the first row of this layer.
        stop: the row after its last one.
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
        """FP32 (N,): ``int8_weight`` x scale is the layer's weight."""
        return self._tensors()[1]

    @property
    def weight(self) -> FusedWeight:  # type: ignore[override]
        """The weight (N, K) in the dtype it had, or that the model was cast to, for code that reads
        it or multiplies by it. Made each time."""
        block = self.block
        int8, scale, _ = self._tensors()
        return FusedWeight(int8, scale, block.factor, block.dtype, self.quantizes_rows)

    @property
    def bias(self) -> torch.Tensor | None:  # type: ignore[override]
        """(N,), or None."""
        return self._tensors()[2]

    @property
    def factor(self) -> torch.Tensor | None:
        """(K,) that the input is multiplied by, or None."""
        return self.block.factor

    def _tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return weight, scale and bias."""
        block, rows = self.block, self._rows
        if rows is None:
            return block.weight, block.scale, block.bias
        bias = block.bias
        return block.weight[rows], block.scale[rows], None if bias is None else bias[rows]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return (..., N) in the dtype of ``input`` (..., K)."""
        # The operators themselves, not the functions of that name: Dynamo reads every function that
        # a layer calls, in each layer of a model.
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
    """A linear layer with INT8 weights that multiplies in the dtype of its input."""

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
    """Put a layer with plain tensors in the place of each named layer of ``model``.

    Layers of one parent that take inputs of one width, and have the same factor (one tensor) or
    none, share a block, in the order in which the parent holds them.

    Args:
        model: changed in place.
        layers: tensors by dotted name; one name is enough for a layer that has several.
        kind: what the layers become.
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
            for attribute, value in vars(model.get_submodule(name)).items():  # of the user's
                if attribute != "extra_repr":  # torchao's, of the layer that was
                    vars(layer).setdefault(attribute, value)
            start = stop
            for alias in shared[name]:
                model.set_submodule(alias, layer)
