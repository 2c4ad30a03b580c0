"""The section that shows how figures changed from file to file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from string import ascii_uppercase
from typing import Any, TypeVar

from pytest_int8bench.environment import differences
from pytest_int8bench.report.cells import figure_interval, figure_text, status_text
from pytest_int8bench.report.page import labels
from pytest_int8bench.report.page.charts import Lines, Mark, Point, Series, distinct
from pytest_int8bench.report.page.model import Section, Titled
from pytest_int8bench.report.page.sources import Source, device
from pytest_int8bench.report.tables import MISSING, Grid, number
from pytest_int8bench.results.base import Record, point_label
from pytest_int8bench.results.figures import FIGURES, Figure
from pytest_int8bench.results.records import Result, Timed
from pytest_int8bench.results.verdicts import Accuracy

_TimedT = TypeVar("_TimedT", bound=Timed)
_Key = tuple[str, str, str, str]  # device, workload, test, run name
#: Number of files for which a chart has room.
MOST_FILES = 200


def section(sources: Sequence[Source], renames: Sequence[str] = ()) -> Section | None:
    """Return the history of points that are in several files, or None for a single file.

    Args:
        sources: the files, oldest first.
        renames: one line for each point of an older file that has since been renamed.
    """
    if len(sources) < 2:
        return None
    notes = []
    if len(sources) > MOST_FILES:
        notes = [f"Only the last {MOST_FILES} of {len(sources):,} files are shown."]
        sources = sources[-MOST_FILES:]
    marks = changes(sources)
    results = _by_key(sources, lambda source: source.saved.results)
    timed = _by_key(sources, lambda source: source.saved.timed)
    notes += [
        f"{mark.letter}, before {sources[round(mark.x + 0.5)].label}: {mark.text}" for mark in marks
    ]
    if marks:
        notes.append("Figures across such a change come from different machines or software.")
    return Section(
        id="history",
        title="History",
        intro=(
            (
                "Figures by file, oldest first. Each comes from one process, so small differences "
                "are noise. To judge two commits, use int8bench compare; to measure them in "
                "alternation, int8bench ab."
            ),
        ),
        charts=tuple(_charts(sources, results, marks)),
        tables=(_files(sources, marks), *_tables(sources, timed)),
        notes=(*notes, *renames),
    )


def changes(sources: Sequence[Source]) -> tuple[Mark, ...]:
    """Return a mark for each file whose fingerprint differs from the previous file's."""
    found: list[Mark] = []
    for place in range(1, len(sources)):
        before, after = (s.saved.environment for s in sources[place - 1 : place + 1])
        if differing := differences(before, after):
            text = ", ".join(f"{name} {a} → {b}" for name, (a, b) in differing.items())
            found.append(Mark(x=place - 0.5, letter=_letter(len(found)), text=text))
    return tuple(found)


def _letter(index: int) -> str:
    rounds, place = divmod(index, len(ascii_uppercase))
    return ascii_uppercase[place] + (str(rounds + 1) if rounds else "")


def _by_key(
    sources: Sequence[Source], records: Callable[[Source], Sequence[_TimedT]]
) -> dict[_Key, dict[int, _TimedT]]:
    """Return the results of each point, keyed by the index of their file in ``sources``."""
    found: dict[_Key, dict[int, _TimedT]] = {}
    for place, source in enumerate(sources):
        for result in records(source):
            found.setdefault(_key(source, result), {})[place] = result
    return found


def _key(source: Source, record: Record) -> _Key:
    where = device(source.saved.environment)
    return (where, record.workload, labels.test_of(record), record.run_name)


def _charts(
    sources: Sequence[Source], results: dict[_Key, dict[int, Result]], marks: tuple[Mark, ...]
) -> list[Lines]:
    """Return a throughput chart and a speedup chart for each point, with a line per mode."""
    groups: dict[tuple[object, ...], dict[_Key, dict[int, Result]]] = {}
    for key, found in results.items():
        if sum(labels.is_measured(result) for result in found.values()) < 2:
            continue
        params = labels.identifying_params(next(iter(found.values())))
        rest = {n: v for n, v in params.items() if not n.startswith("int8_") and n != "bf16"}
        groups.setdefault((*key[:3], *sorted(rest.items())), {})[key] = found
    points: dict[str, list[dict[str, Any]]] = {}  # by workload: each has its own axes
    for key, found in ((k, f) for group in groups.values() for k, f in group.items()):
        points.setdefault(key[1], []).append(labels.identifying_params(next(iter(found.values()))))
    names_of = {workload: labels.differing(each) for workload, each in points.items()}
    devices, workloads, tests = (
        {key[i] for group in groups.values() for key in group} for i in range(3)
    )
    charts = []
    for number_of, group in enumerate(groups.values(), start=1):
        where, workload, test, _ = next(iter(group))
        names = names_of[workload]
        first = labels.identifying_params(next(iter(next(iter(group.values())).values())))
        parts = [
            labels.setting(n, first[n]) for n in names if n in first and not n.startswith("int8_")
        ]
        parts = [
            *([workload] if len(workloads) > 1 else []),
            *parts,
            *([where] if len(devices) > 1 else []),
            *([test] if len(tests) > 1 else []),
        ] or [workload]
        title = ", ".join(parts)
        for what, field, point, reference in (
            ("throughput", "samples_per_s", _rate, None),
            ("speedup", "speedup", _speedup, 1.0),
        ):
            series = _series(sources, group, names, point)
            if not series:
                continue
            charts.append(
                Lines(
                    id=f"history-{what}-{number_of}",
                    title=f"{what.capitalize()} across files: {title}",
                    description=_described(series, marks),
                    unit=FIGURES[field].unit,
                    x_label="commit",
                    series=series,
                    names=tuple(source.label for source in sources),
                    from_zero=False,
                    reference=reference,
                    decimals=None if reference is None else 2,
                    marks=marks,
                )
            )
    return charts


def _series(
    sources: Sequence[Source],
    group: dict[_Key, dict[int, Result]],
    names: Sequence[str],
    figure: Callable[[Result], tuple[float | None, float | None, float | None]],
) -> tuple[Series, ...]:
    found = []
    int8_names = [name for name in names if name.startswith("int8_")]
    for by_place in group.values():
        params = labels.identifying_params(next(iter(by_place.values())))
        points = []
        for place, result in sorted(by_place.items()):
            y, low, high = figure(result)
            if y is None and (result.status in ("ok", "skipped") or not params.get("int8_enabled")):
                continue
            points.append(
                Point(
                    name=result.label,
                    x=place,
                    x_shown=sources[place].label,
                    y=y,
                    low=low,
                    high=high,
                    note="" if result.status == "ok" else status_text(result),
                )
            )
        if any(point.y is not None for point in points):
            name = labels.label(params, int8_names)
            found.append(Series(name=name, style=labels.style(params), points=tuple(points)))
    return distinct(found)


def _rate(result: Result) -> tuple[float | None, float | None, float | None]:
    return (result.samples_per_s, *figure_interval(FIGURES["samples_per_s"], result))


def _speedup(result: Result) -> tuple[float | None, float | None, float | None]:
    return (result.speedup, result.speedup_low, result.speedup_high)


def _described(series: Sequence[Series], marks: Sequence[Mark]) -> str:
    parts = []
    for one in series:
        ys = [point for point in one.points if point.y is not None]
        parts.append(
            f"{one.name} from {number(ys[0].y)} ({ys[0].x_shown}) to {number(ys[-1].y)} "
            f"({ys[-1].x_shown})"
        )
    if marks:
        parts.append("the fingerprint changes at " + ", ".join(mark.letter for mark in marks))
    return "; ".join(parts) + "."


def _files(sources: Sequence[Source], marks: Sequence[Mark]) -> Titled:
    changed = {round(mark.x + 0.5): mark for mark in marks}
    rows = []
    for place, source in enumerate(sources):
        saved, mark = source.saved, changed.get(place)
        measured = sum(record.median_s is not None for record in saved.timed)
        rows.append(
            [
                source.label,
                source.name,
                device(saved.environment),
                f"{measured} of {len(saved.timed)}",
                f"{mark.letter}: {mark.text}" if mark else MISSING,
            ]
        )
    return Titled(
        caption="Files, and changes of machine or software",
        grid=Grid(
            columns=["commit", "file", "device", "points measured", "fingerprint changes"],
            rows=rows,
            styles=["changed" if place in changed else None for place in range(len(sources))],
            name="commit",
            left=("file", "device", "fingerprint changes"),
        ),
    )


def _tables(sources: Sequence[Source], results: Mapping[_Key, Mapping[int, Timed]]) -> list[Titled]:
    names = _names(results)
    titled = sorted((f for f in FIGURES.values() if f.title), key=lambda figure: not figure.leads)
    tables = []
    for figure in titled:
        unit = f", {figure.unit}" if figure.unit else ""
        caption = f"{figure.title}{' [95 %]' if figure.interval else unit}"
        rows = {
            names[key]: {place: _cell(figure, result) for place, result in found.items()}
            for key, found in results.items()
        }
        tables += _table(caption, sources, rows)
    verdicts: dict[str, dict[int, str]] = {}
    for place, source in enumerate(sources):
        for verdict in source.saved.accuracy:
            name = f"{verdict.label} {verdict.metric}"
            verdicts.setdefault(name, {})[place] = _verdict_cell(verdict)
    return tables + _table("Accuracy verdicts, drop", sources, verdicts)


def _names(keys: Iterable[_Key]) -> dict[_Key, str]:
    """Return a name for each point, with the test or device only if it distinguishes points."""
    keys = list(keys)
    tests: dict[tuple[str, str], set[str]] = {}
    devices: dict[tuple[str, str], set[str]] = {}
    for where, workload, test, run_name in keys:
        tests.setdefault((workload, run_name), set()).add(test)
        devices.setdefault((workload, run_name), set()).add(where)
    names = {}
    for where, workload, test, run_name in keys:
        name = point_label(workload, run_name)
        if len(tests[workload, run_name]) > 1:
            name += f" ({test})"
        if len(devices[workload, run_name]) > 1:
            name += f" on {where}"
        names[where, workload, test, run_name] = name
    return names


def _cell(figure: Figure, result: Timed) -> str:
    text = figure_text(figure, result)
    if result.status == "ok" or not figure.shows_status:
        return text
    return status_text(result) if text == MISSING else f"{text} ({status_text(result)})"


def _verdict_cell(verdict: Accuracy) -> str:
    text = verdict.outcome + ("*" if verdict.is_pipeline_check else "")
    if verdict.drop is None:
        return text
    return f"{text} {100 * verdict.drop:.2f}{verdict.drop_unit}"


def _table(
    caption: str, sources: Sequence[Source], rows: dict[str, dict[int, str]]
) -> list[Titled]:
    """Return a table with a column for each file, or nothing if no row has two values."""
    kept = {
        name: cells
        for name, cells in rows.items()
        if sum(cell != MISSING for cell in cells.values()) > 1
    }
    if not kept:
        return []
    grid = Grid(
        columns=["run", *(source.label for source in sources)],
        rows=[
            [name, *(cells.get(place, MISSING) for place in range(len(sources)))]
            for name, cells in kept.items()
        ],
        styles=[None] * len(kept),
        name="run",
    )
    return [Titled(caption=f"{caption}, by file", grid=grid)]
