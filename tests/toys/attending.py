"""Models whose attention differs between calls, and between eager and compiled forwards."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from pytest_int8bench.params import RunParams
from pytest_int8bench.workloads import Workload

TOKENS, DIM = 4, 32


def attend(x: torch.Tensor, **options: Any) -> torch.Tensor:
    return scaled_dot_product_attention(x, x, x, **options)


def masked(x: torch.Tensor) -> torch.Tensor:
    return attend(x, attn_mask=x.new_zeros(TOKENS, TOKENS))


@torch.compiler.disable
def masked_outside(x: torch.Tensor) -> torch.Tensor:
    return masked(x)


class Attends(nn.Module):
    """Linear layers, and an attention that subclasses vary."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.attention(self.fc1(x)[:, None])[:, 0])

    def attention(self, x: torch.Tensor) -> torch.Tensor:
        return attend(x)


class NoAttention(Attends):
    def attention(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Masked(Attends):
    def attention(self, x: torch.Tensor) -> torch.Tensor:
        return masked(x)


class MaskedIfCompiled(Attends):
    """Like encoders of transformers: drop a mask of ones, except when traced."""

    def attention(self, x: torch.Tensor) -> torch.Tensor:
        return masked(x) if torch.compiler.is_compiling() else attend(x)


class MaskedIfEager(Attends):
    def attention(self, x: torch.Tensor) -> torch.Tensor:
        return attend(x) if torch.compiler.is_dynamo_compiling() else masked(x)


class Twice(Attends):
    """Two calls, only the first of which flash supports on CUDA."""

    def attention(self, x: torch.Tensor) -> torch.Tensor:
        return masked(attend(x))


class Causal(Attends):
    def attention(self, x: torch.Tensor) -> torch.Tensor:
        return attend(x, is_causal=True)


class Grouped(Attends):
    def attention(self, x: torch.Tensor) -> torch.Tensor:
        heads = x.expand(-1, 4, -1, -1)
        pair = x.expand(-1, 2, -1, -1)
        return scaled_dot_product_attention(heads, pair, pair, enable_gqa=True)[:, :1]


class MultiHead(Attends):
    """Dynamo does not trace into the attention of torch's own module."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(DIM, 2, batch_first=True)

    def attention(self, x: torch.Tensor) -> torch.Tensor:
        mask = x.new_zeros(TOKENS, TOKENS)
        y = x[:, 0]
        return self.inner(y, y, y, need_weights=False, attn_mask=mask)[0][:, None]


class Plain(MultiHead):
    """The same without a mask."""

    def attention(self, x: torch.Tensor) -> torch.Tensor:
        y = x[:, 0]
        return self.inner(y, y, y, need_weights=False)[0][:, None]


class ChoosesMath(Attends):
    """Choose its own backend."""

    def attention(self, x: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return attend(x)


class Autocast(Attends):
    def attention(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            return attend(x.float()).to(x.dtype)


class Broken(Attends):
    """A graph break between two calls."""

    def attention(self, x: torch.Tensor) -> torch.Tensor:
        x = attend(x)
        torch._dynamo.graph_break()
        return masked(x)


class Outside(Attends):
    """One call inside a graph and one outside."""

    def attention(self, x: torch.Tensor) -> torch.Tensor:
        return masked_outside(attend(x))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attends = Masked()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.attends(x)


class Blocks(nn.Module):
    """Repeated blocks, which compile once."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Outlier(nn.Module):
    """Attention of each token to itself. Where queries are zero, one column of each key is so large
    that INT8 keys lose all other columns."""

    def __init__(self, outlier: float) -> None:
        super().__init__()
        self.outlier = outlier

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k = 20 * x, x.clone()
        q[..., 0] = 0
        k[..., 0, 0] = self.outlier
        return scaled_dot_product_attention(q, k, x)


def workload_of(kind: type[nn.Module]) -> Workload:
    def inputs(p: RunParams, device: torch.device) -> tuple[torch.Tensor]:
        return (torch.randn(p.batch_size, TOKENS, DIM, device=device),)

    return Workload(name="attends", build=lambda p: kind(), inputs=inputs)
