"""Deciding between two revisions: rules, laws, and simulated error rates of the whole procedure.

Simulated are families of 24 runs, each measured by processes in the order in which they would
run. Rates are held by binomial bounds of one in a thousand.
"""

from __future__ import annotations

import itertools
import math
import re
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from pytest_int8bench.gate.ab.design import Design
from pytest_int8bench.gate.ab.judging import Estimate, Judged, Screened, holm, judge, screen

RUNS = 24
RNG_SEED = 20
DEFAULT = Design()

Array = np.ndarray[Any, Any]


# --- The simulator ---


@dataclass(frozen=True, kw_only=True)
class Machine:
    """How the times of processes vary. Shares of the time, as standard deviations."""

    noise: float
    """Of a process."""
    shared: float = 0.0
    """Share of the noise's variance that all runs of a process have in common."""
    drift: float = 0.0
    """Linear growth of the time over the whole session."""
    walk: float = 0.0
    """Step of a random walk, from each process to the next."""
    tails: float | None = None
    """Degrees of freedom of the t distribution of the noise; normal if ``None``."""

    def logs(self, rng: np.random.Generator, families: int, processes: int) -> Array:
        """Log times of shape (families, processes, runs), of code that never changes."""

        def draw(runs: int) -> Array:
            shape = (families, processes, runs)
            if self.tails is None:
                return rng.normal(size=shape)
            return rng.standard_t(self.tails, shape) / math.sqrt(self.tails / (self.tails - 2))

        own = draw(RUNS) * math.sqrt(1 - self.shared)
        common = draw(1) * math.sqrt(self.shared)
        walk = rng.normal(0, self.walk, (families, processes, 1)).cumsum(axis=1)
        line = math.log1p(self.drift) * np.linspace(0, 1, processes)[:, None]
        return self.noise * (own + common) + walk + line


@dataclass(frozen=True, kw_only=True)
class Session:
    """What became of the runs of many families; arrays of shape (families, runs)."""

    flagged: Array
    outcomes: Array
    """``PASS`` for what screening cleared."""

    def share(self, outcome: str) -> float:
        """Of all runs."""
        return float((self.outcomes == outcome).mean())

    def families_with(self, outcome: str) -> int:
        return int((self.outcomes == outcome).any(axis=1).sum())


def simulate(
    machine: Machine,
    *,
    families: int,
    slowdowns: float | list[float] = 0.0,
    design: Design = DEFAULT,
    seed: int = RNG_SEED,
) -> Session:
    """Both stages, stage after stage: AB BA AB BA, then ABA blocks of the flagged runs."""
    screening = "".join(("AB", "BA")[block % 2] for block in range(design.screening_blocks))
    order = np.array(list(screening + "ABA" * design.verdict_blocks))
    rng = np.random.default_rng(seed)
    logs = machine.logs(rng, families, len(order))
    logs[:, order == "B"] += np.log1p(np.broadcast_to(slowdowns, RUNS))
    times = np.exp(logs).transpose(0, 2, 1)

    first, then = np.split(times, [len(screening)], axis=2)
    base, new = (first[..., order[: len(screening)] == name] for name in "AB")
    # Screening knows nothing of families: it takes all runs of them at once.
    screened = screen(base.reshape(-1, base.shape[2]), new.reshape(-1, new.shape[2]), design)
    flagged = np.array([run.flagged for run in screened]).reshape(families, RUNS)
    outcomes = np.full((families, RUNS), "PASS", dtype="<U12")
    for family in np.flatnonzero(flagged.any(axis=1)):
        runs = flagged[family]
        base, new, base_again = (then[family, runs, place::3] for place in range(3))
        outcomes[family, runs] = [run.outcome for run in judge(base, new, base_again, design)]
    return Session(flagged=flagged, outcomes=outcomes)


def at_most(hits: int, trials: int, rate: float) -> bool:
    """Whether the true rate is shown to be under ``rate`` (Clopper and Pearson 1934)."""
    return bool(hits < trials and stats.beta.isf(0.001, hits + 1, trials - hits) < rate)


def not_over(hits: int, trials: int, rate: float) -> bool:
    """Whether the hits are no evidence of more than ``rate``."""
    return bool(stats.binom.sf(hits - 1, trials, rate) > 0.001)


DRIFTING = {"drift": 0.02, "walk": 0.001}
MACHINES = {
    f"noise {noise:.1%}{', drift' if drift else ''}{', shared' if shared else ''}": Machine(
        noise=noise, shared=shared, **drift
    )
    for noise, drift, shared in itertools.product((0.003, 0.01), ({}, DRIFTING), (0.0, 0.5))
}
HEAVY = {
    f"noise {noise:.1%}, t with 4 df": Machine(noise=noise, tails=4, **DRIFTING)
    for noise in (0.003, 0.01)
}
every_machine = pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
with_heavy_tails = pytest.mark.parametrize(
    "machine", [*MACHINES.values(), *HEAVY.values()], ids=[*MACHINES, *HEAVY]
)


# --- Error rates ---


@with_heavy_tails
def test_identical_code_never_fails_in_five_percent_of_families(machine: Machine) -> None:
    session = simulate(machine, families=1000)
    assert at_most(session.families_with("FAIL"), 1000, 0.05)
    assert session.share("INCONCLUSIVE") < 0.005


@with_heavy_tails
def test_code_slower_by_the_margin_fails_in_at_most_five_percent_of_families(
    machine: Machine,
) -> None:
    session = simulate(machine, families=600, slowdowns=DEFAULT.margin)
    assert not_over(session.families_with("FAIL"), 600, 0.05)
    assert session.families_with("FAIL") > 5  # not by never failing


@pytest.mark.parametrize("slow_too", [0.0, 0.05])
def test_code_slower_by_the_margin_among_slow_runs(slow_too: float) -> None:
    """That runs beside them fail rightly costs the level nothing, however few are left."""
    slowdowns = [DEFAULT.margin] * 6 + [slow_too] * (RUNS - 6)
    session = simulate(MACHINES["noise 0.3%"], families=1000, slowdowns=slowdowns)
    wrong = int((session.outcomes[:, :6] == "FAIL").any(axis=1).sum())
    assert not_over(wrong, 1000, 0.05)
    assert wrong > 20


@every_machine
def test_one_run_slower_by_what_must_be_found_is_found(machine: Machine) -> None:
    slowdowns = [DEFAULT.max_slowdown] + [0.0] * (RUNS - 1)
    session = simulate(machine, families=600, slowdowns=slowdowns)
    missed = int((session.outcomes[:, 0] != "FAIL").sum())
    passed = int((session.outcomes[:, 0] == "PASS").sum())
    assert at_most(missed, 600, 0.1)
    assert at_most(passed, 600, 0.05)
    others = int((session.outcomes[:, 1:] == "FAIL").any(axis=1).sum())
    assert at_most(others, 600, 0.05)


@every_machine
def test_every_run_slower_by_what_must_be_found_is_found(machine: Machine) -> None:
    session = simulate(machine, families=300, slowdowns=DEFAULT.max_slowdown)
    missed = (session.outcomes != "FAIL").sum(axis=0)
    passed = (session.outcomes == "PASS").sum(axis=0)
    assert all(at_most(int(count), 300, 0.1) for count in missed)
    assert all(at_most(int(count), 300, 0.05) for count in passed)


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
    """As the docstring of ``screening_blocks`` says."""
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


@pytest.mark.parametrize("tails", [None, 4.0])
def test_bounds_hold_at_their_level(tails: float | None) -> None:
    """Of all runs of many families, each of its own."""
    logs = Machine(noise=0.01, tails=tails).logs(np.random.default_rng(RNG_SEED), 400, 18)
    base, new, again = (np.exp(logs[:, place::3]).transpose(0, 2, 1) for place in range(3))
    judged = judge(*(times.reshape(-1, 6) for times in (base, new, again)), DEFAULT)
    bounds = [run.estimate for run in judged if run.estimate is not None]
    assert len(bounds) == 9600
    below = sum(estimate.high < 0 for estimate in bounds)
    above = sum(estimate.low > 0 for estimate in bounds)
    assert not_over(below, 9600, 0.05)
    assert not_over(above, 9600, 0.05)
    assert min(below, above) > 0.035 * 9600
    noise = np.array([estimate.noise for estimate in bounds])
    assert math.sqrt((noise**2).mean()) == pytest.approx(0.01, rel=0.03)


@pytest.mark.parametrize(("step", "low", "high"), [(1.01, 0.04, 0.06), (1.0, 0.0, 0.0)])
def test_a_control_is_called_unsteady_by_chance_at_the_level(
    step: float, low: float, high: float
) -> None:
    """At half the level if the base differs by the margin in one direction, here in either for
    half of the runs; not at all if it does not differ."""
    rng = np.random.default_rng(RNG_SEED)
    base, again = np.exp(rng.normal(0, 0.003, (2, 8000, 6)))
    again[:4000] *= step
    again[4000:] /= step
    judged = judge(base, base, again, DEFAULT)
    unsteady = [run.reason is not None and "steady" in run.reason for run in judged]
    for half in (unsteady[:4000], unsteady[4000:]):
        assert low / 2 <= sum(half) / 4000 <= high / 2


# --- Rules ---


def blocks(mean: float, spread: float, count: int) -> Array:
    """Times of one run, in seconds, with that slowdown and that standard deviation of the logs."""
    steps = np.resize([1.0, -1.0], count)
    steps -= steps.mean()
    steps /= steps.std(ddof=1)
    return 0.02 * np.exp(math.log1p(mean) + spread * steps)[None]


def verdict(
    slowdown: float,
    spread: float = 0.005,
    count: int = 6,
    *,
    again: float = 0.0,
    again_spread: float = 0.0,
    design: Design = DEFAULT,
) -> Judged:
    """Of one run whose log ratios have that spread."""
    base = np.full((1, count), 0.02)
    base_again = blocks(again, again_spread, count)
    new = blocks(slowdown, spread, count) * np.sqrt(base_again / base)
    return judge(base, new, base_again, design)[0]


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


@given(st.integers(2, 8), st.integers(0, 1000))
def test_p_values_are_those_of_scipy(count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    base, new, again = np.exp(rng.normal(0, 0.02, (3, 5, count)))
    judged = judge(base, new, again, DEFAULT)
    ratios = np.log(new) - (np.log(base) + np.log(again)) / 2
    test = stats.ttest_1samp(ratios, math.log1p(0.01), axis=1, alternative="greater")
    np.testing.assert_allclose([run.p for run in judged], test.pvalue, rtol=1e-9)
    np.testing.assert_array_equal([run.p_holm for run in judged], holm([run.p for run in judged]))
    interval = stats.ttest_1samp(ratios, 0.0, axis=1).confidence_interval(0.9)
    for run, low, high in zip(judged, *interval, strict=True):
        assert run.estimate is not None
        assert run.estimate.low == pytest.approx(math.expm1(low))
        assert run.estimate.high == pytest.approx(math.expm1(high))


def test_fail() -> None:
    found = verdict(0.05)
    assert (found.outcome, found.reason, found.blocks_needed) == ("FAIL", None, None)
    assert found.p == found.p_holm < 0.001
    assert found.estimate is not None
    assert found.estimate.slowdown == pytest.approx(0.05)
    assert found.estimate.noise == pytest.approx(0.005 / math.sqrt(1.5))
    assert found.estimate.blocks == 6
    assert found.estimate.low > DEFAULT.margin
    assert found.control is not None
    assert found.control.slowdown == pytest.approx(0)
    assert found.control.noise == 0


def test_a_small_slowdown_that_is_shown_fails() -> None:
    """Over the margin is over the margin, far under ``max_slowdown`` as it may be."""
    assert verdict(0.02, 0.005).outcome == "FAIL"


def test_pass() -> None:
    for slowdown in (-0.3, 0.0, 0.01):
        found = verdict(slowdown)
        assert (found.outcome, found.reason, found.blocks_needed) == ("PASS", None, None)
        assert found.p >= 0.49


def test_a_pass_excludes_what_must_be_found_at_the_level() -> None:
    """t with 5 degrees of freedom reaches 2.015 standard errors."""
    widest = math.log1p(0.05) / (2.0150 / math.sqrt(6))
    assert verdict(0.0, 0.999 * widest).outcome == "PASS"
    assert verdict(0.0, 1.001 * widest).outcome == "INCONCLUSIVE"


def test_between_the_limits_without_proof_is_a_pass() -> None:
    found = verdict(0.02, 0.02)
    assert found.outcome == "PASS"
    assert 0.05 < found.p < 0.5
    assert found.estimate is not None
    assert found.estimate.high < 0.05


def test_more_runs_ask_for_more_proof() -> None:
    """One of two p-values counts double, so what fails alone can pass beside another."""
    assert 0.03 < verdict(0.02, 0.011).p < 0.05
    assert verdict(0.02, 0.011).outcome == "FAIL"
    base = np.full((2, 6), 0.02)
    new = np.concatenate([blocks(0.02, 0.011, 6), blocks(0.0, 0.005, 6)])
    first, second = judge(base, new, base, DEFAULT)
    assert first.p_holm == 2 * first.p
    assert first.outcome == second.outcome == "PASS"


def test_inconclusive() -> None:
    found = verdict(0.031, 0.04)
    assert found.outcome == "INCONCLUSIVE"
    assert found.blocks_needed == 34
    assert found.reason == (
        "a slowdown of 3.1% [-0.2, 6.5] is neither shown to be over 1% (p 0.13 for 1 run) "
        "nor under 5%: at the noise seen (3.3%) 34 blocks would decide"
    )


def test_inconclusive_for_ever() -> None:
    found = verdict(0.031, 0.5)
    assert (found.outcome, found.blocks_needed) == ("INCONCLUSIVE", None)
    assert found.reason is not None
    assert found.reason.endswith("at the noise seen (40.8%) over 1000 blocks would decide")


@given(st.floats(-0.1, 0.2), st.floats(0.002, 0.1), st.integers(2, 12), st.integers(1, 30))
def test_the_blocks_asked_for_would_decide(
    slowdown: float, spread: float, count: int, runs: int
) -> None:
    """With 90 %, and one fewer with less, for a true slowdown and a noise as seen."""
    base = np.full((runs, count), 0.02)
    new = np.repeat(blocks(slowdown, spread, count), runs, axis=0)
    found = judge(base, new, base, DEFAULT)[-1]
    if found.outcome != "INCONCLUSIVE":
        assert found.blocks_needed is None
        return
    tests = [
        (math.log1p(slowdown) - math.log1p(0.01), 0.05 / runs),
        (math.log1p(0.05) - math.log1p(slowdown), 0.05),
    ]

    def decides(blocks: int) -> bool:
        return any(
            stats.nct.sf(stats.t.isf(level, blocks - 1), blocks - 1, gap / spread * blocks**0.5)
            >= 0.9
            for gap, level in tests
        )

    if found.blocks_needed is None:
        assert not decides(1000)
    else:
        assert found.blocks_needed > count
        assert decides(found.blocks_needed)
        assert found.blocks_needed == count + 1 or not decides(found.blocks_needed - 1)


@pytest.mark.parametrize("slowdown", [0.0, 0.03, 0.2])
@pytest.mark.parametrize(
    ("again", "text"), [(0.023, "2.3% [1.5, 3.1]"), (-0.023, "-2.3% [-3.1, -1.5]")]
)
def test_a_base_that_differs_from_itself_decides_nothing(
    slowdown: float, again: float, text: str
) -> None:
    # t with 5 degrees of freedom reaches 2.571 standard errors at 2.5 %.
    found = verdict(slowdown, again=again, again_spread=0.0076)
    assert found.outcome == "INCONCLUSIVE"
    assert found.reason == f"base differs from itself by {text}: the machine was not steady"
    assert found.blocks_needed is None
    assert found.control is not None
    assert found.control.noise == pytest.approx(0.0076 / math.sqrt(2))


@pytest.mark.parametrize("sign", [1, -1])
def test_the_control_is_tested_at_half_the_level(sign: int) -> None:
    """Bounds of 2.5 % reach 2.571 standard errors, with 5 degrees of freedom."""
    widest = (math.log1p(0.023) - math.log1p(0.01)) / (2.5706 / math.sqrt(6))
    again = math.expm1(sign * math.log1p(0.023))
    for share, outcome in ((0.999, "INCONCLUSIVE"), (1.001, "FAIL")):
        found = verdict(0.05, 0.001, again=again, again_spread=share * widest)
        assert found.outcome == outcome, share


def test_what_is_not_shown_of_the_control_does_not_count() -> None:
    assert verdict(0.05, again=0.02, again_spread=0.02).outcome == "FAIL"
    assert verdict(0.05, again=0.009, again_spread=0.0001).outcome == "FAIL"


@pytest.mark.parametrize(
    ("slowdown", "outcome", "p"),
    [(0.0, "PASS", 1.0), (0.01, "PASS", 1.0), (0.0100001, "FAIL", 0.0), (0.05, "FAIL", 0.0)],
)
@pytest.mark.parametrize("count", [2, 3, 6])
@pytest.mark.parametrize("second", [0.1, 1.0, 1 / 3])
def test_times_without_noise(
    slowdown: float, outcome: str, p: float, count: int, second: float
) -> None:
    """Those of a fake clock: nothing is divided by zero, and rounding proves nothing."""
    base = np.full((3, count), second) * np.array([[1.0], [3.0], [7.0]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        judged = judge(base, base * (1 + slowdown), base, DEFAULT)
        screened = screen(base, base * (1 + slowdown), DEFAULT)
    for run in judged:
        assert (run.outcome, run.p, run.p_holm) == (outcome, p, p)
        assert run.control == Estimate(slowdown=0, low=0, high=0, noise=0, blocks=count)
    for one in (*judged, *screened):
        assert one.estimate is not None
        assert one.estimate.low == one.estimate.slowdown == one.estimate.high
        assert one.estimate.slowdown == pytest.approx(slowdown, abs=1e-12)
        assert one.estimate.noise == 0
    assert [run.flagged for run in screened] == [outcome == "FAIL"] * 3


def test_limits_that_are_next_to_each_other_and_no_noise() -> None:
    design = Design(margin=math.nextafter(0.05, 0))
    found = verdict(0.05, 0.0, design=design)
    assert (found.outcome, found.blocks_needed) == ("INCONCLUSIVE", None)


@pytest.mark.parametrize(
    ("factor", "outcome"),
    [(1.01, "FAIL"), (1 / 1.01, "FAIL"), (1.0100001, "INCONCLUSIVE"), (0.98, "INCONCLUSIVE")],
)
def test_a_control_without_noise_at_the_margin_is_clean(factor: float, outcome: str) -> None:
    """Rounding puts some of these times beyond it."""
    base = np.tile(np.geomspace(0.001, 10, 40)[:, None], (1, 6))
    judged = judge(base, base * 1.05, base * factor, DEFAULT)
    assert [run.outcome for run in judged] == [outcome] * 40


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_blocks_for_a_verdict(count: int) -> None:
    times = np.full((2, count), 0.02)
    expected = Judged(
        outcome="INCONCLUSIVE",
        estimate=None,
        p=1.0,
        p_holm=1.0,
        control=None,
        reason=f"only {count} of 6 blocks",
        blocks_needed=6,
    )
    assert judge(times, times, times, DEFAULT) == [expected] * 2


def test_dropped_blocks_leave_a_verdict() -> None:
    found = verdict(0.05, 0.003, 3)
    assert found.outcome == "FAIL"
    assert found.estimate is not None
    assert found.estimate.blocks == 3


def test_no_runs() -> None:
    none = np.empty((0, 4))
    assert screen(none, none, DEFAULT) == []
    assert judge(none, none, none, DEFAULT) == []


def test_two_blocks_that_could_mean_anything() -> None:
    """A bound beyond all numbers is infinite, without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = judge([[1.0, 1.0]], [[1e-100, 1e100]], [[1.0, 1.0]], DEFAULT)[0]
    assert found.outcome == "INCONCLUSIVE"
    assert found.estimate is not None
    assert (found.estimate.low, found.estimate.high) == (-1.0, math.inf)


GOOD = [[0.02, 0.03]]


@pytest.mark.parametrize(
    ("base", "new", "message"),
    [
        ([0.02, 0.03], GOOD, "base must have the shape (runs, blocks), got (2,)"),
        (GOOD, 0.02, "new must have the shape (runs, blocks), got ()"),
        (GOOD, [[0.02, 0.03, 0.04]], "new must have the shape of base, (1, 2), got (1, 3)"),
        (GOOD, [[0.0, 0.03]], "new must be positive, finite seconds: 1 are not"),
        ([[-1.0, math.nan]], GOOD, "base must be positive, finite seconds: 2 are not"),
        (GOOD, [[math.inf, 0.03]], "new must be positive, finite seconds: 1 are not"),
    ],
)
def test_times_that_are_none(base: Any, new: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        screen(base, new, DEFAULT)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        judge(base, new, GOOD, DEFAULT)
    message = message.replace("new ", "base_again ")
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        judge(base, GOOD, new, DEFAULT)


# --- Holm's correction ---

p_values = st.lists(st.sampled_from([0.0, 0.004, 0.01, 0.013, 0.02, 0.03, 0.05, 0.2, 0.6, 1.0]))


@given(p_values.filter(lambda p: len(p) <= 4))
def test_holm_is_the_closure_of_bonferronis(p: list[float]) -> None:
    """A hypothesis is rejected if every set of hypotheses with it is, by its smallest p-value
    times its size."""
    indices = range(len(p))
    expected = [
        max(
            min(1.0, len(together) * min(p[other] for other in together))
            for size in range(1, len(p) + 1)
            for together in itertools.combinations(indices, size)
            if index in together
        )
        for index in indices
    ]
    np.testing.assert_allclose(holm(p), expected, rtol=1e-12)


@given(st.lists(st.floats(0, 1), max_size=40), st.randoms(use_true_random=False))
def test_laws_of_holm(p: list[float], random: Any) -> None:
    adjusted = holm(p)
    assert (adjusted >= p).all()
    assert (adjusted <= 1).all()
    assert (np.diff(adjusted[np.argsort(p, kind="stable")]) >= 0).all()
    order = random.sample(range(len(p)), len(p))
    np.testing.assert_array_equal(holm([p[index] for index in order]), adjusted[order])
    if p:
        assert adjusted.min() == min(1.0, len(p) * min(p))
        assert adjusted.max() >= max(p)


# --- Laws ---

seeds = st.integers(0, 10_000)


def close(first: Judged | Screened, second: Judged | Screened) -> bool:
    """Equal but for rounding."""
    one, other = first.estimate, second.estimate
    assert one is not None
    assert other is not None
    same = all(
        getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-6, abs=1e-9)
        for name in ("slowdown", "low", "high", "noise", "blocks")
    )
    if isinstance(first, Judged) and isinstance(second, Judged):
        return same and first.outcome == second.outcome
    return same and getattr(first, "flagged", None) == getattr(second, "flagged", None)


def draw(seed: int, count: int = 3) -> Array:
    """Times of a few runs, most of them slower."""
    rng = np.random.default_rng(seed)
    times = 0.02 * np.exp(rng.normal(0, rng.choice([0.003, 0.02]), (count, 5, 4)))
    times[1] *= 1 + rng.uniform(-0.02, 0.08, (5, 1))
    return times


@given(seeds, st.floats(1e-6, 1e6))
def test_the_unit_of_time_does_not_matter(seed: int, factor: float) -> None:
    base, new, again = draw(seed)
    for one, other in zip(
        [*screen(base, new, DEFAULT), *judge(base, new, again, DEFAULT)],
        [
            *screen(base * factor, new * factor, DEFAULT),
            *judge(base * factor, new * factor, again * factor, DEFAULT),
        ],
        strict=True,
    ):
        assert close(one, other)


@given(seeds)
def test_swapping_the_revisions_mirrors_the_estimate(seed: int) -> None:
    base, new, again = draw(seed)
    middle = np.sqrt(base * again)
    pairs = [
        *zip(screen(base, new, DEFAULT), screen(new, base, DEFAULT), strict=True),
        *zip(judge(base, new, again, DEFAULT), judge(new, middle, new, DEFAULT), strict=True),
    ]
    for one, other in pairs:
        assert one.estimate is not None
        assert other.estimate is not None
        assert math.log1p(other.estimate.slowdown) == pytest.approx(
            -math.log1p(one.estimate.slowdown), abs=1e-9
        )
        assert math.log1p(other.estimate.low) == pytest.approx(
            -math.log1p(one.estimate.high), abs=1e-9
        )
        assert other.estimate.noise == pytest.approx(one.estimate.noise, abs=1e-9)


@given(seeds, st.lists(st.floats(-0.003, 0.003), min_size=4, max_size=4))
def test_linear_drift_within_blocks_cancels_in_the_verdict_stage(
    seed: int, drifts: list[float]
) -> None:
    """Of each block its own, and whatever the level at which a block starts."""
    base, new, again = draw(seed)
    start = np.exp(np.random.default_rng(seed).normal(0, 0.1, 4))
    growth = np.exp(np.array(drifts))
    moved = (base * start, new * start * growth, again * start * growth**2)
    for one, other in zip(judge(base, new, again, DEFAULT), judge(*moved, DEFAULT), strict=True):
        assert one.p == pytest.approx(other.p, rel=1e-6)
        assert one.estimate is not None
        assert other.estimate is not None
        assert one.estimate.slowdown == pytest.approx(other.estimate.slowdown, abs=1e-9)
        assert one.estimate.noise == pytest.approx(other.estimate.noise, abs=1e-9)


@given(seeds, st.floats(-0.1, 0.1))
def test_linear_drift_over_even_blocks_leaves_the_screened_mean(seed: int, drift: float) -> None:
    """AB BA AB BA: what the order gives to one revision it takes back in the next block."""
    base, new, _ = draw(seed)
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


@given(seeds)
def test_neither_the_order_of_blocks_nor_of_runs_matters(seed: int) -> None:
    base, new, again = draw(seed)
    rng = np.random.default_rng(seed)
    runs, order = rng.permutation(5), rng.permutation(4)
    found = judge(base, new, again, DEFAULT)
    times = (array[runs][:, order] for array in (base, new, again))
    for index, other in zip(runs, judge(*times, DEFAULT), strict=True):
        assert close(found[index], other)
        assert found[index].p_holm == pytest.approx(other.p_holm, rel=1e-6)


@given(seeds)
def test_outcomes_agree_with_what_is_shown(seed: int) -> None:
    base, new, again = draw(seed)
    for run in judge(base, new, again, DEFAULT):
        assert run.estimate is not None
        assert run.control is not None
        assert run.estimate.low <= run.estimate.slowdown <= run.estimate.high
        assert (run.reason is not None) == (run.outcome == "INCONCLUSIVE")
        if run.outcome == "FAIL":
            assert run.p <= run.p_holm <= 0.05
            assert run.estimate.low > 0.01
        elif run.outcome == "PASS":
            assert run.p_holm > 0.05
            assert run.estimate.high < 0.05
