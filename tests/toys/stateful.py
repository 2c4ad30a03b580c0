"""Models whose calls change what the next call returns."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

WIDTH, SLOTS = 16, 6


class Layers(nn.Module):
    """Two linear layers without state."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)


class Cache(Layers):
    """Write each call's keys to the next slots of a ring, like a decoder's cache."""

    position: torch.Tensor
    keys: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("keys", torch.zeros(SLOTS, WIDTH), persistent=False)
        self.register_buffer("position", torch.zeros((), dtype=torch.long))

    def forward(self, x: torch.Tensor) -> Any:
        places = (self.position + torch.arange(2)) % SLOTS
        self.keys.index_copy_(0, places, self.fc1(x)[:2])
        self.position.add_(2)
        return self.fc2(x) + self.keys.sum(0)


class Counter(Layers):
    """Scale its output by the number of calls."""

    calls: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> Any:
        self.calls += 1
        return self.fc2(self.fc1(x)) * self.calls


class RunningMean(Layers):
    """Subtract a running mean that each call updates."""

    mean: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, x: torch.Tensor) -> Any:
        h = self.fc1(x)
        self.mean.lerp_(h.mean(0) + 3, 0.3)
        return self.fc2(h - self.mean)


IN_BUFFERS = (Cache, Counter, RunningMean)


class Draws(Layers):
    """Apply dropout in inference, too."""

    def forward(self, x: torch.Tensor) -> Any:
        return self.fc2(F.dropout(self.fc1(x), 0.3, training=True))


class InPython(Layers):
    """Count its calls in an attribute."""

    calls = 0

    def forward(self, x: torch.Tensor) -> Any:
        self.calls += 1
        return self.fc2(self.fc1(x)) * self.calls
