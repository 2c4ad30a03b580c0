"""Small models and a workload of them, and layers of the fused backend without torchao."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from pytest_int8bench.clock import synchronized_perf_counter
from pytest_int8bench.kernels.linear import Quantized, replace_linears
from pytest_int8bench.measure.timing import Plan, Run, time_block
from pytest_int8bench.params import RunParams
from pytest_int8bench.workloads import Workload

Inputs = Callable[[RunParams, torch.device], tuple[torch.Tensor, ...]]


class Mlp(nn.Module):
    """Two layers."""

    def __init__(self, dim: int = 32, hidden: int = 64, out: int | None = None) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, out or dim)

    @property
    def quantized(self) -> bool:
        return type(self.fc1.weight) is not nn.Parameter

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(gelu(self.fc1(x)))


class Attention(nn.Module):
    """Attention with separate projections."""

    def __init__(self, dim: int, heads: int = 1) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = (layer(x).unflatten(-1, (self.heads, -1)) for layer in (self.q, self.k, self.v))
        mixed = scaled_dot_product_attention(*(part.transpose(1, 2) for part in parts))
        return self.proj(mixed.transpose(1, 2).flatten(2))


class BareAttention(nn.Module):
    """Attention of a tensor with itself, without layers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return scaled_dot_product_attention(x, x, x)


@functools.cache  # two workloads of one toy are one to the pool of models
def normal(*shape: int) -> Inputs:
    """Return inputs for a workload: a batch of random samples of a shape."""
    return lambda p, device: (torch.randn(p.batch_size, *shape, device=device),)


def make_workload(model: Callable[[], nn.Module] = Mlp, **changes: Any) -> Workload:
    """Return a workload of a model, with rows of 32 numbers unless told otherwise."""
    toy = {"name": "toy", "build": lambda p: model(), "inputs": normal(32)}
    return Workload(**{**toy, **changes})


def time_rounds(run: Run, plan: Plan) -> list[float]:
    """Time rounds without pytest-benchmark."""
    return [time_block(run, synchronized_perf_counter, plan.iterations) for _ in range(plan.rounds)]


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
