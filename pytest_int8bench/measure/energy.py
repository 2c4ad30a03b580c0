"""Measure the energy that a GPU uses while it works, by NVML's counter.

``nvmlDeviceGetTotalEnergyConsumption`` (Volta and later) counts the energy of the whole GPU and
moves in steps. NVML does not document how long a step is. Others saw about 10 ms
(https://github.com/gpuopenanalytics/pynvml/pull/18) and 100 ms
(https://ml.energy/blog/energy/measurement/thermally-stable-profiling-for-accurate-gpu-energy-measurement).
On an H200 with driver 580.159 we measured 97 to 103 ms, and 4 ms for one reading.

Reading the counter at both ends of an interval would be off by up to one step at each end. Instead:

- Wait for the counter to move, and start the work at once.
- After the work, wait for two more steps with the device idle. The first gives the energy since the
  start of the work, including the idle time before this step. The power between the two steps is
  the idle power, from which the energy of the idle time is computed and subtracted. The time
  between them is the length of a step.
- Return None for work shorter than :data:`MIN_STEPS` steps. Idle power falls after the work (on the
  H200 from 165 to 130 W, against 690 W under load). The subtracted energy, at most one step of idle
  time, is therefore off by under 1 % of the energy of 8 steps under load.

On that H200, an 8192x8192x8192 matmul that ran for 1 s took 0.3 to 1.6 % more energy than in a 6 s
run (BF16 and INT8, three runs each). Twenty ratios of the two lay within 1.5 % of their median.

The counter is only read while the device is idle, and never within a timed interval.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from pytest_int8bench.measure.timing import Run, Timer
from pytest_int8bench.nvml import find_gpu

#: Fewest counter steps that the work must last.
MIN_STEPS = 8
#: Steps that a block of a comparison lasts.
BLOCK_STEPS = 10
#: Bounds of the length of a step. A counter that stands still for longer is considered broken.
SHORTEST_STEP_S, LONGEST_STEP_S = 0.01, 0.5
#: Seconds between two readings, and most seconds from the end of one to the end of the next.
POLL_S, PRECISE_S = 0.001, 0.012
#: Largest fraction of the interval for a comparison.
COMPARISON_SHARE = 0.25


@dataclass(frozen=True)
class Step:
    """A moment at which the counter moved."""

    joules: float
    at_s: float
    moves: int = 1
    """Number of moves since the first reading, including this one."""


class EnergyCounter:
    """Measures energy by a counter that moves in steps, as the module describes.

    Args:
        read: returns the counter in joules, or None where it does not answer.
        clock: the time, as ``timer`` returns it, without waiting for the device.
        sleep: waits for some seconds.
    """

    def __init__(
        self,
        read: Callable[[], float | None],
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._read = read
        self._clock = clock
        self._sleep = sleep

    def watts(self, start: Step | None, end_s: float) -> float | None:
        """Return the mean power of the GPU over work that began at ``start``.

        Args:
            start: what :meth:`next_step` returned just before the work.
            end_s: when the work ended; the device must have been idle since.

        Returns:
            None where the counter does not answer, or the work was too short for it.
        """
        if start is None:
            return None
        joules, _ = self._used(start, end_s)
        return None if joules is None else joules / (end_s - start.at_s)

    def ratio(
        self,
        first: Run,
        second: Run,
        timer: Timer,
        *,
        batch_s: tuple[float, float],
        interval_s: float,
    ) -> float | None:
        """Run one block of each and return the ratio of their energies per batch.

        Args:
            first: one batch of the model whose energy is the numerator.
            second: one batch of the other model.
            timer: a timer that waits for the device.
            batch_s: seconds of one batch of each.
            interval_s: both blocks may take a quarter of it.

        Returns:
            None where the counter does not answer, or blocks of that length are too short for it.
        """
        earlier, start = self.next_step(), self.next_step()
        if earlier is None or start is None:
            return None
        block_s = BLOCK_STEPS * _length_s(earlier, start)
        counts = [math.ceil(block_s / seconds) for seconds in batch_s]
        if sum(n * s for n, s in zip(counts, batch_s, strict=True)) > COMPARISON_SHARE * interval_s:
            return None
        per_batch: list[float] = []
        for run, count in zip((first, second), counts, strict=True):
            for _ in range(count):
                run()
            joules, following = self._used(start, timer())
            if joules is None or following is None:
                return None
            per_batch.append(joules / count)
            start = following
        return per_batch[0] / per_batch[1]

    def next_step(self) -> Step | None:
        """Wait until the counter moves. Return None if it does not answer or never moves.

        The first readings after a pause may be old or slow, so a step only counts between two
        readings that are close together and of which the earlier showed no change.
        """
        values = [self._read()]
        begin_s = before_s = self._clock()
        moves = 0
        while values[-1] is not None and before_s - begin_s <= LONGEST_STEP_S:
            self._sleep(POLL_S)
            joules, now_s = self._read(), self._clock()
            if joules is not None and joules != values[-1]:
                moves += 1
                is_settled = len(values) > 1 and values[-1] == values[-2]
                if is_settled and now_s - before_s <= PRECISE_S:
                    return Step(joules, now_s, moves)
            values = [values[-1], joules]
            before_s = now_s
        return None

    def _used(self, start: Step, end_s: float) -> tuple[float | None, Step | None]:
        """Return the joules from ``start`` to ``end_s``, and the step at which more work may start.

        The device must have been idle since ``end_s``.
        """
        worked_s = end_s - start.at_s
        if worked_s < MIN_STEPS * SHORTEST_STEP_S:
            return None, None
        first, second = self.next_step(), self.next_step()
        if first is None or second is None:
            return None, None
        idle_w = (second.joules - first.joules) / (second.at_s - first.at_s)
        joules = first.joules - start.joules - idle_w * (first.at_s - end_s)
        is_too_short = worked_s < MIN_STEPS * _length_s(first, second)
        if is_too_short or idle_w < 0 or joules <= 0:  # a reset counter goes back
            return None, second
        return joules, second


def _length_s(first: Step, second: Step) -> float:
    """Return the length of a step, where ``second`` was waited for right after ``first``."""
    return (second.at_s - first.at_s) / second.moves


def counter_of(device: torch.device) -> EnergyCounter:
    """Return the energy counter of a device. It returns None for a CPU, without NVML, and for a MIG
    instance, because NVML counts the energy of the whole GPU."""
    if device.type == "cuda":
        try:
            index = torch.cuda.current_device() if device.index is None else device.index
            gpu = find_gpu(str(torch.cuda.get_device_properties(index).uuid))
            if gpu is not None and gpu.counts_own_energy():
                return EnergyCounter(gpu.energy_j)
        except Exception:  # energy is optional
            pass
    return EnergyCounter(lambda: None)
