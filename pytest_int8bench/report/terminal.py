"""The table at the end of a session."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from pytest_int8bench.environment import describe
from pytest_int8bench.report.tables import MISSING, Grid, number, paragraphs, plain_grid
from pytest_int8bench.results import Accuracy, Result, Saved, Sensitivity, point_label

#: Behind a rate that was measured while the GPU was slowed down.
_THROTTLED = "*"
#: Behind a verdict on a model with random weights.
_PIPELINE = "*"
PIPELINE_CHECK = (
    f"{_PIPELINE} pipeline check: the weights are random, so the verdict says nothing about a "
    "trained model and fails no test; see --int8-weights"
)
MAX_SYNCHRONIZATION_SHARE = 0.005
#: Part of the batch time that kernels run in, under which the reader is told.
HOST_BOUND = 0.8
#: Part of the batch time that feeding from the host may add before its cause is looked for.
FEED_BOUND = 0.02


def render(saved: Saved, *, width: int | None, color: bool) -> str:
    """Return the table, the points without figures, and the machine as text.

    Args:
        saved: what to show.
        width: columns of the terminal; None for as wide as the table needs.
        color: use ANSI colors.
    """
    measured = [r for r in saved.results if r.samples_per_s is not None or r.oom]
    tables: list[tuple[str | None, Grid]] = [(None, results_table(measured))] if measured else []
    if judged := [v for v in saved.accuracy if v.limit is not None]:
        tables.append((None, accuracy_table(judged)))
    tables += [
        (f"{_label(scan)}, {scan.samples:,} samples", sensitivity_table(scan))
        for scan in saved.sensitivity
    ]

    def fold(*texts: str, style: str | None = None) -> str:
        return paragraphs(texts, width=width, color=color, style=style)

    parts = []
    for title, table in tables:
        parts.append(fold(*([title] if title else [])) + table.text(width=width, color=color))
    text = "\n".join(parts)
    for verdict in saved.accuracy:
        text += fold(*verdict_remarks(verdict))
    if any(verdict.is_pipeline_check for verdict in saved.accuracy):
        text += fold(PIPELINE_CHECK)
    for result in saved.results:
        text += fold(*status_remarks(result), *remarks(result))
    versions = {r.params.get("model_version") for r in measured if r.workload == "olmoearth"}
    if named := sorted(version for version in versions if version):
        text += fold(f"OlmoEarth {', '.join(named)}", style="dim")
    if short := short_rounds(saved.results):
        text += fold(short)
    return text + fold(describe(saved.environment), style="dim")


def results_table(results: Sequence[Result]) -> Grid:
    """Return the figures of points that were measured or ran out of memory."""
    columns: dict[str, Callable[[Result], str]] = {
        "run": lambda r: r.run_name,
        "samples/s": lambda r: number(r.samples_per_s) + (_THROTTLED if r.throttled else ""),
        "tokens/s": lambda r: number(r.tokens_per_s),
        "km²/s": lambda r: number(r.square_km_per_s),
        "ms/batch": lambda r: number(None if r.batch_time_s is None else r.batch_time_s * 1e3),
        "peak MiB": lambda r: number(r.peak_memory_bytes and r.peak_memory_bytes / 2**20),
        "compile s": lambda r: (
            number(r.compile_s) + (" (warm)" if r.compile_cache == "warm" else "")
        ),
        "INT8 time": _int8_time,
        "attention": lambda r: r.attention_kernel or MISSING,
        "speedup [95 %]": shown_speedup,
    }
    workloads = {result.workload for result in results}
    if workloads != {"olmoearth"}:
        columns = {"workload": lambda r: r.workload, **columns}
    rows = []
    for result in results:
        cells = [show(result) for show in columns.values()]
        if result.oom:
            cells[list(columns).index("samples/s")] = "OOM"
        rows.append(cells)
    return Grid(
        columns=[*columns],
        rows=rows,
        styles=[None if result.status == "ok" else "red" for result in results],
        name="run",
        left=("workload", "attention"),
        keys=("workload",),
        first=("samples/s", "speedup [95 %]"),
    )


def _int8_time(result: Result) -> str:
    """Return the share of INT8 products, and whose they are where they are ours."""
    if result.int8_time_share is None:
        return MISSING
    ours = " fused" if result.int8_backend == "fused" else ""
    return f"{result.int8_time_share:.0%}{ours}"


def accuracy_table(verdicts: Sequence[Accuracy]) -> Grid:
    """Return the verdicts on labelled samples."""
    columns: dict[str, Callable[[Accuracy], str]] = {
        "accuracy": lambda v: v.run_name,
        "metric": lambda v: v.metric,
        "samples": lambda v: f"{v.samples:,}",
        "baseline": lambda v: _score(v.baseline),
        "INT8": lambda v: _score(v.candidate),
        "drop [one-sided 95 %]": shown_drop,
        "worse/better": lambda v: f"{v.lost}/{v.gained}",
        "limit": lambda v: v.limit or MISSING,
        "verdict": lambda v: v.outcome + (_PIPELINE if v.is_pipeline_check else ""),
    }
    if {verdict.workload for verdict in verdicts} != {"olmoearth"}:
        columns = {"workload": lambda v: v.workload, **columns}
    return Grid(
        columns=[*columns],
        rows=[[show(v) for show in columns.values()] for v in verdicts],
        styles=[_style(v) for v in verdicts],
        name="accuracy",
        left=("workload", "metric", "verdict"),
        keys=("workload", "metric"),
        first=("drop [one-sided 95 %]", "limit", "verdict"),
    )


def _style(verdict: Accuracy) -> str | None:
    if verdict.is_pipeline_check:
        return "dim"
    return None if verdict.outcome == "PASS" else "red"


def _score(value: float | None) -> str:
    return MISSING if value is None else f"{value:.4f}"


def shown_drop(verdict: Accuracy) -> str:
    """Return a drop with its bounds."""
    unit = "pp" if str(verdict.limit).endswith("pp") else "%"
    drop, low, high = (
        f"{100 * (value or 0):.2f}" for value in (verdict.drop, verdict.drop_low, verdict.drop_high)
    )
    return f"{drop}{unit} [{low}, {high}]"


def verdict_remarks(verdict: Accuracy) -> list[str]:
    """Return what the reader must know about a verdict beyond its row."""
    from pytest_int8bench.accuracy.text import beside_row

    return beside_row(verdict)


def sensitivity_table(found: Sensitivity) -> Grid:
    """Return what each layer, or block, loses."""
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        f"INT8 in one {found.by} alone": lambda row: str(row["name"]),
        "SQNR dB": lambda row: MISSING if row["sqnr_db"] is None else f"{row['sqnr_db']:.1f}",
    }
    if found.metric is not None:
        columns[f"{found.metric} drop"] = lambda row: f"{100 * row['drop']:.2f}pp"
        columns["worse/better"] = lambda row: f"{row['lost']}/{row['gained']}"
    rows = [[show(row) for show in columns.values()] for row in found.layers]
    return plain_grid([*columns], rows)


def shown_speedup(result: Result) -> str:
    """Return a speedup with its interval."""
    if result.speedup is None:
        return MISSING
    if result.speedup_low is None or result.speedup_high is None:
        return f"{result.speedup:.2f}x (apart)"
    return f"{result.speedup:.2f}x [{result.speedup_low:.2f}, {result.speedup_high:.2f}]"


def status_remarks(result: Result) -> list[str]:
    """Return why a point is not ``ok``, or its note."""
    if result.status == "ok" and not result.reason:
        return []
    mark = "note" if result.status == "ok" else result.status
    return [f"{mark}: {_label(result)}: {result.reason or 'no reason given'}"]


def remarks(result: Result) -> list[str]:
    """Return what the reader must know about a point beyond its row and its status."""
    lines = []
    name = _label(result)
    if result.throttled:
        lines.append(f"{_THROTTLED} throttled: {name}: {', '.join(result.throttled)}")
    if result.steady is False:
        lines.append(f"unsteady: {name}: batch times had not settled after warm-up")
    # Waiting for data is told apart.
    fed_s = max(result.feed_exposed_s or 0, 0)
    busy = (result.device_time_s or 0) / max((result.batch_time_s or math.inf) - fed_s, 1e-9)
    if 0 < busy < HOST_BOUND:
        lines.append(
            f"host-bound: {name}: kernels run in {busy:.0%} of the batch time, the GPU waits for "
            "the host in the rest; use a larger batch or CUDA graphs (compile_mode=reduce-overhead)"
        )
    if result.int8_backend == "fused" and (falls := (result.coverage or {}).get("fallbacks")):
        reasons = Counter(falls.values())
        listed = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
        lines.append(f"not fused: {name}: layers on torchao's kernels: {listed}")
    lines += ceiling_remarks(result)
    if result.cuda_graphs_skipped:
        lines.append(f"no CUDA graphs: {name}: Inductor skipped what the compile mode asks for")
    if result.regions_refused is not None:
        lines.append(f"compiled one by one: {name}: repeated blocks: {result.regions_refused}")
    if (feeding := _feeding(result)) is not None:
        lines.append(feeding)
    return lines


def ceiling_remarks(result: Result) -> list[str]:
    """Return what INT8 could bring at most at a point, and how much of it was reached."""
    basis = result.ceiling or {}
    if problem := basis.get("problem"):
        return [f"ceiling: {_label(result)}: not known: {problem}"]
    split = basis.get("baseline")
    if result.ceiling_speedup is None or not isinstance(split, dict):
        return []
    total_s = sum(split.values())
    products_s = split["int8_products"] + split["other_products"]
    shares = f"products {products_s / total_s:.0%}, attention {split['attention'] / total_s:.0%}"
    dtype = "BF16" if result.params.get("bf16", True) else "FP32"
    text = (
        f"INT8 could bring at most {result.ceiling_speedup:.2f}x here, "
        f"{basis['products_speedup']:.2f}x by its products alone "
        f"({shares}, rest {split['rest'] / total_s:.0%} of the {dtype} kernels' time; "
        f"{basis['quantized_share']:.0%} of the products are quantized, and could run "
        f"{basis['product_ratio']:.2f}x as fast)"
    )
    if result.ceiling_reached is not None:
        part = max(result.ceiling_reached, 0.0)
        text += f": {part:.0%} of that gain reached" if part else ": none of that gain reached"
    if result.speedup and result.batch_time_s:
        busy = total_s / (result.speedup * result.batch_time_s)
        if busy < HOST_BOUND:
            text += f"; that is of the kernels, which run in {busy:.0%} of the {dtype} batch time"
    if result.params.get("attention") == "math":
        text += "; the products of math attention count as those of layers"
    return [f"ceiling: {_label(result)}: {text}"]


def _feeding(result: Result) -> str | None:
    """Return what of feeding from the host is hidden behind the compute, and what is not."""
    copy_s, exposed_s = result.feed_copy_s, result.feed_exposed_s
    if copy_s is None or exposed_s is None:
        return None
    wait_s, batch_s = result.feed_wait_s or 0, result.batch_time_s or math.inf
    copy, exposed, hidden, wait = (
        f"{number(seconds * 1e3)} ms" for seconds in (copy_s, exposed_s, copy_s - exposed_s, wait_s)
    )
    low_s, high_s = result.feed_exposed_low_s, result.feed_exposed_high_s
    interval = ""
    if low_s is not None and high_s is not None:
        interval = f" [{number(low_s * 1e3)}, {number(high_s * 1e3)}]"
    copying = f"{_label(result)}: copying a batch from the host takes {copy}"
    longer = f"a batch takes {exposed}{interval} longer than one that is on the device"
    if exposed_s > FEED_BOUND * batch_s and wait_s >= exposed_s / 2:
        loader = f"{result.feed_workers} workers" if result.feed_workers else "the main process"
        return (
            f"data-bound: {copying}, but {longer}: the host waits {wait} for the loader "
            f"({loader}), which is the limit"
        )
    if exposed_s < 0:
        return (
            f"host feed: {copying}, all of it hidden behind the compute (the part that is not came "
            f"out at {exposed}{interval}: noise)"
        )
    if low_s is not None and low_s <= 0:
        return f"host feed: {copying}; {longer}, which may be noise"
    if exposed_s > copy_s:
        return f"host feed: {copying}, none of it hidden: {longer}"
    return (
        f"host feed: {copying}, {hidden} of it hidden behind the compute and {exposed}{interval} "
        "not"
    )


def _label(record: Result | Accuracy | Sensitivity) -> str:
    return point_label(record.workload, record.run_name)


def short_rounds(results: Sequence[Result]) -> str | None:
    """Return what is wrong with rounds that are too short to be exact."""
    short = [r for r in results if (r.synchronization_share or 0) > MAX_SYNCHRONIZATION_SHARE]
    if not short:
        return None
    worst = max(short, key=lambda result: result.synchronization_share or 0)
    return (
        f"short rounds: in {len(short)} of {len(results)} points over "
        f"{MAX_SYNCHRONIZATION_SHARE:.1%} of the batch time is the host starting a round, at most "
        f"{worst.synchronization_share:.1%} ({_label(worst)}); raise benchmark_interval_s"
    )
