"""The table at the end of a session."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from pytest_int8bench.environment import describe
from pytest_int8bench.results import Accuracy, Result, Saved, Sensitivity, point_label

_MISSING = "-"
#: Behind a rate that was measured while the GPU was slowed down.
_THROTTLED = "*"
#: Behind a verdict on a model with random weights.
_PIPELINE = "*"
_PIPELINE_CHECK = (
    f"{_PIPELINE} pipeline check: the weights are random, so the verdict says nothing about a "
    "trained model and fails no test; see --int8-weights"
)
_WIDE = 1000
MAX_SYNCHRONIZATION_SHARE = 0.005
#: Part of the batch time that kernels run in, under which the reader is told.
HOST_BOUND = 0.8


def render(saved: Saved, *, width: int | None, color: bool) -> str:
    """Return the table, the points without figures, and the machine as text.

    Args:
        saved: what to show.
        width: columns of the terminal; None for as wide as the table needs.
        color: use ANSI colors.
    """
    stream = io.StringIO()
    measured = [r for r in saved.results if r.samples_per_s is not None or r.oom]
    tables: list[Table] = [_table(measured)] if measured else []
    titles: dict[int, str] = {}
    if judged := [v for v in saved.accuracy if v.limit is not None]:
        tables.append(_accuracy_table(judged))
    for scan in saved.sensitivity:
        titles[len(tables)] = f"{_label(scan)}, {scan.samples:,} samples"
        tables.append(_sensitivity_table(scan))
    for index, table in enumerate(tables):
        stream.write("\n" if index else "")
        if index in titles:
            _console(stream, width or _WIDE, color).print(Text(titles[index], overflow="fold"))
        wide = _console(stream, _WIDE, color)
        # A figure that is cut reads like another figure: rather too wide than that.
        least = Measurement.get(wide, wide.options, table).minimum
        _console(stream, max(width or _WIDE, least), color).print(table)
    console = _console(stream, width or _WIDE, color)
    for verdict in saved.accuracy:
        for line in _verdict_remarks(verdict):
            console.print(Text(line, overflow="fold"))
    if any(verdict.is_pipeline_check for verdict in saved.accuracy):
        console.print(Text(_PIPELINE_CHECK, overflow="fold"))
    for result in saved.results:
        for line in _remarks(result):
            console.print(Text(line, overflow="fold"))
    versions = {r.params.get("model_version") for r in measured if r.workload == "olmoearth"}
    if named := sorted(version for version in versions if version):
        console.print(Text(f"OlmoEarth {', '.join(named)}", style="dim"))
    if short := _short_rounds(saved.results):
        console.print(Text(short, overflow="fold"))
    console.print(Text(describe(saved.environment), style="dim", overflow="fold"))
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"


def _console(stream: io.StringIO, width: int, color: bool) -> Console:
    return Console(
        file=stream,
        width=width,
        force_terminal=color,
        color_system="standard" if color else None,
        no_color=not color,
        highlight=False,
        legacy_windows=False,
    )


def _table(results: list[Result]) -> Table:
    columns: dict[str, Callable[[Result], str]] = {
        "run": lambda r: r.run_name,
        "samples/s": lambda r: _number(r.samples_per_s) + (_THROTTLED if r.throttled else ""),
        "tokens/s": lambda r: _number(r.tokens_per_s),
        "km²/s": lambda r: _number(r.square_km_per_s),
        "ms/batch": lambda r: _number(None if r.batch_time_s is None else r.batch_time_s * 1e3),
        "peak MiB": lambda r: _number(r.peak_memory_bytes and r.peak_memory_bytes / 2**20),
        "compile s": lambda r: _number(r.compile_s),
        "INT8 time": lambda r: (
            _MISSING if r.int8_time_share is None else f"{r.int8_time_share:.0%}"
        ),
        "attention": lambda r: r.attention_kernel or _MISSING,
        "speedup [95 %]": _speedup,
    }
    workloads = {result.workload for result in results}
    if workloads != {"olmoearth"}:
        columns = {"workload": lambda r: r.workload, **columns}
    table = _columns(columns, name="run", left=("workload", "attention"))
    for result in results:
        cells = [show(result) for show in columns.values()]
        if result.oom:
            cells[list(columns).index("samples/s")] = "OOM"
        table.add_row(*map(Text, cells), style=None if result.status == "ok" else "red")
    return table


def _accuracy_table(verdicts: list[Accuracy]) -> Table:
    columns: dict[str, Callable[[Accuracy], str]] = {
        "accuracy": lambda v: v.run_name,
        "metric": lambda v: v.metric,
        "samples": lambda v: f"{v.samples:,}",
        "baseline": lambda v: _score(v.baseline),
        "INT8": lambda v: _score(v.candidate),
        "drop [one-sided 95 %]": _drop,
        "worse/better": lambda v: f"{v.lost}/{v.gained}",
        "limit": lambda v: v.limit or _MISSING,
        "verdict": lambda v: v.outcome + (_PIPELINE if v.is_pipeline_check else ""),
    }
    if {verdict.workload for verdict in verdicts} != {"olmoearth"}:
        columns = {"workload": lambda v: v.workload, **columns}
    table = _columns(columns, name="accuracy", left=("workload", "metric", "verdict"))
    for verdict in verdicts:
        cells = [Text(show(verdict)) for show in columns.values()]
        table.add_row(*cells, style=_style(verdict))
    return table


def _style(verdict: Accuracy) -> str | None:
    if verdict.is_pipeline_check:
        return "dim"
    return None if verdict.outcome == "PASS" else "red"


def _score(value: float | None) -> str:
    return _MISSING if value is None else f"{value:.4f}"


def _drop(verdict: Accuracy) -> str:
    unit = "pp" if str(verdict.limit).endswith("pp") else "%"
    drop, low, high = (
        f"{100 * (value or 0):.2f}" for value in (verdict.drop, verdict.drop_low, verdict.drop_high)
    )
    return f"{drop}{unit} [{low}, {high}]"


def _verdict_remarks(verdict: Accuracy) -> list[str]:
    """Return what the reader must know about a verdict beyond its row."""
    if verdict.is_pipeline_check or verdict.outcome == "PASS":
        return []
    from pytest_int8bench.accuracy.text import describe

    return describe(verdict)


def _sensitivity_table(found: Sensitivity) -> Table:
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        f"INT8 in one {found.by} alone": lambda row: str(row["name"]),
        "SQNR dB": lambda row: _MISSING if row["sqnr_db"] is None else f"{row['sqnr_db']:.1f}",
    }
    if found.metric is not None:
        columns[f"{found.metric} drop"] = lambda row: f"{100 * row['drop']:.2f}pp"
        columns["worse/better"] = lambda row: f"{row['lost']}/{row['gained']}"
    table = _columns(columns, name=next(iter(columns)), left=())
    for row in found.layers:
        table.add_row(*[Text(show(row)) for show in columns.values()])
    return table


def _columns(columns: Iterable[str], *, name: str, left: Sequence[str]) -> Table:
    """Return a table without rows, whose column ``name`` may be folded and no other."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for column in columns:
        table.add_column(
            column,
            justify="left" if column in (name, *left) else "right",
            no_wrap=column != name,
            overflow="fold",
            min_width=20 if column == name else None,
        )
    return table


def _speedup(result: Result) -> str:
    if result.speedup is None:
        return _MISSING
    if result.speedup_low is None or result.speedup_high is None:
        return f"{result.speedup:.2f}x (apart)"
    return f"{result.speedup:.2f}x [{result.speedup_low:.2f}, {result.speedup_high:.2f}]"


def _remarks(result: Result) -> list[str]:
    """Return what the reader must know about a point beyond its row."""
    lines = []
    name = _label(result)
    if result.status != "ok" or result.reason:
        mark = "note" if result.status == "ok" else result.status
        lines.append(f"{mark}: {name}: {result.reason or 'no reason given'}")
    if result.throttled:
        lines.append(f"{_THROTTLED} throttled: {name}: {', '.join(result.throttled)}")
    if result.steady is False:
        lines.append(f"unsteady: {name}: batch times had not settled after warm-up")
    busy = (result.device_time_s or 0) / (result.batch_time_s or math.inf)
    if 0 < busy < HOST_BOUND:
        lines.append(
            f"host-bound: {name}: kernels run in {busy:.0%} of the batch time, the GPU waits for "
            "the host in the rest; use a larger batch or CUDA graphs (compile_mode=reduce-overhead)"
        )
    if result.cuda_graphs_skipped:
        lines.append(f"no CUDA graphs: {name}: Inductor skipped what the compile mode asks for")
    return lines


def _label(record: Result | Accuracy | Sensitivity) -> str:
    return point_label(record.workload, record.run_name)


def _short_rounds(results: list[Result]) -> str | None:
    short = [r for r in results if (r.synchronization_share or 0) > MAX_SYNCHRONIZATION_SHARE]
    if not short:
        return None
    worst = max(short, key=lambda result: result.synchronization_share or 0)
    return (
        f"short rounds: in {len(short)} of {len(results)} points over "
        f"{MAX_SYNCHRONIZATION_SHARE:.1%} of the batch time is the host starting a round, at most "
        f"{worst.synchronization_share:.1%} ({_label(worst)}); raise benchmark_interval_s"
    )


def _number(value: float | None) -> str:
    """Return three significant digits at least, thousands separated; a dash for nothing."""
    if value is None:
        return _MISSING
    if 0 < abs(value) < 1:
        return f"{value:.3g}"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f}"
