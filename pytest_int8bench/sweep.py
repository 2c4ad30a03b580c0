"""Sweep keys and the points they expand to."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_int8bench.choices import FEEDS, SWEPT_ATTENTION, SWEPT_MODES

if TYPE_CHECKING:
    from pytest_int8bench.params import RunParams

#: The key of every axis together.
ALL = "all"
#: A session of more points would take weeks, and pytest gigabytes to collect it.
MAX_POINTS = 100_000


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
