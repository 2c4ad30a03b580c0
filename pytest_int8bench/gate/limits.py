"""How much worse each metric may get. Every pytest session loads this file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase


@dataclass(frozen=True)
class Metric:
    """What is compared of a run, as a growth of cost: 0.05 means 5 % worse."""

    name: str
    field: str
    """Field of ``Result``."""
    option: str
    """Name of its limit, on the command line and in ``pyproject.toml``."""
    help: str
    limit: float | None
    """Largest growth that passes, relative; None judges nothing."""
    floor: float
    """Relative difference of two processes of equal code that is taken for noise where only one
    file a side is given."""
    is_rate: bool = False
    """Higher is better, and the cost is the time that one takes."""
    depends_on_clocks: bool = True
    """A GPU that is slowed down by heat changes it."""

    def growth(self, base: float, new: float) -> float:
        """Return by how much the cost grew, relative to the base's."""
        return (base / new if self.is_rate else new / base) - 1


METRICS = {
    metric.name: metric
    for metric in (
        Metric(
            "throughput",
            "samples_per_s",
            "max-slowdown",
            "growth of the median time of a sample",
            limit=0.05,
            floor=0.02,
            is_rate=True,
        ),
        Metric(
            "batch-time",
            "batch_time_s",
            "max-batch-time-growth",
            "growth of the median time of a batch; the slowdown, as long as batches keep their "
            "samples",
            limit=None,
            floor=0.02,
        ),
        Metric(
            "p95",
            "batch_time_p95_s",
            "max-p95-growth",
            "growth of the 95th percentile of the batch time",
            limit=None,
            floor=0.05,
        ),
        Metric(
            "memory",
            "peak_memory_bytes",
            "max-memory-growth",
            "growth of the model's peak memory (CUDA only)",
            limit=0.05,
            floor=0.01,
            depends_on_clocks=False,
        ),
        Metric(
            "compile",
            "compile_s",
            "max-compile-growth",
            "growth of the first call's time; it depends on whether the compile cache was warm",
            limit=None,
            floor=0.3,
        ),
    )
}


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
