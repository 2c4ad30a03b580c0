"""Test what saved files can show: simulated error rates, and the message if they cannot decide."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from pytest_int8bench.gate.compare import Comparison, compare
from pytest_int8bench.gate.limits import Rules
from pytest_int8bench.gate.noise import files_needed, shows_noise
from pytest_int8bench.results.benchmarks import Benchmark
from pytest_int8bench.results.locating import Run
from toys.gate_noise import PROCESSES, Noise, normal, outliers, simulate_compare
from toys.results import entry, saved, timed

FAMILIES = 40
#: If 5 % of families regress, more than this is seen once in a thousand times.
MOST = int(stats.binom.isf(0.001, FAMILIES, 0.05))


# benchmarks/gate_error_rates.py covers all pairs of machines and files.
@pytest.mark.parametrize(
    ("machine", "files"),
    [
        ("2 %", (1, 1)),
        ("2 %", (2, 2)),
        ("4 %", (1, 1)),
        ("4 %", (2, 2)),
        ("4 %", (5, 5)),
        ("4 %", (5, 1)),
        ("4 %, alike in all runs", (2, 2)),
        ("two states, 8 % apart", (2, 2)),
        ("a rare state, 8 % slower", (8, 1)),
        ("two states of each run", (3, 3)),
    ],
)
def test_unchanged_code_rarely_regresses(machine: str, files: tuple[int, int]) -> None:
    outcomes = simulate_compare(PROCESSES[machine], files=files, families=FAMILIES)
    assert (outcomes == "regressed").any(axis=1).sum() <= MOST


@pytest.mark.parametrize(("rounds", "files"), [(1, 1), (5, 1)])
def test_few_rounds_rarely_regress(rounds: int, files: int) -> None:
    """Rounds of these plain benchmarks vary by 30 %, and processes differ by 2 %."""
    rng = np.random.default_rng(20)

    def process() -> Run:
        logs = rng.normal(rng.normal(0, 0.02, (8, 1)), 0.3, (8, rounds))
        times = np.exp(logs)
        low, median, high = np.quantile(times, (0.25, 0.5, 0.75), axis=1)
        spread = times.std(axis=1, ddof=1) if rounds > 1 else np.zeros(8)
        columns = np.stack([median, spread, high - low, times.min(axis=1)], axis=1)
        timings = (
            entry(f"{run}", m, stddev=s, iqr=q, min=least, rounds=rounds)
            for run, (m, s, q, least) in enumerate(columns.tolist())
        )
        return Run(Path("file.json"), saved(*map(Benchmark.from_timing, timings)))

    found = (
        compare([process() for _ in range(files)], [process() for _ in range(files)], Rules())
        for _ in range(FAMILIES)
    )
    assert sum("regressed" in comparison.counts for comparison in found) <= MOST


@pytest.mark.parametrize(
    ("files", "runs", "noise"),
    [
        ((1, 1), 24, outliers(0.01)),
        ((2, 2), 24, outliers(0.01)),
        ((3, 3), 24, outliers(0.01)),
        ((8, 1), 4, outliers(0.01)),
        ((8, 1), 24, outliers(0.01, share=0.02, slower=0.3)),
        ((2, 2), 4, outliers(0.01, share=0.1, slower=1.0)),
    ],
)
def test_outliers_rarely_regress(files: tuple[int, int], runs: int, noise: Noise) -> None:
    outcomes = simulate_compare(noise, files=files, families=FAMILIES, runs=runs)
    assert (outcomes == "regressed").any(axis=1).sum() <= MOST


@pytest.mark.parametrize("files", [(1, 1), (2, 2), (8, 1)])
@pytest.mark.parametrize(("share", "slower"), [(1 / 3, 1.3), (0.5, 1.3), (0.6, 2.0), (0.9, 1.5)])
def test_other_load_rarely_regresses(files: tuple[int, int], share: float, slower: float) -> None:
    """Other load slows some rounds of the last new process, and in half of the cases also of the
    first base process."""

    def process(place: int) -> Run:
        times = np.exp(rng.normal(math.log(1e-3), 0.01, (8, 40)))
        if place == sum(files) - 1 or (place == 0 and family % 2):
            times[:, rng.permutation(40)[: round(40 * share)]] *= slower
        low, median, high = np.quantile(times, (0.25, 0.5, 0.75), axis=1)
        columns = np.stack([median, high - low, times.min(axis=1)], axis=1)
        timings = (
            entry(f"{run}", m, stddev=1.0, iqr=q, min=least, rounds=40)
            for run, (m, q, least) in enumerate(columns.tolist())
        )
        return Run(Path("file.json"), saved(*map(Benchmark.from_timing, timings)))

    for family in range(4):
        rng = np.random.default_rng(family)
        runs = [process(place) for place in range(sum(files))]
        comparison = compare(runs[: files[0]], runs[files[0] :], Rules())
        assert comparison.exit_code != 1


def test_disturbed_base_does_not_hide_slowdown() -> None:
    """Base files disagree, or the base has a slow median but a normal fastest round."""
    assert outcome([1.0, 1.3], [1.15])[:2] == ("suspected", 2)
    assert outcome([1.0, 1.3], [1.15, 1.15]) == (
        "suspected",
        2,
        (
            "max-slowdown: +0.9%, limit 5.0%, but +15.0% without the slowest file of a side: "
            "int8bench ab or 4 files of the base can decide"
        ),
    )
    assert outcome([1.0, 1.3], [1.02, 1.02])[:2] == ("improved", 0)
    assert outcome([1.0, 1.01], [1.0, 1.3])[:2] == ("suspected", 2)
    history = [1.0, 1.01, 0.99, 1.005, 0.995, 1.01, 0.99]
    assert outcome([*history, 1.5], [1.3])[:2] == ("suspected", 2)
    assert outcome([*history, 1.5], [1.0])[:2] == ("same", 0)
    assert outcome([1, 1.01, 2], [1.2, 1.21, 1.19])[:2] == ("suspected", 2)

    def fastest(median: float, least: float) -> Run:
        return Run(Path("x.json"), saved(timed(slower=median, batch_time_min_s=0.12 * least)))

    [run] = compare([fastest(1.3, 1.0)], [fastest(1.25, 1.25)], Rules()).runs
    assert (run.outcome, run.exit_code) == ("suspected", 2)
    assert "but +25.0% by the fastest rounds" in str(run.reason)
    [run] = compare([fastest(1.0, 1.0)], [fastest(2.0, 1.01)], Rules()).runs
    assert (run.outcome, run.reason) == (
        "suspected",
        (
            "max-slowdown: +100.0%, limit 5.0%, but +1.0% by the fastest rounds, as other load "
            "shows: int8bench ab or 7 files of the base can decide"
        ),
    )
    [run] = compare([fastest(1.0, 1.0)], [fastest(2.0, 1.9)], Rules()).runs
    assert run.outcome == "regressed"


def test_copies_of_a_file_do_not_determine_the_noise() -> None:
    assert outcome([1.0] * 8, [1.06])[:2] == ("suspected", 2)
    assert outcome([1.0] * 8, [1.2])[:2] == ("regressed", 1)


def test_uncertain_rounds_add_to_the_assumed_noise() -> None:
    base, new = (timed(slower=by, batch_time_standard_error=0.1) for by in (1.0, 1.2))
    sides = ([Run(Path("x.json"), saved(record))] for record in (base, new))
    assert compare(*sides, Rules()).runs[0].outcome == "suspected"


@pytest.mark.parametrize(
    ("noise", "files", "slowdown", "outcome"),
    [
        (0.02, (1, 1), 0.4, "regressed"),
        (0.02, (5, 5), 0.15, "regressed"),
        (0.01, (3, 3), 0.15, "regressed"),
        (0.01, (8, 1), 0.15, "regressed"),
        (0.005, (2, 2), 0.08, "suspected"),
        (0.005, (5, 1), 0.08, "suspected"),
    ],
)
def test_slower_code_is_found(
    noise: float, files: tuple[int, int], slowdown: float, outcome: str
) -> None:
    slowdowns = [slowdown] + [0.0] * 23
    outcomes = simulate_compare(normal(noise), files=files, families=20, slowdowns=slowdowns)
    assert (outcomes[:, 0] == outcome).mean() >= 0.9


# -- messages -------------------------------------------------------------------------------------


def compared(base: list[float], new: list[float], rules: Rules | None = None) -> Comparison:
    sides = (
        [Run(Path(f"{name}.json"), saved(timed(slower=factor))) for factor in factors]
        for name, factors in (("base", base), ("new", new))
    )
    return compare(*sides, rules or Rules())


def outcome(*sides: list[float], rules: Rules | None = None) -> tuple[str, int, str | None]:
    [run] = compared(*sides, rules).runs
    return run.outcome, run.exit_code, run.reason


def test_suspected_slowdown_reports_assumption_and_remedy() -> None:
    assert outcome([1.0], [1.1]) == (
        "suspected",
        2,
        (
            "max-slowdown: +10.0%, limit 5.0%, shown from 11.9% on if processes differ by 4.0%, as "
            "is assumed: int8bench ab or 7 files of the base can decide"
        ),
    )
    assert outcome([1.0], [1.12])[:2] == ("regressed", 1)


def test_suspected_p95_growth_suggests_more_files() -> None:
    rules = Rules(limits={"p95": 0.05, "throughput": None, "memory": None})
    assert outcome([1.0], [1.2], rules=rules) == (
        "suspected",
        2,
        (
            "max-p95-growth: +20.0%, limit 5.0%, shown from 26.2% on if processes differ by 10.0%, "
            "as is assumed: 7 files of the base can decide"
        ),
    )


def test_a_history_gives_a_prediction_interval_for_one_process() -> None:
    history = [1.0, 1.01, 0.99, 1.005, 0.995, 1.01, 0.99]
    [run] = compared(history, [1.08]).runs
    change = run.change("throughput")
    assert change is not None
    logs = [math.log(factor) for factor in history]
    spread = math.sqrt(sum((log - sum(logs) / 7) ** 2 for log in logs) / 6)
    reach = stats.t.isf(0.025, 6) * spread * math.sqrt(1 + 1 / 7)
    # The only other test, of unchanged memory, is not rejected; this one is rejected first.
    assert change.shown_from == pytest.approx(
        math.expm1(reach * stats.t.isf(0.05, 6) / stats.t.isf(0.025, 6))
    )
    assert (change.assumed, run.outcome) == (None, "regressed")
    assert outcome(history, [1.02])[0] == "same"


def test_noisy_history_widens_the_assumed_noise() -> None:
    assert outcome([1.0, 1.3, 0.9], [1.2])[:2] == ("suspected", 2)
    assert outcome([1.0, 1.3], [1.4])[:2] == ("suspected", 2)
    assert outcome([1.0, 1.2, 0.9, 1.0, 1.1, 1.0, 0.9], [1.2])[:2] == ("same", 0)


def test_given_floor_replaces_the_assumed_noise() -> None:
    rules = Rules(floors={"throughput": 0.02})
    assert outcome([1.0], [1.06], rules=rules)[:2] == ("regressed", 1)
    assert compared([1.0], [1.06], rules).runs[0].changes[0].shown_from is None


def test_more_runs_need_stronger_evidence() -> None:
    def shown_from(runs: int) -> float:
        sides = [Run(Path("x.json"), saved(*(timed(str(run)) for run in range(runs))))] * 2
        change = compare(sides[:1], sides[1:], Rules()).runs[0].change("throughput")
        assert change is not None
        assert change.shown_from is not None
        return change.shown_from

    values = [shown_from(runs) for runs in (1, 2, 24)]
    expected = [
        math.expm1(stats.t.isf(0.05 / (2 * runs), 5) * math.sqrt(3 / 5) * 0.04 * math.sqrt(2))
        for runs in (1, 2, 24)
    ]
    assert values == pytest.approx(expected)


@pytest.mark.parametrize(
    ("base", "new", "known"),
    [
        (1, 1, False),
        (2, 2, False),
        (5, 1, False),
        (6, 1, False),
        (7, 1, True),
        (3, 2, False),
        (4, 2, True),
        (3, 3, True),
        (1, 7, True),
    ],
)
def test_number_of_files_that_determine_the_noise(base: int, new: int, known: bool) -> None:
    assert shows_noise(base, new) is known


@given(st.integers(1, 30))
def test_files_needed_is_minimal(new: int) -> None:
    needed = files_needed(new)
    assert shows_noise(needed, new)
    assert needed == 1 or not shows_noise(needed - 1, new)
