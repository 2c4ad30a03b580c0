"""Plain benchmarks: tests with pytest-benchmark's own ``benchmark``, and files without our block.

pytest-benchmark saves the times of a test in seconds per call, whatever the iterations of a round
are, and about the machine its ``machine_info``.
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

#: Of a median, over that of a mean, if times are normally distributed.
_OF_MEDIAN = math.sqrt(math.pi / 2)
#: Interquartile range of a normal distribution, in standard deviations.
_QUARTILES = 1.349
#: Rounds from which on quartiles say how times scatter, whatever outliers there are.
_MANY_ROUNDS = 10
#: What a point has in its ``extra_info``, among others.
_OUR_EXTRA = ("run_name", "workload", "params")


@dataclass(frozen=True, kw_only=True)
class Benchmark(Measured):
    """A test with pytest-benchmark's own ``benchmark``. Its run name is its node id."""

    KIND = "a plain benchmark"
    IS_PLAIN = True

    call_time_s: float | None = None
    """Median over the rounds of the time per call: that of a round over its iterations."""
    call_time_mean_s: float | None = None
    """Mean over the rounds."""
    call_time_min_s: float | None = None
    """The fastest round."""
    call_time_standard_error: float | None = None
    """Estimated standard error of the median, relative to it; None after a single round."""
    rounds: Count | None = None
    """Rounds that were timed."""
    iterations: Count | None = None
    """Calls per round."""
    timer: str | None = None
    """Name of the function that told the time; None where the file does not say."""

    throttled: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def of(cls, nodeid: str, **values: Any) -> Self:
        """Return the record of a test."""
        return cls(nodeid=nodeid, workload=PLAIN, run_name=nodeid, params={}, **values)

    @classmethod
    def from_timing(cls, timing: Any) -> Self:
        """Read an entry of ``benchmarks`` in pytest-benchmark's JSON.

        Raises:
            SchemaError: one line, if it is none.
        """
        if not isinstance(timing, Mapping):
            raise SchemaError(f"not {cls.KIND}: {shown(timing)}")
        try:
            check(Timing, timing)
            stats = timing["stats"]
            # A call that is shorter than the tick of its timer takes no time.
            coarse = {"status": "skipped", "reason": "its timer is too coarse for its calls"}
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
        """What stands for the process: the median round."""
        return self.call_time_s

    @property
    def fastest_s(self) -> float | None:
        """The fastest round."""
        return self.call_time_min_s

    @property
    def wall_s(self) -> float:
        """About the wall time that measuring took."""
        return (self.rounds or 0) * (self.iterations or 1) * (self.call_time_mean_s or 0.0)

    @property
    def waits_for_device(self) -> bool:
        """The timer is ours, which waits until the device has done its work."""
        return self.timer == synchronized_perf_counter.__name__


def _standard_error(stats: Mapping[str, Any]) -> float | None:
    rounds, spread, quartiles = stats["rounds"], stats.get("stddev"), stats.get("iqr")
    if rounds >= _MANY_ROUNDS and quartiles is not None:
        spread = quartiles / _QUARTILES
    if rounds < 2 or spread is None or not stats["median"]:
        return None
    return float(_OF_MEDIAN * spread / math.sqrt(rounds) / stats["median"])


def picked(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is read of pytest-benchmark's JSON, without the times of all rounds."""
    timings = data.get("benchmarks")
    if isinstance(timings, list):
        timings = [_part(t, ("fullname", "stats", "options", "extra_info")) for t in timings]
        for timing in timings:
            if isinstance(timing, dict):
                stats = ("median", "mean", "min", "stddev", "iqr", "rounds", "iterations")
                timing["stats"] = _part(timing.get("stats"), stats)
                timing["options"] = _part(timing.get("options"), ("timer",))
                timing["extra_info"] = _part(timing.get("extra_info"), _OUR_EXTRA)
    if data.get("int8bench") is not None:  # which has a fingerprint
        return {"benchmarks": timings}
    return {**_part(data, ("machine_info", "commit_info")), "benchmarks": timings}


def is_of_test(timing: Any, ours: Collection[str]) -> bool:
    """Return whether an entry of ``benchmarks`` in a file with our block is of one of our tests, by
    its node id or what it holds of us, or of no test at all."""
    if not isinstance(timing, dict):
        return False
    extra, nodeid = timing.get("extra_info"), timing.get("fullname")
    is_point = isinstance(extra, dict) and all(name in extra for name in _OUR_EXTRA)
    return nodeid is None or str(nodeid) in ours or is_point


def _part(value: Any, names: Iterable[str]) -> Any:
    return {n: value[n] for n in names if n in value} if isinstance(value, dict) else value


def partial_environment(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fingerprint of a file without ours: what pytest-benchmark knows of it, by our
    names, which ``only`` lists."""
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
    """Return a line about a file that says little of its machine, None if it says all."""
    if (known := environment.get("only")) is None:
        return None
    return (
        "saved without pytest-int8bench: the machine could be checked only as far as "
        f"machine_info goes ({', '.join(known) or 'nothing'}), without GPU and versions of packages"
    )


def unsynchronized(benchmarks: Iterable[Benchmark], environment: Mapping[str, Any]) -> str | None:
    """Return a line about times that hold no work of the GPU, None if there are none."""
    if not environment.get("gpu"):
        return None
    names = [b.nodeid for b in benchmarks if b.call_time_s and not b.waits_for_device]
    if not names:
        return None
    more = f" and {len(names) - 1} more" if names[1:] else ""
    return (
        f"timer does not wait for the GPU: {names[0]}{more}: the time is that of submitting work, "
        "where the function does not wait by itself; to wait: @pytest.mark.benchmark(timer="
        f"pytest_int8bench.clock.{synchronized_perf_counter.__name__})"
    )
