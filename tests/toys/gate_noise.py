"""Simulate processes with several kinds of noise, and the outcomes of the gate."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pytest_int8bench.gate.ab.design import Design, spend
from pytest_int8bench.gate.ab.judging import decide, scales, screen
from pytest_int8bench.gate.ab.randomization import PLACES
from pytest_int8bench.gate.compare import compare
from pytest_int8bench.gate.limits import Rules
from pytest_int8bench.results.locating import Run
from pytest_int8bench.results.records import Result
from toys.results import saved, timed

Array = np.ndarray[Any, Any]
Rng = np.random.Generator
#: Draws log times of unchanged code, of shape (families, processes, runs).
Noise = Callable[[Rng, int, int, int], Array]

#: Slowdown of the slower bimodal state and of the slow periodic processes, as log ratio.
STEP = 0.04


def normal(deviation: float, *, shared: float = 0.0, tails: float | None = None) -> Noise:
    """Draw noise between processes; runs of a process share some of its variance."""

    def draw(rng: Rng, families: int, processes: int, runs: int) -> Array:
        def one(count: int) -> Array:
            shape = (families, processes, count)
            if tails is None:
                return rng.normal(size=shape)
            return rng.standard_t(tails, shape) / math.sqrt(tails / (tails - 2))

        return deviation * (math.sqrt(1 - shared) * one(runs) + math.sqrt(shared) * one(1))

    return draw


def drifting(deviation: float, *, shared: float = 0.5) -> Noise:
    """Add a drift of 2 % over the session and a random walk of 0.1 % per process."""
    noise = normal(deviation, shared=shared)

    def draw(rng: Rng, families: int, processes: int, runs: int) -> Array:
        walk = rng.normal(0, 0.001, (families, processes, 1)).cumsum(axis=1)
        line = math.log1p(0.02) * np.linspace(0, 1, processes)[:, None]
        return noise(rng, families, processes, runs) + walk + line

    return draw


def bimodal(
    *, shared: bool, share: float = 0.5, step: float = STEP, deviation: float = 0.003
) -> Noise:
    """Put the clocks of random processes or runs in a slower state."""

    def draw(rng: Rng, families: int, processes: int, runs: int) -> Array:
        is_slow = rng.random((families, processes, 1 if shared else runs)) < share
        return rng.normal(0, deviation, (families, processes, runs)) + step * is_slow

    return draw


def periodic(period: int, *, step: float = STEP, deviation: float = 0.003) -> Noise:
    """Slow down one of every ``period`` processes."""

    def draw(rng: Rng, families: int, processes: int, runs: int) -> Array:
        phase = rng.integers(period, size=(families, 1, 1))
        is_slow = (np.arange(processes)[:, None] + phase) % period == 0
        return rng.normal(0, deviation, (families, processes, runs)) + step * is_slow

    return draw


def outliers(deviation: float, *, share: float = 0.08, slower: float = 0.2) -> Noise:
    """Make some times far too long."""

    def draw(rng: Rng, families: int, processes: int, runs: int) -> Array:
        shape = (families, processes, runs)
        return rng.normal(0, deviation, shape) + math.log1p(slower) * (rng.random(shape) < share)

    return draw


MACHINES: dict[str, Noise] = {
    "normal 0.3 %": normal(0.003),
    "normal 1 %": normal(0.01),
    "drift, shared 0.3 %": drifting(0.003),
    "drift, shared 1 %": drifting(0.01),
    "t(4) 1 %": normal(0.01, tails=4),
    "bimodal processes": bimodal(shared=True),
    "bimodal runs": bimodal(shared=False),
    "every 2nd process slow": periodic(2),
    "every 3rd process slow": periodic(3),
    "every 4th process slow": periodic(4),
    "outliers, normal 0.3 %": outliers(0.003),
    "outliers, normal 1 %": outliers(0.01),
}

#: Processes of unchanged code, as saved files show them.
PROCESSES: dict[str, Noise] = {
    "1 %": normal(0.01),
    "2 %": normal(0.02),
    "4 %": normal(0.04),
    "4 %, alike in all runs": normal(0.04, shared=1.0),
    "two states, 8 % apart": bimodal(shared=True, step=0.08),
    "a rare state, 8 % slower": bimodal(shared=True, step=0.08, share=0.15),
    "two states of each run": bimodal(shared=False, step=0.08),
    "outliers, normal 1 %": outliers(0.01),
}


# -- int8bench ab ---------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Session:
    """Outcomes of the runs of many families, as arrays of shape (families, runs)."""

    flagged: Array
    outcomes: Array
    """``PASS`` for what screening cleared."""
    blocks: Array
    """Verdict blocks until a run was decided; 0 for what screening cleared."""

    def share(self, outcome: str) -> float:
        """Of all runs."""
        return float((self.outcomes == outcome).mean())

    def families_with(self, outcome: str) -> int:
        return int((self.outcomes == outcome).any(axis=1).sum())


def simulate_ab(
    noise: Noise,
    *,
    families: int,
    runs: int = 24,
    slowdowns: float | list[float] = 0.0,
    design: Design | None = None,
    seed: int = 20,
) -> Session:
    """Simulate screening and the looks of the verdict stage, in the order of the processes."""
    design = design or Design()
    rng = np.random.default_rng(seed)
    shifts = np.log1p(np.broadcast_to(slowdowns, runs))
    first = 2 * design.screening_blocks
    logs = noise(rng, families, first + 4 * design.verdict_blocks, runs)
    is_new = _orders(rng, families, design)
    logs = (logs + shifts * is_new[..., None]).transpose(0, 2, 1)

    flagged, noises = _screened(np.exp(logs[..., :first]), is_new[:, :first], design)
    rest = logs[..., first:].reshape(families, runs, design.verdict_blocks, 4)
    labels = is_new[:, first:].reshape(families, design.verdict_blocks, 4)
    outcomes = np.where(flagged, "INCONCLUSIVE", "PASS")
    blocks = np.zeros((families, runs), dtype=int)
    levels = spend(design.level, design.verdict_blocks, design.looks)
    for count, level in zip(design.looks, levels, strict=True):
        is_open = outcomes == "INCONCLUSIVE"
        in_family = flagged & (outcomes != "FAIL")
        for part in np.array_split(np.flatnonzero(is_open.any(axis=1)), 1 + families // 50):
            if not part.size:
                continue
            # Failed runs are excluded: without a residual they are never the largest.
            here = labels[part][:, :count]
            nothing = math.log1p(design.margin) * here[:, None]
            taken = np.where(in_family[part][..., None, None], rest[part][:, :, :count], nothing)
            is_last = count == design.verdict_blocks
            found = decide(taken, here, design, level, noises[part], is_last=is_last).outcomes
            outcomes[part] = np.where(is_open[part], found, outcomes[part])
        blocks[is_open] = count
    return Session(flagged=flagged, outcomes=outcomes, blocks=blocks)


def _orders(rng: Rng, families: int, design: Design) -> Array:
    """Draw which processes run the new revision, of shape (families, processes)."""
    swapped = rng.random((families, (design.screening_blocks + 1) // 2, 1)) < 0.5
    pairs = np.array([False, True, True, False]) ^ swapped
    screening = pairs.reshape(families, -1)[:, : 2 * design.screening_blocks]
    places = np.array([[place in chosen for place in range(4)] for chosen in PLACES])
    verdict = places[rng.integers(len(PLACES), size=(families, design.verdict_blocks))]
    return np.concatenate([screening, verdict.reshape(families, -1)], axis=1)


def _screened(times: Array, is_new: Array, design: Design) -> tuple[Array, Array]:
    """Return which runs are flagged, and how noisy they are, of shape (families, runs)."""
    families, runs, _ = times.shape
    order = np.argsort(is_new.reshape(families, 1, -1, 2), axis=-1, kind="stable")
    sides = np.take_along_axis(times.reshape(families, runs, -1, 2), order, -1)
    base, new = (sides[..., side].reshape(families * runs, -1) for side in (0, 1))
    screened = screen(base, new, design)
    flagged = np.array([run.flagged for run in screened]).reshape(families, runs)
    parts = (screened[start : start + runs] for start in range(0, families * runs, runs))
    return flagged, np.array([scales(part) for part in parts])


# -- int8bench compare ----------------------------------------------------------------------


def simulate_compare(
    noise: Noise,
    *,
    files: tuple[int, int],
    families: int,
    runs: int = 24,
    slowdowns: float | list[float] = 0.0,
    rules: Rules | None = None,
    seed: int = 20,
) -> Array:
    """Return the outcomes of saved files of both sides, of shape (families, runs)."""
    rng = np.random.default_rng(seed)
    logs = noise(rng, families, sum(files), runs)
    logs[:, files[0] :] += np.log1p(np.broadcast_to(slowdowns, runs))
    named = [timed(str(run)) for run in range(runs)]
    outcomes = []
    for family in np.exp(logs):
        saved_files = [
            Run(Path("file.json"), saved(*(_slower(*one) for one in zip(named, row, strict=True))))
            for row in family.tolist()
        ]
        found = compare(saved_files[: files[0]], saved_files[files[0] :], rules or Rules())
        outcomes.append([run.outcome for run in found.runs])
    return np.array(outcomes)


def _slower(result: Result, factor: float) -> Result:
    assert result.samples_per_s is not None
    assert result.batch_time_s is not None
    return dataclasses.replace(
        result,
        samples_per_s=result.samples_per_s / factor,
        batch_time_s=result.batch_time_s * factor,
    )
