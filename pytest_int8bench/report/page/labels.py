"""Label points with short names instead of full run names, and choose their styles and order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pytest_int8bench.choices import SWEPT_MODES
from pytest_int8bench.params import MEASURING_FIELDS
from pytest_int8bench.results.base import Record
from pytest_int8bench.results.records import Result

#: Parameters that determine how a model is quantized, but not which kernels it runs.
MODE_FIELDS = ("int8_enabled", "int8_mode", "int8_smoothquant", "bf16")
#: Short names of numeric axes.
_SPOKEN = {
    "batch_size": "batch",
    "image_size": "image",
    "patch_size": "patch",
    "num_timesteps": "timesteps",
}
_QUANTIZED = [name.upper() for name in SWEPT_MODES]
_MODES = ("BF16", *_QUANTIZED, *(f"{name}, SmoothQuant" for name in _QUANTIZED))


def identifying_params(record: Record) -> dict[str, Any]:
    """Return the parameters that identify a point; those of its workload are named ``extra.NAME``.

    Baselines run no INT8 kernels, so their ``int8_*`` parameters are left out.
    """
    values = {name: v for name, v in record.params.items() if name not in MEASURING_FIELDS}
    extra = values.pop("extra", None)
    for name, value in extra.items() if isinstance(extra, dict) else ():
        values[f"extra.{name}"] = value
    if not values.get("int8_enabled"):
        values = {name: v for name, v in values.items() if not name.startswith("int8_")}
    # Damaged files may hold lists or objects, which are not hashable.
    return {name: v if isinstance(v, str | int | float) else str(v) for name, v in values.items()}


def mode(params: Mapping[str, Any]) -> str:
    """Return the name of a point's mode: ``BF16``, ``W8A8, SmoothQuant``, ``W8 (FP32)``."""
    is_bf16 = params.get("bf16", True)
    if not params.get("int8_enabled"):
        return "BF16" if is_bf16 else "FP32"
    smooth = ", SmoothQuant" if params.get("int8_smoothquant") else ""
    return f"{str(params.get('int8_mode', 'INT8')).upper()}{smooth}{'' if is_bf16 else ' (FP32)'}"


def style(params: Mapping[str, Any]) -> int:
    """Return the index of the color and marker for a point's mode; 0 for a baseline."""
    if not params.get("int8_enabled"):
        return 0
    name = mode(params).removesuffix(" (FP32)")
    return _MODES.index(name) if name in _MODES else len(_MODES)


def order(params: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return a key that sorts points by their axes, then by mode."""
    axes = {name: value for name, value in sorted(params.items()) if name not in MODE_FIELDS}
    shared = [_sortable(value) for name, value in axes.items() if not name.startswith("int8_")]
    own = [_sortable(value) for name, value in axes.items() if name.startswith("int8_")]
    return (shared, style(params), own)


def differing(points: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the names of the parameters in which ``points`` differ, except :data:`MODE_FIELDS`.
    ``int8_*`` parameters are compared only among quantized points."""
    points = list(points)
    found = []
    for name in dict.fromkeys(name for point in points for name in point):
        asked = [p for p in points if p.get("int8_enabled") or not name.startswith("int8_")]
        if name not in MODE_FIELDS and len({_typed(p.get(name)) for p in asked}) > 1:
            found.append(name)
    return found


def label(params: Mapping[str, Any], names: Iterable[str]) -> str:
    """Return a label: the point's mode, and the values of those parameters in ``names`` that it
    has."""
    return ", ".join([mode(params), *(setting(n, params[n]) for n in names if n in params)])


def setting(name: str, value: object) -> str:
    """Return a parameter with its value: ``batch 128``, ``compile_mode=default``."""
    if name in _SPOKEN:
        return f"{_SPOKEN[name]} {value}"
    return f"{name.removeprefix('extra.')}={shown_value(value)}"


def axis(name: str) -> str:
    """Return the human-readable name of an axis."""
    return _SPOKEN.get(name, name.removeprefix("extra."))


def shown_value(value: object) -> str:
    """Return a value as users write it in options."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def is_number(value: object) -> bool:
    """Return whether a value can be placed on a numeric axis."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def test_of(record: Record) -> str:
    """Return the record's node id without parameters."""
    return record.nodeid.partition("[")[0]


def is_measured(result: Result) -> bool:
    """Return whether the point has a throughput."""
    return result.samples_per_s is not None


def sortable_values(values: Iterable[Any]) -> list[Any]:
    """Return the distinct values, sorted: numbers first, then all others as text."""
    return sorted({_typed(v): v for v in values}.values(), key=_sortable)


def _typed(value: object) -> tuple[str, object]:
    return (type(value).__name__ if isinstance(value, bool) else "", value)


def _sortable(value: object) -> tuple[int, float, str]:
    if isinstance(value, int | float):
        return (0, float(value), "")
    return (1, 0.0, str(value))
