"""Read saved files: pytest-benchmark's JSON with our block, and journals.

pytest-benchmark's JSON gets a top-level ``int8bench`` object::

    {"schema": 1, "environment": {...}, "results": [...], "accuracy": [...], "sensitivity": [...]}

``environment`` is the fingerprint of :mod:`pytest_int8bench.environment`. ``results`` lists every
finished point (:class:`Result`) whatever its status, ``accuracy`` every verdict
(:class:`Accuracy`), and ``sensitivity`` every table of layers (:class:`Sensitivity`). A journal has
a header, then the same records as JSON lines; all records but results are wrapped in an object that
names their kind.

Plain benchmarks (:class:`Benchmark`) are the tests that pytest-benchmark timed besides our points.
They are in its own ``benchmarks``; ``benchmarks`` in our block lists those without a time, if there
are any. A file without our block has only plain benchmarks.

All strings are cleaned here, once, so that a malicious file cannot inject anything into a terminal,
the log of a CI server or Markdown.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pytest_int8bench.git_lfs import POINTER, is_pointer
from pytest_int8bench.results.base import SchemaError
from pytest_int8bench.results.benchmarks import (
    Benchmark,
    is_of_test,
    partial_environment,
    used_parts,
)
from pytest_int8bench.results.checks import check, short, shown
from pytest_int8bench.results.lines import unwrapped
from pytest_int8bench.results.parsing import cleaned_values, parse, read_text
from pytest_int8bench.results.records import (
    KINDS,
    SCHEMA,
    AnyRecord,
    Result,
    Saved,
    latest,
)
from pytest_int8bench.results.shapes import BenchmarkFile, Block, Header
from pytest_int8bench.results.verdicts import Accuracy, Sensitivity


def read(path: Path) -> Saved:
    """Read a JSON file of pytest-benchmark, or a journal.

    Raises:
        SchemaError: one line, if the file is damaged, not ours or from a newer version.
        OSError: if it cannot be read.
    """
    text = read_text(path)
    if not text.strip():
        raise SchemaError(f"{path} is empty")
    if is_pointer(text):
        raise SchemaError(f"{path} {POINTER}")
    try:
        data = parse(path, text)
    except json.JSONDecodeError as error:
        return _read_journal(path, text, error)
    if isinstance(data, dict) and "benchmarks" not in data and "int8bench" in data:
        return _read_journal(path, text)  # a journal that has only its header
    block = data.get("int8bench") if isinstance(data, dict) else None
    has_timings = isinstance(data, dict) and bool(data.get("benchmarks")) and block is None
    if not isinstance(block, dict) and not has_timings:
        raise SchemaError(f"{path} has no int8bench block: it was not saved by pytest-int8bench")
    file = cleaned_values(path, used_parts(data))
    try:
        check(BenchmarkFile, file)
    except ValueError as error:
        raise SchemaError(f"{path}: {error}") from None
    if block is None:
        return Saved(
            partial_environment(file),
            [],
            benchmarks=_benchmarks(path, file["benchmarks"], []),
            time=_time(data.get("datetime")),
        )
    block = cleaned_values(path, block)
    _check_head(path, block, Block)
    results = _records(path, Result, block["results"])
    untimed = _records(path, Benchmark, block.get("benchmarks", []))
    ours = {result.nodeid for result in results}
    plain = [timing for timing in file["benchmarks"] if not is_of_test(timing, ours)]
    return Saved(
        block["environment"],
        results,
        _records(path, Accuracy, block["accuracy"]),
        _records(path, Sensitivity, block.get("sensitivity", [])),
        _benchmarks(path, plain, untimed),
        time=_time(data.get("datetime")),
    )


def _benchmarks(path: Path, timings: list[Any], untimed: list[Benchmark]) -> list[Benchmark]:
    """Return the plain benchmarks of a file, both timed and untimed. An entry in ``untimed``
    replaces the timing of the same test, which pytest-benchmark may have saved before the test
    failed."""
    timed = [_record(path, Benchmark.from_timing, timing, "fullname") for timing in timings]
    return latest((*timed, *untimed))  # keeps the last attempt of a test that was run again


def _read_journal(path: Path, text: str, error: json.JSONDecodeError | None = None) -> Saved:
    lines = text.rstrip("\r\n").split("\n")
    records: list[Any] = []
    skipped: list[int] = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(cleaned_values(path, parse(path, line)))
        except json.JSONDecodeError:
            if error is not None and not records:
                raise SchemaError(_no_json(path, text, error)) from None
            # A process that is killed while writing leaves an incomplete last line; do not report
            # that.
            if number < len(lines) or text.endswith("\n"):
                skipped.append(number)
    header = records[0].get("int8bench") if isinstance(records[0], dict) else None
    if not isinstance(header, dict):
        raise SchemaError(f"{path} is not a journal of pytest-int8bench: it has no header")
    _check_head(path, header, Header)
    kept: dict[str, list[Any]] = {name: [] for name in KINDS}
    for name, values in map(unwrapped, records[1:]):
        kept[name].append(values)
    found: dict[str, Any] = {
        name: _records(path, kind, kept[name], again=True) for name, kind in KINDS.items()
    }
    return Saved(
        header["environment"],
        **found,
        is_journal=True,
        skipped=tuple(skipped),
        time=_time(header.get("datetime")),
    )


def _time(text: Any) -> datetime | None:
    try:
        time = datetime.fromisoformat(text)
        # Older versions of pytest-benchmark write UTC without a time zone.
        return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)
    except (TypeError, ValueError, OverflowError):
        return None


def _no_json(path: Path, text: str, error: json.JSONDecodeError) -> str:
    if not text.lstrip().startswith("{"):
        return f"{path} is neither JSON nor a journal (line 1)"
    end = text.rstrip()
    is_cut = error.pos >= len(end) or not end.endswith("}")
    is_cut |= error.msg.startswith("Unterminated")
    what = "it is cut off" if is_cut else error.msg
    return f"{path} is not JSON: {what} (line {error.lineno}, column {error.colno})"


def _records(
    path: Path, kind: type[AnyRecord], values: list[Any], *, again: bool = False
) -> list[AnyRecord]:
    """Read records. If an identity repeats, keep the last record with ``again``, and raise
    SchemaError without it."""
    found = [_record(path, kind.from_dict, value, "nodeid") for value in values]
    kept = latest(found)
    if not again and len(kept) < len(found):
        count = Counter(record.identity for record in found)
        [(identity, times)] = count.most_common(1)
        raise SchemaError(f"{path} holds {kind.KIND} {times} times: {short(', '.join(identity))}")
    return kept


def _record(path: Path, read: Callable[[Any], AnyRecord], value: Any, name: str) -> AnyRecord:
    """Read a record. Errors name its node id, which is in the field ``name``."""
    try:
        return read(value)
    except SchemaError as error:
        nodeid = value.get(name) if isinstance(value, dict) else None
        where = f"{path}: {short(nodeid)}" if nodeid and isinstance(nodeid, str) else str(path)
        raise SchemaError(f"{where}: {error}") from None


def _check_head(path: Path, head: Mapping[str, Any], kind: Any) -> None:
    """Check the schema version and all values around the records."""
    schema = head.get("schema")
    if not isinstance(schema, int) or isinstance(schema, bool):
        raise SchemaError(f"{path}: schema must be a whole number, got {shown(schema)}")
    if schema > SCHEMA:
        raise SchemaError(
            f"{path} has schema {shown(schema)}, but this version reads only up to {SCHEMA}; "
            "update pytest-int8bench"
        )
    try:
        check(kind, head)
    except ValueError as error:
        raise SchemaError(f"{path}: {error}") from None
