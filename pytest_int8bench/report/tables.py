"""Format tables as text for terminals and logs, and as Markdown."""

from __future__ import annotations

import dataclasses
import functools
import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from pytest_int8bench.printing import one_line
from pytest_int8bench.report.rows import Row, cell_width, longest_word, print_rows

MISSING = "-"
#: GitHub drops larger step summaries, and does not render larger Markdown files.
MARKDOWN_BYTES = 1 << 20
_WIDE = 1000
_WIDEST = 1 << 30
#: Folded names keep at least this width.
_FOLDED = 20
#: Tells readers where to find the rows and remarks that a Markdown file leaves out.
_ELSEWHERE = "the worst are shown first; the log and the --json file have all of them"
#: Styles of rows with a problem, worst first.
_WORST = ("red", "yellow")
# Text that GitHub turns into mentions, emoji, references or formulas; characters that Markdown
# escapes with a backslash; bare links; and list markers at the start of a line.
_MARKDOWN = re.compile(
    r"(?P<github>@(?=\w)|:(?=[\w+-]+:)|#(?=\d)|(?<=GH)-(?=\d)|\$)"
    r"|[\\`*_\[\]<>#|~&]|:(?=//)|(?<=www)\.|^(?:[-+](?=\s|-+\s*$)|\d+[.)](?=\s|$))",
    re.IGNORECASE,
)


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A table of texts."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    styles: Sequence[str | None]
    """Style of each row; None for plain."""
    name: str
    """The column that names each row. It is folded before any other column."""
    left: Sequence[str] = ()
    """Left-aligned columns besides ``name``."""
    keys: Sequence[str] = ()
    """Columns that identify a row together with ``name``. They are repeated in each part of a table
    that is too wide for a terminal."""
    first: Sequence[str] = ()
    """Columns that come first when a table is split into parts."""

    def text(self, *, width: int | None, color: bool) -> str:
        """Return the table for a terminal of ``width`` columns, or at full width for None.

        If it is too wide even with folded names, empty columns are dropped, and if necessary the
        others are split into several tables. Figures are never cut, as a cut figure reads like a
        different one, so a table may still exceed the width.
        """
        width = width or _WIDE
        deciding = zip(*(self._deciding[column] for column in self.columns), strict=True)
        whole = self._table(self.columns, {}, ((row, None) for row in deciding))
        wide = _console(io.StringIO(), _WIDEST, color)
        if width >= Measurement.get(wide, wide.options, whole).minimum:
            return self._printed(self.columns, {}, width, color)
        tables = []
        for columns in self._parts(width):
            widths = self._key_widths(columns, width)
            least = _total([widths.get(column, self._width(column)) for column in columns])
            tables.append(self._printed(columns, widths, max(width, least), color))
        return "\n".join(tables)

    def _printed(
        self, columns: Sequence[str], widths: Mapping[str, int], width: int, color: bool
    ) -> str:
        """Return a table of the given columns as text, folding each column in ``widths`` (column ->
        width). Rich lays out only the rows that decide column widths, which takes a hundredth of
        the time."""
        places = [self.columns.index(column) for column in columns]
        rows: list[Row] = [
            ([one_line(row[place]) for place in places], style)
            for row, style in zip(self.rows, self.styles, strict=True)
        ]
        return print_rows(
            lambda rows: self._table(columns, widths, rows),
            [[self._deciding[column][n] for column in columns] for n in range(2)],
            rows,
            lambda stream: _console(stream, width, color),
        )

    @functools.cached_property
    def _deciding(self) -> dict[str, tuple[str, str]]:
        """Column -> the two cells that decide its width: the widest, and the one with the longest
        word."""
        return {
            column: (
                max(cells, key=cell_width, default=""),
                max(cells, key=longest_word, default=""),
            )
            for column in self.columns
            for cells in [list(map(one_line, self._cells(column)))]
        }

    def _table(
        self, columns: Sequence[str], widths: Mapping[str, int], rows: Iterable[Row]
    ) -> Table:
        """Return a rich table of the given columns, folding each column in ``widths`` (column ->
        width)."""
        table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
        for column in columns:
            table.add_column(
                Text(column),  # a plain string with brackets would be parsed as markup
                justify="left" if column in (self.name, *self.left) else "right",
                no_wrap=column != self.name and column not in widths,
                overflow="fold",
                width=widths.get(column),
                min_width=_FOLDED if column == self.name and not widths else None,
            )
        for row, style in rows:
            cells = (cell if isinstance(cell, Text) else Text(cell) for cell in row)
            table.add_row(*cells, style=style)
        return table

    def _parts(self, width: int) -> list[list[str]]:
        """Divide the columns among tables no wider than ``width``, if possible; each has name and
        keys."""
        keys = [column for column in self.columns if column in (self.name, *self.keys)]
        least = [min(self._width(key), _FOLDED) for key in keys]
        others = [column for column in self.columns if column not in keys]
        if _total([*least, *map(self._width, others)]) <= width:
            return [[*self.columns]]
        others = [c for c in others if any(cell != MISSING for cell in self._cells(c))] or others
        if _total([*least, *map(self._width, others)]) <= width:
            return [[c for c in self.columns if c in (*keys, *others)]]
        others.sort(key=lambda c: self.first.index(c) if c in self.first else len(self.first))
        room = width - _total(least)

        def split(room: int) -> list[list[str]]:
            parts = [others[:1]]
            for column in others[1:]:
                part = [*parts[-1], column]
                if sum(self._width(c) + 1 for c in part) <= room:
                    parts[-1] = part
                else:
                    parts.append([column])
            return parts

        # Use the fewest possible tables, of similar width, to leave the most room for names.
        count = len(split(room))
        even = next((less for less in range(1, room) if len(split(less)) == count), room)
        return [[*keys, *part] for part in split(even)]

    def _key_widths(self, columns: Sequence[str], width: int) -> dict[str, int]:
        """Return the width of the name column and of each key column: as wide as needed, if there
        is room."""
        keys = [self.name, *(column for column in columns if column in self.keys)]
        widths = {key: min(self._width(key), _FOLDED) for key in keys}
        for key in keys:
            room = width - _total([widths.get(column, self._width(column)) for column in columns])
            widths[key] = min(self._width(key), widths[key] + max(room, 0))
        return widths

    def _cells(self, column: str) -> list[str]:
        place = self.columns.index(column)
        return [row[place] for row in self.rows]

    def _width(self, column: str) -> int:
        return self._widths[column]

    @functools.cached_property
    def _widths(self) -> dict[str, int]:
        return {
            column: max(map(cell_width, (column, *self._cells(column)))) for column in self.columns
        }

    def markdown(self, rows: int | None = None, elsewhere: str = _ELSEWHERE) -> str:
        """Return the table as Markdown for GitHub.

        Args:
            rows: how many rows to show, worst first; None for all, in their order.
            elsewhere: where readers find the rows that are left out.
        """
        marks = ["---" if c in (self.name, *self.left) else "---:" for c in self.columns]
        shown = self.rows if rows is None else self._worst_first()[:rows]
        lines = [[*map(escaped, self.columns)], marks, *([*map(escaped, row)] for row in shown)]
        text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
        if left_out := len(self.rows) - len(shown):
            text += f"\n{left_out:,} of {len(self.rows):,} rows are left out; {elsewhere}\n"
        return text

    def _worst_first(self) -> list[Sequence[str]]:
        order = sorted(range(len(self.rows)), key=lambda row: _badness(self.styles[row]))
        return [self.rows[row] for row in order]


def as_much_as_fits(text_of: Callable[[int], str], most: int, limit_bytes: int) -> str:
    """Return the text with as many rows of each table as fit into ``limit_bytes``. If no row fits,
    return the text without rows, which may still be too large.

    Args:
        text_of: returns the text with at most the given number of rows per table.
        most: number of rows of the complete text, which is known to be too large.
        limit_bytes: maximum size of the text in UTF-8.
    """
    fits, too_many = 0, most
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if len(text_of(middle).encode()) <= limit_bytes:
            fits = middle
        else:
            too_many = middle
    return text_of(fits)


def _badness(style: str | None) -> int:
    """Return a key that sorts rows by style, worst first."""
    return _WORST.index(style) if style in _WORST else len(_WORST)


def _total(widths: Sequence[int]) -> int:
    """Return the total width of columns, with a space between adjacent ones."""
    return sum(widths) + len(widths) - 1


def plain_grid(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, left: Sequence[str] = ()
) -> Grid:
    """Return a table of unstyled rows whose first column names them."""
    return Grid(columns=columns, rows=rows, styles=[None] * len(rows), name=columns[0], left=left)


def paragraphs(
    texts: Iterable[str], *, width: int | None, color: bool, style: str | None = None
) -> str:
    """Return each text as a paragraph folded at ``width``."""
    return "".join(
        _printed(Text(text, overflow="fold", style=style or ""), width or _WIDE, color)
        for text in texts
    )


def finite(value: Any) -> Any:
    """Convert dataclasses to plain values for JSON, and non-finite numbers to None."""
    if dataclasses.is_dataclass(value):
        fields = dataclasses.fields(value)
        return {field.name: finite(getattr(value, field.name)) for field in fields}
    if isinstance(value, dict):
        return {name: finite(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def number(value: float | None) -> str:
    """Format a number with at least three significant digits and thousands separators; None as a
    dash."""
    if value is None:
        return MISSING
    if 0 < abs(value) < 1:
        return f"{value:.3g}"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f}"


def _printed(what: RenderableType, width: int, color: bool) -> str:
    stream = io.StringIO()
    _console(stream, width, color).print(what)
    return "".join(f"{line.rstrip()}\n" for line in stream.getvalue().splitlines())


def _console(stream: TextIO, width: int, color: bool) -> Console:
    return Console(
        file=stream,
        width=width,
        force_terminal=color,
        color_system="standard" if color else None,
        no_color=not color,
        highlight=False,
        legacy_windows=False,
    )


@dataclass(frozen=True, kw_only=True)
class Page:
    """A report of a comparison: a headline, tables and remarks."""

    title: str
    headline: str
    grids: Sequence[Grid]
    remarks: Sequence[str]
    """Remarks that are not in the tables, worst first."""
    footer: Sequence[str]
    """Lines that describe what was compared, and how."""

    def text(self, *, width: int | None, color: bool) -> str:
        """Return the page for a terminal or a log, with the headline last."""
        tables = "\n".join(grid.text(width=width, color=color) for grid in self.grids)
        folded = (
            paragraphs(self.remarks, width=width, color=color),
            paragraphs(self.footer, width=width, color=color, style="dim"),
            paragraphs([f"{self.title}: {self.headline}"], width=width, color=color, style="bold"),
        )
        return tables + "".join(folded)

    def markdown(self, limit_bytes: int | None = None) -> str:
        """Return the page as Markdown, with the headline first.

        If it exceeds ``limit_bytes``, it keeps as many rows and remarks as fit, worst first, and
        says how many are left out.
        """
        text = self._markdown(None)
        if limit_bytes is None or len(text.encode()) <= limit_bytes:
            return text
        most = max([len(self.remarks), *(len(grid.rows) for grid in self.grids)])
        text = as_much_as_fits(self._markdown, most, limit_bytes)
        return text if len(text.encode()) <= limit_bytes else self._head()

    def _head(self) -> str:
        return f"## {escaped(self.title)}: {escaped(self.headline)}\n"

    def _markdown(self, most: int | None) -> str:
        """Return the page with at most ``most`` rows per table and ``most`` remarks."""
        remarks = self.remarks if most is None else self.remarks[:most]
        lines = [f"- {escaped(line)}\n" for line in remarks]
        if left_out := len(self.remarks) - len(remarks):
            lines.append(
                f"- {left_out:,} of {len(self.remarks):,} remarks are left out; {_ELSEWHERE}\n"
            )
        parts = [self._head(), *(grid.markdown(most) for grid in self.grids), "".join(lines)]
        parts += ["".join(f"<sub>{escaped(line)}</sub><br>\n" for line in self.footer)]
        return "\n".join(part for part in parts if part)


def escaped(line: str) -> str:
    """Escape a line for Markdown on GitHub. Run names are full of underscores, and a name with an @
    must not notify anybody."""
    return _MARKDOWN.sub(_without_meaning, one_line(line).strip())


def _without_meaning(found: re.Match[str]) -> str:
    # GitHub looks for these after it has rendered Markdown and removed any backslashes.
    if found["github"]:
        return f"<span>{found[0]}</span>"
    return f"{found[0][:-1]}\\{found[0][-1]}"
