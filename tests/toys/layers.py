"""Models that do not simply call each linear layer once, as a module."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


def is_linear(module: nn.Module, name: str) -> bool:
    """Select every linear layer."""
    return isinstance(module, nn.Linear)


class FourLayers(nn.Module):
    """Two pairs of layers; subclasses use the second pair differently."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(32, 64), nn.Linear(64, 32)
        self.c, self.d = nn.Linear(32, 64), nn.Linear(64, 32)

    def first(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(F.gelu(self.a(x)))

    def second(self, x: torch.Tensor) -> torch.Tensor:
        return self.d(F.gelu(self.c(x)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


class InClosure(FourLayers):
    """Keep the second pair in a closure, so that a copy of the model calls the original's."""

    def __init__(self) -> None:
        super().__init__()
        c, d = self.c, self.d
        self.called = lambda x: d(F.gelu(c(x)))

    def second(self, x: torch.Tensor) -> torch.Tensor:
        return self.called(x)


class Uncalled(FourLayers):
    def second(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Discarded(FourLayers):
    """Compute with the second pair and discard the result."""

    def second(self, x: torch.Tensor) -> torch.Tensor:
        super().second(x)
        return x


class Multiplies(FourLayers):
    """Multiply by the values of one weight."""

    def second(self, x: torch.Tensor) -> torch.Tensor:
        return self.d(F.gelu(x @ values(self.c).T))


class MultipliesOnce(FourLayers):
    """Call a layer, then multiply by its values a second time."""

    def second(self, x: torch.Tensor) -> torch.Tensor:
        return super().second(x) + self.d(F.gelu(x @ values(self.c).T))


class CallsTwice(FourLayers):
    def second(self, x: torch.Tensor) -> torch.Tensor:
        return super().second(super().second(x))


class SharesLayer(FourLayers):
    def __init__(self) -> None:
        super().__init__()
        self.c = self.a


class SharesWeight(FourLayers):
    def __init__(self) -> None:
        super().__init__()
        self.c.weight = self.a.weight


class Checkpointed(FourLayers):
    def second(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = checkpoint(super().second, x, use_reentrant=False)
        return out


class ChangesGradMode(FourLayers):
    def second(self, x: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode(False), torch.no_grad():
            return super().second(x.clone())


class NotCompiled(FourLayers):
    @torch.compiler.disable
    def second(self, x: torch.Tensor) -> torch.Tensor:
        return super().second(x)


class ConvolvesEagerly(nn.Module):
    """A convolution outside compiled graphs, and a linear layer inside."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.linear = nn.Conv1d(32, 32, 5), nn.Linear(32, 32)

    @torch.compiler.disable
    def first(self, x: torch.Tensor) -> torch.Tensor:
        return self.convolution(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.first(x[:, :, None].expand(-1, -1, 512)).amax(-1))


class Experts(nn.Module):
    """A router with experts, the last of which it never selects."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(32, 4)
        self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen = self.router(x)[:, :3].argmax(-1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero().squeeze(-1)
            out[rows] = expert(x[rows]) if len(rows) else x[rows]
        return out


def values(layer: nn.Linear) -> torch.Tensor:
    """Return the weight as a plain tensor, however it is stored."""
    weight = layer.weight
    return weight.dequantize() if hasattr(weight, "qdata") else weight * 1


class OnlyCompiled(FourLayers):
    """Run the second pair only when Dynamo traces it."""

    def second(self, x: torch.Tensor) -> torch.Tensor:
        return super().second(x) if torch.compiler.is_compiling() else x


class OnlyEager(FourLayers):
    def second(self, x: torch.Tensor) -> torch.Tensor:
        return x if torch.compiler.is_dynamo_compiling() else super().second(x)


class DequantizesIfEager(FourLayers):
    """Multiply by the values of a weight only in eager mode."""

    def second(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return super().second(x)
        return self.d(F.gelu(x @ values(self.c).T))


class DequantizesIfCompiled(FourLayers):
    def second(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return self.d(F.gelu(x @ values(self.c).T))
        return super().second(x)


class PairOfCompiled(nn.Module):
    """Repeated blocks, which compile once."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(OnlyCompiled() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x
