"""Records of results and verdicts, and saved files as sessions write them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from pytest_int8bench.params import RunParams
from pytest_int8bench.results.base import Record
from pytest_int8bench.results.benchmarks import Benchmark
from pytest_int8bench.results.journal import Journal
from pytest_int8bench.results.records import Result, Saved
from pytest_int8bench.results.verdicts import Accuracy, Sensitivity

GPU: dict[str, Any] = {
    "gpu": {"name": "A100", "driver": "550", "memory_bytes": 80 * 2**30},
    "cuda": "12.8",
    "packages": {"torch": "2.11.0", "triton": "3.6.0", "torchao": "0.18.0"},
    "python": "3.11.7",
    "commit": "0123456789abcdef",
    "dirty": False,
}
CPU: dict[str, Any] = {**GPU, "gpu": None, "cuda": None, "cpu": "EPYC", "cpu_threads": 8}
OLMOEARTH = {"workload": "olmoearth"}
BASE = RunParams(compile_mode="default")
W8A8 = BASE.replace(int8_enabled=True)
W8 = W8A8.replace(int8_mode="w8")


def environment(commit: str, **changes: Any) -> dict[str, Any]:
    """Return the fingerprint at a commit; ``driver`` goes to the GPU's part."""
    driver = changes.pop("driver", "550")
    return {**GPU, "gpu": {**GPU["gpu"], "driver": driver}, "commit": commit, **changes}


def result_of(point: RunParams | str = "x", test: str = "test_a.py::test", **values: Any) -> Result:
    """Return a result of a point, given as its parameters or as a mere name."""
    return Result(**{**_identity(point, test), **values})


def verdict_of(
    outcome: str = "PASS",
    point: RunParams | str = "x",
    test: str = "test_a.py::test_accuracy",
    **values: Any,
) -> Accuracy:
    """Return a verdict on top-1 for a point, given as its parameters or as a mere name."""
    judged = {"metric": "top1", "outcome": outcome, "samples": 100, "limit": "1%"}
    return Accuracy(**{**_identity(point, test), **judged, **values})


def _identity(point: RunParams | str, test: str) -> dict[str, Any]:
    name, params = (point, {}) if isinstance(point, str) else (point.run_name, point.to_dict())
    return {"nodeid": f"{test}[{name}]", "workload": "toy", "run_name": name, "params": params}


def timed(name: str = "x", slower: float = 1.0, **values: Any) -> Result:
    """Return a result whose times are ``slower`` times those of the default, or which was not
    measured if ``status`` says so."""
    times = {
        "samples_per_s": 1000 / slower,
        "batch_time_s": 0.128 * slower,
        "batch_time_p95_s": 0.130 * slower,
        "compile_s": 20 * slower,
        "peak_memory_bytes": 1 << 30,
    }
    measured = times if values.get("status", "ok") == "ok" else {"reason": "why"}
    return result_of(name, **{**measured, **values})


def result(params: RunParams, rate: float | None = None, **values: Any) -> Result:
    """Return a result of OlmoEarth; with ``rate`` it was measured."""
    measured: dict[str, Any] = {}
    if rate is not None:
        measured = {
            "samples_per_s": rate,
            "batch_time_s": params.batch_size / rate,
            "batch_time_standard_error": 0.005,
            "peak_memory_bytes": (500 + params.batch_size) * 2**20,
            "compile_s": 20.0,
            "compile_cache": "cold",
        }
    return result_of(params, "b/test_t.py::test_t", **{**OLMOEARTH, **measured, **values})


def faster(params: RunParams, rate: float, speedup: float, **values: Any) -> Result:
    """Return a result with a speedup and its interval."""
    ends = {"speedup_low": speedup - 0.02, "speedup_high": speedup + 0.03}
    return result(
        params, rate, **{"speedup": speedup, "speedup_method": "interleaved", **ends, **values}
    )


def verdict(params: RunParams, drop: float, outcome: str, **values: Any) -> Accuracy:
    """Return a verdict on OlmoEarth's top-1."""
    judged = {
        "samples": 1000,
        "baseline": 0.9,
        "candidate": 0.9 * (1 - drop),
        "drop": drop,
        "drop_low": drop - 0.003,
        "drop_high": drop + 0.004,
        "lost": 12,
        "gained": 7,
        "method": "exact",
    }
    return verdict_of(outcome, params, "b/test_a.py::test_a", **{**OLMOEARTH, **judged, **values})


def breakdown(int8: float, other: float, attention: float, rest: float) -> dict[str, float]:
    return {"int8_products": int8, "other_products": other, "attention": attention, "rest": rest}


COVERAGE: dict[str, Any] = {
    "mode": "w8a8",
    "converted_layers": 48,
    "linear_layers": 50,
    "converted_parameters": 85_000_000,
    "total_parameters": 100_000_000,
    "left_out": {"embed.proj": "filtered", "head": "filtered"},
    "fused_layers": 47,
    "fallbacks": {"blocks.0.attn.proj": "a hook <on> it"},
    "smoothed_folded": {},
    "smoothed_runtime": [],
}
CEILING: dict[str, Any] = {
    "baseline": breakdown(0.0, 0.06, 0.03, 0.01),
    "products_speedup": 1.4,
    "product_ratio": 1.9,
    "quantized_share": 0.97,
}


def everything() -> Saved:
    """Return the results of a GPU session with every kind of record: a batch sweep with an OOM,
    verdicts, a failed and a skipped point, and a sensitivity scan."""
    results = []
    for batch, rate in ((1, 40.0), (8, 190.0), (64, 360.0)):
        at = {"batch_size": batch}
        split = breakdown(0.0, 0.05, 0.03, 0.02)
        results.append(result(BASE.replace(**at), rate, device_breakdown=split))
        if batch == 64:
            why = {"status": "oom", "requested_bytes": 2**34, "reason": "out of memory: 16 GiB"}
            results.append(result(W8A8.replace(**at), **why))
        else:
            results.append(
                faster(
                    W8A8.replace(**at),
                    rate * 1.2,
                    1.2,
                    device_breakdown=breakdown(0.03, 0.01, 0.03, 0.02),
                    ceiling=CEILING,
                    ceiling_speedup=1.6,
                    ceiling_reached=1 / 3,
                    coverage=COVERAGE,
                    int8_backend="fused",
                )
            )
        results.append(faster(W8.replace(**at), rate * 0.98, 0.98))
    failed = W8A8.replace(batch_size=8, attention="cudnn")
    results.append(result(failed, status="failed", reason="EvidenceError: flash <ran> & more"))
    skipped = W8A8.replace(batch_size=8, image_size=2)
    results.append(result(skipped, status="skipped", reason="image_size=2 is too small"))
    verdicts = [
        verdict(W8A8.replace(batch_size=8), 0.014, "FAIL"),
        verdict(W8.replace(batch_size=8), 0.002, "PASS"),
    ]
    layers = [
        {"name": "blocks.0.fc1", "layers": ["blocks.0.fc1"], "sqnr_db": 21.5},
        {"name": "blocks.1.fc1", "layers": ["blocks.1.fc1"], "sqnr_db": 33.0},
        {"name": "blocks.2.fc1", "layers": ["blocks.2.fc1"], "sqnr_db": None},
    ]
    scan = Sensitivity(
        nodeid="scan",
        workload="olmoearth",
        run_name=W8A8.run_name,
        params=W8A8.to_dict(),
        by="layer",
        samples=64,
        layers=layers,
    )
    return Saved(GPU, results, verdicts, [scan])


def commits() -> list[tuple[str, Saved]]:
    """Return the files of four commits; the driver changes before the third."""
    files = []
    for place, (rate, driver) in enumerate(
        ((100.0, "550"), (101.0, "550"), (120.0, "570"), (119.0, "570"))
    ):
        where = environment(f"{place}abcdef0123", driver=driver)
        results = [result(BASE, rate), faster(W8A8, rate * 1.1, 1.1 + place / 100)]
        files.append(
            (f"runs/000{place}.json", Saved(where, results, [verdict(W8A8, 0.001 * place, "PASS")]))
        )
    return files


def saved(*records: Record, **environment: Any) -> Saved:
    """Return a file of records."""
    return Saved.of(environment, records)


def plain(name: str = "plain", seconds: float = 1e-3, **values: Any) -> Benchmark:
    """Return a plain benchmark whose rounds do not differ."""
    timing = entry(f"test_a.py::{name}", seconds)
    return replace(Benchmark.from_timing(timing), **values)


def entry(fullname: str, seconds: float = 1e-3, **stats: Any) -> dict[str, Any]:
    """Return what pytest-benchmark saves for a test."""
    times = dict.fromkeys(("min", "max", "mean", "median"), seconds)
    spread = {"stddev": 0.0, "iqr": 0.0, "rounds": 20, "iterations": 1}
    options = {"timer": "perf_counter", "min_rounds": 5}
    stats = {**times, **spread, **stats}
    return {"fullname": fullname, "name": "x", "options": options, "stats": stats}


#: pytest-benchmark's description of the machine of :data:`CPU`.
MACHINE_INFO = {
    "node": "host",
    "python_version": "3.11.7",
    "system": "Linux",
    "machine": "x86_64",
    "cpu": {"brand_raw": "EPYC", "hz_actual": [2000000000, 0]},
}


def write_plain(path: str | Path, *entries: Any, **head: Any) -> Path:
    """Save a file like pytest-benchmark without this plugin."""
    head = {"machine_info": MACHINE_INFO, "commit_info": {"id": "abc", "dirty": False}, **head}
    Path(path).write_text(json.dumps({**head, "benchmarks": [*entries], "version": "5.1.0"}))
    return Path(path)


def write(path: str | Path, saved: Saved, **head: Any) -> Path:
    """Save a file like pytest-benchmark; ``head`` has its other keys."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"benchmarks": [], **head, "int8bench": saved.to_dict()}))
    return path


def write_journal(path: Path, saved: Saved) -> Path:
    """Write a journal with the records of ``saved``."""
    journal = Journal(path, saved.environment)
    for record in saved.records:
        journal.append(record)
    return path
