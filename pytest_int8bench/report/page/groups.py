"""Group points by workload and device, and name the points of a group."""

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
    """Suffix for the titles of charts; empty if there is only one scope."""
    workload: str
    device: str
    results: tuple[Result, ...]

    def pick(self, keep: Callable[[Result], bool]) -> list[tuple[Result, Params, str]]:
        """Return the points that ``keep`` selects, each with its parameters and the shortest name
        that distinguishes it from the others."""
        kept = [result for result in self.results if keep(result)]
        params = [labels.identifying_params(result) for result in kept]
        return list(zip(kept, params, _names(kept, params), strict=True))


def scopes_of(results: Results) -> list[Scope]:
    """Group the points by workload and device."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for found in results:
        groups.setdefault((found.record.workload, found.device), []).append(found.record)
    workloads, devices = ({key[i] for key in groups} for i in range(2))
    scopes = []
    for index, ((workload, where), group) in enumerate(groups.items(), start=1):
        group = sorted(group, key=lambda result: labels.order(labels.identifying_params(result)))
        parts = [workload] if len(workloads) > 1 else []
        parts += [where] if len(devices) > 1 else []
        title = f": {', '.join(parts)}" if parts else ""
        scopes.append(Scope(str(index), title, workload, where, tuple(group)))
    return scopes


def _names(results: Sequence[Result], params: Sequence[Params]) -> list[str]:
    """Return a name for each point, with the test's name only if nothing else distinguishes it."""
    differing = labels.differing(params)
    names = [labels.label(point, differing) for point in params]
    twice = {name for name, count in Counter(names).items() if count > 1}
    return [
        f"{name} ({labels.test_of(result)})" if name in twice else name
        for name, result in zip(names, results, strict=True)
    ]


def note(result: Result) -> str:
    """Return a one-word remark on the point's figure: its status if not ``ok``, else ``throttled``
    or nothing."""
    if result.status != "ok":
        return status_text(result)
    return "throttled" if result.throttled else ""


def with_sources(grid: Grid, shown: Sequence[Found[Any]], many: bool) -> Grid:
    """Return the table; if ``many`` files were given, add a column that names the file of each
    row."""
    if not many:
        return grid
    rows = [[*row, f.source.label] for row, f in zip(grid.rows, shown, strict=True)]
    return dataclasses.replace(
        grid, columns=[*grid.columns, "file"], rows=rows, left=(*grid.left, "file")
    )
