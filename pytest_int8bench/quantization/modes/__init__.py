"""Quantization modes: one file a mode, with everything that varies between them.

A mode of another package is registered by name before options are read, and loaded when it is
first used::

    from pytest_int8bench.choices import ModeChoice, register_mode

    register_mode("w4", ModeChoice(summary="weights in 4 bits", target="my_package.w4:MODE"))

where ``MODE`` is a :class:`Mode`.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from pytest_int8bench.choices import ModeChoice, mode_choices
from pytest_int8bench.errors import QuantizationError
from pytest_int8bench.kernels import dispatch
from pytest_int8bench.quantization.coverage import Layer


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What must be seen of a model, and in one profiled forward of it, for its label to hold."""

    storage: torch.dtype | None = torch.int8
    """What every quantized layer must store its weight in; None for anything."""
    int8_matmuls: bool = False
    """INT8 matmuls must run. Without it none may."""
    kernels: re.Pattern[str] | None = None
    """Names of other kernels one of which must run. They must not run in a baseline."""
    hint: str = ""
    """Why they may be missing on CUDA."""


@dataclass(frozen=True, kw_only=True)
class Bound:
    """What the upper bound of the speedup is computed from."""

    int8_matmuls: bool
    """Matmuls run at the device's INT8 rate, on inputs of one byte, which kernels between layers
    may write; otherwise at the baseline's rate, on its inputs."""
    weight_bytes: float = 1
    """Bytes of an element of a quantized weight."""


def _no_problem(_: Any) -> str | None:
    return None


def _leave(model: nn.Module, layers: Sequence[Layer]) -> None:
    """Leave the layers as torchao quantized them."""


@dataclass(frozen=True, kw_only=True)
class Mode:
    """A way to quantize linear layers."""

    name: str
    """As registered in :mod:`pytest_int8bench.choices`."""
    configure: Callable[[nn.Module], Any]
    """Return torchao's configuration for a model."""
    lower: Callable[[nn.Module, Sequence[Layer]], None] = _leave
    """Replace layers that torchao quantized by faster ones, in place. Layers that the fused kernels
    take are replaced after it."""
    layer_problem: Callable[[nn.Linear], str | None] = _no_problem
    """Say why torchao's kernels cannot take a layer, or return None."""
    device_problem: Callable[[torch.device], str | None] = _no_problem
    """Say why a device cannot run the mode, or return None. Points are skipped with the reason."""
    proof: Proof = field(default_factory=Proof)
    bound: Bound | None = None
    """None where no upper bound is known."""
    smoothquant_helps: bool = False
    """SmoothQuant is the first thing to try when accuracy drops."""
    next_mode: str | None = None
    """The mode to try when accuracy drops, if any."""
    explain: Callable[[str], str | None] = _no_problem
    """Turn the message of an error of torch into one line that says what to do, or return None."""

    @property
    def label(self) -> str:
        """What messages call the mode: ``W8A8``."""
        return self.name.upper()

    @property
    def choice(self) -> ModeChoice:
        """What is known of the mode without torch."""
        return mode_choices()[self.name]

    def fused_problem(self, device: torch.device) -> str | None:
        """Say why no layer can run on the fused kernels, or return None."""
        if not self.choice.fused:
            fused = ", ".join(name.upper() for name, c in mode_choices().items() if c.fused)
            return f"the fused kernels run {fused}, not {self.name}"
        return dispatch.fused_problem(device)


class _Modes(Mapping[str, Mode]):
    """Every mode that is registered, imported when it is first asked for."""

    def __getitem__(self, name: str) -> Mode:
        target = mode_choices()[name].target
        module, _, attribute = target.partition(":")
        try:
            mode = getattr(importlib.import_module(module), attribute)
        except Exception as error:  # code of another package runs here
            raise QuantizationError(
                f"int8_mode={name}: {target} cannot be loaded: {type(error).__name__}: {error}"
            ) from None
        if not isinstance(mode, Mode) or mode.name != name:
            raise TypeError(f"{module}:{attribute} must be a Mode named {name!r}, got {mode!r}")
        return mode

    def __iter__(self) -> Iterator[str]:
        return iter(mode_choices())

    def __len__(self) -> int:
        return len(mode_choices())


MODES: Mapping[str, Mode] = _Modes()
"""Name -> mode."""
