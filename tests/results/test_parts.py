"""Results are joined from the parts that the stages of a measurement return."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

import pytest

from pytest_int8bench.params import RunParams
from pytest_int8bench.results import parts
from pytest_int8bench.results.records import Result

PARAMS = RunParams(int8_enabled=True)


@dataclass(frozen=True)
class Given:
    """An object that can be saved as a dictionary."""

    values: dict[str, Any]
    backend: str = "fused"

    def to_dict(self) -> dict[str, Any]:
        return self.values


@dataclass(frozen=True)
class Kernel:
    name: str
    seconds: float
    calls: int


TIMING = parts.Timing(median_s=0.5, mean_s=0.6, p95_s=0.9, min_s=0.4, standard_error=0.01)
ROUNDS = parts.Rounds(
    timing=TIMING,
    count=7,
    iterations=3,
    synchronization_share=0.001,
    gpu_before={
        "sm_clock_mhz": 1,
        "temperature_c": 2,
        "power_w": 3.0,
        "throttle_reasons": [],
    },
    gpu_after=None,
    throttled=("power brake",),
    joules_per_batch=40.0,
)
SETUP = parts.Setup(
    peak_memory_bytes=11,
    compile_s=1.5,
    compile_cache="cold",
    warm_up_s=2.5,
    steady=True,
    cuda_graphs_skipped=False,
    regions=2,
    regions_refused="because",
    attention_backend="flash",
)
BARE: dict[str, Any] = {
    "nodeid": "test_it.py::test_it",
    "workload": "toy",
    "params": PARAMS,
    "setup": SETUP,
    "units": parts.Units(samples=8),
    "rounds": ROUNDS,
}
FULL: dict[str, Any] = {
    **BARE,
    "units": parts.Units(samples=8, tokens=16, pixels=32, square_km=4),
    "feeding": parts.Feeding(4, 0.125, parts.FeedingCost(0.1, 0.2, 0.15, 0.25)),
    "comparison": parts.Comparison(
        speedup=1.5, low=1.4, high=1.6, method="interleaved", energy_ratio=1.7
    ),
    "coverage": Given({"mode": "w8a8"}),
    "kernels": parts.Kernels(
        device_time_s=0.3,
        int8_time_share=0.6,
        attention_kernel="cudnn",
        longest=[Kernel("gemm", 0.2, 5)],
        trace="traces/it.json",
        breakdown=Given({"rest": 0.1}),
    ),
    "bound": parts.UpperBound(speedup=2.0, reached=0.5, sources=Given({"product_ratio": 3.0})),
    "remark": "slow",
}
EXPECTED = {
    "nodeid": "test_it.py::test_it",
    "workload": "toy",
    "run_name": PARAMS.run_name,
    "params": PARAMS.to_dict(),
    "status": "ok",
    "reason": "slow",
    "requested_bytes": None,
    "samples_per_s": 16.0,
    "tokens_per_s": 32.0,
    "pixels_per_s": 64.0,
    "square_km_per_s": 8.0,
    "batch_time_s": 0.5,
    "batch_time_mean_s": 0.6,
    "batch_time_p95_s": 0.9,
    "batch_time_min_s": 0.4,
    "batch_time_standard_error": 0.01,
    "rounds": 7,
    "iterations": 3,
    "synchronization_share": 0.001,
    "peak_memory_bytes": 11,
    "compile_s": 1.5,
    "compile_cache": "cold",
    "warm_up_s": 2.5,
    "steady": True,
    "cuda_graphs_skipped": False,
    "regions": 2,
    "regions_refused": "because",
    "feed_workers": 4,
    "feed_copy_s": 0.1,
    "feed_exposed_s": 0.2,
    "feed_exposed_low_s": 0.15,
    "feed_exposed_high_s": 0.25,
    "feed_wait_s": 0.125,
    "speedup": 1.5,
    "speedup_low": 1.4,
    "speedup_high": 1.6,
    "speedup_method": "interleaved",
    "int8_backend": "fused",
    "device_time_s": 0.3,
    "int8_time_share": 0.6,
    "attention_backend": "flash",
    "attention_kernel": "cudnn",
    "kernels": [{"name": "gemm", "seconds": 0.2, "calls": 5}],
    "trace": "traces/it.json",
    "device_breakdown": {"rest": 0.1},
    "ceiling_speedup": 2.0,
    "ceiling_reached": 0.5,
    "ceiling": {"product_ratio": 3.0},
    "coverage": {"mode": "w8a8"},
    "gpu_before": ROUNDS.gpu_before,
    "gpu_after": None,
    "joules_per_sample": 5.0,
    "samples_per_joule": 0.2,
    "energy_ratio": 1.7,
    "throttled": ["power brake"],
    "worker": None,
}


def test_every_part_goes_into_its_fields() -> None:
    result = Result.from_parts(**FULL)
    saved = json.loads(json.dumps(dataclasses.asdict(result)))
    assert {name: saved[name] for name in EXPECTED} == EXPECTED
    # A new field must come from a part too.
    assert set(saved) - set(EXPECTED) == set()


@pytest.mark.parametrize(
    ("part", "fields"),
    [
        ("feeding", {name for name in EXPECTED if name.startswith("feed_")}),
        (
            "comparison",
            {"speedup", "speedup_low", "speedup_high", "speedup_method", "energy_ratio"},
        ),
        ("coverage", {"coverage", "int8_backend"}),
        (
            "kernels",
            {
                "device_time_s",
                "int8_time_share",
                "attention_kernel",
                "kernels",
                "trace",
                "device_breakdown",
            },
        ),
        ("bound", {"ceiling_speedup", "ceiling_reached", "ceiling"}),
        ("remark", {"reason"}),
    ],
)
def test_fields_of_a_skipped_stage_are_empty(part: str, fields: set[str]) -> None:
    result = Result.from_parts(**{**FULL, part: None}).to_dict()
    full = Result.from_parts(**FULL).to_dict()
    assert {name for name in full if result[name] != full[name]} == fields
    assert not any(result[name] for name in fields)


def test_the_cost_of_feeding_may_be_unknown() -> None:
    result = Result.from_parts(**BARE, feeding=parts.Feeding(None, 0.5))
    assert (result.feed_workers, result.feed_wait_s) == (None, 0.5)
    assert result.feed_copy_s is result.feed_exposed_s is None


def test_an_upper_bound_may_be_unknown() -> None:
    bound = parts.UpperBound(sources=Given({"problem": "no rate"}))
    result = Result.from_parts(**BARE, bound=bound)
    assert (result.ceiling_speedup, result.ceiling) == (None, {"problem": "no rate"})


def test_no_energy_without_a_counter() -> None:
    rounds = dataclasses.replace(ROUNDS, joules_per_batch=None)
    result = Result.from_parts(**{**BARE, "rounds": rounds})
    assert result.joules_per_sample is result.samples_per_joule is result.energy_ratio is None


@pytest.mark.parametrize(("method", "is_interleaved"), [("interleaved", True), ("separate", False)])
def test_the_method_says_how_it_was_compared(method: str, is_interleaved: bool) -> None:
    assert parts.Comparison(speedup=2.0, method=method).is_interleaved is is_interleaved
