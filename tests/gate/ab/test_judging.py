"""Test decisions between two revisions: rules, laws, and error rates of the whole procedure.

The simulations have families of 24 runs, measured by processes in their real order. Rates are
checked by binomial bounds at 0.001; ``benchmarks/gate_error_rates.py`` prints the full tables.
"""

from __future__ import annotations

import math
import re
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from pytest_int8bench.gate.ab.design import Design
from pytest_int8bench.gate.ab.judging import (
    Estimate,
    Judged,
    Screened,
    decide,
    judge,
    scales,
    screen,
)
from pytest_int8bench.gate.ab.randomization import PLACES
from toys.gate_noise import MACHINES, Noise, drifting, normal, simulate_ab

RUNS = 24
RNG_SEED = 20
DEFAULT = Design()

Array = np.ndarray[Any, Any]


def at_most(hits: int, trials: int, rate: float) -> bool:
    """Return whether the true rate is shown to be under ``rate`` (Clopper and Pearson 1934)."""
    return bool(hits < trials and stats.beta.isf(0.001, hits + 1, trials - hits) < rate)


def not_over(hits: int, trials: int, rate: float) -> bool:
    """Return whether the hits are consistent with ``rate`` or less."""
    return bool(stats.binom.sf(hits - 1, trials, rate) > 0.001)


every_machine = pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
steady = pytest.mark.parametrize("noise", [0.003, 0.01])


# --- Error rates ---

FEW = Design(verdict_blocks=4)  # few enough to enumerate all orders


@every_machine
def test_identical_code_never_fails_in_five_percent_of_families(machine: Noise) -> None:
    session = simulate_ab(machine, families=80, design=FEW)
    assert not_over(session.families_with("FAIL"), 80, 0.05)
    assert session.share("FAIL") < 0.05


@every_machine
def test_code_slower_by_the_margin_fails_in_at_most_five_percent_of_families(
    machine: Noise,
) -> None:
    session = simulate_ab(machine, families=80, slowdowns=DEFAULT.margin, design=FEW)
    assert not_over(session.families_with("FAIL"), 80, 0.05)


@pytest.mark.parametrize("slow_too", [0.0, 0.05])
def test_code_slower_by_the_margin_among_slow_runs(slow_too: float) -> None:
    """True failures of other runs do not raise the error rate, however few runs are left."""
    slowdowns = [DEFAULT.margin] * 6 + [slow_too] * (RUNS - 6)
    session = simulate_ab(drifting(0.003), families=150, slowdowns=slowdowns, design=FEW)
    wrong = int((session.outcomes[:, :6] == "FAIL").any(axis=1).sum())
    assert not_over(wrong, 150, 0.05)
    assert wrong > 0  # the procedure does fail some runs


@pytest.mark.parametrize("slowdowns", [[0.05] + [0.0] * (RUNS - 1), [0.05] * RUNS])
@steady
def test_detects_the_target_slowdown(noise: float, slowdowns: list[float]) -> None:
    session = simulate_ab(drifting(noise), families=150, slowdowns=slowdowns)
    missed = int((session.outcomes[:, 0] != "FAIL").sum())
    passed = int((session.outcomes[:, 0] == "PASS").sum())
    assert at_most(missed, 150, 0.1)
    assert at_most(passed, 150, 0.05)
    if 0.0 in slowdowns:
        others = int((session.outcomes[:, 1:] == "FAIL").any(axis=1).sum())
        assert at_most(others, 150, 0.05)


def test_detects_the_target_slowdown_among_outliers() -> None:
    """With t tests, 42 % of families did if 8 % of times are 20 % too long."""
    slowdowns = [0.05] + [0.0] * (RUNS - 1)
    session = simulate_ab(MACHINES["outliers, normal 0.3 %"], families=60, slowdowns=slowdowns)
    assert (session.outcomes[:, 0] == "FAIL").mean() > 0.75


@pytest.mark.parametrize(("slowdown", "outcome"), [(0.0, "PASS"), (0.12, "FAIL")])
def test_clear_differences_end_at_the_first_look(slowdown: float, outcome: str) -> None:
    design = Design(screening_blocks=2)  # which also flags unchanged code
    session = simulate_ab(normal(0.006), families=300, runs=1, slowdowns=slowdown, design=design)
    assert session.share(outcome) == 1
    assert (session.blocks[session.flagged] == 2).mean() > 0.97


@pytest.mark.parametrize(
    ("blocks", "noise", "unchanged"),
    [
        (2, 0.01, 0.51),
        (3, 0.01, 0.13),
        (4, 0.01, 0.08),
        (2, 0.003, 0.01),
        (3, 0.003, 0.0),
        (4, 0.003, 0.0),
    ],
)
def test_few_screening_blocks_flag_more_but_miss_little(
    blocks: int, noise: float, unchanged: float
) -> None:
    """The docstring of ``screening_blocks`` says so."""
    design = Design(screening_blocks=blocks)
    rng = np.random.default_rng(RNG_SEED)
    base, new = np.exp(rng.normal(0, noise, (2, 20_000, blocks)))
    for slowdown, share in ((0.0, unchanged), (DEFAULT.max_slowdown, 1.0)):
        screened = screen(base, new * (1 + slowdown), design)
        found = sum(run.flagged for run in screened) / 20_000
        assert found == pytest.approx(share, abs=0.005 if slowdown == 0 else 1e-4)


def test_screening_clears_slow_runs_at_its_level_at_most_however_noisy() -> None:
    rng = np.random.default_rng(RNG_SEED)
    cleared = []
    for noise in (0.03, 0.1, 0.3):
        base, new = np.exp(rng.normal(0, noise, (2, 20_000, 2)))
        screened = screen(base, new * 1.05, Design(screening_blocks=2))
        cleared.append(sum(not run.flagged for run in screened))
    assert all(not_over(count, 20_000, 0.05) for count in cleared)
    assert max(cleared) > 200


def draw_orders(seed: int, blocks: int) -> Array:
    """Draw which processes run the new revision, of shape (blocks, 4)."""
    places = np.array([[place in chosen for place in range(4)] for chosen in PLACES])
    found: Array = places[np.random.default_rng(seed).integers(len(PLACES), size=blocks)]
    return found


@pytest.mark.parametrize("tails", [None, 4.0])
def test_bounds_hold_at_their_level(tails: float | None) -> None:
    """Check the bounds of each run, over all runs of many families."""
    rng = np.random.default_rng(RNG_SEED)
    bounds = []
    for seed in range(30):
        logs = normal(0.01, tails=tails)(rng, 1, 12, 40)[0].T.reshape(40, 3, 4)
        judged = judge(np.exp(logs), draw_orders(seed, 3), DEFAULT)
        bounds += [run.estimate for run in judged if run.estimate is not None]
    assert len(bounds) == 1200
    below = sum(estimate.high < 0 for estimate in bounds)
    above = sum(estimate.low > 0 for estimate in bounds)
    assert not_over(below, 1200, 0.05)
    assert not_over(above, 1200, 0.05)
    assert min(below, above) > 0.03 * 1200
    noise = np.array([estimate.noise for estimate in bounds])
    assert math.sqrt((noise**2).mean()) == pytest.approx(0.01, rel=0.06)


@pytest.mark.parametrize(("step", "low", "high"), [(1.01, 0.03, 0.07), (1.0, 0.0, 0.0)])
def test_control_false_alarm_rate_is_the_level(step: float, low: float, high: float) -> None:
    """At half the level if the base differs by the margin in one direction, here in either for
    half of the runs; not at all if it does not differ."""
    rng = np.random.default_rng(RNG_SEED)
    logs = rng.normal(0, 0.003, (4000, 3, 4))
    again = math.log(step)
    logs[:2000, :, 3] += again
    logs[2000:, :, 3] -= again
    decided = decide(logs, np.tile(ABBA, (3, 1)), DEFAULT, 0.05, is_last=True)
    for half in (decided.is_unstable[:2000], decided.is_unstable[2000:]):
        assert low / 2 <= half.mean() <= high / 2


# --- Rules ---


def blocks(mean: float, spread: float, count: int) -> Array:
    """Return times of one run in seconds, given its slowdown and the standard deviation of logs."""
    steps = np.resize([1.0, -1.0], count)
    steps -= steps.mean()
    steps /= steps.std(ddof=1)
    return 0.02 * np.exp(math.log1p(mean) + spread * steps)[None]


ABBA = np.array([False, True, True, False])


def verdict(
    slowdown: float,
    noise: float = 0.003,
    count: int = 2,
    *,
    again: float = 0.0,
    design: Design = DEFAULT,
    seed: int = 1,
    is_last: bool = True,
) -> Judged:
    """Judge one run, in blocks with the new revision in the middle."""
    rng = np.random.default_rng(seed)
    is_new = np.tile(ABBA, (count, 1))
    logs = rng.normal(0, noise, (1, count, 4)) + math.log1p(slowdown) * is_new
    logs[..., 3] += math.log1p(again)
    return judge(0.02 * np.exp(logs), is_new, design, is_last=is_last)[0]


def test_screening_flags_by_the_mean_or_by_the_bound() -> None:
    base = np.full((1, 4), 0.02)

    def screened(slowdown: float, spread: float) -> Screened:
        return screen(base, blocks(slowdown, spread, 4), DEFAULT)[0]

    # t with 3 degrees of freedom reaches 2.353 standard errors.
    assert not screened(0.009, 0.01).flagged
    assert screened(0.011, 0.001).flagged
    reach = 2.3534 / 2
    widest = (math.log1p(0.05) - math.log1p(-0.02)) / reach
    assert not screened(-0.02, 0.999 * widest).flagged
    assert screened(-0.02, 1.001 * widest).flagged

    estimate = screened(0.009, 0.01).estimate
    assert estimate is not None
    assert estimate.slowdown == pytest.approx(0.009)
    assert estimate.low == pytest.approx(1.009 * math.exp(-reach * 0.01) - 1, rel=1e-3)
    assert estimate.high == pytest.approx(1.009 * math.exp(reach * 0.01) - 1, rel=1e-3)
    assert estimate.noise == pytest.approx(0.01 / math.sqrt(2))
    assert estimate.blocks == 4


@pytest.mark.parametrize("count", [0, 1])
def test_screening_with_too_few_blocks_flags(count: int) -> None:
    times = np.full((2, count), 0.02)
    assert screen(times, times, DEFAULT) == [Screened(estimate=None, flagged=True)] * 2


def test_clear_slowdown_fails() -> None:
    found = verdict(0.05)
    assert (found.outcome, found.reason, found.blocks_needed) == ("FAIL", None, None)
    assert found.p == found.p_holm == pytest.approx(1 / 36)
    assert found.estimate is not None
    assert found.estimate.slowdown == pytest.approx(0.05, abs=0.005)
    assert found.estimate.blocks == 2
    assert found.estimate.low > DEFAULT.margin
    assert found.control is not None
    assert found.control.slowdown == pytest.approx(0, abs=0.006)


def test_small_but_significant_slowdown_fails() -> None:
    """A slowdown over the margin fails even if it is far below ``max_slowdown``."""
    assert verdict(0.02, 0.001).outcome == "FAIL"


@pytest.mark.parametrize("slowdown", [-0.3, 0.0, 0.008])
@pytest.mark.parametrize("is_last", [True, False])
def test_unchanged_and_faster_code_passes(slowdown: float, is_last: bool) -> None:
    found = verdict(slowdown, 0.001, is_last=is_last)
    assert (found.outcome, found.reason, found.blocks_needed) == ("PASS", None, None)
    assert found.p >= 0.5
    assert found.estimate is not None
    assert found.estimate.high < 0.05


def test_only_the_last_look_passes_estimates_over_the_margin() -> None:
    """More blocks can find a slowdown between the limits."""
    found = {is_last: verdict(0.02, 0.01, is_last=is_last) for is_last in (True, False)}
    assert found[True].estimate is not None
    assert found[True].estimate.slowdown > 0.01
    assert (found[True].outcome, found[False].outcome) == ("PASS", "INCONCLUSIVE")


def test_more_runs_need_stronger_evidence() -> None:
    """A run that fails alone can pass next to one that looks as slow under another order."""
    is_new = np.tile(ABBA, (2, 1))
    steps = np.array([[[0, 0.02, 0.02, 0], [0, 0.02, 0.02, 0]]])
    times = np.exp(np.concatenate([steps, steps[..., [1, 0, 2, 3]]]))
    alone = judge(times[:1], is_new, DEFAULT)[0]
    assert (alone.outcome, alone.p_holm) == ("FAIL", pytest.approx(1 / 36))
    first, _ = judge(times, is_new, DEFAULT)
    assert (first.p, first.p_holm) == (alone.p, pytest.approx(4 / 36))
    assert first.outcome == "PASS"


def test_noisy_run_is_inconclusive() -> None:
    found = verdict(0.03, 0.03)
    assert found.outcome == "INCONCLUSIVE"
    assert found.reason is not None
    assert re.fullmatch(
        r"the slowdown of \S+% \[\S+, \S+\] is not shown to be over 1% \(p = 0\.\d+ for 1 run\) "
        r"or under 5%; at the observed noise \(\S+%\), \d+ blocks would decide",
        found.reason,
    )
    assert found.blocks_needed is not None
    assert f"{found.blocks_needed} blocks would decide" in found.reason


def test_inconclusive_run_may_need_over_1000_blocks() -> None:
    found = verdict(0.031, 2.0, 3)
    assert found.outcome == "INCONCLUSIVE"
    assert found.reason is not None
    if found.blocks_needed is None:
        assert found.reason.endswith("over 1000 blocks would decide")


def test_too_small_level_decides_nothing() -> None:
    is_new = np.tile(ABBA, (2, 1))
    times = np.exp(0.1 * is_new)[None]
    [found] = judge(times, is_new, DEFAULT, level=0.02)
    assert (found.outcome, found.p) == ("INCONCLUSIVE", pytest.approx(1 / 36))


@pytest.mark.parametrize("slowdown", [0.0, 0.03, 0.2])
@pytest.mark.parametrize("again", [0.03, -0.03])
def test_unstable_base_decides_nothing(slowdown: float, again: float) -> None:
    found = verdict(slowdown, 0.002, 6, again=again)
    assert found.outcome == "INCONCLUSIVE"
    sign = "-" if again < 0 else ""
    assert found.reason is not None
    assert found.reason.startswith(f"the base differs from itself by {sign}")
    assert found.reason.endswith("]: the machine was not steady")
    assert found.blocks_needed is None


def test_insignificant_control_difference_is_ignored() -> None:
    assert verdict(0.08, 0.0001, again=0.009).outcome == "FAIL"


@pytest.mark.parametrize(
    ("slowdown", "outcome"), [(0.0, "PASS"), (0.01, "PASS"), (0.0100001, "FAIL"), (0.05, "FAIL")]
)
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("second", [0.1, 1.0, 1 / 3])
def test_times_without_noise(slowdown: float, outcome: str, count: int, second: float) -> None:
    """With the times of a fake clock, nothing is divided by zero and rounding proves nothing."""
    base = np.full((3, count), second) * np.array([[1.0], [3.0], [7.0]])
    is_new = draw_orders(1, count)
    times = np.where(is_new, 1 + slowdown, 1.0) * base[..., None]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        judged = judge(times, is_new, DEFAULT, scale=scales([]) or 1.0)
        screened = screen(base, base * (1 + slowdown), DEFAULT)
    for run in judged:
        assert run.outcome == outcome
        assert run.p == run.p_holm == pytest.approx(6.0**-count if outcome == "FAIL" else 1.0)
        assert run.control == Estimate(slowdown=0, low=0, high=0, noise=0, blocks=count)
    for one in (*judged, *screened):
        assert one.estimate is not None
        assert one.estimate.slowdown == pytest.approx(slowdown, abs=1e-9)
        assert one.estimate.low == pytest.approx(slowdown, abs=1e-9)
        assert one.estimate.high == pytest.approx(slowdown, abs=1e-9)
        assert one.estimate.noise == 0
    assert [run.flagged for run in screened] == [outcome == "FAIL"] * 3


def test_noise_is_at_least_the_median_of_screening() -> None:
    base = np.full((3, 4), 0.02)
    steady, middle, noisy = (blocks(0.0, spread, 4)[0] for spread in (0.001, 0.01, 0.1))
    found = scales(screen(base, np.stack([steady, middle, noisy]), DEFAULT))
    assert found == pytest.approx([spread / math.sqrt(2) for spread in (0.01, 0.01, 0.1)])
    assert scales([]) == []


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_blocks_for_a_verdict(count: int) -> None:
    expected = Judged(
        outcome="INCONCLUSIVE",
        estimate=None,
        p=1.0,
        p_holm=1.0,
        control=None,
        reason=f"measured only {count} of 6 blocks",
        blocks_needed=6,
    )
    found = judge(np.full((2, count, 4), 0.02), np.tile(ABBA, (count, 1)), DEFAULT)
    assert found == [expected] * 2


def test_judges_an_empty_list_of_runs() -> None:
    assert screen(np.empty((0, 4)), np.empty((0, 4)), DEFAULT) == []
    assert judge(np.empty((0, 2, 4)), np.tile(ABBA, (2, 1)), DEFAULT) == []


def test_two_contradictory_blocks_give_infinite_bound() -> None:
    """A bound that overflows is infinite, without a warning."""
    times = np.array([[[1.0, 1e-100, 1e-100, 1.0], [1.0, 1e100, 1e100, 1.0]]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        [found] = judge(times, np.tile(ABBA, (2, 1)), DEFAULT)
    assert found.outcome == "INCONCLUSIVE"
    assert found.estimate is not None
    assert found.estimate.low == pytest.approx(-1.0)
    assert found.estimate.high > 1e50


GOOD = [[0.02, 0.03]]


@pytest.mark.parametrize(
    ("base", "new", "message"),
    [
        ([0.02, 0.03], GOOD, "base must have the shape (runs, blocks), got (2,)"),
        (GOOD, 0.02, "new must have the shape (runs, blocks), got ()"),
        (GOOD, [[0.02, 0.03, 0.04]], "new must have the shape of base, (1, 2), got (1, 3)"),
        (GOOD, [[0.0, 0.03]], "new must be positive and finite seconds, got 1 other value"),
        ([[-1.0, math.nan]], GOOD, "base must be positive and finite seconds, got 2 other values"),
        (GOOD, [[math.inf, 0.03]], "new must be positive and finite seconds, got 1 other value"),
    ],
)
def test_rejects_invalid_times(base: Any, new: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        screen(base, new, DEFAULT)


@pytest.mark.parametrize(
    ("times", "is_new", "message"),
    [
        ([[0.02] * 4], [ABBA], "times must have the shape (runs, blocks, 4), got (1, 4)"),
        ([[[0.02] * 3]], [ABBA], "times must have the shape (runs, blocks, 4), got (1, 1, 3)"),
        ([[[0.02] * 4]], ABBA, "is_new must have the shape (blocks, 4), (1, 4), got (4,)"),
        ([[[0.02] * 4]], [[True] * 4], "is_new must mark exactly two processes in each block"),
        (
            [[[0.0, -1.0, math.nan, 1.0]]],
            [ABBA],
            "times must be positive and finite seconds, got 3 other values",
        ),
    ],
)
def test_rejects_invalid_blocks(times: Any, is_new: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        judge(times, is_new, DEFAULT)


# --- Laws ---

seeds = st.integers(0, 10_000)


def draw(seed: int, count: int = 2) -> Array:
    """Draw times of a few runs, most of them slower."""
    rng = np.random.default_rng(seed)
    times = 0.02 * np.exp(rng.normal(0, rng.choice([0.003, 0.02]), (count, 5, 4)))
    times[1] *= 1 + rng.uniform(-0.02, 0.08, (5, 1))
    return times


@given(seeds, st.floats(1e-6, 1e6))
def test_result_does_not_depend_on_the_time_unit(seed: int, factor: float) -> None:
    base, new = draw(seed)
    for one, other in zip(
        screen(base, new, DEFAULT), screen(base * factor, new * factor, DEFAULT), strict=True
    ):
        assert one.flagged == other.flagged
        assert one.estimate is not None
        assert other.estimate is not None
        assert one.estimate.high == pytest.approx(other.estimate.high, rel=1e-6, abs=1e-9)


@given(seeds)
def test_swapping_the_revisions_mirrors_the_estimate(seed: int) -> None:
    base, new = draw(seed)
    for one, other in zip(screen(base, new, DEFAULT), screen(new, base, DEFAULT), strict=True):
        assert one.estimate is not None
        assert other.estimate is not None
        assert math.log1p(other.estimate.slowdown) == pytest.approx(
            -math.log1p(one.estimate.slowdown), abs=1e-9
        )
        assert other.estimate.noise == pytest.approx(one.estimate.noise, abs=1e-9)


@given(seeds, st.floats(-0.1, 0.1))
def test_linear_drift_over_even_blocks_leaves_the_screened_mean(seed: int, drift: float) -> None:
    """In AB BA AB BA, the effect of drift on one block cancels in the next one."""
    base, new = draw(seed)
    places = np.array([[0, 3, 4, 7], [1, 2, 5, 6]])
    drifting = np.exp(drift * places)
    for one, other in zip(
        screen(base, new, DEFAULT),
        screen(base * drifting[0], new * drifting[1], DEFAULT),
        strict=True,
    ):
        assert one.estimate is not None
        assert other.estimate is not None
        assert one.estimate.slowdown == pytest.approx(other.estimate.slowdown, abs=1e-9)


@settings(max_examples=15)
@given(seeds, st.floats(-0.1, 0.1))
def test_shift_of_a_whole_block_does_not_matter(seed: int, step: float) -> None:
    rng = np.random.default_rng(seed)
    is_new = draw_orders(seed, 2)
    times = np.exp(rng.normal(0, 0.01, (3, 2, 4)) + 0.03 * is_new)
    moved = times * np.exp(step * np.arange(2))[:, None]
    for one, other in zip(
        judge(times, is_new, DEFAULT), judge(moved, is_new, DEFAULT), strict=True
    ):
        assert (one.outcome, one.p, one.p_holm) == (other.outcome, other.p, other.p_holm)


@settings(max_examples=15)
@given(seeds)
def test_outcomes_agree_with_reported_estimates(seed: int) -> None:
    rng = np.random.default_rng(seed)
    is_new = draw_orders(seed, 2)
    steps = rng.uniform(-0.02, 0.08, (5, 1, 1)) * is_new
    times = np.exp(rng.normal(0, rng.choice([0.003, 0.02]), (5, 2, 4)) + steps)
    for run in judge(times, is_new, DEFAULT):
        assert run.estimate is not None
        assert run.control is not None
        assert run.estimate.low <= run.estimate.slowdown <= run.estimate.high
        assert (run.reason is not None) == (run.outcome == "INCONCLUSIVE")
        if run.outcome == "FAIL":
            assert run.p <= run.p_holm <= 0.05
            assert run.estimate.low > 0.01 - 1e-9
        elif run.outcome == "PASS":
            assert run.p_holm > 0.05
            assert run.estimate.high < 0.05 + 1e-9
