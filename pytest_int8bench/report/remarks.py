"""Remarks about results: one line each, below the table."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from pytest_int8bench.report.left_out import left_out_remarks
from pytest_int8bench.report.tables import number
from pytest_int8bench.results.base import Record, point_label
from pytest_int8bench.results.records import Result, Timed
from pytest_int8bench.words import plural, some

#: Behind a rate that was measured while the GPU was slowed down.
THROTTLED_MARK = "*"
MAX_SYNCHRONIZATION_SHARE = 0.005
#: Part of the batch time that kernels run in, under which the reader is told.
HOST_BOUND = 0.8
#: Part of the batch time that feeding from the host may add before its cause is looked for.
FEED_BOUND = 0.02


def status_remarks(result: Timed) -> list[str]:
    """Return why a point is not ``ok``, or its note."""
    if result.status == "ok" and not result.reason:
        return []
    mark = "note" if result.status == "ok" else result.status
    return [f"{mark}: {record_label(result)}: {result.reason or 'no reason given'}"]


def remarks(result: Result) -> list[str]:
    """Return what the reader must know about a point beyond its row and its status."""
    lines = []
    name = record_label(result)
    if result.throttled:
        lines.append(f"{THROTTLED_MARK} throttled: {name}: {', '.join(result.throttled)}")
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
        listed = some([f"{count} {reason}" for reason, count in reasons.items()])
        lines.append(f"not fused: {name}: layers on torchao's kernels: {listed}")
    lines += left_out_remarks(result)
    lines += ceiling_remarks(result)
    if result.cuda_graphs_skipped:
        lines.append(f"no CUDA graphs: {name}: Inductor skipped what the compile mode asks for")
    # No region takes torchao's tensors: that is so at each of its points, and needs no line.
    if result.regions_refused is not None and result.int8_backend != "torchao":
        lines.append(f"compiled one by one: {name}: repeated blocks: {result.regions_refused}")
    if (feeding := _feeding(result)) is not None:
        lines.append(feeding)
    return lines


def ceiling_remarks(result: Result) -> list[str]:
    """Return what INT8 could bring at most at a point, and how much of it was reached."""
    basis = result.ceiling or {}
    if problem := basis.get("problem"):
        return [f"ceiling: {record_label(result)}: not known: {problem}"]
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
        f"{basis['product_ratio']:.2f}x as fast{_int8_attention(basis)})"
    )
    if result.ceiling_reached is not None:
        part = max(result.ceiling_reached, 0.0)
        if part > 1 and (result.speedup_low or math.inf) <= result.ceiling_speedup:
            part = 1.0  # as far as the speedup is known
        text += f": {part:.0%} of that gain reached" if part else ": none of that gain reached"
    if result.speedup and result.batch_time_s:
        busy = total_s / (result.speedup * result.batch_time_s)
        if busy < HOST_BOUND:
            text += f"; that is of the kernels, which run in {busy:.0%} of the {dtype} batch time"
    if result.params.get("attention") == "math":
        text += "; the products of math attention count as those of layers"
    return [f"ceiling: {record_label(result)}: {text}"]


def _int8_attention(basis: Mapping[str, Any]) -> str:
    part = basis.get("attention")
    if part is None:
        return ""
    return (
        f"; {part['share']:.0%} of the attention runs in INT8, and could run {part['ratio']:.2f}x "
        "as fast"
    )


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
    copying = f"{record_label(result)}: copying a batch from the host takes {copy}"
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


def record_label(record: Record) -> str:
    return point_label(record.workload, record.run_name)


def short_rounds(results: Sequence[Result]) -> str | None:
    """Return what is wrong with rounds that are too short to be exact."""
    short = [r for r in results if (r.synchronization_share or 0) > MAX_SYNCHRONIZATION_SHARE]
    if not short:
        return None
    measured = [result for result in results if result.samples_per_s is not None]
    worst = max(short, key=lambda result: result.synchronization_share or 0)
    return (
        f"short rounds: in {len(short)} of {plural(len(measured), 'measured point')} over "
        f"{MAX_SYNCHRONIZATION_SHARE:.1%} of the batch time is the host starting a round, at most "
        f"{worst.synchronization_share:.1%} ({record_label(worst)}); raise benchmark_interval_s"
    )
