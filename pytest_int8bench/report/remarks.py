"""Remarks on results, one line each, to show below the table."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from pytest_int8bench.report.left_out import left_out_remarks
from pytest_int8bench.report.tables import number
from pytest_int8bench.results.records import Result, Timed
from pytest_int8bench.words import plural, some

#: Appended to a rate that was measured while the GPU was throttled.
THROTTLED_MARK = "*"
MAX_SYNCHRONIZATION_SHARE = 0.005
#: A point is host-bound if kernels run for less than this share of the batch time.
HOST_BOUND = 0.8
#: A point can be data-bound if feeding from the host adds more than this share of the batch time.
FEED_BOUND = 0.02


def status_remarks(result: Timed) -> list[str]:
    """Return a remark with the reason why a point is not ``ok``, or with the note on an ``ok``
    point."""
    if result.status == "ok" and not result.reason:
        return []
    mark = "note" if result.status == "ok" else result.status
    return [f"{mark}: {result.label}: {result.reason or 'no reason given'}"]


def remarks(result: Result) -> list[str]:
    """Return the remarks on a point, other than its status, that are not in its row."""
    lines = []
    name = result.label
    if result.throttled:
        lines.append(f"{THROTTLED_MARK} throttled: {name}: {', '.join(result.throttled)}")
    if result.steady is False:
        lines.append(f"unsteady: {name}: batch times had not settled after warm-up")
    # Do not count time spent waiting for data, which _feeding() reports.
    fed_s = max(result.feed_exposed_s or 0, 0)
    busy = (result.device_time_s or 0) / max((result.batch_time_s or math.inf) - fed_s, 1e-9)
    if 0 < busy < HOST_BOUND:
        lines.append(
            f"host-bound: {name}: kernels run for {busy:.0%} of the batch time, and the GPU waits "
            "for the host the rest of the time; use a larger batch or CUDA graphs "
            "(compile_mode=reduce-overhead)"
        )
    if result.int8_backend == "fused" and (falls := (result.coverage or {}).get("fallbacks")):
        reasons = Counter(falls.values())
        listed = some([f"{count} {reason}" for reason, count in reasons.items()])
        lines.append(f"not fused: {name}: layers that run torchao's kernels: {listed}")
    lines += left_out_remarks(result)
    lines += upper_bound_remarks(result)
    if result.cuda_graphs_skipped:
        lines.append(
            f"no CUDA graphs: {name}: the compile mode asks for them, but Inductor skipped them"
        )
    # Regions never support torchao's tensors, so a remark on every point with torchao would be
    # noise.
    if result.regions_refused is not None and result.int8_backend != "torchao":
        lines.append(f"compiled one by one: {name}: repeated blocks: {result.regions_refused}")
    if (feeding := _feeding(result)) is not None:
        lines.append(feeding)
    return lines


def upper_bound_remarks(result: Result) -> list[str]:
    """Return a remark on a point's INT8 upper bound and the share of the possible gain it
    achieved."""
    basis = result.ceiling or {}
    if problem := basis.get("problem"):
        return [f"upper bound: {result.label}: unknown: {problem}"]
    split = basis.get("baseline")
    if result.ceiling_speedup is None or not isinstance(split, dict):
        return []
    total_s = sum(split.values())
    matmuls_s = split["int8_products"] + split["other_products"]
    shares = f"matmuls {matmuls_s / total_s:.0%}, attention {split['attention'] / total_s:.0%}"
    dtype = result.float_dtype
    text = (
        f"INT8 can reach at most {result.ceiling_speedup:.2f}x, "
        f"{basis['products_speedup']:.2f}x from matmuls alone "
        f"({dtype} kernel time: {shares}, rest {split['rest'] / total_s:.0%}; "
        f"{basis['quantized_share']:.0%} of the matmul time is quantized and could run "
        f"{basis['product_ratio']:.2f}x as fast{_int8_attention(basis)})"
    )
    if result.ceiling_reached is not None:
        part = max(result.ceiling_reached, 0.0)
        if part > 1 and (result.speedup_low or math.inf) <= result.ceiling_speedup:
            part = 1.0  # the speedup's interval includes the upper bound
        text += f"; {f'{part:.0%}' if part else 'none'} of the possible gain achieved"
        if part > 1:
            text += " (the bound assumes that all other kernels take as long as in the baseline)"
    if result.speedup and result.batch_time_s:
        busy = total_s / (result.speedup * result.batch_time_s)
        if busy < HOST_BOUND:
            text += (
                f"; this covers kernels only, which run for {busy:.0%} of the {dtype} batch time"
            )
    if "math" in (result.params.get("attention"), result.attention_backend):
        text += "; matmuls of math attention count as layer matmuls"
    return [f"upper bound: {result.label}: {text}"]


def _int8_attention(basis: Mapping[str, Any]) -> str:
    part = basis.get("attention")
    if part is None:
        return ""
    return (
        f"; {part['share']:.0%} of the attention time is in INT8 calls and could run "
        f"{part['ratio']:.2f}x as fast"
    )


def _feeding(result: Result) -> str | None:
    """Return a remark on how much of the time to feed a batch from the host is hidden behind
    compute."""
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
    copying = f"{result.label}: copying a batch from the host takes {copy}"
    added = f"feeding adds {exposed}{interval} to each batch"
    if exposed_s > FEED_BOUND * batch_s and wait_s >= exposed_s / 2:
        loader = f"{result.feed_workers} workers" if result.feed_workers else "the main process"
        return (
            f"data-bound: {copying}, but {added}, as the host waits {wait} for the loader "
            f"({loader})"
        )
    if exposed_s < 0:
        return (
            f"host feed: {copying}, all of it hidden behind compute (feeding seems to add "
            f"{exposed}{interval}, which is noise)"
        )
    if low_s is not None and low_s <= 0:
        return f"host feed: {copying}; {added}, which may be noise"
    if exposed_s > copy_s:
        return f"host feed: {copying}, none of it hidden: {added}"
    return f"host feed: {copying}: {hidden} is hidden behind compute, {exposed}{interval} is not"


def short_rounds(results: Sequence[Result]) -> str | None:
    """Return a remark on points whose rounds are too short for exact times, or None if there are
    none."""
    short = [r for r in results if (r.synchronization_share or 0) > MAX_SYNCHRONIZATION_SHARE]
    if not short:
        return None
    measured = [result for result in results if result.samples_per_s is not None]
    worst = max(short, key=lambda result: result.synchronization_share or 0)
    return (
        f"short rounds: in {len(short)} of {plural(len(measured), 'measured point')}, starting a "
        f"round on the host takes over {MAX_SYNCHRONIZATION_SHARE:.1%} of the batch time, up to "
        f"{worst.synchronization_share:.1%} ({worst.label}); raise benchmark_interval_s"
    )
