"""Layers of the fused backend, without torchao."""

from __future__ import annotations

import torch
from torch import nn

from pytest_int8bench.kernels.linear import Quantized, replace_linears


def quantized(layer: nn.Linear, factor: torch.Tensor | None = None) -> Quantized:
    weight = layer.weight.detach()
    scale = weight.abs().amax(1) / 127.5
    values = (weight / scale[:, None]).round().clamp(-128, 127).to(torch.int8)
    bias = None if layer.bias is None else layer.bias.detach()
    return Quantized(values, scale.float(), bias, factor, weight.dtype)


def lowered(
    model: nn.Module, keep: tuple[str, ...] = (), factors: dict[str, torch.Tensor] | None = None
) -> nn.Module:
    """Replace the linear layers of ``model`` but those named."""
    model.eval().requires_grad_(False)
    layers = {
        name: quantized(layer, (factors or {}).get(name))
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and name not in keep
    }
    replace_linears(model, layers)
    return model
