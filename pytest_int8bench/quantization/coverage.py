"""The linear layers of a model, and what became of them when it was quantized."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Layer:
    """A linear layer and what became of it."""

    name: str
    parameters: int
    """Number of weights and biases."""
    reason: str | None = None
    """Why the layer was left out; None if it was converted."""
    fused: bool = False
    """It runs on the fused kernels, not on torchao's."""
    fallback: str | None = None
    """Why a converted layer does not, where it was to."""


@dataclass(frozen=True)
class Coverage:
    """Summary of what :func:`apply_int8_quant` did to a model."""

    mode: str
    """Name of the mode, or ``custom`` for a configuration of the user's."""
    layers: tuple[Layer, ...]
    """Every linear layer of the model, in order."""
    total_parameters: int
    """All parameters of the model, outside linear layers too."""
    smoothed_runtime: tuple[str, ...] = ()
    """SmoothQuant: the layers whose inputs are multiplied at run time."""
    precision: str = "INT8"
    """Storage precision of the converted weights."""
    unused: tuple[str, ...] = ()
    """Converted layers that the forward which was measured did not use."""
    missed: dict[str, Any] = field(default_factory=dict)
    """Attention and MLP layers of repeated blocks that were left out (``layers``), and how many
    such layers there are (``of``)."""
    elsewhere: dict[str, Any] = field(default_factory=dict)
    """Where most weights are if not in ``nn.Linear``: their ``share``, and by kind the number of
    ``parameters`` and the ``layers``."""
    attention: dict[str, Any] = field(default_factory=dict)
    """Where INT8 attention was asked for: how many calls run on INT8 queries and keys (``int8``),
    and how many were left to torch, by reason (``left_out``)."""

    @property
    def converted(self) -> tuple[Layer, ...]:
        """The layers that are quantized now."""
        return tuple(layer for layer in self.layers if layer.reason is None)

    @property
    def left_out(self) -> tuple[Layer, ...]:
        """The layers that are not, with reasons."""
        return tuple(layer for layer in self.layers if layer.reason is not None)

    @property
    def converted_parameters(self) -> int:
        """Number of parameters of the converted layers."""
        return sum(layer.parameters for layer in self.converted)

    @property
    def fused(self) -> tuple[Layer, ...]:
        """The converted layers that run on the fused kernels."""
        return tuple(layer for layer in self.converted if layer.fused)

    @property
    def backend(self) -> str:
        """``fused`` if a layer runs on the fused kernels, else ``torchao``."""
        return "fused" if self.fused else "torchao"

    def __str__(self) -> str:
        share = self.converted_parameters / max(self.total_parameters, 1)
        text = (
            f"{len(self.converted)} of {len(self.layers)} linear layers in {self.precision} "
            f"({self.mode}), "
            f"{self.converted_parameters:,} of {self.total_parameters:,} parameters ({share:.1%})"
        )
        if reasons := Counter(str(layer.reason) for layer in self.left_out):
            text += "; left out: " + ", ".join(f"{n} {reason}" for reason, n in reasons.items())
        if self.fused:
            text += f"; {len(self.fused)} on fused kernels"
        if falls := Counter(layer.fallback for layer in self.converted if layer.fallback):
            text += "; on torchao's: " + ", ".join(f"{n} {reason}" for reason, n in falls.items())
        if self.smoothed_runtime:
            text += f"; SmoothQuant: {len(self.smoothed_runtime)} layers scaled at run time"
        return text

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {
            "mode": self.mode,
            "converted_layers": len(self.converted),
            "linear_layers": len(self.layers),
            "converted_parameters": self.converted_parameters,
            "total_parameters": self.total_parameters,
            "left_out": {layer.name: layer.reason for layer in self.left_out},
            "fused_layers": len(self.fused),
            "fallbacks": {layer.name: layer.fallback for layer in self.converted if layer.fallback},
            "smoothed_folded": {},  # of schema 1; norm -> layers in older files
            "smoothed_runtime": list(self.smoothed_runtime),
            **({"unused": list(self.unused)} if self.unused else {}),
            **({"missed": self.missed} if self.missed else {}),
            **({"elsewhere": self.elsewhere} if self.elsewhere else {}),
            **({"attention": self.attention} if self.attention else {}),
        }
