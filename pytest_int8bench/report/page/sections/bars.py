"""Sections with one bar per point: speedup, memory and compile time."""

from __future__ import annotations

from collections.abc import Sequence

from pytest_int8bench.report.cells import figure_text, shown_speedup
from pytest_int8bench.report.page import labels
from pytest_int8bench.report.page.charts import Bar, Bars
from pytest_int8bench.report.page.groups import Scope, note
from pytest_int8bench.report.page.model import Section, Titled
from pytest_int8bench.report.remarks import upper_bound_remarks
from pytest_int8bench.report.tables import MISSING, number, plain_grid
from pytest_int8bench.results.figures import FIGURES, Figure
from pytest_int8bench.results.records import Result
from pytest_int8bench.words import plural


def speedup(scopes: Sequence[Scope]) -> Section | None:
    """Return the section of speedups and their upper bounds, or None if there are none."""
    charts = [chart for scope in scopes if (chart := _speedups(scope)) is not None]
    known = [r for scope in scopes for r, _, _ in scope.pick(lambda r: r.ceiling is not None)]
    if not charts and not known:
        return None
    notes = [
        line
        for result in known
        if "problem" in (result.ceiling or {})
        for line in upper_bound_remarks(result)
    ]
    has_most = any(bar.most for chart in charts for bar in chart.bars)
    diamond = (
        "The diamond marks the INT8 upper bound: the highest possible speedup, computed from the "
        "baseline's kernels and rates measured on the device."
    )
    intro = (
        "Baseline and candidate alternate in one process. Intervals are at the 95 % level. Above "
        "1, the candidate is faster."
    )
    return Section(
        id="speedup",
        title="Speedup",
        intro=(intro,),
        pictures=(diamond,) if has_most else (),
        charts=tuple(charts),
        tables=(_upper_bounds(known),) if known else (),
        notes=tuple(notes),
    )


def _speedups(scope: Scope) -> Bars | None:
    bars = [
        Bar(
            name=name,
            style=labels.style(params),
            value=result.speedup,
            low=result.speedup_low,
            high=result.speedup_high,
            most=result.ceiling_speedup,
            note="separate" if result.speedup_method == "separate" else note(result),
        )
        for result, params, name in scope.pick(lambda r: r.speedup is not None)
    ]
    if not bars:
        return None
    return _bars("speedup", scope, bars, FIGURES["speedup"], reference=1.0, decimals=2)


def _upper_bounds(results: Sequence[Result]) -> Titled:
    columns = [
        "run",
        "speedup [95 %]",
        "upper bound",
        "from matmuls alone",
        "gain achieved",
        "matmuls quantized",
        "baseline kernel time",
    ]
    grid = plain_grid(columns, [_upper_bound_row(result) for result in results], left=columns[-1:])
    return Titled(caption="INT8 upper bound", grid=grid)


def _upper_bound_row(result: Result) -> list[str]:
    basis = result.ceiling or {}
    share, reached = basis.get("quantized_share"), result.ceiling_reached
    return [
        result.label,
        shown_speedup(result),
        _times(result.ceiling_speedup),
        _times(basis.get("products_speedup")),
        MISSING if reached is None else f"{max(reached, 0):.0%}",
        MISSING if share is None else f"{share:.0%}",
        _kernels(basis.get("baseline")),
    ]


def _kernels(split: dict[str, float] | None) -> str:
    total = sum(split.values()) if split else 0
    if not split or not total:
        return MISSING
    matmuls = split["int8_products"] + split["other_products"]
    shares = {"matmuls": matmuls, "attention": split["attention"], "rest": split["rest"]}
    return ", ".join(f"{name} {value / total:.0%}" for name, value in shares.items())


def _times(value: float | None) -> str:
    return MISSING if value is None else f"{value:.2f}x"


def memory(scopes: Sequence[Scope]) -> Section | None:
    """Return the section of peak memory, or None if it was not measured."""
    figure = FIGURES["peak_memory_bytes"]
    charts = []
    for scope in scopes:
        found = scope.pick(lambda r: r.peak_memory_bytes is not None or r.oom)
        bars = [
            Bar(
                name=name,
                style=labels.style(params),
                value=None if result.oom else figure.scaled(result.peak_memory_bytes or 0),
                note=_failed_allocation(result) if result.oom else "",
            )
            for result, params, name in found
        ]
        if bars:
            charts.append(_bars("memory", scope, bars, figure))
    if not charts:
        return None
    return Section(
        id="memory",
        title="Memory",
        intro=("Peak memory of one model alone: weights, inputs and activations.",),
        charts=tuple(charts),
    )


def _failed_allocation(result: Result) -> str:
    if result.requested_bytes is None:
        return "OOM"
    figure = FIGURES["requested_bytes"]
    return f"OOM when allocating {figure_text(figure, result)} {figure.unit}"


def first_call(scopes: Sequence[Scope]) -> Section | None:
    """Return the section of compile time, or None if nothing was compiled."""
    charts = []
    for scope in scopes:
        bars = [
            Bar(
                name=name,
                style=labels.style(params),
                value=result.compile_s,
                note=result.compile_cache or "",
            )
            for result, params, name in scope.pick(lambda r: r.compile_s is not None)
        ]
        if bars:
            charts.append(_bars("compile", scope, bars, FIGURES["compile_s"]))
    if not charts:
        return None
    return Section(
        id="compile",
        title="Compile time",
        intro=(
            (
                "Time of the first call, including compilation. Cold: some graphs had to be "
                "compiled. Warm: the compile cache on disk had them all."
            ),
        ),
        charts=tuple(charts),
    )


def _bars(
    kind: str,
    scope: Scope,
    bars: Sequence[Bar],
    figure: Figure,
    *,
    reference: float | None = None,
    decimals: int | None = None,
) -> Bars:
    known = [bar for bar in bars if bar.value is not None]
    words = "no values"
    if known:
        least, most = (pick(known, key=lambda bar: bar.value or 0) for pick in (min, max))
        words = f"from {number(least.value)} {figure.unit} ({least.name})"
        words += f" to {number(most.value)} {figure.unit} ({most.name})"
    return Bars(
        id=f"{kind}-{scope.id}",
        title=f"{figure.title}{scope.title}",
        description=f"{plural(len(bars), 'point')}, {words}.",
        unit=figure.unit,
        bars=tuple(bars),
        reference=reference,
        decimals=decimals,
    )
