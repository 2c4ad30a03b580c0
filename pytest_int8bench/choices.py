"""The values that RunParams fields may take, apart from numbers: what the help of the options needs
without loading RunParams."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

MODEL_SIZES = ("nano", "tiny", "small", "base", "large")
DEVICES = ("cuda", "cpu")
COMPILE_MODES = (
    "default",
    "reduce-overhead",
    "max-autotune",
    "max-autotune-no-cudagraphs",
    "off",
)
ATTENTION_BACKENDS = ("flash", "cudnn", "efficient", "math", "short", "auto")
# The kernel for short sequences fits few models; ``auto`` tries it.
SWEPT_ATTENTION = tuple(name for name in ATTENTION_BACKENDS if name != "short")
INT8_BACKENDS = ("torchao", "fused", "auto")
FEEDS = ("device", "host")


class ModeChoice(NamedTuple):  # made at every start of pytest, where a dataclass takes 1 ms more
    """What options, run names and reports need to know of a quantization mode before torch is
    imported."""

    summary: str
    """What is quantized, for help and advice: ``weights only``."""
    target: str
    """Where its :class:`~pytest_int8bench.quantization.modes.Mode` is: ``package.module:NAME``."""
    precision: str = "INT8"
    """What its weights are stored in, for messages."""
    fused: bool = False
    """The fused kernels run it."""
    smoothquant: bool = True
    """It takes SmoothQuant."""
    cuda_only: bool = False
    bf16_only: bool = False


_HOME = "pytest_int8bench.quantization.modes"
_BUILT_IN = {
    "w8a8": ModeChoice(
        summary="weights and dynamic activations", target=f"{_HOME}.w8a8:MODE", fused=True
    ),
    "w8": ModeChoice(summary="weights only", target=f"{_HOME}.w8:MODE"),
    "fp8": ModeChoice(
        summary="weights and dynamic activations in FP8, for reference",
        target=f"{_HOME}.fp8:MODE",
        precision="FP8",
        smoothquant=False,
        cuda_only=True,
        bf16_only=True,
    ),
}
#: The modes of this package.
INT8_MODES = tuple(_BUILT_IN)
#: Values of the sweep key ``int8_mode``.
SWEPT_MODES = ("w8a8", "w8")
_modes = dict(_BUILT_IN)
# Run names separate their parts by underscores and test ids by hyphens.
_MODE_NAME = re.compile(r"[a-z][a-z0-9]*")


def mode_choices() -> dict[str, ModeChoice]:
    """Return every quantization mode by name, registered ones after those of this package."""
    return dict(_modes)


def register_mode(name: str, choice: ModeChoice) -> None:
    """Add a quantization mode from outside this package, for ``--int8-mode`` and ``RunParams``.

    Call it in a plugin or in a ``conftest.py``, so that it is known when options are read.
    Registering the same choice again does nothing.

    Raises:
        ValueError: for a name that is taken, or that cannot be part of a run name.
    """
    if name == "off" or not _MODE_NAME.fullmatch(name):
        raise ValueError(
            f"name must be lower-case letters and digits, starting with a letter, and not off; "
            f"got {name!r}"
        )
    if _modes.get(name, choice) != choice:
        raise ValueError(f"quantization mode {name!r} is registered already: {_modes[name]}")
    _modes[name] = choice


def precision(params: Mapping[str, Any]) -> str:
    """Return what the quantized layers of a saved point store: ``INT8``, or ``FP8``. A mode that
    is not registered here, of a file that was saved elsewhere, counts as INT8."""
    choice = _modes.get(str(params.get("int8_mode")))
    return choice.precision if choice is not None else "INT8"


def takes_smoothquant(params: Mapping[str, Any]) -> bool:
    """Say whether SmoothQuant goes with the mode of a saved point, as far as that is known."""
    choice = _modes.get(str(params.get("int8_mode")))
    return choice is None or choice.smoothquant
