"""Records of which linear layers of a model were quantized, and why the others were not."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Layer:
    """The outcome of quantizing one linear layer."""

    name: str
    parameters: int
    """Number of weights and biases."""
    reason: str | None = None
    """Why the layer was left out; None if it was converted."""
    fused: bool = False
    """True if the layer runs on the fused kernels, False if on torchao's."""
    fallback: str | None = None
    """Why a converted layer runs on torchao's kernels although the fused ones were requested."""


@dataclass(frozen=True)
class Coverage:
    """Summary of what :func:`apply_int8_quant` converted in a model."""

    mode: str
    """Name of the mode, or ``custom`` for the user's own configuration."""
    layers: tuple[Layer, ...]
    """Every linear layer of the model, in order."""
    total_parameters: int
    """Number of parameters of the whole model, including those outside linear layers."""
    smoothed_runtime: tuple[str, ...] = ()
    """Layers whose inputs SmoothQuant scales at run time."""
    precision: str = "INT8"
    """Storage precision of the converted weights."""
    unused: tuple[str, ...] = ()
    """Converted layers that the measured forward did not use."""
    missed: dict[str, Any] = field(default_factory=dict)
    """Attention and MLP layers of repeated blocks that were left out (``layers``), and the total
    number of such layers (``of``)."""
    elsewhere: dict[str, Any] = field(default_factory=dict)
    """Set if most weights are outside ``nn.Linear``: their ``share`` of all weights, and
    ``weights``, the number of ``parameters`` and the ``layers`` of each kind of module."""
    attention: dict[str, Any] = field(default_factory=dict)
    """Set if INT8 attention was requested: how many calls run on INT8 queries and keys (``int8``),
    and how many were left to torch, by reason (``left_out``)."""

    @property
    def converted(self) -> tuple[Layer, ...]:
        """The quantized layers."""
        return tuple(layer for layer in self.layers if layer.reason is None)

    @property
    def left_out(self) -> tuple[Layer, ...]:
        """The layers that were not quantized, with reasons."""
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
        """``fused`` if any layer runs on the fused kernels, else ``torchao``."""
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
        if reasons := Counter(layer.fallback for layer in self.converted if layer.fallback):
            listed = ", ".join(f"{n} {reason}" for reason, n in reasons.items())
            text += f"; on torchao kernels: {listed}"
        if self.smoothed_runtime:
            text += f"; SmoothQuant: {len(self.smoothed_runtime)} layers scaled at run time"
        return text

    def to_dict(self) -> dict[str, Any]:
        """Return the coverage as JSON-serializable values."""
        return {
            "mode": self.mode,
            "converted_layers": len(self.converted),
            "linear_layers": len(self.layers),
            "converted_parameters": self.converted_parameters,
            "total_parameters": self.total_parameters,
            "left_out": {layer.name: layer.reason for layer in self.left_out},
            "fused_layers": len(self.fused),
            "fallbacks": {layer.name: layer.fallback for layer in self.converted if layer.fallback},
            "smoothed_folded": {},  # part of schema 1: norm -> layers in older files
            "smoothed_runtime": list(self.smoothed_runtime),
            **({"unused": list(self.unused)} if self.unused else {}),
            **({"missed": self.missed} if self.missed else {}),
            **({"elsewhere": self.elsewhere} if self.elsewhere else {}),
            **({"attention": self.attention} if self.attention else {}),
        }
