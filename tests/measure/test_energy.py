"""Test measuring energy by a counter that moves in steps, on a simulated GPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pytest_int8bench.measure import energy
from pytest_int8bench.measure.energy import MIN_STEPS, EnergyCounter, counter_of
from pytest_int8bench.nvml import Gpu

IDLE_W = 100.0


class FakeGpu:
    """A GPU with its own time, whose energy counter moves every ``step_s``."""

    def __init__(self, step_s: float = 0.1, read_s: float = 0.004) -> None:
        self.now = 0.033
        self.step_s = step_s
        self.read_s = read_s
        self.readings: list[float] = []
        self.batches: list[tuple[str, float]] = []
        self.answer: Callable[[float], float | None] = lambda joules: joules
        # Start and power of each period.
        self._used: list[tuple[float, float]] = [(0.0, IDLE_W)]

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def work(self, seconds: float, watts: float, name: str = "") -> None:
        self.batches.append((name, self.now))
        self._used.append((self.now, watts))
        self.now += seconds
        self._used.append((self.now, IDLE_W))

    def read(self) -> float | None:
        self.now += self.read_s
        self.readings.append(self.now)
        return self.answer(self._joules(math.floor(self.now / self.step_s) * self.step_s))

    def _joules(self, until: float) -> float:
        ends = [start for start, _ in self._used[1:]] + [math.inf]
        return sum(
            (min(end, until) - start) * watts
            for (start, watts), end in zip(self._used, ends, strict=True)
            if start < until
        )

    def counter(self) -> EnergyCounter:
        return EnergyCounter(self.read, self.clock, self.sleep)

    def watts(self, seconds: float, watts: float) -> float | None:
        """Return the power that the counter measures over work of ``watts``."""
        counter = self.counter()
        start = counter.next_step()
        self.work(seconds, watts)
        return counter.watts(start, self.now)

    def ratio(self, first: Any, second: Any, interval_s: float = 10.0) -> float | None:
        """Compare two batches, each given as seconds and watts."""
        return self.counter().ratio(
            lambda: self.work(*first, "A"),
            lambda: self.work(*second, "B"),
            self.clock,
            batch_s=(first[0], second[0]),
            interval_s=interval_s,
        )


# -- power --------------------------------------------------------------------------------------


@pytest.mark.parametrize("step_s", [0.01, 0.02, 0.1])
@pytest.mark.parametrize("steps", [9.3, 10.0, 12.7, 100.0])
@pytest.mark.parametrize("watts", [150.0, 700.0])
def test_power_is_accurate_to_one_percent(step_s: float, steps: float, watts: float) -> None:
    gpu = FakeGpu(step_s, read_s=step_s / 25)
    gpu_watts = gpu.watts(steps * step_s, watts)
    assert gpu_watts == pytest.approx(watts, rel=0.01)


def test_takes_no_reading_during_the_work() -> None:
    gpu = FakeGpu()
    assert gpu.watts(2.0, 700.0) is not None
    ((_, start_s),) = gpu.batches
    assert [at_s for at_s in gpu.readings if start_s < at_s < start_s + 2.0] == []


def test_waits_at_most_three_steps() -> None:
    gpu = FakeGpu()
    before = gpu.now
    gpu.watts(2.0, 700.0)
    assert gpu.now - before - 2.0 <= 3 * (gpu.step_s + 3 * (gpu.read_s + energy.POLL_S))


@pytest.mark.parametrize("steps", [0.5, 3.0, MIN_STEPS - 0.5])
def test_work_too_short_for_the_counter_has_no_power(steps: float) -> None:
    gpu = FakeGpu()
    assert gpu.watts(steps * gpu.step_s, 700.0) is None


def test_does_not_wait_for_work_too_short_for_any_counter() -> None:
    gpu = FakeGpu()
    counter = gpu.counter()
    start = counter.next_step()
    gpu.work(0.05, 700.0)
    readings = len(gpu.readings)
    assert counter.watts(start, gpu.now) is None
    assert len(gpu.readings) == readings


def test_gives_up_on_a_frozen_counter() -> None:
    gpu = FakeGpu()
    gpu.answer = lambda joules: 5.0
    assert gpu.counter().next_step() is None
    assert gpu.now < 0.033 + 1.1 * energy.LONGEST_STEP_S
    assert gpu.watts(2.0, 700.0) is None


@pytest.mark.parametrize("answers", [0, 1, 30, 45, 60])
def test_a_counter_that_stops_answering_has_no_power(answers: int) -> None:
    gpu = FakeGpu()
    gpu.answer = lambda joules: joules if len(gpu.readings) <= answers else None
    assert gpu.watts(2.0, 700.0) is None or len(gpu.readings) <= answers


@pytest.mark.parametrize("phase", [0.0, 0.2, 0.4, 0.6, 0.8, 0.95])
def test_ignores_stale_first_reading(phase: float) -> None:
    """NVML may answer the first call after a pause with an old value."""
    gpu = FakeGpu()
    gpu.now = 5 + phase * gpu.step_s
    last_s = 0.0

    def answer(joules: float) -> float:
        nonlocal last_s
        is_old = gpu.now - last_s > 0.05
        last_s = gpu.now
        return joules - 10 if is_old else joules

    gpu.answer = answer
    assert gpu.watts(1.0, 700.0) == pytest.approx(700.0, rel=0.01)


def test_a_step_during_a_slow_reading_is_not_precise() -> None:
    gpu = FakeGpu()

    def answer(joules: float) -> float:
        if 0.1 <= gpu.now < 0.12:  # the counter has just moved
            gpu.now += 0.06
        return joules

    gpu.answer = answer
    step = gpu.counter().next_step()
    assert step is not None
    assert step.at_s == pytest.approx(0.2, abs=0.006)


def test_slow_readings_do_not_make_steps_longer() -> None:
    gpu = FakeGpu()
    start = gpu.counter().next_step()
    gpu.work(1.0, 700.0)
    end_s = gpu.now
    moved = False

    def answer(joules: float) -> float:
        nonlocal moved
        if not moved and gpu.now > math.ceil(end_s / 0.1) * 0.1 + 0.1:  # the second step since
            moved = True
            gpu.now += 0.03
        return joules

    gpu.answer = answer
    assert gpu.counter().watts(start, end_s) == pytest.approx(700.0, rel=0.01)
    assert moved


def test_a_counter_that_never_answers_is_read_once() -> None:
    gpu = FakeGpu()
    gpu.answer = lambda joules: None
    assert gpu.watts(2.0, 700.0) is None
    assert len(gpu.readings) == 1


@pytest.mark.parametrize("during_work", [True, False])
def test_a_counter_that_is_reset_has_no_power(during_work: bool) -> None:
    gpu = FakeGpu()
    reset_s = 1.0 if during_work else 2.25
    gpu.answer = lambda joules: joules if gpu.now < reset_s else joules - 5000
    assert gpu.watts(2.0, 700.0) is None


# -- the ratio of two models --------------------------------------------------------------------


@pytest.mark.parametrize("step_s", [0.02, 0.1])
def test_the_ratio_compares_energy_per_batch(step_s: float) -> None:
    gpu = FakeGpu(step_s)
    ratio = gpu.ratio((0.05, 600.0), (0.03, 500.0))
    assert ratio == pytest.approx(0.05 * 600 / (0.03 * 500), rel=0.01)


def test_ratio_runs_one_block_of_each_model() -> None:
    gpu = FakeGpu()
    gpu.ratio((0.05, 600.0), (0.03, 500.0))
    names = "".join(name for name, _ in gpu.batches)
    assert names == names.count("A") * "A" + names.count("B") * "B"
    assert names.count("A") == pytest.approx(20, abs=2)  # a second, of steps of 0.1 s
    assert names.count("B") == pytest.approx(33, abs=3)
    # No reading takes place during a block.
    for name in "AB":
        block = [at_s for which, at_s in gpu.batches if which == name]
        assert [at_s for at_s in gpu.readings if block[0] < at_s <= block[-1]] == []


@pytest.mark.parametrize("interval_s", [0.2, 3.0, 7.0])
def test_does_not_run_blocks_that_would_take_too_long(interval_s: float) -> None:
    gpu = FakeGpu()
    assert gpu.ratio((0.05, 600.0), (0.03, 500.0), interval_s) is None
    assert gpu.batches == []


def test_blocks_shorter_than_expected_have_no_ratio() -> None:
    gpu = FakeGpu()
    counter = gpu.counter()
    run = lambda: gpu.work(0.01, 600.0)  # noqa: E731
    assert counter.ratio(run, run, gpu.clock, batch_s=(0.05, 0.05), interval_s=10.0) is None


@pytest.mark.parametrize("answers", [0, 20, 40, 80])
def test_a_counter_that_stops_answering_has_no_ratio(answers: int) -> None:
    gpu = FakeGpu()
    gpu.answer = lambda joules: joules if len(gpu.readings) <= answers else None
    assert gpu.ratio((0.05, 600.0), (0.03, 500.0)) is None


# -- the counter of a device --------------------------------------------------------------------


class FakeNvml(SimpleNamespace):
    """NVML of one GPU that has used 12 J or raises errors."""

    class NVMLError(Exception):
        pass

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        assert handle == "handle"
        if self.refuses:
            raise self.NVMLError("not supported")
        return 12_000

    def nvmlDeviceGetMigMode(self, handle: str) -> list[int]:
        return [self.mig, self.mig]


def gpu_of(refuses: bool = False, mig: int = 0, is_instance: bool = False) -> Gpu:
    return Gpu(FakeNvml(refuses=refuses, mig=mig), "handle", None, is_instance)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Callable[[Gpu | None], list[str]]:
    """Simulate a GPU; the returned list collects the requested UUIDs."""

    def put(gpu: Gpu | None) -> list[str]:
        asked: list[str] = []

        def find(uuid: str) -> Gpu | None:
            asked.append(uuid)
            return gpu

        properties = [SimpleNamespace(uuid=f"uuid-{index}") for index in range(3)]
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties[index])
        monkeypatch.setattr(energy, "find_gpu", find)
        return asked

    return put


@pytest.mark.parametrize(("device", "uuid"), [("cuda", "uuid-1"), ("cuda:2", "uuid-2")])
def test_uses_the_counter_of_the_device(cuda: Any, device: str, uuid: str) -> None:
    asked = cuda(gpu_of())
    assert counter_of(torch.device(device))._read() == 12.0
    assert asked == [uuid]


@pytest.mark.parametrize(
    "gpu",
    [None, gpu_of(refuses=True), gpu_of(mig=1), gpu_of(is_instance=True)],
    ids=["no NVML", "refused", "MIG", "old driver with MIG"],
)
def test_gpu_without_its_own_counter_has_no_energy(cuda: Any, gpu: Gpu | None) -> None:
    cuda(gpu)
    assert counter_of(torch.device("cuda")).next_step() is None


def test_a_cpu_has_no_energy(cuda: Any) -> None:
    asked = cuda(gpu_of())
    assert counter_of(torch.device("cpu")).next_step() is None
    assert asked == []


def test_an_error_of_nvml_is_not_raised(cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(uuid: str) -> Gpu:
        raise RuntimeError("NVML is broken")

    cuda(None)
    monkeypatch.setattr(energy, "find_gpu", fail)
    assert counter_of(torch.device("cuda")).next_step() is None
