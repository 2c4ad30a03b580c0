"""Read plain benchmarks: tests that use pytest-benchmark's own ``benchmark`` fixture.

pytest-benchmark saves their times in seconds per call, regardless of the iterations per round. In
files without our block, only ``machine_info`` describes the machine.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from pytest_int8bench.clock import synchronized_perf_counter
from pytest_int8bench.results.base import Measured, SchemaError
from pytest_int8bench.results.checks import Count, check, shown
from pytest_int8bench.results.figure import PLAIN
from pytest_int8bench.results.shapes import Timing

#: Ratio of the standard error of a median to that of a mean, for normally distributed times.
_MEDIAN_FACTOR = math.sqrt(math.pi / 2)
#: Interquartile range of a normal distribution, in standard deviations.
_QUARTILES = 1.349
#: From this many rounds on, the spread is estimated from quartiles, which are robust to outliers.
_MANY_ROUNDS = 10
#: Keys of ``extra_info`` that mark an entry as one of our points.
_OUR_EXTRA = ("run_name", "workload", "params")


@dataclass(frozen=True, kw_only=True)
class Benchmark(Measured):
    """A test that uses pytest-benchmark's own ``benchmark``. Its run name is its node id."""

    KIND = "a plain benchmark"
    IS_PLAIN = True

    call_time_s: float | None = None
    """Median over the rounds of the time per call (the round's time divided by its iterations)."""
    call_time_mean_s: float | None = None
    """Mean over the rounds."""
    call_time_min_s: float | None = None
    """Time per call of the fastest round."""
    call_time_standard_error: float | None = None
    """Estimated standard error of the median, relative to it; None after a single round."""
    rounds: Count | None = None
    """Number of timed rounds."""
    iterations: Count | None = None
    """Calls per round."""
    timer: str | None = None
    """Name of the timer function; None if the file does not name it."""

    throttled: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def of(cls, nodeid: str, **values: Any) -> Self:
        """Return the record of the test with a node id."""
        return cls(nodeid=nodeid, workload=PLAIN, run_name=nodeid, params={}, **values)

    @classmethod
    def from_timing(cls, timing: Any) -> Self:
        """Read an entry of ``benchmarks`` in pytest-benchmark's JSON.

        Raises:
            SchemaError: one line, if the entry is not valid.
        """
        if not isinstance(timing, Mapping):
            raise SchemaError(f"not {cls.KIND}: {shown(timing)}")
        try:
            check(Timing, timing)
            stats = timing["stats"]
            # A call shorter than the timer's resolution has a time of 0.
            coarse = {"status": "skipped", "reason": "the timer is too coarse to time a call"}
            return cls.of(
                timing["fullname"],
                **({} if stats["median"] else coarse),
                call_time_s=stats["median"] or None,
                call_time_mean_s=stats.get("mean") or None,
                call_time_min_s=stats["min"] or None,
                call_time_standard_error=_standard_error(stats),
                rounds=stats["rounds"],
                iterations=stats.get("iterations"),
                timer=(timing.get("options") or {}).get("timer"),
            )
        except ValueError as error:
            raise SchemaError(f"not {cls.KIND}: {str(error).removeprefix('stats.')}") from None

    @property
    def median_s(self) -> float | None:
        """Time per call of the median round, which represents the process in comparisons."""
        return self.call_time_s

    @property
    def fastest_s(self) -> float | None:
        """Time of the fastest round."""
        return self.call_time_min_s

    @property
    def wall_s(self) -> float:
        """Approximate wall time of the measurement."""
        return (self.rounds or 0) * (self.iterations or 1) * (self.call_time_mean_s or 0.0)

    @property
    def waits_for_device(self) -> bool:
        """Whether the timer is ours, which synchronizes with the device."""
        return self.timer == synchronized_perf_counter.__name__


def _standard_error(stats: Mapping[str, Any]) -> float | None:
    rounds, spread, quartiles = stats["rounds"], stats.get("stddev"), stats.get("iqr")
    if rounds >= _MANY_ROUNDS and quartiles is not None:
        spread = quartiles / _QUARTILES
    if rounds < 2 or spread is None or not stats["median"]:
        return None
    return float(_MEDIAN_FACTOR * spread / math.sqrt(rounds) / stats["median"])


def used_parts(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parts of pytest-benchmark's JSON that are used, without the times of single
    rounds."""
    timings = data.get("benchmarks")
    if isinstance(timings, list):
        timings = [_part(t, ("fullname", "stats", "options", "extra_info")) for t in timings]
        for timing in timings:
            if isinstance(timing, dict):
                stats = ("median", "mean", "min", "stddev", "iqr", "rounds", "iterations")
                timing["stats"] = _part(timing.get("stats"), stats)
                timing["options"] = _part(timing.get("options"), ("timer",))
                timing["extra_info"] = _part(timing.get("extra_info"), _OUR_EXTRA)
    if data.get("int8bench") is not None:  # our block has a fingerprint of its own
        return {"benchmarks": timings}
    return {**_part(data, ("machine_info", "commit_info")), "benchmarks": timings}


def is_of_test(timing: Any, ours: Collection[str]) -> bool:
    """Return whether an entry of ``benchmarks`` belongs to one of our tests, or to no test at all.

    Our tests are recognized by node id or by our keys in ``extra_info``.
    """
    if not isinstance(timing, dict):
        return False
    extra, nodeid = timing.get("extra_info"), timing.get("fullname")
    is_point = isinstance(extra, dict) and all(name in extra for name in _OUR_EXTRA)
    return nodeid is None or str(nodeid) in ours or is_point


def _part(value: Any, names: Iterable[str]) -> Any:
    return {n: value[n] for n in names if n in value} if isinstance(value, dict) else value


def partial_environment(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return a fingerprint from pytest-benchmark's ``machine_info`` and ``commit_info``, for a file
    without our own. Its entry ``only`` lists the names that are known."""
    info, commit = data.get("machine_info") or {}, data.get("commit_info") or {}
    cpu, system = info.get("cpu") or {}, [info.get("system"), info.get("machine")]
    found = {
        "python": info.get("python_version"),
        "system": " ".join(map(str, system)) if all(system) else None,
        "cpu": cpu.get("brand_raw") or cpu.get("brand"),
    }
    known = {name: value for name, value in found.items() if value}
    code = {"commit": commit.get("id"), "dirty": commit.get("dirty")}
    return {**known, **code, "only": [*known]}


def partly_known(environment: Mapping[str, Any]) -> str | None:
    """Return a warning about a file with a partial fingerprint, or None if it is complete."""
    if (known := environment.get("only")) is None:
        return None
    return (
        f"saved without pytest-int8bench: only machine_info ({', '.join(known) or 'empty'}) could "
        "be checked, not GPU and package versions"
    )


def unsynchronized(benchmarks: Iterable[Benchmark], environment: Mapping[str, Any]) -> str | None:
    """Return a warning if times may not include work on the GPU, else None."""
    if not environment.get("gpu"):
        return None
    names = [b.nodeid for b in benchmarks if b.call_time_s and not b.waits_for_device]
    if not names:
        return None
    more = f" and {len(names) - 1} more" if names[1:] else ""
    return (
        f"timer does not wait for the GPU: {names[0]}{more}: unless the function synchronizes, "
        "only submitting work is timed; use @pytest.mark.benchmark(timer="
        f"pytest_int8bench.clock.{synchronized_perf_counter.__name__})"
    )
