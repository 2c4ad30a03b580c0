"""Sections on a model's internals: device time, quantized layers and layer sensitivity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pytest_int8bench.choices import precision
from pytest_int8bench.report.page.charts import Bar, Bars, Stack, Stacks
from pytest_int8bench.report.page.groups import Results, Scope
from pytest_int8bench.report.page.model import Section, Titled
from pytest_int8bench.report.page.sources import Found
from pytest_int8bench.report.tables import MISSING, number, plain_grid
from pytest_int8bench.report.terminal import sensitivity_table
from pytest_int8bench.results.records import Result
from pytest_int8bench.results.verdicts import Sensitivity
from pytest_int8bench.words import some

#: Maximum number of layers in the chart of a sensitivity scan; the table has all of them.
_MOST_LAYERS = 30
_PARTS = {
    "int8_products": "INT8 matmuls",
    "other_products": "other matmuls",
    "attention": "attention",
    "rest": "rest",
}


def device_time(scopes: Sequence[Scope]) -> Section | None:
    """Return the section of device time, or None if it was not measured."""
    charts = []
    for scope in scopes:
        stacks = [
            Stack(
                name=name,
                values=tuple(1e3 * (result.device_breakdown or {}).get(key, 0) for key in _PARTS),
            )
            for result, _, name in scope.pick(lambda r: bool(r.device_breakdown))
        ]
        if stacks:
            longest = max(stacks, key=lambda stack: sum(stack.values))
            charts.append(
                Stacks(
                    id=f"device-time-{scope.id}",
                    title=f"Device time of one forward{scope.title}",
                    description="; ".join(map(_shares, stacks[:8]))
                    + f". The longest takes {number(sum(longest.values))} ms ({longest.name}).",
                    unit="ms",
                    parts=tuple(_PARTS.values()),
                    stacks=tuple(stacks),
                )
            )
    if not charts:
        return None
    return Section(
        id="device-time",
        title="Device time",
        intro=(
            (
                "Shares of the kernel time of one profiled forward. The rest is norms, activation "
                "functions, quantization, copies and unrecognized kernels."
            ),
        ),
        charts=tuple(charts),
    )


def _shares(stack: Stack) -> str:
    total = sum(stack.values)
    if not total:
        return f"{stack.name}: no kernel time"
    parts = [
        f"{part} {value / total:.0%}"
        for part, value in zip(_PARTS.values(), stack.values, strict=True)
    ]
    return f"{stack.name}: {', '.join(parts)}"


def coverage(results: Results) -> Section | None:
    """Return the section of coverage, or None without any; points with the same coverage share a
    row."""
    groups: dict[str, tuple[dict[str, Any], list[Result]]] = {}
    for found in results:
        if covered := found.record.coverage:
            key = f"{found.record.workload} {sorted(map(str, covered.items()))}"
            groups.setdefault(key, (covered, []))[1].append(found.record)
    if not groups:
        return None
    rows, reasons = [], []
    for covered, group in groups.values():
        name = group[0].label
        name += f" and {len(group) - 1} more" if len(group) > 1 else ""
        total = covered.get("total_parameters") or 0
        share = (covered.get("converted_parameters") or 0) / max(total, 1)
        smoothed = sum(map(len, (covered.get("smoothed_folded") or {}).values()))
        smoothed += len(covered.get("smoothed_runtime") or ())
        rows.append(
            [
                name,
                f"{covered.get('converted_layers', 0)} of {covered.get('linear_layers', 0)}",
                f"{share:.1%}",
                str(covered.get("fused_layers", 0)),
                str(len(covered.get("fallbacks") or {})),
                f"{smoothed} layers" if smoothed else MISSING,
            ]
        )
        for kind, field in (("not quantized", "left_out"), ("on torchao's kernels", "fallbacks")):
            by_reason: dict[str, list[str]] = {}
            for layer, reason in (covered.get(field) or {}).items():
                by_reason.setdefault(str(reason), []).append(str(layer))
            reasons += [
                [name, kind, reason, str(len(layers)), some(layers, 6)]
                for reason, layers in by_reason.items()
            ]
    columns = ["run", "quantized layers", "parameter share", "fused", "not fused", "SmoothQuant"]
    tables = [Titled(caption="Quantized linear layers", grid=plain_grid(columns, rows))]
    if reasons:
        columns = ["run", "status", "reason", "count", "layers"]
        grid = plain_grid(columns, reasons, left=("status", "reason", "layers"))
        tables.append(Titled(caption="Layers not quantized or not fused, and why", grid=grid))
    return Section(id="coverage", title="Coverage", tables=tuple(tables))


def sensitivity(scans: Sequence[Found[Sensitivity]]) -> Section | None:
    """Return the section of layer sensitivity, or None without a scan."""
    charts, tables = [], []
    for index, found in enumerate(scans, start=1):
        scan = found.record
        name = f"{scan.label}, {scan.samples:,} samples"
        tables.append(Titled(caption=name, grid=sensitivity_table(scan)))
        by_metric = scan.metric is not None
        bars = [
            Bar(
                name=str(row["name"]),
                style=1,
                value=100 * row["drop"] if by_metric else row["sqnr_db"],
                note="equal outputs" if not by_metric and row["sqnr_db"] is None else "",
            )
            for row in scan.layers[:_MOST_LAYERS]
        ]
        if not bars:
            continue
        which = f", the worst {len(bars)} of {len(scan.layers)}" if scan.layers[len(bars) :] else ""
        stored = precision(scan.params)
        what = f"{scan.metric} drop" if by_metric else "SQNR of the outputs"
        charts.append(
            Bars(
                id=f"sensitivity-{index}",
                title=f"{what} with one {scan.by} in {stored}{which}: {scan.workload}",
                description=f"Worst: {bars[0].name} at {number(bars[0].value)}.",
                unit="pp" if by_metric else "dB",
                bars=tuple(bars),
            )
        )
    if not tables:
        return None
    return Section(
        id="sensitivity",
        title="Layer sensitivity",
        intro=(
            (
                "Each layer or block quantized alone, worst first. Consider keeping layers with a "
                "low SQNR or a large drop in BF16."
            ),
        ),
        charts=tuple(charts),
        tables=tuple(tables),
    )
