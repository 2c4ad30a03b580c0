"""Test planning an A/B: rejected designs, and the power of the others."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_int8bench.errors import ClearError
from pytest_int8bench.gate.ab.design import Design, DesignError, looks, spend
from toys.gate_noise import normal, simulate_ab

RUNS = 24
DEFAULT = Design()


@pytest.mark.parametrize(("noise", "blocks"), [(0.02, 4), (0.03, 4), (0.01, 2)])
def test_power_is_close_to_simulation(noise: float, blocks: int) -> None:
    """Power for one run. The formula counts only the best look, so all looks together have more."""
    design = Design(noise=noise, verdict_blocks=blocks)
    found = simulate_ab(normal(noise), families=400, runs=1, slowdowns=0.05, design=design)
    share = float((found.outcomes[found.flagged] == "FAIL").mean())
    assert share - 0.15 <= design.power(1) <= share + 0.06


def test_default_design_has_power_for_24_runs() -> None:
    DEFAULT.check(RUNS)
    assert DEFAULT.power(RUNS) > 0.9999
    assert DEFAULT.blocks_needed(RUNS) == 3


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [(2, (2,)), (3, (2, 3)), (4, (2, 3, 4)), (5, (2, 4, 5)), (6, (2, 4, 6)), (12, (4, 8, 12))],
)
def test_looks_are_spread_over_the_blocks(blocks: int, expected: tuple[int, ...]) -> None:
    assert looks(blocks) == expected
    assert Design(verdict_blocks=blocks).looks == expected


def test_levels_of_the_default_looks() -> None:
    """1 of 36 orders, 16 of 1,296 orders, and the rest of the level."""
    levels = spend(0.05, 6, (2, 4, 6))
    assert levels == pytest.approx([1 / 36, 16 / 1296, 0.05 - 1 / 36 - 16 / 1296])


@given(st.floats(0.001, 0.4), st.integers(2, 40), st.data())
def test_looks_do_not_exceed_the_level(level: float, blocks: int, data: Any) -> None:
    """The sum holds for any number of blocks at each look."""
    seen = [data.draw(st.integers(0, planned)) for planned in looks(blocks)]
    levels = spend(level, blocks, seen)
    assert all(0 <= one <= level for one in levels)
    assert sum(levels) <= level * (1 + 1e-9)


@settings(max_examples=15)
@given(
    st.integers(1, 200),
    st.floats(0.0005, 0.05),
    st.floats(0, 0.03),
    st.floats(0.035, 0.2),
    st.floats(0.5, 0.99),
)
def test_blocks_needed_is_minimal(
    runs: int, noise: float, margin: float, max_slowdown: float, power: float
) -> None:
    def design(blocks: int) -> Design:
        return Design(noise=noise, margin=margin, max_slowdown=max_slowdown, verdict_blocks=blocks)

    needed = design(2).blocks_needed(runs, power=power)
    if needed is None:
        assert design(1000).power(runs) < power
        return
    assert design(needed).power(runs) >= power
    assert needed == 2 or design(needed - 1).power(runs) < power


@given(st.integers(1, 100), st.integers(2, 30), st.floats(1e-15, 10))
def test_power_decreases_with_runs_and_noise(runs: int, blocks: int, noise: float) -> None:
    power = Design(verdict_blocks=blocks, noise=noise).power(runs)
    more = 1e-9  # rounding in SciPy
    assert 0 < power <= 1
    assert Design(verdict_blocks=blocks, noise=noise).power(runs + 1) <= power + more
    assert Design(verdict_blocks=blocks, noise=noise * 1.1).power(runs) <= power + more


@pytest.mark.parametrize(
    ("changes", "runs", "slowdown", "conditions"),
    [
        ({"verdict_blocks": 2}, 24, "5%", "24 runs, noise 1%"),
        ({"verdict_blocks": 3, "noise": 0.03}, 1, "5%", "1 run, noise 3%"),
        ({"noise": 0.5, "max_slowdown": 0.025}, 24, "2.5%", "24 runs, noise 50%"),
    ],
)
def test_rejects_design_without_power(
    changes: dict[str, Any], runs: int, slowdown: str, conditions: str
) -> None:
    design = Design(**changes)
    needed = design.blocks_needed(runs)
    listed = "over 1000 blocks" if needed is None else f"{needed} blocks"
    message = (
        f"{design.verdict_blocks} verdict blocks detect a slowdown of {slowdown} with a "
        f"probability of only {math.floor(100 * design.power(runs))}% ({conditions} between "
        f"processes); 90% needs {listed}"
    )
    with pytest.raises(DesignError, match=f"^{re.escape(message)}$") as caught:
        design.check(runs)
    assert isinstance(caught.value, ClearError)


def test_blocks_needed_is_none_over_a_thousand() -> None:
    assert Design(noise=0.4).blocks_needed(24, power=0.8) is None


@pytest.mark.parametrize(
    ("margin", "max_slowdown"),
    [(-0.01, 0.05), (0.05, 0.05), (math.nan, 0.05), (0.01, math.nan), (0.01, math.inf)],
)
def test_rejects_invalid_margins(margin: float, max_slowdown: float) -> None:
    message = (
        "margin must be at least 0 and less than max_slowdown, "
        f"got {margin:g} with a max_slowdown of {max_slowdown:g}"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Design(margin=margin, max_slowdown=max_slowdown)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"level": 0.0}, "level must be over 0 and under 0.5, got 0"),
        ({"level": 0.5}, "level must be over 0 and under 0.5, got 0.5"),
        ({"screening_blocks": 1}, "screening_blocks must be at least 2, got 1"),
        ({"verdict_blocks": 0}, "verdict_blocks must be at least 2, got 0"),
        ({"verdict_blocks": 10**30}, "verdict_blocks must be at most 1000, got 1e+30"),
        ({"noise": 0.0}, "noise must be over 0 and finite, got 0"),
        ({"noise": math.inf}, "noise must be over 0 and finite, got inf"),
    ],
)
def test_rejects_invalid_designs(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Design(**changes)


@pytest.mark.parametrize("method", [Design.power, Design.blocks_needed, Design.check])
def test_design_needs_at_least_one_run(method: Any) -> None:
    with pytest.raises(ValueError, match=r"^runs must be at least 1, got 0$"):
        method(DEFAULT, 0)
