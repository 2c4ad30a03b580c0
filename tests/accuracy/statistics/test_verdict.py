"""Test error rates and power of verdicts, and the inputs that they reject.

Error rates of the exact test are enumerated; all others are simulated with the seeds below, and
may exceed the level by three standard errors of the simulation.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from pytest_int8bench.accuracy.limit import Limit
from pytest_int8bench.accuracy.statistics import mean_tests, paired_exact
from pytest_int8bench.accuracy.statistics import verdict as module
from pytest_int8bench.accuracy.statistics.checks import ScoreError
from pytest_int8bench.accuracy.statistics.verdict import ALPHA, Verdict, judge
from pytest_int8bench.errors import ClearError

ONE_PERCENT = Limit.parse("1%")
ONE_POINT = Limit.parse("1pp")
RNG_SEED = 20

Array = np.ndarray[Any, Any]
#: Draw scores of reference and candidate.
Draw = Callable[[np.random.Generator], tuple[Array, Array]]


def zero_one(samples: int, lost: int, gained: int, right: int) -> tuple[Array, Array]:
    reference = np.zeros(samples)
    reference[:right] = 1
    candidate = reference.copy()
    candidate[:lost] = 0
    candidate[right : right + gained] = 1
    return reference, candidate


def flips(samples: int, lost: int, gained: int, **changes: Any) -> paired_exact.PairedExactTest:
    values = {"right": samples, "relative": False, "alpha": ALPHA, **changes}
    return paired_exact.PairedExactTest(lost=lost, gained=gained, samples=samples, **values)


@pytest.fixture
def no_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the computation of needed samples, which takes longest."""
    monkeypatch.setattr(paired_exact.PairedExactTest, "needed", lambda self, limit, drop: 0)


# --- Levels of the exact test ---


def fewest_lost_that_fail(samples: int, count: int, limit: float, guess: int) -> int:
    @functools.cache
    def fails(lost: int) -> bool:
        return flips(samples, lost, count - lost).p_at_most(limit) <= ALPHA

    lost = min(guess, count)
    while lost <= count and not fails(lost):
        lost += 1
    while lost > 0 and fails(lost - 1):
        lost -= 1
    return lost


@pytest.mark.parametrize("limit", [0.005, 0.01, 0.02])
@pytest.mark.parametrize(("samples", "most"), [(40, 0.3), (150, 0.2), (270, 0.2), (600, 0.06)])
def test_error_rates_with_an_absolute_limit(samples: int, most: float, limit: float) -> None:
    """If the true drop equals the limit, at most 5 % pass or fail, for any rate of flips."""
    counts = np.arange(int(stats.binom.isf(1e-7, samples, most)) + 1)
    empty = flips(samples, 0, 0)
    passing = np.array([empty.most_lost(int(count), limit) for count in counts])
    failing: list[int] = []
    for count in counts:
        guess = failing[-1] if failing else 0
        failing.append(fewest_lost_that_fail(samples, int(count), limit, guess))

    # 400 rates, none of which is on the grid that the test searches.
    q = limit + np.geomspace(1e-6, most - limit, 400)
    weights = stats.binom.pmf(counts, samples, q[:, None])
    lost_share = ((q + limit) / (2 * q))[:, None]
    passes = (weights * stats.binom.cdf(passing, counts, lost_share)).sum(axis=1)
    fails = (weights * stats.binom.sf(np.array(failing) - 1, counts, lost_share)).sum(axis=1)

    assert passes.max() + 1e-7 <= ALPHA
    assert fails.max() + 1e-7 <= ALPHA
    assert max(passes.max(), fails.max()) > 0.04  # the test does decide sometimes
    # With the same number of lost samples, more gained ones never undo a pass.
    assert (np.diff(passing) >= 0).all()


@pytest.mark.parametrize(
    ("samples", "limit", "right"),
    [(150, 0.02, 0.5), (300, 0.01, 0.5), (300, 0.01, 0.8), (300, 0.01, 0.95)],
)
def test_error_rate_with_a_relative_limit(samples: int, limit: float, right: float) -> None:
    """Enumerated over flips, lost samples, and samples that the reference has right."""
    top = int(stats.binom.isf(1e-7, samples, 0.05))
    first = int(stats.binom.isf(1 - 1e-7, samples, right))
    rights = np.arange(first, int(stats.binom.isf(1e-7, samples, right)) + 1)
    thresholds = np.stack([_thresholds(samples, rights, limit, count) for count in range(top + 1)])

    drop = limit * right
    levels = []
    for q in drop + np.geomspace(1e-6, 0.99 * min(0.05, 2 * (1 - right)) - drop, 10):
        level = 3e-7
        for count in range(top + 1):
            if stats.binom.pmf(count, samples, q) < 1e-9:
                continue
            lost = np.arange(count + 1)
            given_count = stats.binom.pmf(lost, count, (q + drop) / (2 * q))
            both = (right - (q + drop) / 2) / (1 - q)
            given_lost = stats.binom.pmf(rights[:, None] - lost, samples - count, both)
            passes = lost <= thresholds[count][:, None]
            level += stats.binom.pmf(count, samples, q) * float(
                (given_count * (given_lost * passes).sum(axis=0)).sum()
            )
        levels.append(level)

    assert 0.02 < max(levels) <= ALPHA


def _thresholds(samples: int, rights: Array, limit: float, count: int) -> Array:
    """Return how many lost samples still pass for each number of correct ones; it increases."""

    @functools.cache
    def most(right: int) -> int:
        empty = flips(samples, 0, 0, right=right, relative=True)
        return empty.most_lost(count, limit)

    found = np.empty(len(rights), dtype=int)

    def fill(start: int, end: int) -> None:
        if most(int(rights[start])) == most(int(rights[end])):
            found[start : end + 1] = most(int(rights[start]))
        else:
            middle = (start + end) // 2
            fill(start, middle)
            fill(middle + 1, end)

    fill(0, len(rights) - 1)
    return found


@pytest.mark.parametrize(
    ("samples", "lost", "gained", "drop", "less"),
    [
        (40, 1, 8, 0.02, True),
        (300, 3, 10, 0.01, True),
        (1000, 2, 6, 0.01, True),
        (300, 12, 3, 0.01, False),
        (20_000, 400, 260, 0.01, True),
    ],
)
def test_finer_grid_of_flip_rates_does_not_raise_p_value(
    monkeypatch: pytest.MonkeyPatch, samples: int, lost: int, gained: int, drop: float, less: bool
) -> None:
    def p_value() -> float:
        return paired_exact._p_value(lost, gained, samples, drop, 0.0005, less=less)

    found = p_value()
    monkeypatch.setattr(paired_exact, "GRID_STEP", 0.005)
    assert 0.0005 < found < 0.2
    assert p_value() - found < 2e-5


@pytest.mark.parametrize("drop", [0.0, 1e-4, 0.01, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("samples", [5, 40, 300, 5000])
def test_score_increases_with_lost_samples(samples: int, drop: float) -> None:
    """The thresholds behind the p-values rely on this."""
    for count in range(0, samples + 1, max(1, samples // 25)):
        lost = np.arange(count + 1)
        scores = paired_exact._score(lost, count - lost, samples, drop)
        assert (np.diff(scores) > 0).all()


def test_score_matches_tango() -> None:
    """Compare with the likelihood maximized numerically."""
    lost, gained, samples, drop = 7, 3, 100, 0.02
    x = np.linspace(1e-7, 0.48, 400_001)
    likelihood = (
        lost * np.log(x + drop)
        + gained * np.log(x)
        + (samples - lost - gained) * np.log1p(-2 * x - drop)
    )
    share = x[likelihood.argmax()]
    expected = (lost - gained - samples * drop) / math.sqrt(samples * (2 * share + drop - drop**2))
    found = paired_exact._score(np.array([lost]), np.array([gained]), samples, drop)[0]
    assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.usefixtures("no_advice")
def test_one_point_limit_needs_300_samples_without_flips() -> None:
    """0.99^n is the chance to see no flip; a hundredth of the level is spent on the interval."""
    spent = ALPHA * paired_exact.NUISANCE_SHARE + paired_exact.TRUNCATED
    assert 0.99**299 > ALPHA - spent > 0.99**300
    assert judge(*zero_one(299, 0, 0, 240), ONE_POINT).outcome == "INCONCLUSIVE"
    assert judge(*zero_one(300, 0, 0, 240), ONE_POINT).outcome == "PASS"
    assert judge(*zero_one(300, 0, 0, 299), ONE_PERCENT).outcome == "INCONCLUSIVE"
    assert judge(*zero_one(400, 0, 0, 390), ONE_PERCENT).outcome == "PASS"


# --- Levels of the other tests, simulated ---


def rate(draw: Draw, decide: Callable[[Array, Array], bool], repeats: int) -> float:
    rng = np.random.default_rng(RNG_SEED)
    return sum(decide(*draw(rng)) for _ in range(repeats)) / repeats


def allowed(repeats: int) -> float:
    return ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / repeats)


def passes(limit: Limit, alpha: float = ALPHA) -> Callable[[Array, Array], bool]:
    def decide(reference: Array, candidate: Array) -> bool:
        test = module._score_test((reference, candidate), limit, alpha, 0.0, "iou")[0]
        return test.p_at_least(limit.value) <= alpha

    return decide


def fails(limit: Limit) -> Callable[[Array, Array], bool]:
    def decide(reference: Array, candidate: Array) -> bool:
        test = module._score_test((reference, candidate), limit, ALPHA, 0.0, "iou")[0]
        return test.p_at_most(limit.value) <= ALPHA

    return decide


def lowered(reference: Array, limit: Limit, share: float) -> Array:
    """Lower every score by a fraction of the limit."""
    by = limit.value * share
    return reference * (1 - by) if limit.relative else reference - by


def noise(samples: int, limit: Limit, noise_std: float = 0.03) -> Draw:
    """Drop all scores by the limit, with normal noise."""

    def draw(rng: np.random.Generator) -> tuple[Array, Array]:
        reference = rng.uniform(0.5, 0.9, samples)
        return reference, lowered(reference, limit, 1.0) + rng.normal(0, noise_std, samples)

    return draw


def collapses(samples: int, limit: Limit, size: float, share: float = 1.0) -> Draw:
    """Cause a share of the limit's drop by rare samples that lose ``size`` of their score."""

    def draw(rng: np.random.Generator) -> tuple[Array, Array]:
        reference = rng.uniform(0.79, 0.81, samples)
        mean = 1.0 if limit.relative else 0.8
        candidate = lowered(reference, limit, 1 - share)
        # A collapsing sample can only lose what it has not lost already.
        left = 1 - limit.value * (1 - share) / mean
        chance = limit.value * share / (mean * size * left)
        candidate = np.where(rng.random(samples) < chance, candidate * (1 - size), candidate)
        return reference, candidate

    return draw


def jumps(samples: int) -> Draw:
    """A true drop of 1%: a drop everywhere, but for rare jumps from 0.3 to 1."""

    def draw(rng: np.random.Generator) -> tuple[Array, Array]:
        reference = rng.uniform(0.29, 0.31, samples)
        chance = 0.003
        lower = (0.01 * 0.3 + chance * 0.7) / (0.3 * (1 - chance))
        jumped = rng.random(samples) < chance
        return reference, np.where(jumped, 1.0, reference * (1 - lower))

    return draw


@pytest.mark.parametrize("limit", [ONE_PERCENT, ONE_POINT], ids=str)
@pytest.mark.parametrize("samples", [100, 300, 1000, 3000])
def test_pass_error_rate_with_rare_collapses(samples: int, limit: Limit) -> None:
    """The plain t test passes such models in up to 60 % of the runs (100 samples, none seen), and
    in 8 % still with 3000."""
    repeats = 300 if samples <= 300 else 700
    for size, share in ((1.0, 1.0), (1.0, 0.5), (0.5, 1.0)):
        draw = collapses(samples, limit, size, share)
        assert rate(draw, passes(limit), repeats) <= allowed(repeats), (size, share)


@pytest.mark.parametrize("limit", [ONE_PERCENT, ONE_POINT], ids=str)
@pytest.mark.parametrize("samples", [100, 2000])
def test_error_rates_under_normal_noise(samples: int, limit: Limit) -> None:
    repeats = 800
    draw = noise(samples, limit)
    rng = np.random.default_rng(RNG_SEED)
    decided = {"PASS": 0, "FAIL": 0}

    for _ in range(repeats):
        test = module._score_test(draw(rng), limit, ALPHA, 0.0, "iou")[0]
        decided["PASS"] += test.p_at_least(limit.value) <= ALPHA
        decided["FAIL"] += test.p_at_most(limit.value) <= ALPHA

    assert decided["PASS"] / repeats <= allowed(repeats)
    assert decided["FAIL"] / repeats <= allowed(repeats)


@pytest.mark.parametrize("samples", [300, 1000, 3000])
def test_fail_error_rate_with_rare_jumps(samples: int) -> None:
    """The plain t test fails such models in 16 to 40 % of the runs."""
    repeats = 500
    assert rate(jumps(samples), fails(ONE_PERCENT), repeats) <= allowed(repeats)


def test_pass_error_rate_with_a_divided_alpha() -> None:
    repeats = 1500
    alpha = ALPHA / 3
    most = alpha + 3 * math.sqrt(alpha * (1 - alpha) / repeats)
    found = rate(collapses(1500, ONE_PERCENT, 1.0), passes(ONE_PERCENT, alpha), repeats)
    assert 0 < found <= most


@pytest.mark.parametrize("alpha", [0.1, ALPHA, ALPHA / 3, 0.001])
def test_virtual_samples_cover_exact_poisson_limit(alpha: float) -> None:
    """Upper limit of a Poisson mean (Garwood 1936), for every count up to 10,000."""
    z = mean_tests.z(alpha)
    seen = np.arange(10_001)
    virtual = seen + (z**2 + 2) / 3
    assert (virtual + z * np.sqrt(virtual) >= stats.chi2.isf(alpha, 2 * seen + 2) / 2).all()


# --- Aggregated metrics ---


def f1(rows: Array) -> float:
    true_positives, false_positives, false_negatives = rows.reshape(-1, 3).sum(axis=0).tolist()
    return float(2 * true_positives / (2 * true_positives + false_positives + false_negatives))


def mean_iou(rows: Array) -> float:
    counts = rows.sum(axis=0)
    return float((counts[:, 0] / counts.sum(axis=1)).mean())


def images(rng: np.random.Generator, samples: int, classes: int) -> Array:
    """Return true positives, false positives and false negatives per image and class."""
    positives = 1 + rng.poisson(rng.gamma(1.0, 20.0, (samples, classes)))
    right = rng.binomial(positives, 0.85)
    return np.stack([right, rng.poisson(0.1 * positives), positives - right], axis=-1)


def missed(rng: np.random.Generator, rows: Array, chance: float) -> Array:
    """Miss every true positive with a probability."""
    out = rows.copy()
    lost = rng.binomial(rows[..., 0], chance)
    out[..., 0] -= lost
    out[..., 2] += lost
    return out


def blind(rng: np.random.Generator, rows: Array, chance: float) -> Array:
    """Let a whole image miss every positive and get as many false positives."""
    out = rows.copy()
    hit = rng.random(len(rows)) < chance
    positives = rows[hit][..., 0] + rows[hit][..., 2]
    out[hit] = np.stack([np.zeros_like(positives), positives, positives], axis=-1)
    return out


Change = Callable[[np.random.Generator, Array, float], Array]


@functools.cache
def chance_of(
    metric: Callable[[Array], float], classes: int, change: Change, limit: Limit
) -> float:
    """Return the probability at which the expected drop over 100,000 images is the limit."""
    rng = np.random.default_rng(1)
    rows = images(rng, 100_000, classes)
    # Each change is linear in its probability: p alters p times as many counts as 1 does.
    before, after = (counts.sum(axis=0)[None] for counts in (rows, change(rng, rows, 1.0)))
    low, high = 0.0, 0.3
    for _ in range(20):
        middle = (low + high) / 2
        drop = metric(before) - metric((1 - middle) * before + middle * after)
        drop /= metric(before) if limit.relative else 1.0
        low, high = (middle, high) if drop < limit.value else (low, middle)
    return high


@pytest.mark.parametrize("change", [missed, blind])
@pytest.mark.parametrize(
    ("metric", "classes", "samples", "limit"),
    [
        (f1, 1, 150, Limit.parse("8%")),
        (f1, 1, 300, Limit.parse("5pp")),
        (mean_iou, 3, 150, Limit.parse("10%")),
    ],
)
def test_error_rates_with_an_aggregate(
    monkeypatch: pytest.MonkeyPatch,
    metric: Callable[[Array], float],
    classes: int,
    samples: int,
    limit: Limit,
    change: Change,
) -> None:
    """The limit is wide, so that so few samples can pass at all."""
    # Counts lost and gained images, at the cost of one more metric for each.
    monkeypatch.setattr(module, "swap_effects", lambda pairs, total, value: np.zeros(len(pairs[0])))
    chance = chance_of(metric, classes, change, limit)
    repeats = 100
    rng = np.random.default_rng(RNG_SEED)
    decided = {"PASS": 0, "FAIL": 0}

    for _ in range(repeats):
        reference = images(rng, samples, classes)
        candidate = change(rng, reference, chance)
        pairs = (reference, candidate)
        test = module._jackknife_test(pairs, limit, ALPHA, metric, "f1")[0]
        decided["PASS"] += test.p_at_least(limit.value) <= ALPHA
        decided["FAIL"] += test.p_at_most(limit.value) <= ALPHA

    assert decided["PASS"] / repeats <= allowed(repeats)
    assert decided["FAIL"] / repeats <= allowed(repeats)


def test_pseudo_values_of_a_mean_equal_the_scores() -> None:
    """The jackknife therefore agrees with the plain scores."""
    rng = np.random.default_rng(RNG_SEED)
    scores = rng.uniform(0.2, 1, 50)
    found = mean_tests.pseudo_values(scores, scores.mean(), lambda rows: float(rows.mean()))
    assert found == pytest.approx(scores)


def test_verdict_of_an_aggregate() -> None:
    rng = np.random.default_rng(RNG_SEED)
    reference = images(rng, 1500, 1)[:, 0]
    candidate = reference.copy()
    candidate[:10, 1] += 1  # ten images with one more false positive
    candidate[10:14, 1] = 0
    verdict = judge(reference, candidate, Limit.parse("5%"), aggregate=f1)
    assert verdict.method == "jackknife"
    assert verdict.outcome == "PASS"
    assert verdict.reference == f1(reference)
    assert verdict.candidate == f1(candidate)
    assert verdict.lost == 10
    assert verdict.gained == np.count_nonzero(reference[10:14, 1])
    assert verdict.drop_low < verdict.drop < verdict.drop_high

    few = judge(reference[:60], candidate[:60], ONE_PERCENT, aggregate=f1)
    assert few.outcome == "INCONCLUSIVE"
    assert few.needed is not None
    assert few.needed > 1000
    worse = blind(rng, reference, 0.3)
    assert judge(reference, worse, ONE_PERCENT, aggregate=f1).outcome == "FAIL"


# --- Power and advice ---


def lossless_power(
    samples: int, right: float, q: float, limit: Limit, points: int | None = None
) -> float:
    """Return a lower bound of the probability that a lossless model passes.

    Without ``points`` use every number of flips, otherwise the thresholds at that many numbers with
    linear interpolation between them.
    """
    first, last = stats.binom.ppf([5e-4, 1 - 5e-4], samples, q).astype(int)
    counts = np.arange(first, last + 1)
    tried = np.linspace(first, last, points).astype(int) if points else counts
    empty = flips(samples, 0, 0, right=round(right * samples), relative=limit.relative)
    thresholds = [empty.most_lost(int(count), limit.value) for count in tried]
    most = np.floor(np.interp(counts, tried, thresholds))
    weights = stats.binom.pmf(counts, samples, q)
    return float((weights * stats.binom.cdf(most, counts, 0.5)).sum())


@pytest.mark.parametrize(
    ("samples", "lost", "gained", "limit"),
    [
        (40, 0, 0, ONE_POINT),
        (100, 0, 0, ONE_PERCENT),
        (300, 3, 3, ONE_PERCENT),
        (200, 5, 5, Limit.parse("2pp")),
        (30, 2, 2, Limit.parse("5%")),
    ],
)
def test_lossless_flips_pass_as_planned(samples: int, lost: int, gained: int, limit: Limit) -> None:
    right = 0.8
    verdict = judge(*zero_one(samples, lost, gained, int(right * samples)), limit)
    assert verdict.outcome == "INCONCLUSIVE"
    assert verdict.needed is not None
    q = (lost + gained + 1) / (samples + 2)
    assert lossless_power(verdict.needed, right, q, limit) >= mean_tests.POWER


@pytest.mark.parametrize("limit", [ONE_PERCENT, ONE_POINT], ids=str)
@pytest.mark.parametrize("noise_std", [0.0, 0.02, 0.1])
def test_lossless_continuous_scores_pass_as_planned(limit: Limit, noise_std: float) -> None:
    def draw(samples: int, rng: np.random.Generator) -> tuple[Array, Array]:
        reference = rng.uniform(0.4, 0.9, samples)
        return reference, np.maximum(reference + rng.normal(0, noise_std, samples), 0)

    pilot = judge(*draw(100, np.random.default_rng(RNG_SEED)), limit)
    assert pilot.outcome == "INCONCLUSIVE"
    assert pilot.needed is not None
    needed = pilot.needed
    power = rate(lambda rng: draw(needed, rng), passes(limit), 300)
    assert power >= mean_tests.POWER - 3 * math.sqrt(0.16 / 300)


@pytest.mark.parametrize("seen", [60, 300])
@pytest.mark.parametrize(("metric", "classes"), [(f1, 1), (mean_iou, 3)])
def test_a_lossless_aggregate_passes_as_planned(
    metric: Callable[[Array], float], classes: int, seen: int
) -> None:
    """With more images the largest one, which a collapse may cost, has a larger share."""
    limit = Limit.parse("2%")
    rng = np.random.default_rng(RNG_SEED)
    passed = 0
    for _ in range(10):
        pilot = images(rng, seen, classes)
        needed = module.samples_to_pass(pilot, limit, aggregate=metric)
        assert needed is not None
        again = images(rng, needed, classes)
        passed += module.samples_to_pass(again, limit, aggregate=metric) is None
    assert passed / 10 >= mean_tests.POWER - 3 * math.sqrt(0.16 / 10)


@pytest.mark.parametrize(
    ("samples", "lost", "gained", "right", "limit"),
    [(500, 50, 50, 400, ONE_POINT), (200, 60, 60, 100, Limit.parse("6%"))],
)
def test_large_needed_sample_size_reaches_power(
    samples: int, lost: int, gained: int, right: int, limit: Limit
) -> None:
    """Beyond ``MANY_DISCORDANT`` the normal approximation computes the power."""
    verdict = judge(*zero_one(samples, lost, gained, right), limit)
    needed, q = verdict.needed, (lost + gained) / samples
    assert needed is not None
    assert needed * q > paired_exact.MANY_DISCORDANT
    assert lossless_power(needed, right / samples, q, limit, points=9) >= mean_tests.POWER


def test_two_point_drop_fails_more_often_with_more_samples() -> None:
    """The limit is one point and 4 % of samples flip: three are lost for each one gained."""
    rng = np.random.default_rng(RNG_SEED)
    failed, passed = [], []
    for samples in (300, 1000, 3000, 8000):
        found = []
        for _ in range(30):
            lost, gained, _rest = rng.multinomial(samples, [0.03, 0.01, 0.96])
            test = flips(samples, lost, gained)
            found.append((test.p_at_most(0.01) <= ALPHA, test.p_at_least(0.01) <= ALPHA))
        failed.append(sum(fail for fail, _ in found) / 30)
        passed.append(sum(good for _, good in found) / 30)
    assert failed == sorted(failed)
    assert failed[0] < 0.5
    assert failed[-1] > 0.99
    assert max(passed) <= 0.05


def test_forty_samples_are_too_few() -> None:
    verdict = judge(*zero_one(40, 1, 1, 32), ONE_POINT)
    assert verdict.outcome == "INCONCLUSIVE"
    assert verdict.needed is not None
    assert 2000 < verdict.needed < 10_000
    assert (verdict.samples, verdict.lost, verdict.gained) == (40, 1, 1)


def test_drop_near_the_limit_needs_more_samples() -> None:
    lossless = judge(*zero_one(1000, 20, 20, 800), ONE_POINT).needed
    near = judge(*zero_one(1000, 24, 16, 800), ONE_POINT).needed
    over = judge(*zero_one(1000, 26, 14, 800), ONE_POINT).needed
    at_the_limit = judge(*zero_one(1000, 25, 15, 800), ONE_POINT).needed
    assert lossless is not None
    assert near is not None
    assert over is not None
    assert near > 5 * lossless
    assert over > 5 * lossless
    assert at_the_limit == mean_tests.MOST_SAMPLES


@pytest.mark.parametrize(
    ("number", "rounded"),
    [(2, 2), (99, 99), (100, 100), (101, 110), (1234.5, 1300), (9_999_999, 10_000_000)],
)
def test_needed_samples_round_up_to_two_digits(number: float, rounded: int) -> None:
    assert mean_tests.round_up(number) == rounded


# --- Laws ---


@st.composite
def counts_of_flips(draw: st.DrawFn) -> tuple[int, int, int, int]:
    samples = draw(st.integers(2, 400))
    right = draw(st.integers(1, samples - 1))
    lost = draw(st.integers(0, min(right, 20)))
    gained = draw(st.integers(0, min(samples - right, 20)))
    return samples, lost, gained, right


LIMITS = st.sampled_from([Limit.parse(text) for text in ("1%", "1pp", "5%", "5pp", "20%")])


def consistent(verdict: Verdict) -> bool:
    limit = verdict.limit.value
    return (
        verdict.drop_low <= verdict.drop <= verdict.drop_high
        and (verdict.outcome == "PASS") == (verdict.drop_high < limit)
        and (verdict.outcome == "FAIL") == (verdict.drop_low > limit)
        and (verdict.needed is not None) == (verdict.outcome == "INCONCLUSIVE")
        and (verdict.needed is None or verdict.needed > verdict.samples)
    )


@pytest.mark.usefixtures("no_advice")
@settings(max_examples=10)
@given(counts_of_flips(), LIMITS, st.randoms(use_true_random=False))
def test_flip_verdicts_are_consistent_and_order_invariant(
    counts: tuple[int, int, int, int], limit: Limit, random: Any
) -> None:
    reference, candidate = zero_one(*counts)
    verdict = judge(reference, candidate, limit)
    assert consistent(verdict)
    order = np.array(random.sample(range(counts[0]), counts[0]))
    assert judge(reference[order].astype(bool), candidate[order].astype(int), limit) == verdict


@pytest.mark.usefixtures("no_advice")
@settings(max_examples=60)
@given(counts_of_flips(), LIMITS)
def test_gained_samples_never_undo_a_pass(counts: tuple[int, int, int, int], limit: Limit) -> None:
    samples, lost, gained, right = counts
    assume(right + gained < samples)
    relative = {"right": right, "relative": limit.relative}
    if flips(samples, lost, gained, **relative).p_at_least(limit.value) <= ALPHA:
        more = flips(samples, lost, gained + 1, **relative)
        assert more.p_at_least(limit.value) <= ALPHA


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.floats(0.1, 1), st.floats(0, 1)), min_size=2, max_size=60),
    LIMITS,
    st.integers(0, 1000),
)
def test_mean_verdicts_are_consistent_and_order_invariant(
    scores: list[tuple[float, float]], limit: Limit, seed: int
) -> None:
    reference, candidate = (np.array(values) for values in zip(*scores, strict=True))
    assume(np.ptp(np.concatenate([reference, candidate])) > 1e-3)
    assume(not set(np.concatenate([reference, candidate])) <= {0.0, 1.0})
    verdict = judge(reference, candidate, limit)
    assert verdict.method == "mean"
    assert consistent(verdict)
    order = np.random.default_rng(seed).permutation(len(reference))
    again = judge(reference[order], candidate[order], limit)
    assert again.outcome == verdict.outcome
    assert again.drop_high == pytest.approx(verdict.drop_high, abs=1e-6)


@given(st.integers(1, 10_000), st.booleans())
def test_limits_round_trip_through_text(hundredths: int, relative: bool) -> None:
    limit = Limit.parse(f"{hundredths / 100:g} {'%' if relative else 'pp'}")
    assert limit.relative == relative
    assert limit.value == pytest.approx(hundredths / 10_000)
    assert Limit.parse(str(limit)) == limit


def test_a_million_samples() -> None:
    verdict = judge(*zero_one(1_000_000, 20_000, 18_000, 800_000), ONE_PERCENT)
    assert verdict.outcome == "PASS"
    # Wald's interval is good enough here.
    wide = 1.645 * math.sqrt(0.038 - 0.002**2) / 1000 / 0.8
    assert verdict.drop_high == pytest.approx(0.0025 + wide, abs=0.05 * wide)
    assert verdict.drop_low == pytest.approx(0.0025 - wide, abs=0.05 * wide)


def test_collapsed_candidate_fails() -> None:
    scores = np.linspace(0.5, 0.9, 50)
    verdict = judge(scores, np.zeros(50), ONE_PERCENT)
    assert (verdict.outcome, verdict.drop, verdict.lost) == ("FAIL", 1.0, 50)
    assert judge(np.ones(50), np.zeros(50), ONE_PERCENT).outcome == "FAIL"


# --- Errors ---

GOOD = [0.5, 0.6, 0.7]


@pytest.mark.parametrize(
    ("reference", "candidate", "options", "message"),
    [
        (
            GOOD,
            GOOD[:2],
            {},
            "iou: baseline and candidate must score the same samples, got shapes (3,) and (2,)",
        ),
        (
            GOOD,
            [0.5, math.nan, math.inf],
            {},
            "iou: scores must be finite, got 2 non-finite scores for the candidate",
        ),
        (
            [math.nan, 0.5, 0.5],
            GOOD,
            {},
            "iou: scores must be finite, got 1 non-finite score for the baseline",
        ),
        (["a", "b"], GOOD, {}, "iou: scores must be numbers, got <U1 for the baseline"),
        ([0.5], [0.5], {}, "iou: needs at least 2 samples, got 1"),
        (0.5, 0.5, {}, "iou: needs at least 2 samples, got 1"),
        (
            [GOOD, GOOD],
            [GOOD, GOOD],
            {},
            "iou: needs one score per sample or an aggregate, got shape (2, 3)",
        ),
        (
            [1.0] * 500,
            [1.0] * 500,
            {},
            "iou: every sample of both models scores 1: a constant metric cannot show a drop",
        ),
        (
            [0.0, 0.0, 0.0],
            [1.0, 0.0, 0.0],
            {},
            "iou: a relative limit (1%) needs a baseline metric over 0, got 0",
        ),
        (
            GOOD,
            [0.5, 0.6, -0.1],
            {},
            "iou: scores must be at least 0 (worst), got -0.1 for the candidate",
        ),
        (
            GOOD,
            GOOD,
            {"worst": 0.55},
            "iou: scores must be at least 0.55 (worst), got 0.5 for the baseline",
        ),
        (
            GOOD,
            GOOD,
            {"aggregate": lambda rows: math.nan},
            "iou: aggregate must return a finite number, got nan for 3 rows",
        ),
        (
            GOOD,
            GOOD,
            {"aggregate": lambda rows: 0.5 if len(rows) > 2 else math.inf},
            "iou: aggregate must return a finite number, got inf for 2 rows",
        ),
        (
            GOOD,
            GOOD,
            {"aggregate": lambda rows: "high"},
            "iou: aggregate must return one number: could not convert string to float: 'high'",
        ),
        (
            GOOD,
            GOOD,
            {"aggregate": lambda rows: 0.9},
            "iou: every sample of both models scores 0.9: a constant metric cannot show a drop",
        ),
        (
            [0.5, [0.5]],
            GOOD,
            {},
            "iou: the baseline's scores cannot be converted to an array: setting an array element ",
        ),
    ],
)
def test_rejects_bad_scores(
    reference: Any, candidate: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ScoreError, match=f"^{re.escape(message)}") as caught:
        judge(reference, candidate, ONE_PERCENT, metric="iou", **options)
    assert isinstance(caught.value, ClearError)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["1", "", "pp", "1 percent", "-1%", "1e-2%", "nan%"])
def test_rejects_malformed_limits(text: str) -> None:
    message = f"must be a percentage such as 1% (relative) or 1pp (absolute), got {text!r}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Limit.parse(text)


@pytest.mark.parametrize("text", ["0%", "0.0pp", "101%", "100.5pp"])
def test_rejects_limits_out_of_range(text: str) -> None:
    message = f"must be over 0 and at most 100, got {text!r}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Limit.parse(text)
