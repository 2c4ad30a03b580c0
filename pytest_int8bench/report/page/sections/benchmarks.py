"""The section on plain benchmarks, which use pytest-benchmark's own fixture."""

from __future__ import annotations

from collections.abc import Sequence

from pytest_int8bench.report.page.groups import with_sources
from pytest_int8bench.report.page.model import Section, Titled
from pytest_int8bench.report.page.sources import Found, Source
from pytest_int8bench.report.terminal import benchmarks_table
from pytest_int8bench.results.benchmarks import Benchmark, unsynchronized


def section(found: Sequence[Found[Benchmark]], sources: Sequence[Source]) -> Section | None:
    """Return the section of plain benchmarks, or None if none was timed."""
    timed = [f for f in found if f.record.call_time_s is not None]
    if not timed:
        return None
    grid = benchmarks_table([f.record for f in timed])
    notes = (
        unsynchronized([f.record for f in timed if f.source is source], source.saved.environment)
        for source in sources
    )
    return Section(
        id="benchmarks",
        title="Plain benchmarks",
        intro=(
            "Tests that use pytest-benchmark's own fixture: time per call, median over all rounds.",
        ),
        tables=(Titled(caption="Time per call", grid=with_sources(grid, timed, len(sources) > 1)),),
        notes=tuple(dict.fromkeys(filter(None, notes))),
    )
