"""Toys that name and nest linear layers like real models do. None has a forward."""

from __future__ import annotations

import torch
from torch import nn

DIM, EXPERTS = 64, 4


class Holder(nn.Module):
    """A module of the given parts."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


def linear(inputs: int = DIM, outputs: int = DIM) -> nn.Linear:
    return nn.Linear(inputs, outputs)


def repeated(block: type[nn.Module] | object, count: int = 2, **around: nn.Module) -> nn.Module:
    """Return a model of several blocks between other parts."""
    assert callable(block)
    return Holder(layers=nn.ModuleList([block() for _ in range(count)]), **around)


class Attention(Holder):
    """An attention with the given names of projections."""

    def __init__(self, *names: str) -> None:
        super().__init__(**{name: linear() for name in names or ("q", "k", "v", "proj")})


class Mlp(Holder):
    """Two layers, up and down."""

    def __init__(self, up: str = "fc1", down: str = "fc2", inner: int = 4 * DIM) -> None:
        super().__init__(**{up: linear(DIM, inner), down: linear(inner, DIM)})


class Gated(Holder):
    """A gated MLP with layers named after their roles."""

    def __init__(self, inner: int = 2 * DIM) -> None:
        super().__init__(gate=linear(DIM, inner), up=linear(DIM, inner), down=linear(inner, DIM))


class Stacked(nn.Module):
    """Experts in 3-D parameters, as in Mixtral and Llama 4."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.zeros(EXPERTS, DIM, 4 * DIM))
        self.down = nn.Parameter(torch.zeros(EXPERTS, 4 * DIM, DIM))


class Experts(Holder):
    """A mixture of experts with any name for its router."""

    def __init__(self, router: str = "gate", *, stacked: bool = False) -> None:
        experts = Stacked() if stacked else nn.ModuleList([Mlp() for _ in range(EXPERTS)])
        super().__init__(experts=experts, **{router: linear(DIM, EXPERTS)})


class Adapted(Holder):
    """A linear layer with a low-rank adapter."""

    def __init__(
        self, base: str = "base_layer", down: str = "lora_A", up: str = "lora_B", rank: int = 4
    ) -> None:
        super().__init__(
            **{
                base: linear(),
                down: nn.ModuleDict({"default": linear(DIM, rank)}),
                up: nn.ModuleDict({"default": linear(rank, DIM)}),
            }
        )


class Block(Holder):
    """A transformer block of the given attention and MLP."""

    def __init__(self, attn: nn.Module | None = None, mlp: nn.Module | None = None) -> None:
        super().__init__(
            norm1=nn.LayerNorm(DIM),
            attn=Attention() if attn is None else attn,
            norm2=nn.LayerNorm(DIM),
            mlp=Mlp() if mlp is None else mlp,
        )
