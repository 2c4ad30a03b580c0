"""Export saved files in the formats of services that track benchmarks over time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pytest_int8bench.environment import describe
from pytest_int8bench.report.cells import figure_interval, status_text
from pytest_int8bench.results.base import Record, point_label
from pytest_int8bench.results.figures import FIGURES
from pytest_int8bench.results.numbers import is_number
from pytest_int8bench.results.records import Saved, Timed
from pytest_int8bench.results.verdicts import Accuracy

#: Bencher's limits in characters (bencher.dev/docs/reference/bencher-metric-format).
BENCHMARK_LENGTH, MEASURE_LENGTH = 1024, 64


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One figure of one point."""

    point: str
    """Workload and test, which identify the point across commits."""
    name: str
    """Name of the field, such as ``batch_time_s``."""
    value: float
    low: float | None = None
    """Lower end of the 95 % interval."""
    high: float | None = None
    """Upper end of the 95 % interval."""
    unit: str
    """Unit of ``value * scale``."""
    scale: float = 1.0
    higher_is_better: bool
    run_name: str


def metrics(saved: Saved) -> list[Metric]:
    """Return the figures of measured points and of accuracy verdicts.

    Points that failed or were throttled are left out, and so are verdicts on random weights.
    """
    found = [m for result in saved.timed if _problem(result) is None for m in _of(result)]
    for verdict in saved.accuracy:
        if not verdict.is_pipeline_check:
            found += _of_verdict(verdict)
    return found


def left_out(saved: Saved) -> list[str]:
    """Return the points that :func:`metrics` leaves out, each with the reason."""
    problems = [(result, _problem(result)) for result in saved.timed]
    named = [f"{_label(result)} ({why})" for result, why in problems if why is not None]
    checks = [verdict for verdict in saved.accuracy if verdict.is_pipeline_check]
    return named + [f"{_label(v)} {v.metric} (random weights)" for v in checks]


def bencher(found: Sequence[Metric]) -> dict[str, Any]:
    """Return the metrics in the Bencher Metric Format."""
    values: dict[str, Any] = {}
    for metric in found:
        ends = {"lower_value": metric.low, "upper_value": metric.high}
        entry = {"value": metric.value, **{k: end for k, end in ends.items() if end is not None}}
        measures = values.setdefault(_shortened(metric.point, BENCHMARK_LENGTH), {})
        measures[_shortened(metric.name, MEASURE_LENGTH)] = entry
    return values


def github_action_benchmark(
    found: Sequence[Metric], environment: dict[str, Any], *, higher_is_better: bool
) -> list[dict[str, Any]]:
    """Return the metrics of one direction for github-action-benchmark.

    Its tool ``customBiggerIsBetter`` reads one direction, ``customSmallerIsBetter`` the other.
    """
    machine = describe(environment)
    return [
        {
            "name": f"{metric.point} {metric.name}",
            "unit": metric.unit,
            "value": metric.value * metric.scale,
            **({} if (text := _range(metric)) is None else {"range": text}),
            "extra": f"{metric.run_name}\n{machine}",
        }
        for metric in found
        if metric.higher_is_better == higher_is_better
    ]


def _of(result: Timed) -> Iterator[Metric]:
    for figure in FIGURES.values():
        # Only figures that are gated or charted are sure to declare which direction is better.
        is_tracked = figure.kind != "text" and (figure.option or figure.title)
        value = figure.of(result) if is_tracked else None
        if not is_number(value):
            continue
        low, high = figure_interval(figure, result)
        yield Metric(
            point=_label(result),
            name=figure.field,
            value=value,
            low=low,
            high=high,
            unit=figure.unit or ("s" if figure.kind == "time" else figure.field),
            scale=figure.scale,
            higher_is_better=figure.higher_is_better,
            run_name=result.run_name,
        )


def _of_verdict(verdict: Accuracy) -> Iterator[Metric]:
    if verdict.candidate is not None:
        yield _accuracy(verdict, verdict.metric, verdict.candidate, higher_is_better=True)
    if verdict.drop is not None:
        low, high = verdict.drop_low, verdict.drop_high
        yield _accuracy(verdict, f"{verdict.metric}_drop", verdict.drop, low, high)


def _accuracy(
    verdict: Accuracy,
    name: str,
    value: float,
    low: float | None = None,
    high: float | None = None,
    *,
    higher_is_better: bool = False,
) -> Metric:
    """Return an accuracy metric. With too few samples, its bounds are infinite."""
    return Metric(
        point=_label(verdict),
        name=name,
        value=value,
        low=low if is_number(low) else None,
        high=high if is_number(high) else None,
        unit=verdict.metric,
        higher_is_better=higher_is_better,
        run_name=verdict.run_name,
    )


def _problem(result: Timed) -> str | None:
    """Return why the point's figures must not be tracked, or None if they can be."""
    if result.status != "ok":
        return status_text(result)
    return "throttled" if result.throttled else None


def _label(record: Record) -> str:
    return point_label(record.workload, record.nodeid)


def _range(metric: Metric) -> str | None:
    if metric.low is None or metric.high is None:
        return None
    low, high = metric.low * metric.scale, metric.high * metric.scale
    return f"{low:.6g} to {high:.6g}"


def _shortened(name: str, length: int) -> str:
    """Return the name cut to ``length`` characters, kept unique by a hash if it was longer."""
    if len(name) <= length:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{name[: length - len(digest) - 1]}-{digest}"
