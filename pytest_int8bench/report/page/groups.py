"""Points that belong together, and what tells them apart."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pytest_int8bench.report.cells import status_text
from pytest_int8bench.report.page import labels
from pytest_int8bench.report.page.sources import Found
from pytest_int8bench.report.tables import Grid
from pytest_int8bench.results.records import Result

Results = list[Found[Result]]
Params = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Scope:
    """The points of one workload on one device."""

    id: str
    title: str
    """What is added to the title of a chart; empty where there is one scope only."""
    workload: str
    device: str
    results: tuple[Result, ...]

    def pick(self, keep: Callable[[Result], bool]) -> list[tuple[Result, Params, str]]:
        """Return the points to keep, each with its parameters and the shortest name that tells it
        from the others that are kept."""
        kept = [result for result in self.results if keep(result)]
        params = [labels.plain(result) for result in kept]
        return list(zip(kept, params, _names(kept, params), strict=True))


def scopes_of(results: Results) -> list[Scope]:
    """Return the points by workload and device."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for found in results:
        groups.setdefault((found.record.workload, found.device), []).append(found.record)
    workloads, devices = ({key[i] for key in groups} for i in range(2))
    scopes = []
    for index, ((workload, where), group) in enumerate(groups.items(), start=1):
        group = sorted(group, key=lambda result: labels.order(labels.plain(result)))
        said = [workload] if len(workloads) > 1 else []
        said += [where] if len(devices) > 1 else []
        title = f": {', '.join(said)}" if said else ""
        scopes.append(Scope(str(index), title, workload, where, tuple(group)))
    return scopes


def _names(results: Sequence[Result], params: Sequence[Params]) -> list[str]:
    """Return a name for each point; the test's is in it where nothing else differs."""
    differing = labels.differing(params)
    names = [labels.label(point, differing) for point in params]
    twice = {name for name, count in Counter(names).items() if count > 1}
    return [
        f"{name} ({labels.test_of(result)})" if name in twice else name
        for name, result in zip(names, results, strict=True)
    ]


def note(result: Result) -> str:
    """Return what a figure's reader should know in a word."""
    if result.status != "ok":
        return status_text(result)
    return "throttled" if result.throttled else ""


def with_sources(grid: Grid, shown: Sequence[Found[Any]], many: bool) -> Grid:
    """Return the table with the file of each row, where there are several."""
    if not many:
        return grid
    rows = [[*row, f.source.label] for row, f in zip(grid.rows, shown, strict=True)]
    return dataclasses.replace(
        grid, columns=[*grid.columns, "file"], rows=rows, left=(*grid.left, "file")
    )
