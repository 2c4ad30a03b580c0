"""If one value of a saved file changes, readers show it or reject the file in one line."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from pytest_int8bench.cli.main import main
from pytest_int8bench.results.records import Saved
from toys.results import (
    CEILING,
    COVERAGE,
    W8A8,
    breakdown,
    environment,
    everything,
    faster,
    verdict,
)

STATE = {
    "sm_clock_mhz": 1980,
    "temperature_c": 50,
    "power_w": 300.0,
    "throttle_reasons": ["power cap"],
}
DISTANCE = {
    "samples": 64,
    "finite": True,
    "cosine": 0.99,
    "sqnr_db": 30.0,
    "top1_agreement": 0.9,
    "knn_agreement": 0.9,
}
REMEDY = {
    "rung": "SmoothQuant",
    "setting": "alpha=0.5",
    "configuration": "Workload(...)",
    "selection_drop": 0.01,
    "selection_samples": 50,
    "problem": None,
    "outcome": "PASS",
    "drop": 0.001,
    "drop_low": -0.01,
    "drop_high": 0.01,
    "samples": 50,
    "needed": None,
    "speedup": 1.1,
    "speedup_low": 1.0,
    "speedup_high": 1.2,
}
LAYER = {"name": "a", "layers": ["a"], "sqnr_db": 20.0, "drop": 0.1, "lost": 3, "gained": 1}


def full() -> Saved:
    """Return a file in which every field of every record has a value somewhere."""
    known = everything()
    point = W8A8.replace(batch_size=32, extra={"act": "relu", "depth": 3})
    result = faster(
        point,
        300.0,
        1.2,
        rounds=20,
        iterations=3,
        tokens_per_s=1e5,
        pixels_per_s=1e5,
        square_km_per_s=3.0,
        batch_time_mean_s=0.1,
        batch_time_p95_s=0.2,
        batch_time_min_s=0.05,
        synchronization_share=0.01,
        warm_up_s=2.0,
        steady=False,
        cuda_graphs_skipped=True,
        regions=2,
        regions_refused="why",
        feed_workers=2,
        feed_copy_s=0.001,
        feed_exposed_s=0.002,
        feed_exposed_low_s=0.001,
        feed_exposed_high_s=0.003,
        feed_wait_s=0.001,
        int8_backend="fused",
        int8_time_share=0.5,
        device_time_s=0.03,
        attention_backend="flash",
        attention_kernel="flash",
        kernels=[{"name": "gemm", "seconds": 0.1, "calls": 2}],
        trace="trace.json",
        device_breakdown=breakdown(0.03, 0.01, 0.03, 0.02),
        ceiling={
            **CEILING,
            "float_ops_per_s": 1e14,
            "int8_ops_per_s": 2e14,
            "bytes_per_s": 1e12,
            "attention": {"share": 1.0, "ratio": 1.8, "ops_per_s": 5e14},
        },
        ceiling_speedup=1.6,
        ceiling_reached=0.3,
        coverage={**COVERAGE, "smoothed_runtime": ["a"], "smoothed_folded": {"norm": ["b"]}},
        gpu_before=STATE,
        gpu_after=STATE,
        throttled=["power cap"],
        joules_per_sample=0.2,
        samples_per_joule=5.0,
        energy_ratio=1.2,
        worker={"id": "gw0", "host": "h", "gpu": "0"},
    )
    verdicts = [
        verdict(point, 0.02, "FAIL", remedies=[REMEDY], reason="why"),
        verdict(
            point.replace(batch_size=16), 0.009, "INCONCLUSIVE", needed=5000, groups=20, seconds=3.0
        ),
        verdict(point.replace(batch_size=2), 0.02, "FAIL"),
        replace(
            verdict(point.replace(batch_size=4), 0.0, "FAIL"),
            metric="outputs",
            limit=None,
            distance=DISTANCE,
            floor=DISTANCE,
        ),
    ]
    scan = replace(
        known.sensitivity[0], nodeid="scan of drops", metric="top1", layers=[LAYER], seconds=2.0
    )
    where = environment("0123abc", cpu="EPYC", cpu_threads=8, gpu_count=1, cudnn=9, system="Linux")
    return Saved(
        where,
        [*known.results, result],
        [*known.accuracy, *verdicts],
        [*known.sensitivity, scan],
    )


BLOCK = full().to_dict()
ABSENT = object()
values = st.one_of(
    st.sampled_from(
        [ABSENT, None, True, 0, -1, 10**400, 1e308, 5e-324, float("nan"), float("-inf")]
    ),
    st.sampled_from(["", "1%", "\ud800", "\x1b[2J", "::error::", "a\nb", "\ufffe", "\ufeff"]),
    st.sampled_from([[], [None], [[]], [{}], {}, {"a": None}, {"a": {"b": [1]}}, {"": 1}]),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
)


def places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Return the paths to all items in a value."""
    if place:
        yield place
    entries = value.items() if isinstance(value, dict) else enumerate(value)
    for name, entry in entries:
        if isinstance(entry, dict | list):
            yield from places(entry, (*place, name))
        else:
            yield (*place, name)


PLACES = list(places(BLOCK))


def mutated(place: tuple[Any, ...], value: Any) -> dict[str, Any]:
    block = copy.deepcopy(BLOCK)
    *inside, last = place
    holder: Any = block
    for name in inside:
        holder = holder[name]
    if value is ABSENT:
        del holder[last]
    else:
        holder[last] = value
    return {"datetime": "2026-01-01T00:00:00", "benchmarks": [], "int8bench": block}


def run(*arguments: str) -> tuple[int, str]:
    error = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(error):
        code = main(arguments)
    return code, error.getvalue()


def test_every_field_has_a_value_somewhere() -> None:
    for records in (BLOCK["results"], BLOCK["accuracy"], BLOCK["sensitivity"]):
        for name in records[0]:
            assert any(record[name] is not None for record in records), name


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(PLACES), values, st.booleans())
@example(("results", 0, "run_name"), "", False)
def test_one_change_is_shown_or_rejected(place: Any, value: Any, reports: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        good, bad = Path(folder) / "good.json", Path(folder) / "bad.json"
        good.write_text(json.dumps({"benchmarks": [], "int8bench": BLOCK}))
        bad.write_text(json.dumps(mutated(place, value)))
        commands = [("show", str(bad)), ("compare", str(good), str(bad))]
        if reports:
            commands[1:] = [("report", str(bad), "--output", str(Path(folder) / "r.md"))]
        for command in commands:
            code, error = run(*command)
            if error:
                assert code == 2
                assert str(bad) in error
                assert len(error) < 700
                assert error.count("\n") == 1
            assert code == 0 or error or command[0] == "compare"
