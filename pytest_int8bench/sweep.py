"""Sweep keys and the points they expand to."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pytest_int8bench.choices import ATTENTION_BACKENDS, FEEDS, SWEPT_MODES

if TYPE_CHECKING:
    from pytest_int8bench.params import RunParams


SWEEPS: dict[str, dict[str, list[Any]]] = {
    "batch": {"batch_size": [2**n for n in range(14)]},
    "image": {"image_size": [2**n for n in range(8)]},
    "patch": {"patch_size": [1, 2, 4, 8]},
    "time": {"num_timesteps": [1, 2, 4, 6, 8, 12]},
    "use_s1": {"use_s1": [True, False]},
    "use_s2": {"use_s2": [True, False]},
    "use_landsat": {"use_landsat": [True, False]},
    "bf16": {"bf16": [True, False]},
    "model_size": {"model_size": ["nano", "tiny", "base", "large"]},
    "int8_enabled": {"int8_enabled": [True, False]},
    "int8_mode": {"int8_mode": list(SWEPT_MODES)},
    "int8_smoothquant": {"int8_smoothquant": [True, False]},
    "compile_mode": {"compile_mode": ["default", "reduce-overhead", "max-autotune"]},
    "attention": {"attention": list(ATTENTION_BACKENDS)},
    "int8_backend": {"int8_backend": ["torchao", "fused"]},
    "feed": {"feed": list(FEEDS)},
}
"""Sweep key -> {RunParams field: values}."""
SWEEPS["all"] = {name: values for axis in SWEEPS.values() for name, values in axis.items()}


def axes_of(sweep_keys: Iterable[str]) -> dict[str, list[Any]]:
    """Return the axes that ``sweep_keys`` name, in order.

    Raises:
        ValueError: for an unknown key, listing the valid ones.
    """
    axes: dict[str, list[Any]] = {}
    for key in sweep_keys:
        if key not in SWEEPS:
            raise ValueError(f"unknown sweep key {key!r}; keys are {', '.join(SWEEPS)}")
        axes |= SWEEPS[key]
    return axes


def expand(
    default: RunParams,
    axes: Mapping[str, Sequence[Any]],
    *,
    cross_product: bool = False,
) -> list[RunParams]:
    """Expand ``axes`` around ``default``.

    Args:
        default: the point whose other fields are kept.
        axes: RunParams field (or ``extra.NAME``) -> values. No axis gives ``[default]``.
        cross_product: all combinations instead of one axis at a time.

    Returns:
        The points in the order of the axes, each once.

    Raises:
        ValueError: for an unknown field, a bad value, or an axis without values.
    """
    for name, values in axes.items():
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise ValueError(f"sweep over {name} must be a list of values, got {values!r}")
    if cross_product or not axes:
        combinations = [
            dict(zip(axes, combination, strict=True))
            for combination in itertools.product(*axes.values())
        ]
    else:
        combinations = [{name: value} for name, values in axes.items() for value in values]
    return unique(_with(default, changes) for changes in combinations)


def expand_modes(
    default: RunParams,
    modes: Sequence[str],
    axes: Mapping[str, Sequence[Any]],
    *,
    cross_product: bool = False,
) -> list[RunParams]:
    """Expand ``axes`` once for each INT8 mode of ``modes``, ``off`` for none among them.

    Modes always multiply, also without ``cross_product``. Points without INT8 come out as
    plain baselines, so that they fold.
    """
    points: list[RunParams] = []
    for mode in modes:
        start = (
            default.baseline()
            if mode == "off"
            else default.replace(int8_enabled=True, int8_mode=mode)
        )
        expanded = expand(start, axes, cross_product=cross_product)
        points += [p if p.int8_enabled and mode != "off" else p.baseline() for p in expanded]
    return unique(points)


def with_baselines(points: Iterable[RunParams]) -> list[RunParams]:
    """Put the BF16 twin of each point before it; duplicates fold."""
    return unique(point for p in points for point in (p.baseline(), p))


def unique(points: Iterable[RunParams]) -> list[RunParams]:
    """Drop points that come again, keeping the order."""
    return list(dict.fromkeys(points))


def _with(default: RunParams, changes: Mapping[str, Any]) -> RunParams:
    fields = {k: v for k, v in changes.items() if not k.startswith("extra.")}
    extra = {k.removeprefix("extra."): v for k, v in changes.items() if k.startswith("extra.")}
    if extra:
        fields["extra"] = {**default.extra, **extra}
    return default.replace(**fields)
