"""What a report shows of one or many saved files, whatever it is written in."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from pytest_int8bench.accuracy.limit import Limit
from pytest_int8bench.environment import FINGERPRINT_NAMES, describe, flat
from pytest_int8bench.report import history, labels
from pytest_int8bench.report.charts import (
    AnyChart,
    Bar,
    Bars,
    Lines,
    Pareto,
    Point,
    Series,
    Spot,
    Stack,
    Stacks,
)
from pytest_int8bench.report.contents import Section, Titled, View
from pytest_int8bench.report.intervals import rate_interval
from pytest_int8bench.report.sources import Found, Source, current
from pytest_int8bench.report.tables import MISSING, Grid, number
from pytest_int8bench.report.terminal import (
    PIPELINE_CHECK,
    accuracy_table,
    ceiling_remarks,
    remarks,
    results_table,
    sensitivity_table,
    short_rounds,
    shown_speedup,
    status_remarks,
    verdict_remarks,
)
from pytest_int8bench.results import Accuracy, Result, Sensitivity, point_label

TITLE = "INT8 inference benchmarks"
_MIB = 2**20
#: More lines than these in one picture cannot be told apart.
_MOST_SERIES = 6
#: Layers in the picture of a sensitivity scan; the table has all.
_MOST_LAYERS = 30
_PARTS = {
    "int8_products": "INT8 products",
    "other_products": "other products",
    "attention": "attention",
    "rest": "the rest",
}

_Results = list[Found[Result]]
_Params = Mapping[str, Any]


def build(sources: Sequence[Source]) -> View:
    """Return the view of files, oldest first. Of points that several have, the last one counts."""
    results = current(sources, lambda saved: saved.results)
    verdicts = current(sources, lambda saved: saved.accuracy)
    scans = current(sources, lambda saved: saved.sensitivity)
    scopes = _scopes(results)
    sections = [
        _throughput(scopes, results, len(sources) > 1),
        _speedup(scopes),
        _accuracy(scopes, verdicts),
        _memory(scopes),
        _compile(scopes),
        _device_time(scopes),
        _coverage(results),
        _sensitivity(scans),
        _problems(results, len(sources) > 1),
        history.section(sources),
        _environment(sources),
    ]
    found = tuple(section for section in sections if section is not None)
    missing = _missing({section.id for section in found})
    machines = list(dict.fromkeys(describe(source.saved.environment) for source in sources))
    others = f" (the last of {len(machines)} environments)" if len(machines) > 1 else ""
    return View(
        title=TITLE,
        subtitle=describe(sources[-1].saved.environment) + others,
        summary=tuple(_summary(scopes, results, verdicts)),
        sections=(*found, *([missing] if missing is not None else [])),
    )


# -- what belongs together --------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Scope:
    """The points of one workload on one device."""

    id: str
    title: str
    """What is added to the title of a chart; empty where there is one scope only."""
    workload: str
    device: str
    results: tuple[Result, ...]

    def pick(self, keep: Callable[[Result], bool]) -> list[tuple[Result, _Params, str]]:
        """Return the points to keep, each with its parameters and the shortest name that tells it
        from the others that are kept."""
        kept = [result for result in self.results if keep(result)]
        params = [labels.plain(result) for result in kept]
        return list(zip(kept, params, _names(kept, params), strict=True))


def _scopes(results: _Results) -> list[_Scope]:
    groups: dict[tuple[str, str], list[Result]] = {}
    for found in results:
        groups.setdefault((found.record.workload, found.device), []).append(found.record)
    workloads, devices = ({key[i] for key in groups} for i in range(2))
    scopes = []
    for index, ((workload, where), group) in enumerate(groups.items(), start=1):
        group = sorted(group, key=lambda result: labels.order(labels.plain(result)))
        said = [workload] if len(workloads) > 1 else []
        said += [where] if len(devices) > 1 else []
        title = f": {', '.join(said)}" if said else ""
        scopes.append(_Scope(str(index), title, workload, where, tuple(group)))
    return scopes


def _names(results: Sequence[Result], params: Sequence[_Params]) -> list[str]:
    """Return a name for each point; the test's is in it where nothing else differs."""
    differing = labels.differing(params)
    names = [labels.label(point, differing) for point in params]
    twice = {name for name, count in Counter(names).items() if count > 1}
    return [
        f"{name} ({labels.test_of(result)})" if name in twice else name
        for name, result in zip(names, results, strict=True)
    ]


def _note(result: Result) -> str:
    """Return what a figure's reader should know in a word."""
    if result.oom:
        return "OOM"
    if result.status != "ok":
        return result.status
    return "throttled" if result.throttled else ""


# -- throughput -------------------------------------------------------------------------------


def _throughput(scopes: Sequence[_Scope], results: _Results, many: bool) -> Section | None:
    shown = [found for found in results if labels.is_measured(found.record) or found.record.oom]
    if not shown:
        return None
    charts = [chart for scope in scopes for chart in _axes(scope)]
    notes = [line for found in shown for line in _other_remarks(found.record)]
    if (short := short_rounds([found.record for found in shown])) is not None:
        notes.append(short)
    grid = results_table([found.record for found in shown])
    return Section(
        id="throughput",
        title="Throughput",
        intro=(
            (
                "Samples over the median batch time. Intervals are of the median within its "
                "process, from its standard error; the difference between two"
                " processes is not in them."
            ),
        ),
        charts=tuple(charts),
        tables=(Titled(caption="Every point", grid=_with_sources(grid, shown, many)),),
        notes=tuple(dict.fromkeys(notes)),
    )


def _other_remarks(result: Result) -> list[str]:
    told = ceiling_remarks(result)  # beside the speedups
    lines = [line for line in remarks(result) if line not in told]
    return [*(status_remarks(result) if result.status == "ok" else []), *lines]


def _with_sources(grid: Grid, shown: Sequence[Found[Any]], many: bool) -> Grid:
    """Return the table with the file of each row, where there are several."""
    if not many:
        return grid
    rows = [[*row, f.source.label] for row, f in zip(grid.rows, shown, strict=True)]
    return dataclasses.replace(
        grid, columns=[*grid.columns, "file"], rows=rows, left=(*grid.left, "file")
    )


def _axes(scope: _Scope) -> list[Lines]:
    """Return charts of throughput against every axis that was swept; against the mode if none."""
    rows = scope.pick(lambda r: labels.is_measured(r) or r.status in ("oom", "failed"))
    if not any(labels.is_measured(result) for result, _, _ in rows):
        return []
    charts: list[Lines] = []
    for axis in labels.differing([params for _, params, _ in rows]):
        charts += _axis(scope, axis, rows)
    return charts or [_by_mode(scope, rows)]


def _axis(scope: _Scope, axis: str, rows: Sequence[tuple[Result, _Params, str]]) -> list[Lines]:
    groups: dict[tuple[object, ...], list[tuple[Result, _Params]]] = {}
    for result, params, _ in rows:
        if axis in params:
            rest = sorted((n, labels.said(v)) for n, v in params.items() if n != axis)
            groups.setdefault((labels.test_of(result), *rest), []).append((result, params))
    kept = [
        group
        for group in groups.values()
        if len({params[axis] for r, params in group if labels.is_measured(r) or r.oom}) > 1
        and any(labels.is_measured(result) for result, _ in group)
    ]
    values = labels.sortable_values(params[axis] for group in kept for _, params in group)
    numeric = all(map(labels.is_number, values))
    kept.sort(key=lambda group: labels.order({**group[0][1], axis: 0}))
    chunks = [kept[i : i + _MOST_SERIES] for i in range(0, len(kept), _MOST_SERIES)]
    charts = []
    for index, chunk in enumerate(chunks, start=1):
        firsts = [group[0][1] for group in chunk]
        differing = [name for name in labels.differing(firsts) if name != axis]
        names = [labels.label(first, differing) for first in firsts]
        tests = [labels.test_of(group[0][0]) for group in chunk]
        if len(set(tests)) > 1:
            names = [f"{name} ({test})" for name, test in zip(names, tests, strict=True)]
        series = history.distinct(
            [
                Series(
                    name=name,
                    style=labels.style(group[0][1]),
                    points=tuple(_points(group, axis, values, numeric)),
                )
                for name, group in zip(names, chunk, strict=True)
            ]
        )
        part = f" ({index} of {len(chunks)})" if len(chunks) > 1 else ""
        title = f"Throughput against {labels.axis(axis)}{scope.title}{part}"
        charts.append(
            Lines(
                id=f"throughput-{scope.id}-{_slug(axis)}-{index}",
                title=title,
                description=_ends(series, labels.axis(axis)),
                unit="samples/s",
                x_label=labels.axis(axis),
                series=series,
                names=() if numeric else tuple(labels.said(value) for value in values),
                joined=numeric,
            )
        )
    return charts


def _points(
    group: Sequence[tuple[Result, _Params]], axis: str, values: Sequence[Any], numeric: bool
) -> Iterable[Point]:
    for result, params in sorted(group, key=lambda row: values.index(row[1][axis])):
        value = params[axis]
        x = float(value) if numeric else float(values.index(value))
        yield _point(result, x, labels.said(value))


def _point(result: Result, x: float, x_shown: str) -> Point:
    low, high = rate_interval(result)
    return Point(
        name=point_label(result.workload, result.run_name),
        x=x,
        x_shown=x_shown,
        y=result.samples_per_s,
        low=low,
        high=high,
        note=_note(result),
    )


def _by_mode(scope: _Scope, rows: Sequence[tuple[Result, _Params, str]]) -> Lines:
    series = [
        Series(
            name=name,
            style=labels.style(params),
            points=(_point(result, float(index), name),),
        )
        for index, (result, params, name) in enumerate(rows)
    ]
    return Lines(
        id=f"throughput-{scope.id}-mode",
        title=f"Throughput by mode{scope.title}",
        description=_ends(series, "mode"),
        unit="samples/s",
        x_label="mode",
        series=history.distinct(series),
        names=tuple(name for _, _, name in rows),
        joined=False,
    )


def _ends(series: Sequence[Series], axis: str) -> str:
    """Say in words how the lines go."""
    parts = []
    for one in series:
        known = [point for point in one.points if point.y is not None]
        text = f"{one.name}: {number(known[0].y)}" if known else f"{one.name}: none"
        if len(one.points) > 1 and known:
            text += f" at {axis} {known[0].x_shown}, {number(known[-1].y)} at {known[-1].x_shown}"
        lost = [f"{point.note} at {point.x_shown}" for point in one.points if point.y is None]
        parts.append(", ".join([text, *lost]))
    return "; ".join(parts) + "."


def _slug(text: str) -> str:
    return "".join(c if c.isascii() and c.isalnum() else "-" for c in text)


# -- bars of one figure a point ---------------------------------------------------------------


def _speedup(scopes: Sequence[_Scope]) -> Section | None:
    charts: list[AnyChart] = []
    rows: list[list[str]] = []
    notes: list[str] = []
    for scope in scopes:
        found = scope.pick(lambda r: r.speedup is not None)
        bars = [
            Bar(
                name=name,
                style=labels.style(params),
                value=result.speedup,
                low=result.speedup_low,
                high=result.speedup_high,
                most=result.ceiling_speedup,
                note="apart" if result.speedup_method == "separate" else _note(result),
            )
            for result, params, name in found
        ]
        if bars:
            charts.append(
                _bars(
                    "speedup",
                    scope,
                    bars,
                    title="Speedup over the baseline",
                    unit="× baseline",
                    reference=1.0,
                )
            )
        for result, _, _ in scope.pick(lambda r: r.ceiling is not None):
            rows.append(_ceiling_row(result))
            notes += ceiling_remarks(result) if "problem" in (result.ceiling or {}) else []
    if not charts and not rows:
        return None
    tables = []
    if rows:
        columns = [
            "run",
            "speedup [95 %]",
            "at most",
            "by products alone",
            "gain reached",
            "products quantized",
            "kernels of the baseline",
        ]
        tables.append(
            Titled(
                caption="What INT8 could bring at most",
                grid=_plain(columns, rows, left=columns[-1:]),
            )
        )
    has_most = any(bar.most for chart in charts if isinstance(chart, Bars) for bar in chart.bars)
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
        tables=tuple(tables),
        notes=tuple(notes),
    )


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


def _memory(scopes: Sequence[_Scope]) -> Section | None:
    charts = []
    for scope in scopes:
        found = scope.pick(lambda r: r.peak_memory_bytes is not None or r.oom)
        bars = [
            Bar(
                name=name,
                style=labels.style(params),
                value=None if result.oom else (result.peak_memory_bytes or 0) / _MIB,
                note=_asked(result) if result.oom else "",
            )
            for result, params, name in found
        ]
        if bars:
            charts.append(_bars("memory", scope, bars, title="Peak memory", unit="MiB"))
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
    return f"OOM, {number(result.requested_bytes / _MIB)} MiB more asked for"


def _compile(scopes: Sequence[_Scope]) -> Section | None:
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
            charts.append(_bars("compile", scope, bars, title="First call", unit="s"))
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
    scope: _Scope,
    bars: Sequence[Bar],
    *,
    title: str,
    unit: str,
    reference: float | None = None,
) -> Bars:
    known = [bar for bar in bars if bar.value is not None]
    words = "no figure"
    if known:
        least, most = (pick(known, key=lambda bar: bar.value or 0) for pick in (min, max))
        words = f"from {number(least.value)} {unit} ({least.name})"
        words += f" to {number(most.value)} {unit} ({most.name})"
    return Bars(
        id=f"{kind}-{scope.id}",
        title=title + scope.title,
        description=f"{_plural(len(bars), 'point')}, {words}.",
        unit=unit,
        bars=tuple(bars),
        reference=reference,
    )


# -- accuracy ---------------------------------------------------------------------------------


def _accuracy(scopes: Sequence[_Scope], verdicts: list[Found[Accuracy]]) -> Section | None:
    if not verdicts:
        return None
    judged = [found for found in verdicts if found.record.limit is not None]
    tables = []
    if judged:
        grid = accuracy_table([found.record for found in judged])
        tables.append(Titled(caption="Verdicts", grid=grid))
    told = [verdict_remarks(found.record) for found in verdicts]
    notes = ["\n".join(lines) for lines in told if lines]
    if any(found.record.is_pipeline_check for found in verdicts):
        notes.append(PIPELINE_CHECK)
    charts = _paretos(scopes, judged)
    drawn = {spot.name for chart in charts for spot in chart.spots}
    intro = (
        "The drop of the metric against the baseline on the same samples, with one-sided 95 % "
        "bounds. PASS: a drop over the limit is excluded; FAIL: a drop within it is."
    )
    steps = (
        "Up and left is better. The steps join what is beaten by nothing else in both accuracy "
        "and speed; what did not pass is hollow."
    )
    if judged and not drawn:
        notes.append("No picture against throughput: no judged point was timed as well.")
    return Section(
        id="accuracy",
        title="Accuracy",
        intro=(intro,) if judged else (),
        pictures=(steps,) if charts else (),
        charts=tuple(charts),
        tables=tuple(tables),
        notes=tuple(notes),
    )


def _paretos(scopes: Sequence[_Scope], judged: Sequence[Found[Accuracy]]) -> list[Pareto]:
    charts = []
    for scope in scopes:
        groups: dict[tuple[str, str], list[Accuracy]] = {}
        for found in judged:
            if (found.record.workload, found.device) == (scope.workload, scope.device):
                unit = "pp" if str(found.record.limit).endswith("pp") else "%"
                groups.setdefault((found.record.metric, unit), []).append(found.record)
        for index, ((metric, unit), group) in enumerate(groups.items(), start=1):
            spots = _spots(scope, group)
            if spots:
                charts.append(_pareto(scope, index, metric, unit, group, spots))
    return charts


def _pareto(
    scope: _Scope,
    index: int,
    metric: str,
    unit: str,
    group: Sequence[Accuracy],
    spots: Sequence[Spot],
) -> Pareto:
    limits = {100 * Limit.parse(str(verdict.limit)).value for verdict in group}
    said = ", ".join(dict.fromkeys(str(verdict.limit) for verdict in group))
    parts = [f"{s.name}: {s.drop:.2f}{unit}, {number(s.rate)}/s, {s.verdict}" for s in spots]
    title = f"Accuracy drop against throughput: {metric}"
    return Pareto(
        id=f"pareto-{scope.id}-{index}",
        title=title + (scope.title.replace(": ", ", ", 1) if scope.title else ""),
        description=f"Limit {said}. {'; '.join(parts)}.",
        unit="samples/s",
        drop_unit=unit,
        limits=tuple(sorted(limits)),
        spots=tuple(spots),
    )


def _spots(scope: _Scope, group: Sequence[Accuracy]) -> list[Spot]:
    """Return the judged points that were timed, and their baselines, which lose nothing."""
    timed = {r.run_name: (r, p, n) for r, p, n in scope.pick(labels.is_measured)}
    spots: dict[str, Spot] = {}
    for verdict in group:
        if verdict.run_name not in timed or verdict.drop is None:
            continue
        result, params, name = timed[verdict.run_name]
        rate = result.samples_per_s or 0.0
        twin = _without_int8(params)
        for base, base_params, base_name in timed.values():
            if not base_params.get("int8_enabled") and _without_int8(base_params) == twin:
                spots[base_name] = Spot(
                    name=base_name,
                    style=0,
                    drop=0.0,
                    low=None,
                    high=None,
                    rate=base.samples_per_s or 0.0,
                    verdict="baseline",
                    best=False,
                )
        spots[name] = Spot(
            name=name,
            style=labels.style(params),
            drop=100 * verdict.drop,
            low=_percent(verdict.drop_low),
            high=_percent(verdict.drop_high),
            rate=rate,
            verdict=verdict.outcome + ("*" if verdict.is_pipeline_check else ""),
            best=False,
        )
    everything = list(spots.values())
    return [
        dataclasses.replace(spot, best=not any(_beats(other, spot) for other in everything))
        for spot in everything
    ]


def _beats(one: Spot, other: Spot) -> bool:
    as_good = one.drop <= other.drop and one.rate >= other.rate
    return as_good and (one.drop < other.drop or one.rate > other.rate)


def _percent(share: float | None) -> float | None:
    return None if share is None or not math.isfinite(share) else 100 * share


def _without_int8(params: _Params) -> dict[str, Any]:
    return {name: value for name, value in params.items() if not name.startswith("int8_")}


# -- inside a model ---------------------------------------------------------------------------


def _device_time(scopes: Sequence[_Scope]) -> Section | None:
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
        title="Where device time went",
        intro=(
            (
                "Shares of the time of all kernels in one profiled forward. The rest: norms, "
                "activation functions, quantizing, copies and what is not known."
            ),
        ),
        charts=tuple(charts),
    )


def _shares(stack: Stack) -> str:
    total = sum(stack.values)
    if not total:
        return f"{stack.name}: nothing"
    parts = [
        f"{part} {value / total:.0%}"
        for part, value in zip(_PARTS.values(), stack.values, strict=True)
    ]
    return f"{stack.name}: {', '.join(parts)}"


def _coverage(results: _Results) -> Section | None:
    groups: dict[str, tuple[dict[str, Any], list[Result]]] = {}
    for found in results:
        if coverage := found.record.coverage:
            key = f"{found.record.workload} {sorted(map(str, coverage.items()))}"
            groups.setdefault(key, (coverage, []))[1].append(found.record)
    if not groups:
        return None
    rows, reasons = [], []
    for coverage, group in groups.values():
        name = point_label(group[0].workload, group[0].run_name)
        name += f" and {len(group) - 1} more" if len(group) > 1 else ""
        total = coverage.get("total_parameters") or 0
        share = (coverage.get("converted_parameters") or 0) / max(total, 1)
        smoothed = sum(map(len, (coverage.get("smoothed_folded") or {}).values()))
        scaled = len(coverage.get("smoothed_runtime") or ())
        rows.append(
            [
                name,
                f"{coverage.get('converted_layers', 0)} of {coverage.get('linear_layers', 0)}",
                f"{share:.1%}",
                str(coverage.get("fused_layers", 0)),
                str(len(coverage.get("fallbacks") or {})),
                f"{smoothed} folded, {scaled} at run time" if smoothed or scaled else MISSING,
            ]
        )
        for kind, field in (("not quantized", "left_out"), ("on torchao's kernels", "fallbacks")):
            by_reason: dict[str, list[str]] = {}
            for layer, reason in (coverage.get(field) or {}).items():
                by_reason.setdefault(str(reason), []).append(str(layer))
            reasons += [
                [name, kind, reason, str(len(layers)), _some(layers)]
                for reason, layers in by_reason.items()
            ]
    columns = ["run", "INT8 layers", "of the parameters", "fused", "not fused", "SmoothQuant"]
    tables = [Titled(caption="Linear layers in INT8", grid=_plain(columns, rows))]
    if reasons:
        columns = ["run", "what", "reason", "layers", "which"]
        grid = _plain(columns, reasons, left=("what", "reason", "which"))
        tables.append(Titled(caption="Layers that are not, and why", grid=grid))
    return Section(id="coverage", title="Coverage", tables=tuple(tables))


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:6])
    return shown if len(names) <= 6 else f"{shown} and {len(names) - 6} more"


def _sensitivity(scans: Sequence[Found[Sensitivity]]) -> Section | None:
    charts, tables = [], []
    for index, found in enumerate(scans, start=1):
        scan = found.record
        name = f"{point_label(scan.workload, scan.run_name)}, {scan.samples:,} samples"
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
        what = f"{scan.metric} drop" if by_metric else "SQNR of the outputs"
        charts.append(
            Bars(
                id=f"sensitivity-{index}",
                title=f"{what} with one {scan.by} in INT8{which}: {scan.workload}",
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
                "Each layer, or block, quantized alone, worst first. A small SQNR, or a large "
                "drop, is a layer to keep in BF16."
            ),
        ),
        charts=tuple(charts),
        tables=tuple(tables),
    )


# -- the rest ---------------------------------------------------------------------------------


def _problems(results: _Results, many: bool) -> Section | None:
    shown = [found for found in results if found.record.status != "ok"]
    if not shown:
        return None
    rows = [
        [
            point_label(found.record.workload, found.record.run_name),
            labels.test_of(found.record),
            "OOM" if found.record.oom else found.record.status,
            found.record.reason or "no reason given",
        ]
        for found in shown
    ]
    grid = _plain(["run", "test", "status", "reason"], rows, left=("test", "status", "reason"))
    return Section(
        id="problems",
        title="Skipped, failed and out of memory",
        tables=(Titled(caption="Points that are not ok", grid=_with_sources(grid, shown, many)),),
    )


def _environment(sources: Sequence[Source]) -> Section:
    """Return the fingerprint, with a column for each one that differs."""
    columns: dict[tuple[str, ...], list[Source]] = {}
    for source in sources:
        values = tuple(_shown_value(n, v) for n, v in flat(source.saved.environment).items())
        alike = tuple(
            value
            for name, value in zip(flat(source.saved.environment), values, strict=True)
            if name not in ("commit", "dirty")
        )
        columns.setdefault(alike, []).append(source)
    kept = [n for n in FINGERPRINT_NAMES if len(sources) == 1 or n not in ("commit", "dirty")]
    rows: list[list[str]] = []
    styles: list[str | None] = []
    for name in kept:
        cells = [
            _shown_value(name, flat(group[0].saved.environment)[name]) for group in columns.values()
        ]
        rows.append([name, *cells])
        styles.append("changed" if len(set(cells)) > 1 else None)
    heads = [_range(group) for group in columns.values()] if len(sources) > 1 else ["value"]
    grid = Grid(columns=["what", *heads], rows=rows, styles=styles, name="what", left=heads)
    return Section(
        id="environment",
        title="Environment",
        tables=(Titled(caption="Machine and software", grid=grid),),
    )


def _range(group: Sequence[Source]) -> str:
    shown = group[0].label
    return shown if len(group) == 1 else f"{shown} … {group[-1].label} ({len(group)} files)"


def _shown_value(name: str, value: Any) -> str:
    if value is None:
        return MISSING
    if name == "memory_bytes" and labels.is_number(value):
        return f"{number(value / 2**30)} GiB"
    return labels.said(value)


_WHY_MISSING = {
    "throughput": "Throughput: no point was timed.",
    "speedup": "Speedup: no candidate was measured beside its baseline.",
    "accuracy": "Accuracy: no accuracy test came to a verdict.",
    "memory": "Memory: no point has a peak, which is known on CUDA only.",
    "compile": "Compile time: no point has one.",
    "device-time": "Where device time went: no point has it, which is known on CUDA only.",
    "coverage": "Coverage: no point has it.",
    "sensitivity": "Layer sensitivity: int8bench sensitivity measures it.",
}


def _missing(there: set[str]) -> Section | None:
    notes = tuple(why for name, why in _WHY_MISSING.items() if name not in there)
    if not notes:
        return None
    return Section(id="missing", title="Not in this report", notes=notes)


def _summary(
    scopes: Sequence[_Scope], results: _Results, verdicts: Sequence[Found[Accuracy]]
) -> Iterable[str]:
    count = Counter("OOM" if f.record.oom else f.record.status for f in results)
    if results:
        counted = ", ".join(f"{number_of} {status}" for status, number_of in count.items())
        yield f"{_plural(len(results), 'point')}: {counted}."
    for scope in scopes:
        by_mode: dict[str, list[tuple[Result, str]]] = {}
        for result, params, name in scope.pick(lambda r: r.speedup is not None):
            by_mode.setdefault(labels.mode(params), []).append((result, name))
        for mode, rows in by_mode.items():
            least, most = (pick(rows, key=lambda row: row[0].speedup or 0) for pick in (min, max))
            text = f"{scope.workload}, {mode}: {shown_speedup(most[0])} the baseline's speed"
            if shown_speedup(most[0]) != shown_speedup(least[0]):
                text += f" at best ({most[1]}), {shown_speedup(least[0])} at worst ({least[1]})"
            yield f"{text}{f' on {scope.device}' if len(scopes) > 1 and scope.title else ''}."
    judged = [f.record for f in verdicts if f.record.limit is not None]
    real = [verdict for verdict in judged if not verdict.is_pipeline_check]
    if real:
        outcomes = Counter(verdict.outcome for verdict in real)
        limits = ", ".join(dict.fromkeys(str(verdict.limit) for verdict in real))
        counted = ", ".join(f"{number_of} {name}" for name, number_of in outcomes.items())
        yield f"Accuracy: {counted} (limit {limits})."
    if checks := len(judged) - len(real):
        yield (
            f"{_plural(checks, 'verdict')} on random weights: a check of the pipeline, which says "
            "nothing about a trained model."
        )


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _plain(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, left: Sequence[str] = ()
) -> Grid:
    return Grid(columns=columns, rows=rows, styles=[None] * len(rows), name=columns[0], left=left)
