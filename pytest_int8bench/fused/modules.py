"""Linear layers that run the fused operators, on plain tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

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

    By itself it runs two operators; compiled by ``compile_for_a100``, what stands before and after
    it joins them (:mod:`graph`).
    """

    weight: nn.Parameter
    weight_scale: nn.Parameter
    bias: nn.Parameter | None
    factor: nn.Parameter | None

    def __init__(self, tensors: Quantized) -> None:
        super().__init__()
        self.out_features, self.in_features = tensors.weight.shape
        for name, tensor in vars(tensors).items():
            held = None if tensor is None else nn.Parameter(tensor, requires_grad=False)
            self.register_parameter(name, held)

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


def replace_linears(model: nn.Module, layers: Mapping[str, Quantized]) -> None:
    """Put an :class:`Int8Linear` in the place of each named layer of ``model``.

    Layers of one parent that take inputs of one width get neighbouring memory, in the order in
    which the parent holds them, so that one product can serve those that share an input.

    Args:
        model: changed in place.
        layers: tensors by dotted name.
    """
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if name in layers:
            names.setdefault(id(module), []).append(name)
    shared = {same[0]: same for same in names.values()}
    groups: dict[tuple[str, int, bool], list[str]] = {}
    for name in shared:
        tensors = layers[name]
        key = (name.rpartition(".")[0], tensors.weight.shape[1], tensors.bias is None)
        groups.setdefault(key, []).append(name)
    for group in groups.values():
        for name, tensors in zip(group, _neighbours([layers[n] for n in group]), strict=True):
            layer = Int8Linear(tensors)
            for alias in shared[name]:
                model.set_submodule(alias, layer)


def _neighbours(layers: list[Quantized]) -> list[Quantized]:
    """Return the layers with weights, scales and biases in one block of memory each."""
    sizes = [layer.weight.shape[0] for layer in layers]
    weights = torch.cat([layer.weight for layer in layers]).split(sizes)
    scales = torch.cat([layer.weight_scale for layer in layers]).split(sizes)
    there = [layer.bias for layer in layers if layer.bias is not None]
    biases = torch.cat(there).split(sizes) if there else [None] * len(layers)
    return [
        Quantized(weight, scale, bias, layer.factor)
        for weight, scale, bias, layer in zip(weights, scales, biases, layers, strict=True)
    ]
