"""Quantization modes, one file per mode.

Another package registers its mode by name before pytest reads options. The mode is imported when
it is first used::

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
    """The evidence that a model runs in its mode, from its weights and one profiled forward."""

    storage: torch.dtype | None = torch.int8
    """The dtype in which every quantized layer must store its weight, or None for any dtype."""
    int8_matmuls: bool = False
    """True if INT8 matmuls must run, False if none may."""
    kernels: re.Pattern[str] | None = None
    """Matches the names of other kernels. At least one must run, and none in a baseline."""
    hint: str = ""
    """Appended to the error if they did not run on CUDA: a possible reason."""


@dataclass(frozen=True, kw_only=True)
class Bound:
    """Parameters of the upper bound of a mode's speedup."""

    int8_matmuls: bool
    """Matmuls run at the device's INT8 rate and read one byte per input element, which the kernels
    before them can write. Otherwise they run at the baseline's rate and read its inputs."""
    weight_bytes: float = 1
    """Bytes per element of a quantized weight."""


def _no_problem(_: Any) -> str | None:
    return None


def _leave(model: nn.Module, layers: Sequence[Layer]) -> None:
    """Leave the layers as torchao quantized them."""


@dataclass(frozen=True, kw_only=True)
class Mode:
    """A way to quantize linear layers."""

    name: str
    """The name under which :mod:`pytest_int8bench.choices` registers the mode."""
    configure: Callable[[nn.Module], Any]
    """Return torchao's configuration for a model."""
    lower: Callable[[nn.Module, Sequence[Layer]], None] = _leave
    """Replace layers that torchao quantized by faster ones, in place, before layers move to the
    fused kernels."""
    layer_problem: Callable[[nn.Linear], str | None] = _no_problem
    """Return why torchao's kernels do not support a layer, or None if they do."""
    device_problem: Callable[[torch.device], str | None] = _no_problem
    """Return why a device cannot run the mode, or None if it can. Points are skipped with the
    reason."""
    proof: Proof = field(default_factory=Proof)
    bound: Bound | None = None
    """None if no upper bound is known."""
    smoothquant_helps: bool = False
    """Suggest SmoothQuant first when accuracy drops."""
    next_mode: str | None = None
    """The mode to suggest when accuracy drops, if any."""
    explain: Callable[[str], str | None] = _no_problem
    """Turn torch's error message into one line with a remedy, or return None."""

    @property
    def label(self) -> str:
        """The name of the mode in messages, such as ``W8A8``."""
        return self.name.upper()

    @property
    def choice(self) -> ModeChoice:
        """The mode's entry in :mod:`pytest_int8bench.choices`, which does not import torch."""
        return mode_choices()[self.name]

    def fused_problem(self, device: torch.device) -> str | None:
        """Return why no layer can run on the fused kernels, or None if one can."""
        if not self.choice.fused:
            fused = ", ".join(name.upper() for name, c in mode_choices().items() if c.fused)
            return f"the fused kernels support {fused}, not {self.name}"
        return dispatch.fused_problem(device)


class _Modes(Mapping[str, Mode]):
    """Name -> registered mode, imported on lookup."""

    def __getitem__(self, name: str) -> Mode:
        target = mode_choices()[name].target
        module, _, attribute = target.partition(":")
        try:
            mode = getattr(importlib.import_module(module), attribute)
        except Exception as error:  # code of another package runs here
            raise QuantizationError(
                f"int8_mode={name}: cannot load {target}: {type(error).__name__}: {error}"
            ) from None
        if not isinstance(mode, Mode) or mode.name != name:
            raise TypeError(f"{module}:{attribute} must be a Mode named {name!r}, got {mode!r}")
        return mode

    def __iter__(self) -> Iterator[str]:
        return iter(mode_choices())

    def __len__(self) -> int:
        return len(mode_choices())


MODES: Mapping[str, Mode] = _Modes()
