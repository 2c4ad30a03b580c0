"""Sections of one figure a point: speedup, memory, the first call."""

from __future__ import annotations

from collections.abc import Sequence

from pytest_int8bench.report.cells import figure_text, shown_speedup
from pytest_int8bench.report.page import labels
from pytest_int8bench.report.page.charts import Bar, Bars
from pytest_int8bench.report.page.groups import Scope, note
from pytest_int8bench.report.page.model import Section, Titled
from pytest_int8bench.report.remarks import ceiling_remarks
from pytest_int8bench.report.tables import MISSING, number, plain_grid
from pytest_int8bench.results.base import point_label
from pytest_int8bench.results.figures import FIGURES, Figure
from pytest_int8bench.results.records import Result
from pytest_int8bench.words import plural


def speedup(scopes: Sequence[Scope]) -> Section | None:
    """Return the section of speedups and ceilings, None without one."""
    charts = [chart for scope in scopes if (chart := _speedups(scope)) is not None]
    known = [r for scope in scopes for r, _, _ in scope.pick(lambda r: r.ceiling is not None)]
    if not charts and not known:
        return None
    notes = [
        line
        for result in known
        if "problem" in (result.ceiling or {})
        for line in ceiling_remarks(result)
    ]
    has_most = any(bar.most for chart in charts for bar in chart.bars)
    diamond = (
        "The diamond is the ceiling: what INT8 could bring at most there, from the kernels of the "
        "baseline and rates measured on the device."
    )
    intro = (
        "Baseline and candidate alternate in one process; the interval is at 95 %. Over 1 the "
        "candidate is faster."
    )
    return Section(
        id="speedup",
        title="Speedup",
        intro=(intro,),
        pictures=(diamond,) if has_most else (),
        charts=tuple(charts),
        tables=(_ceilings(known),) if known else (),
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
            note="apart" if result.speedup_method == "separate" else note(result),
        )
        for result, params, name in scope.pick(lambda r: r.speedup is not None)
    ]
    if not bars:
        return None
    return _bars("speedup", scope, bars, FIGURES["speedup"], reference=1.0, decimals=2)


def _ceilings(results: Sequence[Result]) -> Titled:
    columns = [
        "run",
        "speedup [95 %]",
        "at most",
        "by products alone",
        "gain reached",
        "products quantized",
        "kernels of the baseline",
    ]
    grid = plain_grid(columns, [_ceiling_row(result) for result in results], left=columns[-1:])
    return Titled(caption="What INT8 could bring at most", grid=grid)


def _ceiling_row(result: Result) -> list[str]:
    basis = result.ceiling or {}
    share, reached = basis.get("quantized_share"), result.ceiling_reached
    return [
        point_label(result.workload, result.run_name),
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
    products = split["int8_products"] + split["other_products"]
    shares = {"products": products, "attention": split["attention"], "rest": split["rest"]}
    return ", ".join(f"{name} {value / total:.0%}" for name, value in shares.items())


def _times(value: float | None) -> str:
    return MISSING if value is None else f"{value:.2f}x"


def memory(scopes: Sequence[Scope]) -> Section | None:
    """Return the section of peak memory, None where it is not known."""
    figure = FIGURES["peak_memory_bytes"]
    charts = []
    for scope in scopes:
        found = scope.pick(lambda r: r.peak_memory_bytes is not None or r.oom)
        bars = [
            Bar(
                name=name,
                style=labels.style(params),
                value=None if result.oom else figure.scaled(result.peak_memory_bytes or 0),
                note=_asked(result) if result.oom else "",
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
        intro=("The peak of one model alone: weights, inputs and activations.",),
        charts=tuple(charts),
    )


def _asked(result: Result) -> str:
    if result.requested_bytes is None:
        return "OOM"
    asked = FIGURES["requested_bytes"]
    return f"OOM, {figure_text(asked, result)} {asked.unit} more asked for"


def first_call(scopes: Sequence[Scope]) -> Section | None:
    """Return the section of compile time, None where nothing was compiled."""
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
                "The first call, compiling included. Cold: something had to be compiled; warm: the "
                "compile cache on disk had all of it."
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
    words = "no figure"
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
