"""Tables with many rows look exactly as rich prints them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.table import Table

from pytest_int8bench.printing import one_line
from pytest_int8bench.report import rows
from pytest_int8bench.report.tables import Grid
from pytest_int8bench.report.terminal import accuracy_table, results_table, sensitivity_table
from toys.results import everything


def by_rich(table: Any, deciding: Any, content: Any, console: Any) -> str:
    """Print all rows with rich alone."""
    stream = io.StringIO()
    printer: Console = console(stream)
    printer.print(table(content))
    return "".join(f"{line.rstrip()}\n" for line in stream.getvalue().splitlines())


def same(grid: Grid, widths: Sequence[int | None]) -> None:
    for color in (False, True):
        for width in widths:
            ours = grid.text(width=width, color=color)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("pytest_int8bench.report.tables.print_rows", by_rich)
                assert ours == grid.text(width=width, color=color), (width, color)


SAVED = everything()


@pytest.mark.parametrize(
    "grid",
    [
        results_table(SAVED.results),
        accuracy_table(SAVED.accuracy),
        sensitivity_table(SAVED.sensitivity[0]),
        results_table([]),
    ],
    ids=["results", "accuracy", "layers", "empty"],
)
def test_session_tables_match_rich(grid: Grid) -> None:
    same(grid, [None, *range(8, 60, 7), 80, 100, 120, 121, 160, 200])


cells = st.text(alphabet="ab 1-_[]é中́🙂", max_size=30).map(one_line)


@given(st.data(), st.integers(1, 4), st.integers(0, 5))
def test_rows_match_rich_for_any_cells(data: st.DataObject, columns: int, count: int) -> None:
    names = [f"c{number}" * data.draw(st.integers(1, 4)) for number in range(columns)]
    some = st.lists(st.sampled_from(names), max_size=2)
    grid = Grid(
        columns=names,
        rows=[[data.draw(cells) for _ in names] for _ in range(count)],
        styles=[data.draw(st.sampled_from([None, "red", "dim", "yellow"])) for _ in range(count)],
        name=names[0],
        left=data.draw(some),
        keys=data.draw(some),
    )
    same(grid, [None, data.draw(st.integers(5, 120))])


def test_rich_prints_only_rows_that_affect_widths(monkeypatch: pytest.MonkeyPatch) -> None:
    added = []
    add_row = Table.add_row
    monkeypatch.setattr(
        rows.Table, "add_row", lambda self, *a, **k: (added.append(a), add_row(self, *a, **k))[1]
    )
    many = results_table([*SAVED.results] * 200)
    assert len(many.text(width=80, color=False).splitlines()) > 2000
    assert len(added) < 50
