"""Implement ``int8bench report``, which writes a page or Markdown from saved files."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pytest_int8bench.cli.arguments import add_storage
from pytest_int8bench.cli.outputs import refuse, tell_broken
from pytest_int8bench.files import FileError, real_path
from pytest_int8bench.printing import one_line, show
from pytest_int8bench.report.write import check_output, publish
from pytest_int8bench.results.base import Measured, Record
from pytest_int8bench.results.locating import Run, find, read_runs
from pytest_int8bench.results.records import Saved

_DEFAULT = "report.html"


def add_report(commands: Any) -> None:
    """Add the command to argparse's subcommands."""
    parser = commands.add_parser(
        "report",
        help="write a page, or Markdown, from saved files",
        description="Write saved results to one file: throughput, speedup, accuracy, memory, "
        "compile time, device time, coverage and layer sensitivity, and, for several files, their "
        "history. If several files contain the same point, the newest is shown.",
    )
    parser.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help="saved JSON files or journals, folders of them, or pytest-benchmark run numbers such "
        "as 0003",
    )
    parser.add_argument(
        "--output",
        action="append",
        metavar="FILE",
        help=f"report to write, .html or .md; repeatable (default: {_DEFAULT})",
    )
    add_storage(parser)


def run_report(arguments: argparse.Namespace) -> int:
    """Run the command and return its exit code: 0, or 2 if a file cannot be read or written."""
    try:
        try:
            outputs = [check_output(text) for text in arguments.output or [_DEFAULT]]
        except FileError as error:
            raise FileError(f"--output: {error}") from None
        runs = gather(arguments.files, arguments.storage)
        tell_broken("report", runs)
        named = [(one_line(str(run.path)), run.saved) for run in runs]
        for output in dict.fromkeys(outputs):
            publish(named, output)
            show(str(output))
    except (OSError, ValueError) as error:  # includes SchemaError and FileError
        return refuse("report", error)
    return 0


_FIRST = datetime.min.replace(tzinfo=UTC)


def gather(names: Sequence[str], storage: Path) -> list[Run]:
    """Read the runs that file names, folders and pytest-benchmark run numbers refer to.

    Runs are sorted by time, oldest first. Files with equal times keep their order, and a file
    without a time stays after the file before it. A file that is given twice counts once. Records
    that both a JSON file and its session's journal contain are taken from the JSON file.

    Raises:
        FileError: if a file does not exist.
        SchemaError: one line, if a file is damaged or not ours.
        OSError: if a file cannot be read.
    """
    found = [path for name in names for path in find(name, storage, journals=True)]
    paths = {real_path(path): path for path in reversed(found)}
    return _by_time(_without_duplicates(read_runs([*reversed(paths.values())])))


def _by_time(runs: Sequence[Run]) -> list[Run]:
    times: list[datetime] = []
    for run in runs:
        times.append(run.saved.time or (times[-1] if times else _FIRST))
    order = sorted(range(len(runs)), key=times.__getitem__)
    return [runs[place] for place in order]


def _without_duplicates(runs: Sequence[Run]) -> list[Run]:
    files = [run.saved for run in runs if not run.saved.is_journal]
    if len(files) in (0, len(runs)):
        return [*runs]
    known = [_texts(file).keys() for file in files]
    # Index files by record, because comparing each journal with each file would be quadratic.
    holders: dict[str, list[int]] = {}
    for place, found in enumerate(known):
        for text in found:
            holders.setdefault(text, []).append(place)
    kept = []
    for run in runs:
        saved = run.saved
        if saved.is_journal:
            texts = _texts(saved)
            timed = [text for text, is_timed in texts.items() if is_timed]
            sharing = {place for text in timed or texts for place in holders.get(text, ())}
            for place in sorted(sharing) if texts else range(len(files)):
                # If a process died early, the runner writes its journal without an environment.
                alike = saved.environment in ({}, files[place].environment)
                # Equal times identify a session, because no two sessions measure the same ones.
                if alike and (timed or texts.keys() <= known[place]):
                    saved = saved.without(files[place].records)
            if saved is not run.saved and not saved.records:
                continue
        kept.append(Run(run.path, saved))
    return kept


def _texts(saved: Saved) -> dict[str, bool]:
    """Return an identifying text of each record -> whether the record contains a time."""
    return {_text(record): _is_timed(record) for record in saved.records}


def _is_timed(record: Record) -> bool:
    field = "median_s" if isinstance(record, Measured) else "seconds"
    return getattr(record, field) is not None


def _text(record: Record) -> str:
    # Compare records as JSON text, in which NaN equals itself.
    return json.dumps([record.KIND, record.to_dict()], sort_keys=True)
