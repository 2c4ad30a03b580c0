"""Build the content of a report from one or more saved files, whatever its output format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from pytest_int8bench.environment import FINGERPRINT_NAMES, describe, flat
from pytest_int8bench.report.cells import shown_speedup, status_text
from pytest_int8bench.report.page import labels
from pytest_int8bench.report.page.fitting import fitted
from pytest_int8bench.report.page.groups import Results, Scope, scopes_of, with_sources
from pytest_int8bench.report.page.model import Section, Titled, View
from pytest_int8bench.report.page.sections import (
    accuracy,
    bars,
    benchmarks,
    history,
    model_internals,
    throughput,
)
from pytest_int8bench.report.page.sources import Found, Source, current, with_new_names
from pytest_int8bench.report.tables import MISSING, Grid, number, plain_grid
from pytest_int8bench.results.records import Result
from pytest_int8bench.results.verdicts import Accuracy
from pytest_int8bench.words import plural

TITLE = "INT8 inference benchmarks"


def build(sources: Sequence[Source]) -> View:
    """Return the view of files, given oldest first. If a point is in several files, the last one
    counts."""
    sources, renames = with_new_names(sources)
    results = current(sources, lambda saved: saved.results)
    verdicts = current(sources, lambda saved: saved.accuracy)
    scans = current(sources, lambda saved: saved.sensitivity)
    plain = current(sources, lambda saved: saved.benchmarks)
    scopes = scopes_of(results)
    sections = [
        throughput.throughput(scopes, results, len(sources) > 1),
        bars.speedup(scopes),
        accuracy.section(scopes, verdicts),
        bars.memory(scopes),
        bars.first_call(scopes),
        model_internals.device_time(scopes),
        model_internals.coverage(results),
        model_internals.sensitivity(scans),
        benchmarks.section(plain, sources),
        _problems([*results, *plain], len(sources) > 1),
        history.section(sources, renames),
        _environment(sources),
    ]
    found = tuple(section for section in sections if section is not None)
    missing = _missing({section.id for section in found})
    machines = list(dict.fromkeys(describe(source.saved.environment) for source in sources))
    others = f" (the latest of {len(machines)} environments)" if len(machines) > 1 else ""
    view = View(
        title=TITLE,
        subtitle=describe(sources[-1].saved.environment) + others,
        summary=(*_summary(scopes, results, verdicts), *_counted(plain, "plain benchmark")),
        sections=(*found, *([missing] if missing is not None else [])),
    )
    return fitted(view)


def _problems(timed: Sequence[Found[Any]], many: bool) -> Section | None:
    shown = [found for found in timed if found.record.status != "ok"]
    if not shown:
        return None
    rows = [
        [
            found.record.label,
            labels.test_of(found.record),
            status_text(found.record),
            found.record.reason or "no reason given",
        ]
        for found in shown
    ]
    grid = plain_grid(["run", "test", "status", "reason"], rows, left=("test", "status", "reason"))
    return Section(
        id="problems",
        title="Skipped, failed and out of memory",
        tables=(
            Titled(caption="Points without valid figures", grid=with_sources(grid, shown, many)),
        ),
    )


def _environment(sources: Sequence[Source]) -> Section:
    """Return the section of fingerprints, with one column per distinct fingerprint."""
    columns: dict[tuple[str, ...], list[Source]] = {}
    for source in sources:
        values = tuple(_shown_value(n, v) for n, v in flat(source.saved.environment).items())
        alike = tuple(
            value
            for name, value in zip(flat(source.saved.environment), values, strict=True)
            if name not in ("commit", "dirty")
        )
        columns.setdefault(alike, []).append(source)
    kept = [n for n in FINGERPRINT_NAMES if len(sources) == 1 or n not in ("commit", "dirty")]
    rows: list[list[str]] = []
    styles: list[str | None] = []
    for name in kept:
        cells = [
            _shown_value(name, flat(group[0].saved.environment)[name]) for group in columns.values()
        ]
        rows.append([name, *cells])
        styles.append("changed" if len(set(cells)) > 1 else None)
    heads = [_range(group) for group in columns.values()] if len(sources) > 1 else ["value"]
    grid = Grid(columns=["property", *heads], rows=rows, styles=styles, name="property", left=heads)
    return Section(
        id="environment",
        title="Environment",
        tables=(Titled(caption="Machine and software", grid=grid),),
    )


def _range(group: Sequence[Source]) -> str:
    shown = group[0].label
    return shown if len(group) == 1 else f"{shown} … {group[-1].label} ({len(group)} files)"


def _shown_value(name: str, value: Any) -> str:
    if value is None:
        return MISSING
    if name == "memory_bytes" and labels.is_number(value):
        return f"{number(value / 2**30)} GiB"
    return labels.shown_value(value)


_WHY_MISSING = {
    "throughput": "Throughput: no point was timed.",
    "speedup": "Speedup: no candidate was measured against its baseline.",
    "accuracy": "Accuracy: no accuracy test reached a verdict.",
    "memory": "Memory: not measured for any point (requires CUDA).",
    "compile": "Compile time: not measured for any point.",
    "device-time": "Device time: not measured for any point (requires CUDA).",
    "coverage": "Coverage: no point reports quantized layers.",
    "sensitivity": "Layer sensitivity: not measured; run int8bench sensitivity.",
}


def _missing(there: set[str]) -> Section | None:
    notes = tuple(why for name, why in _WHY_MISSING.items() if name not in there)
    if not notes:
        return None
    return Section(id="missing", title="Not in this report", notes=notes)


def _counted(found: Sequence[Found[Any]], what: str) -> Iterable[str]:
    count = Counter(status_text(one.record) for one in found)
    if found:
        counted = ", ".join(f"{number_of} {status}" for status, number_of in count.items())
        yield f"{plural(len(found), what)}: {counted}."


def _summary(
    scopes: Sequence[Scope], results: Results, verdicts: Sequence[Found[Accuracy]]
) -> Iterable[str]:
    yield from _counted(results, "point")
    for scope in scopes:
        by_mode: dict[str, list[tuple[Result, str]]] = {}
        for result, params, name in scope.pick(lambda r: r.speedup is not None):
            by_mode.setdefault(labels.mode(params), []).append((result, name))
        for mode, rows in by_mode.items():
            least, most = (pick(rows, key=lambda row: row[0].speedup or 0) for pick in (min, max))
            text = f"{scope.workload}, {mode}: {shown_speedup(most[0])} the baseline's speed"
            if shown_speedup(most[0]) != shown_speedup(least[0]):
                text += f" at best ({most[1]}), {shown_speedup(least[0])} at worst ({least[1]})"
            yield f"{text}{f' on {scope.device}' if len(scopes) > 1 and scope.title else ''}."
    judged = [f.record for f in verdicts if f.record.limit is not None]
    real = [verdict for verdict in judged if not verdict.is_pipeline_check]
    if real:
        outcomes = Counter(verdict.outcome for verdict in real)
        limits = ", ".join(dict.fromkeys(str(verdict.limit) for verdict in real))
        counted = ", ".join(f"{number_of} {name}" for name, number_of in outcomes.items())
        yield f"Accuracy: {counted} (limit {limits})."
    if checks := len(judged) - len(real):
        yield (
            f"{plural(checks, 'verdict')} on random weights (a pipeline check, which says nothing "
            "about a trained model)."
        )
