"""Test measuring points: the fields of a result, and running out of memory."""

from __future__ import annotations

import json
import re
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity
from torch.utils._python_dispatch import TorchDispatchMode
from torchao.quantization import (
    FqnToConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
)

from pytest_int8bench.errors import QuantizationError
from pytest_int8bench.measure import device_time
from pytest_int8bench.measure import steps as measure_steps
from pytest_int8bench.measure.device_rates import Head, RateError, Rates
from pytest_int8bench.measure.energy import EnergyCounter, Step
from pytest_int8bench.measure.evidence import Evidence, EvidenceError, Kernel
from pytest_int8bench.measure.linear_calls import Size
from pytest_int8bench.measure.model import Model
from pytest_int8bench.measure.point import OutputError, Throughput
from pytest_int8bench.measure.pool import ModelPool
from pytest_int8bench.measure.speedup import Speedup
from pytest_int8bench.measure.timing import Plan, Run, Timer
from pytest_int8bench.params import RunParams
from pytest_int8bench.quantization.api import apply_int8_quant
from pytest_int8bench.results.records import Result
from pytest_int8bench.workloads import Workload
from toys import attending, layers
from toys.models import Mlp, make_workload, time_rounds

BF16 = RunParams(
    gpu_type="cpu", compile_mode="off", batch_size=32, model_size="nano", benchmark_interval_s=0.05
)
W8A8 = BF16.replace(int8_enabled=True)
W8 = BF16.replace(int8_enabled=True, int8_mode="w8")
ASKED = "CUDA out of memory. Tried to allocate 2.00 GiB"


@pytest.fixture(autouse=True)
def _no_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Load host-fed batches in this process on every machine."""
    monkeypatch.setattr("pytest_int8bench.measure.host_feed._cpus", lambda: 1)


@pytest.fixture
def throughput() -> Throughput:
    return Throughput(ModelPool())


def measure(throughput: Throughput, workload: Workload, params: RunParams) -> Result:
    return throughput.measure(workload, params, time_rounds, nodeid="test_it.py::test_it")


# -- fields of a result -------------------------------------------------------------------------


def test_a_baseline_has_every_figure_but_a_speedup(throughput: Throughput) -> None:
    workload = make_workload(
        units=lambda p: {"samples": 32, "tokens": 320, "pixels": 640, "square_km": 0.5}
    )
    result = measure(throughput, workload, BF16)

    assert (result.status, result.reason, result.oom) == ("ok", None, False)
    assert (result.nodeid, result.workload) == ("test_it.py::test_it", "toy")
    assert (result.run_name, result.params) == (BF16.run_name, BF16.to_dict())
    assert result.samples_per_s == pytest.approx(32 / result.batch_time_s)
    assert result.tokens_per_s == pytest.approx(10 * result.samples_per_s)
    assert result.pixels_per_s == pytest.approx(20 * result.samples_per_s)
    assert result.square_km_per_s == pytest.approx(result.samples_per_s / 64)
    assert result.batch_time_min_s <= result.batch_time_mean_s
    assert result.trace is None
    assert 0 < result.batch_time_min_s <= result.batch_time_s <= result.batch_time_p95_s
    assert result.batch_time_standard_error >= 0
    assert result.rounds >= 5
    assert result.rounds * result.iterations >= BF16.min_batches_per_interval
    assert result.warm_up_s > 0
    assert result.steady in (True, False)
    assert "aten::addmm" in [kernel["name"] for kernel in result.kernels]
    assert set(result.kernels[0]) == {"name", "seconds", "calls"}
    assert result.int8_time_share == 0
    assert (result.speedup, result.speedup_method, result.coverage) == (None, None, None)
    assert (result.int8_backend, result.attention_kernel) == (None, None)
    # Nothing to compile, and memory is not measured on a CPU.
    assert (result.compile_s, result.compile_cache, result.peak_memory_bytes) == (None, None, None)
    assert result.attention_backend == "flash"


@pytest.mark.parametrize("params", [W8A8, W8], ids=["w8a8", "w8"])
def test_candidate_has_a_speedup(throughput: Throughput, params: RunParams) -> None:
    result = measure(throughput, make_workload(), params)
    assert result.status == "ok"
    assert 0 < result.speedup_low <= result.speedup <= result.speedup_high
    assert result.speedup_method == "interleaved"
    assert result.int8_backend == "torchao"
    assert result.coverage["mode"] == params.int8_mode
    assert result.coverage["converted_layers"] == 2
    assert (result.int8_time_share > 0) is (params is W8A8)
    assert (result.tokens_per_s, result.pixels_per_s) == (None, None)
    assert Result.from_dict(result.to_dict()) == result


@pytest.mark.parametrize("params", [BF16, W8A8], ids=["bf16", "w8a8"])
def test_feeding_from_the_host_is_measured(throughput: Throughput, params: RunParams) -> None:
    result = measure(throughput, make_workload(), params.replace(feed="host"))
    assert (result.status, result.reason) == ("ok", None)
    assert result.feed_workers == 0
    assert result.feed_copy_s > 0
    assert result.feed_wait_s > 0
    assert abs(result.feed_exposed_s) < 1
    assert result.feed_exposed_low_s <= result.feed_exposed_s <= result.feed_exposed_high_s
    assert (result.speedup is not None) is params.int8_enabled
    assert Result.from_dict(result.to_dict()) == result


def test_resident_inputs_have_no_feed_figures(throughput: Throughput) -> None:
    result = measure(throughput, make_workload(), BF16)
    assert result.feed_workers is result.feed_copy_s is result.feed_wait_s is None
    assert result.feed_exposed_s is result.feed_exposed_low_s is result.feed_exposed_high_s is None


def test_loader_wait_of_rounds(throughput: Throughput, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this simulated feed, a batch takes 3 s from the host (every fifth one 5 s), 2 s on the
    device, and a copy takes 0.5 s."""
    now = 0.0

    class Feed:
        batches, wait_s, workers, nbytes, current = 0, 0.0, 3, 0, ()

        def copy_again(self) -> None:
            nonlocal now
            now += 0.5

    feed = Feed()

    def run() -> torch.Tensor:
        nonlocal now
        now += 5.0 if feed.batches % 5 == 4 else 3.0
        feed.batches += 1
        feed.wait_s += 0.25
        return torch.zeros(1)

    def run_again() -> torch.Tensor:
        nonlocal now
        now += 2.0
        return torch.zeros(1)

    def rounds(run: Run, plan: Plan) -> list[float]:
        feed.wait_s += 10  # only in the rounds
        for _ in range(5):
            run()
        return [3.0]

    model = throughput._pool.get(make_workload(), BF16)
    model.ready()
    model.feed = feed  # type: ignore[assignment]
    monkeypatch.setattr(model, "run", run)
    monkeypatch.setattr(model, "run_again", run_again)
    simulated = Throughput(throughput._pool, with_evidence=True, timer=lambda: now)
    monkeypatch.setattr("pytest_int8bench.measure.point.kernels_of", lambda model, keep: None)
    result = simulated.measure(make_workload(), BF16, rounds, nodeid="a")
    assert result.feed_workers == 3
    assert result.feed_wait_s == pytest.approx((10 + 5 * 0.25) / 5)
    assert result.feed_copy_s == pytest.approx(0.5)
    assert result.feed_exposed_s == pytest.approx(1.0)
    assert result.feed_exposed_low_s == pytest.approx(1.0)
    assert result.feed_exposed_high_s == pytest.approx(3.0)
    # Without evidence, only the rounds run.
    lean = Throughput(throughput._pool, with_evidence=False, timer=lambda: now)
    result = lean.measure(make_workload(), BF16, rounds, nodeid="a")
    assert result.feed_wait_s == pytest.approx((10 + 5 * 0.25) / 5)
    assert (result.feed_copy_s, result.feed_exposed_s) == (None, None)


def test_batch_time_is_the_median_of_the_rounds(throughput: Throughput) -> None:
    planned: list[Plan] = []

    def told(run: Run, plan: Plan) -> list[float]:
        planned.append(plan)
        run()
        return [0.5, 0.25, 4.0]

    result = throughput.measure(make_workload(), BF16, told, nodeid="a")
    assert result.batch_time_s == 0.5
    assert result.samples_per_s == 64
    assert (result.rounds, result.iterations) == (3, planned[0].iterations)


def test_tokens_are_counted_from_the_output(throughput: Throughput) -> None:
    workload = make_workload(tokens=lambda output: 5 * output.shape[0])
    result = measure(throughput, workload, BF16)
    assert result.tokens_per_s == pytest.approx(5 * result.samples_per_s)


def test_without_baselines_there_is_no_speedup() -> None:
    built = []

    class Counted(Mlp):
        def __init__(self) -> None:
            super().__init__()
            built.append(self)

    throughput = Throughput(ModelPool(), with_baseline=False)
    workload = make_workload(Counted)
    result = measure(throughput, workload, W8A8)
    assert (result.status, result.speedup, result.speedup_method) == ("ok", None, None)
    assert len(built) == 1
    measure(throughput, workload, BF16)
    assert measure(throughput, workload, W8A8).speedup is None


# -- energy -------------------------------------------------------------------------------------


class Counter(EnergyCounter):
    """Report 200 W for any work and a ratio of 1.5, and record the requests."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def next_step(self) -> Step | None:
        self.asked.append("start")
        return Step(10.0, 1.0)

    def watts(self, start: Step | None, end_s: float) -> float | None:
        assert start == Step(10.0, 1.0)
        self.asked.append("end")
        return 200.0

    def ratio(
        self,
        first: Run,
        second: Run,
        timer: Timer,
        *,
        batch_s: tuple[float, float],
        interval_s: float,
    ) -> float | None:
        self.asked.append((batch_s, interval_s))
        first()
        second()
        return 1.5


@pytest.mark.parametrize("feed", ["device", "host"])
def test_energy_per_sample_covers_the_timed_rounds(feed: str) -> None:
    counter = Counter()
    throughput = Throughput(ModelPool(), energy_counter=lambda device: counter)
    told: list[Any] = []

    def rounds(run: Run, plan: Plan) -> list[float]:
        told.append(list(counter.asked))
        run()
        return [0.5, 0.25, 4.5]

    params = BF16.replace(feed=feed)
    result = throughput.measure(make_workload(), params, rounds, nodeid="a")
    # 200 W for the mean of 1.75 s, over 32 samples.
    assert result.joules_per_sample == pytest.approx(200 * 1.75 / 32)
    assert result.samples_per_joule == pytest.approx(32 / (200 * 1.75))
    assert result.energy_ratio is None
    assert told == [["start"]]
    assert counter.asked == ["start", "end"]
    assert Result.from_dict(json.loads(json.dumps(result.to_dict()))) == result


def test_energy_of_both_is_compared_after_the_speedup(monkeypatch: pytest.MonkeyPatch) -> None:
    counter = Counter()
    throughput = Throughput(ModelPool(), energy_counter=lambda device: counter)
    monkeypatch.setattr(
        measure_steps, "measure_speedup", lambda *args, **kwargs: Speedup(1.25, 1.2, 1.3, 6)
    )
    result = throughput.measure(make_workload(), W8A8, lambda run, plan: [0.5] * 5, nodeid="a")
    assert (result.speedup, result.energy_ratio) == (1.25, 1.5)
    assert counter.asked == ["start", "end", ((0.625, 0.5), W8A8.benchmark_interval_s)]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError(ASKED), RuntimeError("recompiled")])
def test_an_error_in_the_energy_keeps_the_speedup(error: Exception) -> None:
    class Failing(Counter):
        def ratio(self, *args: Any, **kwargs: Any) -> float | None:
            raise error

    throughput = Throughput(ModelPool(), energy_counter=lambda device: Failing())
    result = measure(throughput, make_workload(), W8A8)
    assert (result.status, result.reason, result.speedup_method) == ("ok", None, "interleaved")
    assert (result.energy_ratio, result.joules_per_sample is not None) == (None, True)


def test_a_cpu_has_no_energy(throughput: Throughput) -> None:
    result = measure(throughput, make_workload(), W8A8)
    assert result.joules_per_sample is result.samples_per_joule is result.energy_ratio is None


# -- out of memory ------------------------------------------------------------------------------


class CandidateRunsOut(Mlp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.quantized:
            raise torch.OutOfMemoryError(ASKED)
        return super().forward(x)


class BaselineRunsOut(Mlp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.quantized:
            raise torch.OutOfMemoryError(ASKED)
        return super().forward(x)


def two_do_not_fit() -> type[Mlp]:
    """Return a model class that runs out of memory if two models that ran are alive."""
    alive: weakref.WeakSet[Mlp] = weakref.WeakSet()

    class OneFits(Mlp):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            alive.add(self)
            if len(alive) > 1:
                raise torch.OutOfMemoryError(ASKED)
            return super().forward(x)

    return OneFits


def check_oom(result: Result, params: RunParams) -> None:
    assert (result.status, result.oom) == ("oom", True)
    assert result.reason == "out of memory: tried to allocate 2.00 GiB"
    assert result.requested_bytes == 2 * 2**30
    assert (result.run_name, result.params) == (params.run_name, params.to_dict())
    assert (result.samples_per_s, result.batch_time_s, result.speedup) == (None, None, None)


def test_a_candidate_that_runs_out_of_memory_is_a_result(throughput: Throughput) -> None:
    workload = make_workload(CandidateRunsOut)
    assert measure(throughput, workload, BF16).status == "ok"
    check_oom(measure(throughput, workload, W8A8), W8A8)
    assert measure(throughput, workload, BF16).status == "ok"
    assert measure(throughput, make_workload(name="other"), W8A8).speedup > 0


def test_a_baseline_that_runs_out_of_memory_is_a_result(throughput: Throughput) -> None:
    workload = make_workload(BaselineRunsOut)
    check_oom(measure(throughput, workload, BF16), BF16)
    result = measure(throughput, workload, W8A8)
    assert (result.status, result.reason) == ("ok", "the baseline ran out of memory")
    assert result.samples_per_s > 0
    assert (result.speedup, result.speedup_method) == (None, None)


def test_untested_baseline_runs_out_of_memory(throughput: Throughput) -> None:
    result = measure(throughput, make_workload(BaselineRunsOut), W8A8)
    assert (result.status, result.reason) == ("ok", "the baseline ran out of memory")
    assert result.speedup is None


def test_measures_separately_if_both_do_not_fit(throughput: Throughput) -> None:
    workload = make_workload(two_do_not_fit())
    baseline = measure(throughput, workload, BF16)
    result = measure(throughput, workload, W8A8)
    assert (baseline.status, result.status) == ("ok", "ok")
    assert result.reason == "baseline and candidate do not fit in memory together"
    assert result.speedup == pytest.approx(baseline.batch_time_s / result.batch_time_s)
    assert result.speedup_method == "separate"
    assert (result.speedup_low, result.speedup_high) == (None, None)


def test_next_candidate_is_measured_separately(throughput: Throughput) -> None:
    workload = make_workload(two_do_not_fit())
    measure(throughput, workload, BF16)
    measure(throughput, workload, W8A8)
    result = measure(throughput, workload, W8)
    assert result.status == "ok"
    # The baseline fits, but not together with the previous candidate.
    assert result.reason == "baseline and candidate do not fit in memory together"
    assert result.speedup_method == "separate"


def test_separate_speedup_needs_baseline_time(throughput: Throughput) -> None:
    result = measure(throughput, make_workload(two_do_not_fit()), W8A8)
    assert result.reason == "baseline and candidate do not fit in memory together"
    assert (result.status, result.speedup) == ("ok", None)


def test_running_out_of_memory_while_the_clock_runs_is_a_result(throughput: Throughput) -> None:
    def fail(run: Run, plan: Plan) -> list[float]:
        raise torch.OutOfMemoryError(ASKED)

    result = throughput.measure(make_workload(), BF16, fail, nodeid="a")
    check_oom(result, BF16)


# -- errors -------------------------------------------------------------------------------------


def test_other_errors_are_raised_and_the_next_point_works(throughput: Throughput) -> None:
    class Fails(Mlp):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.quantized:
                raise KeyError("mine")
            return super().forward(x)

    workload = make_workload(Fails)
    with pytest.raises(KeyError, match="mine"):
        measure(throughput, workload, W8A8)
    assert measure(throughput, workload, BF16).status == "ok"


def test_rejects_outputs_of_another_dtype(throughput: Throughput) -> None:
    class Widens(Mlp):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            output = super().forward(x)
            return output.float() if self.quantized else output

    message = (
        f"{W8A8.run_name}: outputs of baseline and candidate differ in shape or dtype: "
        "(((32, 32), torch.bfloat16),) against (((32, 32), torch.float32),)"
    )
    with pytest.raises(OutputError, match=f"^{re.escape(message)}$"):
        measure(throughput, make_workload(Widens), W8A8)


def test_rejects_non_finite_candidate(throughput: Throughput) -> None:
    class Overflows(Mlp):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * (float("nan") if self.quantized else 1)

    message = f"{W8A8.run_name}: the candidate's output holds NaN or infinity"
    with pytest.raises(OutputError, match=f"^{re.escape(message)}$"):
        measure(throughput, make_workload(Overflows), W8A8)


class Divides(Mlp):
    """Return NaN in the last row, with any weights."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return torch.cat([y[:-1], y[-1:] * float("nan")])


class Masks(Mlp):
    """Return minus infinity, as for masked classes, and NaN with INT8 weights."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        y[:, 0] = float("nan") if self.quantized else -float("inf")
        return y


def test_reports_nan_in_the_baseline(throughput: Throughput) -> None:
    workload = make_workload(Divides)
    assert measure(throughput, workload, BF16).reason == "the model's output holds NaN"
    candidate = measure(Throughput(ModelPool()), workload, W8A8)
    assert candidate.status == "ok"
    assert candidate.reason == "the outputs of baseline and candidate hold NaN"


class LosesNan(Mlp):
    """Return NaN, except with INT8 weights."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return y if self.quantized else y * float("nan")


def test_reports_nan_lost_by_quantization(throughput: Throughput) -> None:
    result = measure(throughput, make_workload(LosesNan), W8A8)
    assert result.reason == "the baseline's output holds NaN, and the candidate's does not"


def test_rejects_nan_where_the_baseline_has_infinity(throughput: Throughput) -> None:
    assert measure(throughput, make_workload(Masks), BF16).reason is None
    with pytest.raises(OutputError, match=r"the candidate's output holds NaN or infinity$"):
        measure(throughput, make_workload(Masks), W8A8)


class CountsOperators(TorchDispatchMode):
    """Intercept every operator."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Watcher(TorchFunctionMode):
    """Intercept every function."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("watching", "name"),
    [
        (CountsOperators, "CountsOperators"),
        (Watcher, "Watcher"),
        (lambda: torch.profiler.profile(activities=[ProfilerActivity.CPU]), "torch.profiler"),
    ],
)
def test_reports_profilers_active_during_timing(
    throughput: Throughput, watching: Any, name: str
) -> None:
    with watching():
        result = measure(throughput, make_workload(), BF16)
    assert result.reason == f"timed with {name} active; times include the overhead"
    with torch.device("cpu"):  # what torch.set_default_device enters
        assert measure(throughput, make_workload(), BF16).reason is None


def test_disables_tracers_during_timing(throughput: Throughput) -> None:
    class Looks(Mlp):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            tracers.append(sys.gettrace())
            return super().forward(x)

    def trace(frame: Any, event: str, argument: Any) -> None:
        return None

    tracers: list[Any] = []
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        result = measure(throughput, make_workload(Looks), W8A8)
        assert sys.gettrace() is trace
    finally:
        sys.settrace(before)
    assert (result.status, result.reason) == ("ok", None)
    # Only a few calls are not timed: the proof of the candidate, each model's first call, the check
    # that it is still compiled, evidence, and the check of the outputs.
    assert tracers.count(trace) <= 16
    assert tracers.count(None) > 50


def test_rejects_label_that_the_kernels_contradict(throughput: Throughput) -> None:
    class Skips(Mlp):
        """Have INT8 weights but compute without them."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    with pytest.raises(EvidenceError, match=r" is labelled W8A8, but no INT8 matmul ran; "):
        measure(throughput, make_workload(Skips), W8A8)


@pytest.mark.parametrize("params", [W8A8, W8], ids=["w8a8", "w8"])
def test_names_unused_layers(throughput: Throughput, params: RunParams) -> None:
    workload = make_workload(layers.Uncalled, filter_fn=layers.is_linear)
    result = measure(throughput, workload, params)
    told = "the forward does not use 2 of 4 quantized layers: c, d"
    assert (result.status, result.reason) == ("ok", told)
    assert (result.coverage["converted_layers"], result.coverage.get("unused", [])) == (
        4,
        ["c", "d"],
    )


@pytest.mark.parametrize(
    "toy",
    [
        layers.FourLayers,
        layers.CallsTwice,
        layers.SharesWeight,
        layers.Checkpointed,
        layers.ChangesGradMode,
    ],
)
def test_accepts_layers_called_in_unusual_ways(
    throughput: Throughput, toy: type[nn.Module]
) -> None:
    result = measure(throughput, make_workload(toy, filter_fn=layers.is_linear), W8A8)
    assert (result.status, result.reason, result.coverage.get("unused", [])) == ("ok", None, [])


@pytest.mark.parametrize("toy", [layers.Multiplies, layers.MultipliesOnce])
def test_a_layer_that_runs_another_matmul_contradicts_the_label(
    throughput: Throughput, toy: type[nn.Module]
) -> None:
    workload = make_workload(toy, filter_fn=layers.is_linear)
    with pytest.raises(
        EvidenceError,
        match=r" is labelled W8A8, but 1 of 4 quantized layers ran matmuls that are not INT8: c ",
    ):
        measure(throughput, workload, W8A8)
    assert measure(throughput, workload, W8).status == "ok"


@pytest.mark.parametrize("params", [W8A8, W8], ids=["w8a8", "w8"])
def test_a_candidate_that_calls_another_models_layers_is_an_error(
    throughput: Throughput, params: RunParams
) -> None:
    original = layers.FourLayers()

    class CallsOriginal(layers.FourLayers):
        def second(self, x: torch.Tensor) -> torch.Tensor:
            quantized = type(self.a.weight) is not nn.Parameter
            return original.to(x.dtype).second(x) if quantized else super().second(x)

    workload = make_workload(CallsOriginal, filter_fn=layers.is_linear)
    problem = r" candidate's forward runs less of 2 layers than the baseline's: c, d; "
    with pytest.raises(EvidenceError, match=problem):
        measure(throughput, workload, params)


def test_layers_of_a_user_configuration_may_differ(throughput: Throughput) -> None:
    own = FqnToConfig(
        {"fc1": Int8DynamicActivationInt8WeightConfig(), "fc2": Int8WeightOnlyConfig()}
    )
    result = measure(throughput, make_workload(quant_config=own), W8A8)
    told = "1 of 2 quantized layers ran matmuls that are not INT8: fc2"
    assert (result.status, result.reason) == ("ok", told)


def test_reports_a_failed_eager_forward(
    throughput: Throughput, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(model: nn.Module, run: Run, graphs: object) -> None:
        raise torch.OutOfMemoryError(ASKED)

    monkeypatch.setattr("pytest_int8bench.measure.layers.layer_runs", fails)
    result = measure(throughput, make_workload(), W8A8)
    told = "not proven layer by layer: an eager forward ran out of memory"
    assert (result.status, result.reason) == ("ok", told)


def test_names_layers_outside_the_graphs(throughput: Throughput) -> None:
    workload = make_workload(layers.NotCompiled, filter_fn=layers.is_linear)
    params = BF16.replace(compile_mode="default", compile_fullgraph=False)
    told = "2 of 4 linear layers ran eagerly, outside the compiled graphs: c, d"
    assert measure(throughput, workload, params).reason == told


def test_reports_time_outside_the_graphs_without_layers(throughput: Throughput) -> None:
    params = BF16.replace(compile_mode="default", compile_fullgraph=False)
    workload = make_workload(layers.ConvolvesEagerly, filter_fn=layers.is_linear)
    told = r"\d+% of the kernels' time is spent outside the compiled graphs"
    assert re.fullmatch(told, measure(throughput, workload, params).reason)
    assert measure(throughput, workload, BF16).reason is None


def test_names_layers_dropped_by_the_compiler(throughput: Throughput) -> None:
    workload = make_workload(layers.Discarded, filter_fn=layers.is_linear)
    result = measure(throughput, workload, W8A8.replace(compile_mode="default"))
    assert result.coverage.get("unused", []) == ["c", "d"]
    assert "the forward does not use 2 of 4 quantized layers: c, d" in result.reason


def test_survives_dynamo_reset_before_each_measurement(throughput: Throughput) -> None:
    params = BF16.replace(compile_mode="default")
    for point in (params, params, params.replace(int8_enabled=True)):
        torch._dynamo.reset()
        assert measure(throughput, make_workload(), point).status == "ok"


def test_does_not_profile_without_evidence(monkeypatch: pytest.MonkeyPatch) -> None:
    def look(model: Model, keep: object = None) -> None:
        raise AssertionError("the kernels were looked at")

    monkeypatch.setattr(Model, "evidence", look)
    result = measure(
        Throughput(ModelPool(), with_baseline=False, with_evidence=False), make_workload(), W8A8
    )
    assert (result.status, result.int8_time_share, result.kernels) == ("ok", None, [])
    assert result.coverage is not None
    with pytest.raises(AssertionError, match="looked at"):
        measure(Throughput(ModelPool(), with_baseline=False), make_workload(), W8A8)


@pytest.mark.parametrize(
    ("units", "got"),
    [({"samples": 1, "frames": 2}, "samples, frames"), ({"tokens": 1}, "tokens"), ({}, "nothing")],
)
def test_units_must_be_known(throughput: Throughput, units: dict[str, float], got: str) -> None:
    message = (
        "workload 'toy': units must include samples and may include tokens, pixels, square_km; "
        f"got {got}"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        measure(throughput, make_workload(units=lambda p: units), BF16)


def test_units_may_be_tensors_and_come_out_as_numbers(throughput: Throughput) -> None:
    workload = make_workload(units=lambda p: {"samples": torch.tensor(p.batch_size)})
    result = measure(throughput, workload, BF16)
    assert type(result.samples_per_s) is float
    json.dumps(result.to_dict())


@pytest.mark.parametrize("count", [0, -1, float("inf"), float("nan")])
def test_units_must_be_above_zero(throughput: Throughput, count: float) -> None:
    workload = make_workload(units=lambda p: {"samples": count})
    message = f"workload 'toy': samples must be a number above 0, got {count!r}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        measure(throughput, workload, BF16)


def test_a_quantized_baseline_gives_no_speedup(throughput: Throughput) -> None:
    """The baseline's labels are checked even if no test measures it."""

    def build(p: RunParams) -> nn.Module:
        return Mlp() if p.int8_enabled else apply_int8_quant(Mlp().eval(), mode="w8")

    throughput_apart = Throughput(ModelPool())
    with pytest.raises((EvidenceError, QuantizationError)):
        measure(throughput_apart, make_workload(build=build), BF16.replace(int8_enabled=True))


def test_out_of_memory_in_speedup(throughput: Throughput, monkeypatch: pytest.MonkeyPatch) -> None:
    workload = make_workload()
    baseline = measure(throughput, workload, BF16)

    def full(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")

    monkeypatch.setattr("pytest_int8bench.measure.steps.measure_speedup", full)
    result = measure(throughput, workload, BF16.replace(int8_enabled=True))
    assert result.status == "ok"
    assert result.speedup_method == "separate"
    assert result.reason == "baseline and candidate do not fit in memory together"
    assert result.speedup is not None
    assert result.samples_per_s is not None
    assert baseline.samples_per_s is not None
    assert result.speedup == pytest.approx(result.samples_per_s / baseline.samples_per_s)


@pytest.mark.parametrize(("factor", "told"), [(1.0, False), (1.04, False), (1.2, True)])
def test_reports_machine_drift_between_tests(
    throughput: Throughput, monkeypatch: pytest.MonkeyPatch, factor: float, told: bool
) -> None:
    workload = make_workload()
    throughput.measure(workload, BF16, lambda run, plan: [1.0] * 5, nodeid="a")
    monkeypatch.setattr(
        "pytest_int8bench.measure.steps.measure_speedup",
        lambda *args, **kwargs: Speedup(0.5, 0.49, 0.51, 6),
    )
    result = throughput.measure(
        workload, BF16.replace(int8_enabled=True), lambda run, plan: [2.0 / factor] * 5, nodeid="b"
    )
    assert result.speedup == 0.5
    assert result.reason == (
        "the machine's speed changed between the two tests: the speedup was measured in "
        "alternation; the separate rates would give 0.60x"
        if told
        else None
    )


# -- the ceiling --------------------------------------------------------------------------------

PRODUCT, INT8, ATTENTION = "nvjet_tst_TNN", "triton_tem_fused__int_mm_1", "flash_fwd_kernel"
PROFILES = {  # 6 s of matmuls, 3 s of attention and 1 s of everything else
    False: Evidence((Kernel(PRODUCT, 6.0, 2), Kernel(ATTENTION, 3.0, 1), Kernel("add", 1.0, 10))),
    True: Evidence((Kernel(INT8, 3.0, 2), Kernel(ATTENTION, 3.0, 1), Kernel("add", 2.0, 20))),
}


def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate GPU kernels, INT8 matmuls twice as fast, and a speedup of 1.25."""

    def measure_rates(
        sizes: set[Size],
        device: torch.device,
        dtype: torch.dtype,
        timer: Timer,
        *,
        with_int8: bool,
        heads: set[Head],
    ) -> Rates:
        assert sizes in ({Size(32, 64), Size(64, 32)}, {Size(32, 32)})
        assert dtype == torch.bfloat16
        int8 = dict.fromkeys(sizes, 2e12) if with_int8 else {}
        return Rates(dict.fromkeys(sizes, 1e12), int8, 1e30, dict.fromkeys(heads, 1e6))

    monkeypatch.setattr(device_time, "WITH_KERNELS", ("cpu",))
    monkeypatch.setattr(device_time, "measure_rates", measure_rates)
    monkeypatch.setattr(
        Model, "evidence", lambda self, keep=None: PROFILES[self.params.int8_enabled]
    )
    monkeypatch.setattr(
        measure_steps, "measure_speedup", lambda *args, **kwargs: Speedup(1.25, 1.2, 1.3, 6)
    )


def test_a_candidate_has_a_ceiling(throughput: Throughput, monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_gpu(monkeypatch)
    result = measure(throughput, make_workload(), W8A8)
    assert result.device_breakdown == {
        "int8_products": 3.0,
        "other_products": 0.0,
        "attention": 3.0,
        "rest": 2.0,
    }
    # Of the rest, two passes of 0.1 s, the shortest kernel, remain.
    assert result.ceiling_speedup == pytest.approx(10 / (3 + 3 + 0.2))
    assert result.ceiling_reached == pytest.approx(0.25 / (10 / 6.2 - 1))
    assert result.ceiling == {
        "baseline": {"int8_products": 0.0, "other_products": 6.0, "attention": 3.0, "rest": 1.0},
        "products_speedup": pytest.approx(10 / 7),
        "product_ratio": pytest.approx(2.0),
        "quantized_share": 1.0,
        "float_ops_per_s": pytest.approx(1e12),
        "int8_ops_per_s": pytest.approx(2e12),
        "bytes_per_s": 1e30,
    }
    assert Result.from_dict(json.loads(json.dumps(result.to_dict()))) == result


@pytest.mark.parametrize(
    ("kind", "share"), [(attending.Attends, 1.0), (attending.Twice, 0.4)], ids=["all", "some"]
)
@pytest.mark.parametrize("mode", ["w8a8", "w8"])
def test_the_ceiling_knows_int8_attention(
    throughput: Throughput,
    monkeypatch: pytest.MonkeyPatch,
    kind: type[nn.Module],
    share: float,
    mode: str,
) -> None:
    on_a_gpu(monkeypatch)
    # A call with a mask takes 1.5 times as long as one without.
    monkeypatch.setattr(
        device_time, "seconds_of", lambda backend, call, timer: 1.0 if call.mask is None else 1.5
    )
    params = W8A8.replace(int8_mode=mode, int8_attention=True)
    result = measure(throughput, attending.workload_of(kind), params)
    least_s = 4 * 32 * 4 * 4 * 32 / 1e6  # 32 samples of 4 tokens and a head of 32 columns
    assert result.ceiling["attention"] == {
        "share": pytest.approx(share),
        "ratio": pytest.approx(3 * share / least_s),
        "ops_per_s": pytest.approx(1e6),
    }
    # Half of 6 s of matmuls remains, and two passes of 0.1 s of the 1 s of everything else; W8
    # keeps all matmuls and quantizes only queries and keys.
    other_s = 3 + 0.2 if mode == "w8a8" else 6
    assert result.ceiling_speedup == pytest.approx(10 / (other_s + 3 * (1 - share) + least_s))
    assert Result.from_dict(json.loads(json.dumps(result.to_dict()))) == result


def test_w8_ceiling_at_many_rows(throughput: Throughput, monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_gpu(monkeypatch)
    result = measure(throughput, make_workload(), W8)
    assert (result.ceiling_speedup, result.ceiling_reached) == (1.0, None)
    assert result.ceiling["int8_ops_per_s"] is None


def test_bf16_layers_in_ceiling(throughput: Throughput, monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_gpu(monkeypatch)
    monkeypatch.setattr(
        device_time,
        "measure_rates",
        lambda sizes, *args, **kwargs: Rates(
            dict.fromkeys(sizes, 1e12), dict.fromkeys(sizes, 2e12), 1e30
        ),
    )
    workload = make_workload(filter_fn=lambda module, name: name == "fc1")
    result = measure(throughput, workload, W8A8)
    assert result.ceiling["quantized_share"] == pytest.approx(0.5)
    assert result.ceiling["products_speedup"] == pytest.approx(10 / 8.5)


def test_baseline_breakdown_only(throughput: Throughput, monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_gpu(monkeypatch)
    result = measure(throughput, make_workload(), BF16)
    assert result.device_breakdown["other_products"] == 6.0
    assert (result.ceiling, result.ceiling_speedup, result.ceiling_reached) == (None, None, None)


@pytest.mark.parametrize(
    ("error", "problem"),
    [
        (RateError("no INT8 product takes 3x5"), "no INT8 product takes 3x5"),
        (torch.OutOfMemoryError(f"{ASKED}\nmore"), f"OutOfMemoryError: {ASKED}"),
        (KeyError("mine"), "KeyError: 'mine'"),
    ],
    ids=["rate", "oom", "other"],
)
def test_unknown_ceiling_does_not_lose_the_measurement(
    throughput: Throughput, monkeypatch: pytest.MonkeyPatch, error: Exception, problem: str
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    on_a_gpu(monkeypatch)
    monkeypatch.setattr(device_time, "measure_rates", fail)
    result = measure(throughput, make_workload(), W8A8)
    assert (result.status, result.speedup, result.reason) == ("ok", 1.25, None)
    assert (result.ceiling_speedup, result.ceiling_reached) == (None, None)
    assert result.ceiling == {"problem": problem}
    assert result.device_breakdown is not None


def test_a_cpu_has_neither_breakdown_nor_ceiling(throughput: Throughput) -> None:
    result = measure(throughput, make_workload(), W8A8)
    assert (result.device_breakdown, result.ceiling, result.ceiling_speedup) == (None, None, None)


@pytest.mark.parametrize(
    "changes", [{"with_baseline": False}, {"with_evidence": False}], ids=["alone", "lean"]
)
def test_ceiling_needs_baseline_and_evidence(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, bool]
) -> None:
    on_a_gpu(monkeypatch)
    result = measure(Throughput(ModelPool(), **changes), make_workload(), W8A8)
    assert (result.status, result.ceiling, result.ceiling_speedup) == ("ok", None, None)


# -- steps --------------------------------------------------------------------------------------


class Steps:
    """Record the steps that are entered and left."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []
        self.now: list[tuple[str, str]] = []

    @contextmanager
    def __call__(self, action: str, name: str) -> Iterator[None]:
        self.now.append((action, name))
        try:
            yield
        finally:
            self.seen.append(self.now.pop())

    def take(self) -> list[tuple[str, str]]:
        """Return the steps since the last call."""
        assert self.now == []
        taken, self.seen = self.seen, []
        return taken


def test_reports_only_steps_that_run() -> None:
    steps = Steps()
    throughput = Throughput(ModelPool(), step=steps)
    workload = make_workload()
    baseline, candidate, other = (f"toy: {p.run_name}" for p in (BF16, W8A8, W8))

    measure(throughput, workload, W8A8)
    assert steps.take() == [
        ("building", baseline),
        ("warming up", baseline),
        ("building", candidate),
        ("warming up", candidate),
        ("measuring", candidate),
        ("comparing", candidate),
    ]
    measure(throughput, workload, BF16)
    assert steps.take() == [("measuring", baseline)]
    measure(throughput, workload, W8)
    assert steps.take() == [
        ("building", other),
        ("warming up", other),
        ("measuring", other),
        ("comparing", other),
    ]
    measure(throughput, workload, W8)
    assert steps.take() == [("measuring", other), ("comparing", other)]


def test_a_step_names_the_workload_unless_it_is_the_default_one() -> None:
    steps = Steps()
    measure(Throughput(ModelPool(), step=steps), make_workload(name="olmoearth"), BF16)
    assert {name for _, name in steps.take()} == {BF16.run_name}


@pytest.mark.parametrize(("called", "action"), [(False, "compiling"), (True, "warming up")])
def test_a_model_that_was_called_is_not_compiled_again(called: bool, action: str) -> None:
    pool, steps, workload = ModelPool(), Steps(), make_workload()
    params = BF16.replace(compile_mode="default")
    model = pool.get(workload, params)
    model.compiled._call = lambda x: model.eager(x)  # compiling costs ten seconds
    if called:
        model.compiled.first_call_s = 1.0

    measure(Throughput(pool, step=steps), workload, params)
    name = f"toy: {params.run_name}"
    assert steps.take() == [(action, name), ("measuring", name)]


def test_steps_are_active_during_their_action() -> None:
    steps = Steps()
    during: dict[str, list[tuple[str, str]]] = {}

    class Watched(Mlp):
        def __init__(self) -> None:
            super().__init__()
            during["build"] = list(steps.now)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            during.setdefault("forward", list(steps.now))
            return super().forward(x)

    def told(run: Run, plan: Plan) -> list[float]:
        during["rounds"] = list(steps.now)
        return time_rounds(run, plan)

    Throughput(ModelPool(), step=steps).measure(make_workload(Watched), BF16, told, nodeid="a")
    name = f"toy: {BF16.run_name}"
    assert during == {
        "build": [("building", name)],
        "forward": [("warming up", name)],
        "rounds": [("measuring", name)],
    }


def test_failed_step_is_exited() -> None:
    steps = Steps()
    throughput = Throughput(ModelPool(), step=steps)
    check_oom(measure(throughput, make_workload(CandidateRunsOut), W8A8), W8A8)
    # Once together with the baseline, and once alone.
    assert steps.take()[2:] == 2 * [
        ("building", f"toy: {W8A8.run_name}"),
        ("warming up", f"toy: {W8A8.run_name}"),
    ]
