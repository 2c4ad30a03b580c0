"""Linear layers that run the fused operators, on plain tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pytest_int8bench.fused import operators


@dataclass(frozen=True)
class Quantized:
    """The plain tensors of a W8A8 linear layer."""

    weight: torch.Tensor
    """INT8 (N, K)."""
    weight_scale: torch.Tensor
    """FP32 (N,): weight x scale is the layer's weight."""
    bias: torch.Tensor | None
    """(N,)."""
    factor: torch.Tensor | None
    """(K,) that the input is multiplied by (SmoothQuant)."""


class Int8Linear(nn.Module):
    """A linear layer with INT8 weights that quantizes each row of its input.

    Its tensors are rows of blocks that it may share with layers beside it, so that one product can
    serve all that take the same input: blocks, and not views of one storage, because a compiled
    region takes no inputs that overlap. By itself it runs two operators; compiled by
    ``compile_for_a100``, what stands before and after it joins them (:mod:`graph`).

    Args:
        block: the tensors of the layers that share them, one after another.
        start: the first row of this layer.
        stop: the row after its last one.
        factor: (K,) that the input is multiplied by (SmoothQuant).
    """

    weight_block: nn.Parameter
    scale_block: nn.Parameter
    bias_block: nn.Parameter | None
    factor: nn.Parameter | None

    def __init__(
        self, block: Block, start: int, stop: int, factor: torch.Tensor | None = None
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = block.weight.shape[1], stop - start
        self._rows = None if stop - start == len(block.weight) else slice(start, stop)
        self.weight_block = block.weight
        self.scale_block = block.scale
        self.register_parameter("bias_block", block.bias)
        held = None if factor is None else nn.Parameter(factor, requires_grad=False)
        self.register_parameter("factor", held)

    @property
    def weight(self) -> torch.Tensor:
        """INT8 (N, K)."""
        return self._own(self.weight_block)

    @property
    def weight_scale(self) -> torch.Tensor:
        """FP32 (N,): weight x scale is the layer's weight."""
        return self._own(self.scale_block)

    @property
    def bias(self) -> torch.Tensor | None:
        """(N,), or None."""
        return None if self.bias_block is None else self._own(self.bias_block)

    def _own(self, block: torch.Tensor) -> torch.Tensor:
        return block if self._rows is None else block[self._rows]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (..., N) in the dtype of ``x`` (..., K)."""
        q, scale, _ = operators.quantize_rows(
            x, "none", "none", None, None, None, 0.0, self.factor, False
        )
        out: torch.Tensor = operators.linear(
            q, scale, [self.weight], [self.weight_scale], [self.bias], None, None, x.dtype
        )
        return out

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


@dataclass(frozen=True)
class Block:
    """Tensors of neighbouring layers, one after another."""

    weight: nn.Parameter
    """INT8 (sum of N, K)."""
    scale: nn.Parameter
    """FP32 (sum of N,)."""
    bias: nn.Parameter | None
    """(sum of N,)."""


def replace_linears(model: nn.Module, layers: Mapping[str, Quantized]) -> None:
    """Put an :class:`Int8Linear` in the place of each named layer of ``model``.

    Layers of one parent that take inputs of one width share blocks, in the order in which the
    parent holds them.

    Args:
        model: changed in place.
        layers: tensors by dotted name; one name is enough for a layer that has several.
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
            getattr(bias, "dtype", None),
        )
        groups.setdefault(key, []).append(name)
    for group in groups.values():
        members = [layers[name] for name in group]
        block = _block(members)
        start = 0
        for name, tensors in zip(group, members, strict=True):
            layer = Int8Linear(block, start, start + len(tensors.weight), tensors.factor)
            start += len(tensors.weight)
            for alias in shared[name]:
                model.set_submodule(alias, layer)


def _block(layers: list[Quantized]) -> Block:
    there = [layer.bias for layer in layers if layer.bias is not None]
    return Block(
        _fixed(torch.cat([layer.weight for layer in layers])),
        _fixed(torch.cat([layer.weight_scale for layer in layers])),
        _fixed(torch.cat(there)) if there else None,
    )


def _fixed(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
