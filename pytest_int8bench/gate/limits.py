"""What a comparison lets pass. Every pytest session loads this file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from pytest_int8bench.results.figures import METRICS


@dataclass(frozen=True)
class Rules:
    """What a comparison lets pass."""

    limits: Mapping[str, float | None] = field(default_factory=dict)
    """Metric -> largest growth, relative; None judges nothing. What is not named keeps its
    default."""
    runs: tuple[tuple[str, Mapping[str, float | None]], ...] = ()
    """Pattern of run names or node ids -> limits that go before all others; the last match wins."""
    floors: Mapping[str, float] = field(default_factory=dict)
    """Metric -> noise floor, in place of the default and of what the files show."""
    allow: frozenset[str] = frozenset()
    """Names of the fingerprint that may differ, and ``throttled``."""
    allow_missing: bool = False
    """Runs that are gone, or skipped now, are listed only."""
    fail_on_inconclusive: bool = False
    """A verdict that was PASS and is INCONCLUSIVE counts as a regression."""

    def limit(self, metric: str, *names: str) -> float | None:
        """Return the limit of ``metric`` for the run that goes by ``names``."""
        found = self.limits.get(metric, METRICS[metric].limit)
        for pattern, limits in self.runs:
            if metric in limits and _matches(pattern, names):
                found = limits[metric]
        return found

    def unmatched(self, runs: Iterable[tuple[str, ...]]) -> list[str]:
        """Return the patterns that none of ``runs`` matches, each given by its names."""
        known = list(runs)
        return [
            pattern for pattern, _ in self.runs if not any(_matches(pattern, run) for run in known)
        ]


def _matches(pattern: str, names: Iterable[str]) -> bool:
    # Node ids hold brackets, which a pattern takes for a set of characters.
    return any(name == pattern or fnmatchcase(name, pattern) for name in names)
