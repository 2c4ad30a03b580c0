"""The rules of a comparison."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from pytest_int8bench.results.figures import METRICS


@dataclass(frozen=True)
class Rules:
    """Which changes a comparison accepts."""

    limits: Mapping[str, float | None] = field(default_factory=dict)
    """Maps metrics to their largest relative growth, or None for no limit; others keep their
    defaults."""
    runs: tuple[tuple[str, Mapping[str, float | None]], ...] = ()
    """Maps patterns of run names or node ids to overriding limits; the last match wins."""
    floors: Mapping[str, float] = field(default_factory=dict)
    """Maps metrics to noise floors that replace defaults and learned floors."""
    allow: frozenset[str] = frozenset()
    """Fingerprint names that may differ, or ``throttled``."""
    allow_missing: bool = False
    """Only list runs that are missing or now skipped."""
    fail_on_inconclusive: bool = False
    """Treat a change from PASS to INCONCLUSIVE as a regression."""

    def limit(self, metric: str, *names: str) -> float | None:
        """Return the limit of ``metric`` for the run known by ``names``."""
        found = self.limits.get(metric, METRICS[metric].limit)
        for pattern, limits in self.runs:
            if metric in limits and _matches(pattern, names):
                found = limits[metric]
        return found

    def unmatched(self, runs: Iterable[tuple[str, ...]]) -> list[str]:
        """Return the patterns that match none of ``runs``, each a tuple of names."""
        known = list(runs)
        return [
            pattern for pattern, _ in self.runs if not any(_matches(pattern, run) for run in known)
        ]


def _matches(pattern: str, names: Iterable[str]) -> bool:
    # Node ids hold brackets, which a pattern takes for a set of characters.
    return any(name == pattern or fnmatchcase(name, pattern) for name in names)
