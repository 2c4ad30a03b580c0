"""Expand sweep keys to points. Their table is in :mod:`.choices`, as option help needs it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pytest_int8bench.choices import SWEEPS as SWEEPS
from pytest_int8bench.choices import Sweep as Sweep

if TYPE_CHECKING:
    from pytest_int8bench.params import RunParams

#: A session of more points would take weeks, and pytest gigabytes to collect it.
MAX_POINTS = 100_000


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
        ValueError: for an unknown field, a bad value, an axis without values, or more than
            :data:`MAX_POINTS` points.
    """
    for name, values in axes.items():
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise ValueError(f"sweep over {name} must be a list of values, got {values!r}")
    check_count(axes, cross_product=cross_product)
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

    Raises:
        ValueError: as :func:`expand`; modes count towards :data:`MAX_POINTS`.
    """
    check_count(axes, cross_product=cross_product, modes=len(modes))
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


def check_count(
    axes: Mapping[str, Sequence[Any]], *, cross_product: bool = False, modes: int = 1
) -> None:
    """Count before anything is expanded: the product of all axes does not fit in memory.

    Raises:
        ValueError: for more than :data:`MAX_POINTS` points.
    """
    lengths = [len(values) for values in axes.values()]
    count = modes * (math.prod(lengths) if cross_product else sum(lengths))
    if count > MAX_POINTS:
        raise ValueError(
            f"a sweep must have at most {MAX_POINTS:,} points, got {count:,}: sweep over fewer "
            "keys or values, or not over their cross product"
        )


def with_baselines(points: Iterable[RunParams]) -> list[RunParams]:
    """Put the baseline of each point before it; duplicates fold."""
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
