"""The parameters of one run: a frozen dataclass, its name, and its environment variables.

A run name is the human-readable identity of a point. It serves as the pytest id and can be
parsed::

    >>> p = RunParams(int8_enabled=True)
    >>> p.run_name
    'base_cuda_bf16_int8_w8a8_max-autotune_s2_is64_ps4_ts12_bs128'
    >>> RunParams.from_run_name(p.run_name) == p
    True

Names of other workloads include OlmoEarth's fields only where they differ from their defaults::

    >>> p.with_short_name().run_name
    'cuda_bf16_int8_w8a8_max-autotune_bs128'
    >>> RunParams.from_run_name('cpu_bf16_is224_bs4').image_size
    224
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from pytest_int8bench import run_names
from pytest_int8bench.attention import impossible_reason
from pytest_int8bench.choices import (
    ATTENTION_BACKENDS,
    COMPILE_MODES,
    DEVICES,
    FEEDS,
    INT8_BACKENDS,
    MODEL_SIZES,
    mode_choices,
)
from pytest_int8bench.param_values import (
    FrozenDict,
    Scalar,
    checked_extra,
    parse_bool,
    parse_extra,
    parse_extras,
    to_text,
)

_CHOICES: dict[str, tuple[str, ...]] = {
    "model_size": MODEL_SIZES,
    "gpu_type": DEVICES,
    "compile_mode": COMPILE_MODES,
    "attention": ATTENTION_BACKENDS,
    "int8_backend": INT8_BACKENDS,
    "feed": FEEDS,
}

#: Fields that control measuring and reporting. They never enter names, ids or model identity.
MEASURING_FIELDS = (
    "benchmark_interval_s",
    "min_batches_per_interval",
    "profiler_enabled",
    "wandb_enabled",
)

#: Prefix of the environment variables written by :meth:`RunParams.to_env_vars`.
ENV_PREFIX = "INT8BENCH_"


@dataclass(frozen=True, kw_only=True)
class RunParams:
    """One point of a benchmark.

    An invalid field raises a ``ValueError`` that names the field, the rule and the value. An
    invalid combination raises nothing: :meth:`impossible_reason` reports it, so that a sweep can
    contain it and skip it.
    """

    model_size: str = "base"
    """OlmoEarth model size: ``nano``, ``tiny``, ``small``, ``base`` or ``large``."""
    use_s1: bool = False
    """Feed Sentinel-1 (2 bands)."""
    use_s2: bool = True
    """Feed Sentinel-2 L2A (12 bands)."""
    use_landsat: bool = False
    """Feed Landsat (11 bands)."""
    image_size: int = 64
    """Image height and width in pixels (10 m each)."""
    patch_size: int = 4
    """Patch height and width in pixels."""
    num_timesteps: int = 12
    """Number of images per location."""
    batch_size: int = 128
    """Samples per forward pass."""
    gpu_type: str = "cuda"
    """Device type: ``cuda`` or ``cpu``."""
    bf16: bool = True
    """BF16 weights and activations; FP32 otherwise."""
    int8_enabled: bool = False
    """Quantize the linear layers to INT8."""
    int8_mode: str = "w8a8"
    """``w8a8`` (weights and dynamic activations), ``w8`` (weights only), ``fp8`` (weights and
    dynamic activations in FP8, for reference) or a registered mode."""
    int8_smoothquant: bool = False
    """Calibrate and shift activation outliers into the weights first."""
    compile_mode: str = "max-autotune"
    """torch.compile mode, or ``off`` for eager."""
    compile_fullgraph: bool = True
    """Require the model to compile as one graph."""
    model_version: str = "v1"
    """OlmoEarth version. For Sentinel-2, v1 makes three tokens where v1.1 and later make one."""
    attention: str = "flash"
    """Attention backend: ``flash``, ``cudnn``, ``efficient``, ``math``, ``short`` (this package's
    kernel for sequences of up to 128 tokens) or ``auto`` (fastest)."""
    int8_backend: str = "auto"
    """Source of the INT8 kernels: ``torchao``, ``fused`` or ``auto``."""
    int8_attention: bool = False
    """Multiply queries and keys in INT8 as well. Applies to attention without a mask that is not
    causal and that ``attention=short`` does not handle."""
    feed: str = "device"
    """``device`` keeps the inputs on the device; ``host`` streams from a DataLoader (CUDA only;
    the point is skipped on other devices)."""
    extra: Mapping[str, Scalar] = field(default_factory=FrozenDict)
    """Values of the workload's own axes, by name."""
    benchmark_interval_s: float = 10.0
    """Time limit for the timed rounds of one point, in seconds."""
    min_batches_per_interval: int = 10
    """Minimum number of batches to measure, even if they exceed the interval."""
    profiler_enabled: bool = False
    """Write a trace and a kernel table of one forward pass."""
    wandb_enabled: bool = False
    """Log the point to Weights & Biases at the end of the session."""

    # Not a dataclass field: points that differ only here are equal.
    _has_short_name = False

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            if spec.name != "extra":
                object.__setattr__(self, spec.name, _checked(spec.name, getattr(self, spec.name)))
        object.__setattr__(self, "extra", checked_extra(self.extra))

    # -- changing -------------------------------------------------------------------------

    def replace(self, **changes: Any) -> RunParams:
        """Return a copy with ``changes``; raise ``ValueError`` for an unknown name or bad value."""
        for name in changes:
            if name not in FIELD_TYPES and name != "extra":
                raise ValueError(
                    f"unknown RunParams field {name!r}; fields are {', '.join(FIELD_TYPES)}, extra"
                )
        return dataclasses.replace(self, **changes).with_short_name(self._has_short_name)

    def with_short_name(self, is_short: bool = True) -> RunParams:
        """Return the same point with a short name (other workloads) or a full one (OlmoEarth).

        Args:
            is_short: start :attr:`run_name` with the device, and include OlmoEarth's fields only
                where they differ from their defaults.
        """
        if is_short == self._has_short_name:
            return self
        copy = dataclasses.replace(self)
        object.__setattr__(copy, "_has_short_name", is_short)
        return copy

    @property
    def has_short_name(self) -> bool:
        """Whether the point is named for a workload other than OlmoEarth."""
        return self._has_short_name

    def baseline(self) -> RunParams:
        """Return the BF16 (or FP32) baseline: this point with every INT8 field at its default."""
        return self.replace(**{name: _DEFAULTS[name] for name in FIELD_TYPES if name in _INT8})

    def identity(self) -> RunParams:
        """Return the point with default measuring fields, which do not affect the model."""
        return self.replace(**{name: _DEFAULTS[name] for name in MEASURING_FIELDS})

    # -- reading --------------------------------------------------------------------------

    def impossible_reason(self) -> str | None:
        """Return why this combination of fields cannot run, or None."""
        if not self.has_short_name and (problem := self._impossible_images()) is not None:
            return problem
        on_cuda = self.gpu_type == "cuda"
        if reason := impossible_reason(self.attention, self.gpu_type, bf16=self.bf16):
            return reason
        if self.int8_smoothquant and not self.int8_enabled:
            return "int8_smoothquant=True without int8_enabled has nothing to smooth"
        if self.int8_attention and not self.int8_enabled:
            return "int8_attention=True without int8_enabled has no baseline to compare with"
        if self.feed == "host" and not on_cuda:
            return f"feed=host has no device to copy to, gpu_type={self.gpu_type}"
        return self._impossible_mode() if self.int8_enabled else None

    def _impossible_images(self) -> str | None:
        """Return why OlmoEarth has no such inputs, or None."""
        if not (self.use_s1 or self.use_s2 or self.use_landsat):
            return "no modality: use_s1, use_s2 and use_landsat are all false"
        if self.image_size < self.patch_size:
            return f"image_size={self.image_size} is smaller than patch_size={self.patch_size}"
        if self.image_size % self.patch_size:
            return f"image_size={self.image_size} is not a multiple of patch_size={self.patch_size}"
        return None

    def _impossible_mode(self) -> str | None:
        """Return why the mode cannot run with the other fields, or None."""
        modes = mode_choices()
        mode, on_cuda = modes[self.int8_mode], self.gpu_type == "cuda"
        if mode.cuda_only and not on_cuda:
            return f"int8_mode={self.int8_mode} runs on CUDA only, gpu_type={self.gpu_type}"
        if mode.bf16_only and not self.bf16:
            return f"int8_mode={self.int8_mode} takes BF16 weights only, bf16=False"
        if self.int8_smoothquant and not mode.smoothquant:
            return f"int8_smoothquant must be False with int8_mode={self.int8_mode}, got True"
        if self.int8_backend == "fused":
            if not mode.fused:
                fused = ", ".join(name for name, choice in modes.items() if choice.fused)
                return f"int8_backend=fused runs {fused}, int8_mode={self.int8_mode}"
            if not on_cuda:
                return f"int8_backend=fused runs on CUDA only, gpu_type={self.gpu_type}"
        return None

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as plain values, for JSON."""
        values = {name: getattr(self, name) for name in FIELD_TYPES}
        return {**values, "extra": dict(self.extra)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunParams:
        """Create a point from the output of :meth:`to_dict`."""
        return cls().replace(**values)

    # -- names ----------------------------------------------------------------------------

    @property
    def run_name(self) -> str:
        """The name of the point; fields outside the fixed part appear only if not the default."""
        return run_names.write(vars(self), _DEFAULTS, is_short=self.has_short_name)

    @classmethod
    def from_run_name(cls, name: str) -> RunParams:
        """Parse the run name of any workload; measuring fields get their defaults.

        Raises:
            ValueError: if ``name`` is not a run name.
        """
        texts, is_short = run_names.read(name)
        axes = {k: text for k, text in texts.items() if k.startswith("extra.")}
        values = {k: parse_field(k, text) for k, text in texts.items() if k not in axes}
        extra = {k.removeprefix("extra."): parse_extra(text) for k, text in axes.items()}
        return cls(**values, extra=extra).with_short_name(is_short)

    # -- environment ----------------------------------------------------------------------

    def to_env_vars(self) -> dict[str, str]:
        """Return every field as environment variables (``INT8BENCH_BATCH_SIZE=128`` …)."""
        values = {name: to_text(getattr(self, name)) for name in FIELD_TYPES}
        values["extra"] = json.dumps(dict(self.extra))
        return {ENV_PREFIX + name.upper(): text for name, text in values.items()}

    @classmethod
    def from_env_vars(cls, environ: Mapping[str, str] | None = None) -> RunParams:
        """Create a point from the variables of :meth:`to_env_vars`; missing ones get the default.

        Args:
            environ: the environment variables; defaults to ``os.environ``.

        Raises:
            ValueError: if a value cannot be parsed; the message names the variable.
        """
        environ = os.environ if environ is None else environ
        values: dict[str, Any] = {}
        for name in (*FIELD_TYPES, "extra"):
            variable = ENV_PREFIX + name.upper()
            if (text := environ.get(variable)) is None:
                continue
            try:
                values[name] = parse_extras(text) if name == "extra" else parse_field(name, text)
            except ValueError as error:
                raise ValueError(f"{variable}: {error}") from None
        return cls(**values)


#: Name -> type of each RunParams field except ``extra``, in order.
FIELD_TYPES: dict[str, type] = {
    spec.name: {"str": str, "int": int, "float": float, "bool": bool}[cast("str", spec.type)]
    for spec in dataclasses.fields(RunParams)
    if spec.name != "extra"
}
_DEFAULTS: dict[str, Any] = {
    spec.name: spec.default for spec in dataclasses.fields(RunParams) if spec.name != "extra"
}
_INT8 = {name for name in FIELD_TYPES if name.startswith("int8_")}


def parse_field(name: str, text: str) -> Any:
    """Parse ``text`` as the value of the RunParams field ``name``.

    Raises:
        ValueError: if ``text`` is invalid; the message names the field, the rule and the value.
    """
    if name not in FIELD_TYPES:
        raise ValueError(
            f"unknown RunParams field {name!r}; fields are {', '.join(FIELD_TYPES)}, extra.NAME"
        )
    kind = FIELD_TYPES[name]
    value: Any = text
    if kind is bool:
        try:
            value = parse_bool(text)
        except ValueError as error:
            raise ValueError(f"{name} {error}") from None
    elif kind is not str:
        try:
            value = kind(text.strip())
        except ValueError:
            noun = "a whole number" if kind is int else "a number"
            raise ValueError(f"{name} must be {noun}, got {text!r}") from None
    return _checked(name, value)


def _checked(name: str, value: Any) -> Any:
    """Return ``value`` if it is valid for field ``name``, else raise ``ValueError``."""
    kind: Any = FIELD_TYPES[name]
    if kind is float and type(value) is int:
        try:
            value = float(value)
        except OverflowError:
            value = float("inf")
    if type(value) is not kind:
        noun = {str: "text", int: "a whole number", float: "a number", bool: "True or False"}
        raise ValueError(f"{name} must be {noun[kind]}, got {value!r}")
    choices = tuple(mode_choices()) if name == "int8_mode" else _CHOICES.get(name)
    if choices is not None and value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    if name == "model_version" and not re.fullmatch(r"v\d+(\.\d+)*", value):
        raise ValueError(f"model_version must look like v1 or v1.2, got {value!r}")
    if kind is int and value < 1:
        raise ValueError(f"{name} must be at least 1, got {value!r}")
    if kind is float and not 0 < value < float("inf"):
        raise ValueError(f"{name} must be a finite number above 0, got {value!r}")
    return value
