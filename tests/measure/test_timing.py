"""Test warm-up, plan, timing, speedup and out of memory on a simulated clock."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pytest_int8bench.measure.memory import allocated_bytes, oom_of, peak_memory, requested_bytes
from pytest_int8bench.measure.speedup import MAX_PAIRS, MIN_PAIRS, alternate, measure_speedup
from pytest_int8bench.measure.timing import (
    MAX_SYNC_SHARE,
    MIN_ROUNDS,
    STEADY_CHANGE,
    TARGET_STANDARD_ERROR,
    Run,
    iterations_for,
    pilot,
    plan,
    spread,
    summarize,
    synchronization_cost,
    time_block,
    time_once,
    time_singly,
    warm_up,
)


class FakeClock:
    """A clock that only batches and synchronizations advance."""

    def __init__(self, sync_s: float = 0.0) -> None:
        self.now = 0.0
        self.sync_s = sync_s
        self.readings = 0

    def timer(self) -> float:
        self.readings += 1
        self.now += self.sync_s
        return self.now

    def run(
        self, times: float | Iterable[float], log: list[str] | None = None, name: str = ""
    ) -> Run:
        """Return a batch that takes ``times`` seconds, one value per call."""
        values: Iterator[float] = (
            itertools.repeat(times) if isinstance(times, float) else iter(times)
        )

        def run() -> None:
            self.now += next(values)
            if log is not None:
                log.append(name)

        return run


def noisy(rng: np.random.Generator, mean_s: float, sigma: float) -> Iterator[float]:
    """Yield times with a normal relative error."""
    while True:
        yield from mean_s * (1 + sigma * rng.standard_normal(1000))


def cost_of(run: Run, timer: Callable[[], float]) -> tuple[float, float]:
    return synchronization_cost(run, timer, time_singly(run, timer))


# -- warm-up ----------------------------------------------------------------------------------


def test_times_batches() -> None:
    clock = FakeClock()
    assert time_once(clock.run(0.25), clock.timer) == 0.25
    assert time_block(clock.run([0.25, 0.5, 0.75, 0.5]), clock.timer, 4) == 0.5
    assert clock.readings == 4


def test_steady_times_end_the_warm_up_after_two_windows() -> None:
    clock = FakeClock()
    done = warm_up(clock.run(0.5), clock.timer, max_s=60)
    assert (done.calls, done.seconds, done.steady) == (6, 3.0, True)


def test_always_runs_two_windows() -> None:
    clock = FakeClock()
    done = warm_up(clock.run(100.0), clock.timer, max_s=1)
    assert (done.calls, done.seconds, done.steady) == (6, 600.0, True)


def test_waits_for_a_slow_start() -> None:
    clock = FakeClock()
    start = [0.75**n for n in range(20)]
    done = warm_up(clock.run([*start, *itertools.repeat(0.001, 50)]), clock.timer, max_s=60)
    assert done.steady
    assert done.calls > len(start) + 3
    assert done.seconds == pytest.approx(clock.now)


def test_an_outlier_does_not_make_times_unsteady() -> None:
    clock = FakeClock()
    done = warm_up(clock.run([0.01, 5.0, 0.01, 0.01, 0.01, 0.3]), clock.timer, max_s=60)
    assert (done.calls, done.steady) == (6, True)


@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_times_that_never_settle_are_unsteady(factor: float) -> None:
    clock = FakeClock()
    times = [0.1 * factor**n for n in range(400)]
    limit = 0.99 if factor < 1 else 10.0
    done = warm_up(clock.run(times), clock.timer, max_s=limit)
    assert not done.steady
    # The call that reaches the limit is the last one.
    assert done.seconds >= limit > done.seconds - times[done.calls - 1]


@pytest.mark.parametrize(("change", "steady"), [(0.9, True), (1.1, False)])
def test_times_are_steady_if_medians_change_little(change: float, steady: bool) -> None:
    for sign in (1, -1):
        clock = FakeClock()
        after = 1 + sign * change * STEADY_CHANGE
        times = [1.0, 1.0, 1.0, after, after, after]
        assert warm_up(clock.run(times), clock.timer, max_s=6 * 0.97).steady is steady


# -- iterations and synchronization -----------------------------------------------------------


@pytest.mark.parametrize("batch_s", [1e-6, 1e-3, 0.5])
def test_synchronization_cost(batch_s: float) -> None:
    clock = FakeClock(sync_s=2e-5)
    found = cost_of(clock.run(batch_s), clock.timer)
    assert found == pytest.approx((batch_s, 2e-5), rel=1e-3)


def test_stalls_do_not_make_rounds_too_long() -> None:
    """After two stalls of 30 ms and batches of 0.5 ms, rounds must stay within the interval."""
    clock = FakeClock()
    run = clock.run(itertools.chain([0.03, 0.03], itertools.repeat(5e-4)))
    batch_s, sync_s = cost_of(run, clock.timer)
    assert batch_s == pytest.approx(5e-4)
    assert sync_s == 0
    stalled = FakeClock()
    found = pilot(
        stalled.run(itertools.chain([0.03, 0.03], itertools.repeat(5e-4))),
        stalled.timer,
        interval_s=10,
        min_batches=10,
    )
    assert found.iterations * found.rounds * 5e-4 <= 10


@given(st.floats(1e-7, 100), st.floats(0, 1e-2))
def test_two_synchronizations_cost_at_most_a_thousandth(batch_s: float, sync_s: float) -> None:
    iterations = iterations_for(batch_s, sync_s)
    assert 2 * sync_s <= MAX_SYNC_SHARE * batch_s * iterations * (1 + 1e-9)
    # One batch less would not suffice.
    assert iterations == 1 or 2 * sync_s > MAX_SYNC_SHARE * batch_s * (iterations - 1) * (1 - 1e-9)
    assert MAX_SYNC_SHARE == 0.001


@given(st.floats(1e-7, 100), st.floats(0, 1e-2), st.floats(1e-3, 100))
def test_round_time_is_limited(batch_s: float, sync_s: float, max_round_s: float) -> None:
    iterations = iterations_for(batch_s, sync_s, max_round_s=max_round_s)
    assert iterations == 1 or iterations * batch_s <= max_round_s * (1 + 1e-9)
    if iterations < iterations_for(batch_s, sync_s):
        assert (iterations + 1) * batch_s > max_round_s * (1 - 1e-9)


@pytest.mark.parametrize(
    ("batch_s", "sync_s", "iterations"),
    [(0.1, 1e-5, 1), (0.02, 1e-5, 1), (0.01, 1e-5, 2), (1e-4, 1e-5, 200), (0.1, 0.0, 1)],
)
def test_iterations_per_round(batch_s: float, sync_s: float, iterations: int) -> None:
    assert iterations_for(batch_s, sync_s) == iterations


def test_plans_batch_that_takes_no_time() -> None:
    assert iterations_for(0.0, 0.0) == 1
    assert plan([0.0] * 5, sync_s=0.0, interval_s=1.0, min_batches=10).iterations == 1


# -- plan -------------------------------------------------------------------------------------

pilot_times = st.lists(st.floats(1e-5, 1.0), min_size=5, max_size=20)
syncs = st.floats(0, 1e-4)
intervals = st.floats(1e-3, 100)
batches = st.integers(1, 1000)


@given(pilot_times, syncs, intervals, batches)
def test_a_plan_runs_enough_batches(
    times: list[float], sync_s: float, interval_s: float, min_batches: int
) -> None:
    planned = plan(times, sync_s=sync_s, interval_s=interval_s, min_batches=min_batches)
    assert planned.rounds * planned.iterations >= min_batches
    assert planned.rounds >= MIN_ROUNDS
    round_s = planned.iterations * statistics.median(times)
    assert planned.synchronization_share == pytest.approx(2 * sync_s / round_s)
    # A thousandth, unless such a round would exceed a tenth of the interval.
    longer_s = round_s + statistics.median(times)
    assert planned.synchronization_share <= MAX_SYNC_SHARE * (1 + 1e-9) or longer_s > (
        interval_s / 10 * (1 - 1e-9)
    )


@given(pilot_times, syncs, intervals, batches)
def test_a_plan_keeps_to_the_interval(
    times: list[float], sync_s: float, interval_s: float, min_batches: int
) -> None:
    planned = plan(times, sync_s=sync_s, interval_s=interval_s, min_batches=min_batches)
    least = max(MIN_ROUNDS, math.ceil(min_batches / planned.iterations))
    takes = planned.rounds * planned.iterations * statistics.median(times)
    assert planned.rounds == least or takes <= interval_s * (1 + 1e-9)


@given(pilot_times, syncs, st.floats(1e-3, 10), st.floats(1, 10), batches)
def test_longer_interval_never_gives_fewer_rounds(
    times: list[float], sync_s: float, interval_s: float, factor: float, min_batches: int
) -> None:
    less, more = (
        plan(times, sync_s=sync_s, interval_s=seconds, min_batches=min_batches)
        for seconds in (interval_s, interval_s * factor)
    )
    # Fewer but longer rounds run the batches needed.
    assert less.rounds <= more.rounds or less.iterations < more.iterations


def test_noisier_times_need_more_rounds() -> None:
    def rounds(sigma: float) -> int:
        times = [0.1 * (1 + sigma * z) for z in (-2, -1, 0, 1, 2)]
        return plan(times, sync_s=0.0, interval_s=1e9, min_batches=1).rounds

    assert rounds(0.05) < rounds(0.1) < rounds(0.2)
    # The standard error of the median of n normal values is sqrt(pi / 2) sigma / sqrt(n).
    sigma = 1.4826 * 0.1
    assert rounds(0.1) == math.ceil(math.pi / 2 * (sigma / 0.005) ** 2)


def test_pilot_round_is_as_long_as_the_plan_needs() -> None:
    clock = FakeClock(sync_s=1e-5)
    batch_s = 1e-6
    planned = pilot(clock.run(batch_s), clock.timer, interval_s=10.0, min_batches=10)
    # The first, single batch looked eleven times longer than it is.
    assert 2 * clock.sync_s <= 1.02 * MAX_SYNC_SHARE * batch_s * planned.iterations


def test_pilot_is_short_relative_to_the_interval() -> None:
    clock = FakeClock()
    pilot(clock.run(0.001), clock.timer, interval_s=10.0, min_batches=10)
    assert clock.now < 0.25 * 10.0


def test_runs_slow_batch_at_least_ten_times() -> None:
    clock = FakeClock()
    planned = pilot(clock.run(20.0), clock.timer, interval_s=10.0, min_batches=10)
    assert (planned.rounds, planned.iterations) == (10, 1)


def test_planning_a_slow_batch_takes_few_runs() -> None:
    """The pilot reuses batches timed one by one as rounds; if blocks have only one batch, the cost
    of a synchronization does not matter."""
    log: list[str] = []
    clock = FakeClock(sync_s=1e-3)
    run = clock.run(0.9, log)
    planned = pilot(run, clock.timer, interval_s=5.0, min_batches=10)
    assert planned.synchronization_share == pytest.approx(2e-3 / 0.9, rel=0.01)
    assert len(log) == 5
    alternate(run, run, clock.timer, interval_s=5.0)
    assert len(log) == 5 + 4 + 2 * MIN_PAIRS


def test_pilot_ends_early_if_it_cannot_change_the_plan() -> None:
    log: list[str] = []
    clock = FakeClock(sync_s=1e-3)
    planned = pilot(clock.run(1.5, log), clock.timer, interval_s=10.0, min_batches=10)
    assert (planned.rounds, planned.iterations, planned.synchronization_share) == (10, 1, None)
    assert len(log) == 2


@pytest.mark.parametrize("sigma", [0.002, 0.02, 0.05, 0.1])
def test_median_reaches_the_planned_precision(sigma: float) -> None:
    rng = np.random.default_rng(1)
    errors, claimed = [], []
    for _ in range(400):
        clock = FakeClock()
        run = clock.run(noisy(rng, 0.01, sigma))
        planned = pilot(run, clock.timer, interval_s=60.0, min_batches=10)
        times = [time_block(run, clock.timer, planned.iterations) for _ in range(planned.rounds)]
        timing = summarize(times)
        errors.append(timing.median_s / 0.01 - 1)
        claimed.append(timing.standard_error)
    real = math.sqrt(statistics.fmean(e * e for e in errors))
    # The pilot sees only a sample of the noise, so the target is met within 20 %; 400 runs estimate
    # the spread within 3.5 %.
    assert real <= 1.2 * TARGET_STANDARD_ERROR
    assert statistics.median(claimed) == pytest.approx(real, rel=0.2)
    assert abs(statistics.fmean(errors)) <= 4 * real / math.sqrt(len(errors))


def test_too_noisy_times_use_the_whole_interval() -> None:
    times = [0.1 * (1 + 0.5 * z) for z in (-1, -0.5, 0, 0.5, 1)]
    planned = plan(times, sync_s=0.0, interval_s=10.0, min_batches=10)
    assert (planned.rounds, planned.iterations) == (100, 1)


# -- summary ----------------------------------------------------------------------------------


def test_summarize() -> None:
    assert summarize([1.0, 2.0, 6.0]).mean_s == 3.0
    timing = summarize([1.0, 2.0, 3.0, 4.0, 5.0])
    assert timing.median_s == 3.0
    assert timing.mean_s == 3.0
    assert timing.p95_s == pytest.approx(4.8)
    assert timing.min_s == 1.0
    # Median absolute deviation 1, relative to 3.
    sigma = 1.4826 / 3
    assert timing.standard_error == pytest.approx(math.sqrt(math.pi / 2) * sigma / math.sqrt(5))


def test_summary_of_equal_times() -> None:
    timing = summarize([0.25] * 7)
    assert (timing.median_s, timing.p95_s, timing.standard_error) == (0.25, 0.25, 0.0)


@given(
    st.lists(st.floats(1e-3, 10), min_size=5, max_size=30), st.sampled_from([0.25, 0.5, 2.0, 8.0])
)
def test_relative_figures_do_not_depend_on_the_unit(times: list[float], factor: float) -> None:
    one, other = summarize(times), summarize([factor * t for t in times])
    assert other.median_s == factor * one.median_s
    assert other.p95_s == pytest.approx(factor * one.p95_s)
    assert other.standard_error == pytest.approx(one.standard_error)
    assert min(times) <= one.median_s <= one.p95_s * (1 + 1e-12) <= max(times) * (1 + 1e-9)


def test_spread_is_the_standard_deviation_of_normal_times() -> None:
    rng = np.random.default_rng(2)
    assert spread(5 + 0.5 * rng.standard_normal(20_000)) == pytest.approx(0.1, rel=0.03)


def test_ignores_one_disturbed_round() -> None:
    assert spread([1.0, 1.0, 1.0, 1.0, 50.0]) == 0.0


# -- speedup ----------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.5, 1.0, 1.75, 4.0])
def test_speedup_on_a_clock_without_noise(ratio: float) -> None:
    clock = FakeClock()
    speedup = measure_speedup(clock.run(ratio / 64), clock.run(1 / 64), clock.timer, interval_s=1.0)
    assert (speedup.ratio, speedup.low, speedup.high) == (ratio, ratio, ratio)


def test_blocks_alternate_and_so_does_their_order() -> None:
    clock = FakeClock()
    log: list[str] = []
    speedup = measure_speedup(
        clock.run(0.25, log, "A"), clock.run(0.125, log, "B"), clock.timer, interval_s=1.0
    )
    # First each alone, then pairs in alternating order, starting with the baseline.
    before = log[: len(log) - 2 * speedup.pairs]
    assert before.count("A") == before.count("B") >= 1
    assert "".join(log[len(before) :]) == "ABBA" * (speedup.pairs // 2)


def test_alternating_blocks_give_paired_times() -> None:
    clock = FakeClock()
    pairs = alternate(clock.run(0.25), clock.run(0.125), clock.timer, interval_s=1.0)
    assert pairs == [(0.25, 0.125)] * MIN_PAIRS


def test_blocks_hide_their_synchronizations() -> None:
    clock = FakeClock(sync_s=1e-5)
    log: list[str] = []
    speedup = measure_speedup(
        clock.run(0.005, log, "A"), clock.run(0.0005, log, "B"), clock.timer, interval_s=10.0
    )
    blocks = [(name, len(list(group))) for name, group in itertools.groupby(log)]
    (b, two_blocks), (a, one_block) = blocks[-2:]
    assert (b, a) == ("B", "A")
    # Two synchronizations of 10 us are a thousandth of 20 ms: 4 batches, or 40.
    assert one_block >= 4
    assert two_blocks / 2 >= 40
    assert speedup.ratio == pytest.approx(10, rel=0.002)


@pytest.mark.parametrize("batch_s", [1e-2, 1e-4, 1e-6])
def test_synchronizations_do_not_bias_the_speedup(batch_s: float) -> None:
    clock = FakeClock(sync_s=1e-5)
    speedup = measure_speedup(
        clock.run(2 * batch_s), clock.run(batch_s), clock.timer, interval_s=0.1
    )
    assert speedup.ratio == pytest.approx(2, rel=MAX_SYNC_SHARE)


@pytest.mark.parametrize(
    ("interval_s", "pairs"), [(1e-6, MIN_PAIRS), (12.0, 12), (13.0, 14), (1e6, MAX_PAIRS)]
)
def test_pairs_fit_the_interval(interval_s: float, pairs: int) -> None:
    clock = FakeClock()
    speedup = measure_speedup(clock.run(0.75), clock.run(0.25), clock.timer, interval_s=interval_s)
    # An even number, so that both orders have equal weight.
    assert speedup.pairs == pairs


@pytest.mark.parametrize("per_call", [1e-4, 1e-3, 1e-2])
def test_drift_cancels(per_call: float) -> None:
    clock = FakeClock()
    calls = itertools.count(1)

    def run(seconds: float) -> Callable[[], None]:
        def run_one() -> None:
            clock.now += seconds * (1 + per_call * next(calls))

        return run_one

    speedup = measure_speedup(run(0.02), run(0.01), clock.timer, interval_s=1.0)
    # In a fixed order, each ratio would be biased by the drift of one call.
    assert abs(speedup.ratio / 2 - 1) < 0.02 * per_call
    assert speedup.low <= 2 <= speedup.high


def test_comparing_a_run_with_itself_shows_its_noise() -> None:
    clock = FakeClock()
    run = clock.run(noisy(np.random.default_rng(3), 0.01, 0.05))
    speedup = measure_speedup(run, run, clock.timer, interval_s=1.0)
    assert speedup.low < speedup.ratio < speedup.high


@pytest.mark.parametrize("interval_s", [0.01, 0.5, 100.0])
@pytest.mark.parametrize("skewed", [False, True])
def test_speedup_interval_covers_the_true_value(interval_s: float, skewed: bool) -> None:
    rng = np.random.default_rng(4)

    def times(mean_s: float) -> Iterator[float]:
        while True:
            # Normal noise, or a long tail as on a machine with occasional disturbances.
            noise = rng.exponential(size=1000) if skewed else rng.standard_normal(1000)
            yield from mean_s * np.exp(0.03 * noise)

    repetitions, inside = 400, 0
    for _ in range(repetitions):
        clock = FakeClock()
        speedup = measure_speedup(
            clock.run(times(0.02)), clock.run(times(0.01)), clock.timer, interval_s=interval_s
        )
        assert speedup.low <= speedup.ratio <= speedup.high
        inside += speedup.low <= 2.0 <= speedup.high
    assert inside / repetitions >= 0.93


# -- memory -----------------------------------------------------------------------------------


def test_does_not_measure_cpu_memory() -> None:
    device = torch.device("cpu")
    with peak_memory(device) as peak:
        torch.zeros(1000)
    assert peak() is None
    assert allocated_bytes(device) == 0


CUDA_OOM = (
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.25 GiB "
    "of which 10.00 GiB is free."
)
CPU_OOM = (
    "[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you "
    "tried to allocate 4000000000000000 bytes. Error code 12 (Cannot allocate memory)"
)
CUBLAS = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(CUDA_OOM),
        torch.OutOfMemoryError(""),
        MemoryError(),
        RuntimeError(CUDA_OOM),
        RuntimeError(CPU_OOM),
        RuntimeError(CUBLAS),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"),
    ],
    ids=repr,
)
def test_out_of_memory(error: Exception) -> None:
    assert oom_of(error) is error


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUBLAS_STATUS_EXECUTION_FAILED"),
        RuntimeError("out of resource: shared memory, Required: 131072"),
        ValueError(CUDA_OOM),
        KeyError("memory"),
    ],
    ids=repr,
)
def test_other_errors_are_not_out_of_memory(error: Exception) -> None:
    assert oom_of(error) is None


def raised_by(function: Callable[[], None]) -> Exception:
    with pytest.raises(Exception, match="outer") as info:
        function()
    return info.value


def test_finds_out_of_memory_in_causes() -> None:
    oom = torch.OutOfMemoryError(CUDA_OOM)

    def middle() -> None:
        try:
            raise oom
        except RuntimeError as error:
            raise KeyError("middle") from error

    def outer() -> None:
        try:
            middle()
        except KeyError as error:
            raise ValueError("outer") from error

    assert oom_of(raised_by(outer)) is oom


class CompilerError(RuntimeError):
    """Wrap an error like torch.compile wraps those of a backend."""

    def __init__(self, inner_exception: Exception) -> None:
        super().__init__("backend failed")
        self.inner_exception = inner_exception


def test_finds_out_of_memory_in_compiler_errors() -> None:
    oom = RuntimeError(CUBLAS)
    assert oom_of(CompilerError(oom)) is oom
    assert oom_of(CompilerError(CompilerError(oom))) is oom
    assert oom_of(CompilerError(ValueError("no"))) is None


def test_cyclic_exception_chain_terminates() -> None:
    one, other = ValueError("one"), KeyError("other")
    one.__cause__, other.__cause__ = other, one
    assert oom_of(one) is None


def test_finds_out_of_memory_behind_unrelated_inner_exception() -> None:
    oom = torch.OutOfMemoryError(CUDA_OOM)
    error = CompilerError(ValueError("unrelated"))
    error.__cause__ = oom
    assert oom_of(error) is oom


def test_suppressed_context_is_not_out_of_memory() -> None:
    def outer() -> None:
        try:
            raise torch.OutOfMemoryError(CUDA_OOM)
        except RuntimeError:
            raise KeyError("outer: a bug of its own") from None

    assert oom_of(raised_by(outer)) is None


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (CUDA_OOM, 20 * 2**30),
        (CPU_OOM, 4 * 10**15),
        (CUBLAS, None),
        ("CUDA out of memory. Tried to allocate 2.50 MiB.", 2621440),
        ("CUDA out of memory. Tried to allocate 1.50 KiB.", 1536),
        ("CUDA out of memory. Tried to allocate 512 bytes.", 512),
        ("CUDA out of memory. Tried to allocate 0.10 GiB.", 107374182),
        ("CUDA out of memory. Tried to allocate more than 1EB memory.", None),
        ("CUDA out of memory. Tried to allocate 3 KB.", None),
        ("", None),
    ],
)
def test_requested_bytes(text: str, size: int | None) -> None:
    assert requested_bytes(RuntimeError(text)) == size


# -- prepared runs -------------------------------------------------------------------------------


class Prepared:
    """Consume one prepared item at each call; at most three can be prepared at once."""

    most_calls = 3

    def __init__(self) -> None:
        self.left = 0

    def prepare(self, calls: int) -> None:
        assert calls <= self.most_calls
        self.left = calls

    def __call__(self) -> None:
        assert self.left > 0
        self.left -= 1


@pytest.mark.parametrize("most", [1, 2, 3])
def test_calls_between_preparations_are_limited(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr(Prepared, "most_calls", most)
    first, second, ticks = Prepared(), Prepared(), itertools.count()

    def timer() -> float:
        return next(ticks) * 1e-3

    warm_up(first, timer, max_s=0.01)
    planned = pilot(first, timer, interval_s=10, min_batches=10)
    assert planned.iterations <= most
    assert planned.rounds * planned.iterations >= 10
    alternate(first, second, timer, interval_s=0.1)
