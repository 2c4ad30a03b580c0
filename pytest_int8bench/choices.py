"""The allowed values of non-numeric RunParams fields, and the sweep keys, for option help without
loading RunParams."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
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
# The kernel for short sequences suits few models; ``auto`` tries it.
SWEPT_ATTENTION = tuple(name for name in ATTENTION_BACKENDS if name != "short")
INT8_BACKENDS = ("torchao", "fused", "auto")
FEEDS = ("device", "host")


class ModeChoice(NamedTuple):  # made at every start of pytest, where a dataclass takes 1 ms more
    """A quantization mode as options, run names and reports see it, before torch is imported."""

    summary: str
    """Short description of what is quantized, such as ``weights only``."""
    target: str
    """Path of its :class:`~pytest_int8bench.quantization.modes.Mode`: ``package.module:NAME``."""
    precision: str = "INT8"
    """Storage precision of the weights, for messages."""
    fused: bool = False
    """Whether the fused kernels support it."""
    smoothquant: bool = True
    """Whether it supports SmoothQuant."""
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
#: Built-in modes.
INT8_MODES = tuple(_BUILT_IN)
#: Values of the sweep key ``int8_mode``.
SWEPT_MODES = ("w8a8", "w8")
_modes = dict(_BUILT_IN)
# Underscores separate the parts of run names, and hyphens those of test ids.
_MODE_NAME = re.compile(r"[a-z][a-z0-9]*")


def mode_choices() -> dict[str, ModeChoice]:
    """Return every quantization mode by name: built-in modes first, then registered ones."""
    return dict(_modes)


def register_mode(name: str, choice: ModeChoice) -> None:
    """Register a third-party quantization mode for ``--int8-mode`` and ``RunParams``.

    Call it in a plugin or a ``conftest.py``, before pytest parses its options.
    Registering the same choice again does nothing.

    Raises:
        ValueError: if the name is already taken or cannot be part of a run name.
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
    """Return the storage precision of a saved point's quantized layers, ``INT8`` or ``FP8``. A
    mode that is not registered here counts as INT8 (the file may come from another machine)."""
    choice = _modes.get(str(params.get("int8_mode")))
    return choice.precision if choice is not None else "INT8"


def takes_smoothquant(params: Mapping[str, Any]) -> bool:
    """Return whether the mode of a saved point supports SmoothQuant, as far as known."""
    choice = _modes.get(str(params.get("int8_mode")))
    return choice is None or choice.smoothquant


# -- sweep keys ---------------------------------------------------------------------------------

#: The key of every axis together.
ALL = "all"


class Sweep(NamedTuple):
    """One row of :data:`SWEEPS`."""

    key: str
    """Name of the sweep, as in ``--int8-sweep``."""
    field: str
    """RunParams field, or ``extra.NAME``."""
    values: tuple[Any, ...]
    help: str
    """Description of what is varied, for the documentation."""


class Sweeps(dict[str, dict[str, list[Any]]]):
    """Sweep key -> {RunParams field: values}. ``all`` comes last and follows from the others."""

    def __init__(self, rows: Iterable[Sweep]) -> None:
        super().__init__()
        self.help: dict[str, str] = {}
        """Key -> what is varied."""
        for row in rows:
            self.add(row)

    def add(self, row: Sweep) -> None:
        """Add a sweep.

        Raises:
            ValueError: if its key is taken.
        """
        if row.key in (*self, ALL):
            raise ValueError(f"sweep key {row.key!r} is taken")
        self.help[row.key] = row.help
        self[row.key] = {row.field: list(row.values)}

    def __setitem__(self, key: str, axes: dict[str, list[Any]]) -> None:
        super().__setitem__(key, axes)
        self._renew_all()

    def __delitem__(self, key: str) -> None:
        super().__delitem__(key)
        self.help.pop(key, None)
        self._renew_all()

    def _renew_all(self) -> None:
        self.pop(ALL, None)
        every = {name: values for axes in self.values() for name, values in axes.items()}
        super().__setitem__(ALL, every)


_BOTH = (True, False)
SWEEPS = Sweeps(
    (
        Sweep("batch", "batch_size", tuple(2**n for n in range(14)), "samples per forward"),
        Sweep(
            "image", "image_size", tuple(2**n for n in range(8)), "image height and width in pixels"
        ),
        Sweep("patch", "patch_size", (1, 2, 4, 8), "patch height and width in pixels"),
        Sweep("time", "num_timesteps", (1, 2, 4, 6, 8, 12), "images per location"),
        Sweep("use_s1", "use_s1", _BOTH, "Sentinel-1 as an input"),
        Sweep("use_s2", "use_s2", _BOTH, "Sentinel-2 as an input"),
        Sweep("use_landsat", "use_landsat", _BOTH, "Landsat as an input"),
        Sweep("bf16", "bf16", _BOTH, "BF16 weights and activations, or FP32"),
        Sweep(
            "model_size",
            "model_size",
            ("nano", "tiny", "base", "large"),
            "size of the OlmoEarth encoder",
        ),
        Sweep("int8_enabled", "int8_enabled", _BOTH, "INT8, or its baseline"),
        Sweep("int8_mode", "int8_mode", SWEPT_MODES, "INT8 mode"),
        Sweep("int8_smoothquant", "int8_smoothquant", _BOTH, "with SmoothQuant, or without"),
        Sweep(
            "compile_mode",
            "compile_mode",
            ("default", "reduce-overhead", "max-autotune"),
            "mode of `torch.compile`",
        ),
        Sweep("attention", "attention", SWEPT_ATTENTION, "attention backend"),
        Sweep(
            "int8_backend", "int8_backend", ("torchao", "fused"), "where the INT8 kernels come from"
        ),
        Sweep("int8_attention", "int8_attention", _BOTH, "attention on INT8, or in 16 bits"),
        Sweep("feed", "feed", FEEDS, "inputs that stay on the device, or come from the host"),
    )
)
"""Sweep key -> {RunParams field: values}."""
