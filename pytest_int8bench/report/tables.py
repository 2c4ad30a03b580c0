"""Tables as text for a terminal or a log, and as Markdown."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

MISSING = "-"
_WIDE = 1000


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A table of texts."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    styles: Sequence[str | None]
    """Style of each row; None for plain."""
    name: str
    """The column that may be folded, and no other."""
    left: Sequence[str] = ()
    """Columns beside ``name`` that are aligned left."""

    def text(self, *, width: int | None, color: bool) -> str:
        """Return the table for a terminal of ``width`` columns; None for as wide as it needs."""
        table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
        for column in self.columns:
            table.add_column(
                Text(column),  # brackets would pass for markup
                justify="left" if column in (self.name, *self.left) else "right",
                no_wrap=column != self.name,
                overflow="fold",
                min_width=20 if column == self.name else None,
            )
        for row, style in zip(self.rows, self.styles, strict=True):
            table.add_row(*map(Text, row), style=style)
        wide = _console(io.StringIO(), _WIDE, color)
        # A figure that is cut reads like another figure: rather too wide than that.
        least = Measurement.get(wide, wide.options, table).minimum
        return _printed(table, max(width or _WIDE, least), color)

    def markdown(self) -> str:
        """Return the table as GitHub shows it."""
        marks = ["---" if c in (self.name, *self.left) else "---:" for c in self.columns]
        columns = [column.replace("|", r"\|").replace("<", r"\<") for column in self.columns]
        rows = [[escaped(cell) for cell in row] for row in self.rows]
        return "".join(f"| {' | '.join(row)} |\n" for row in (columns, marks, *rows))


def plain_grid(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, left: Sequence[str] = ()
) -> Grid:
    """Return a table of plain rows, named by its first column."""
    return Grid(columns=columns, rows=rows, styles=[None] * len(rows), name=columns[0], left=left)


def paragraphs(
    texts: Iterable[str], *, width: int | None, color: bool, style: str | None = None
) -> str:
    """Return each text on lines of its own, folded at ``width``."""
    return "".join(
        _printed(Text(text, overflow="fold", style=style or ""), width or _WIDE, color)
        for text in texts
    )


def finite(value: Any) -> Any:
    """Return plain values without infinities, which JSON does not know: None instead."""
    if isinstance(value, dict):
        return {name: finite(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def number(value: float | None) -> str:
    """Return three significant digits at least, thousands separated; a dash for nothing."""
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


def _console(stream: io.StringIO, width: int, color: bool) -> Console:
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
    """A report of the gate: what came out in one line, tables, and remarks."""

    title: str
    headline: str
    grids: Sequence[Grid]
    remarks: Sequence[str]
    """What must be known beyond the tables."""
    footer: Sequence[str]
    """What was compared, and how."""

    def text(self, *, width: int | None, color: bool) -> str:
        """Return the page for a terminal or a log; the headline comes last."""
        tables = "\n".join(grid.text(width=width, color=color) for grid in self.grids)
        folded = (
            paragraphs(self.remarks, width=width, color=color),
            paragraphs(self.footer, width=width, color=color, style="dim"),
            paragraphs([f"{self.title}: {self.headline}"], width=width, color=color, style="bold"),
        )
        return tables + "".join(folded)

    def markdown(self) -> str:
        """Return the page as Markdown; the headline comes first."""
        parts = [f"## {self.title}: {self.headline}\n"]
        parts += [grid.markdown() for grid in self.grids]
        parts += ["".join(f"- {escaped(line)}\n" for line in self.remarks)]
        parts += ["".join(f"<sub>{escaped(line)}</sub><br>\n" for line in self.footer)]
        return "\n".join(part for part in parts if part)


def escaped(line: str) -> str:
    """Return one line in which Markdown finds nothing: run names are full of underscores."""
    return re.sub(r"([\\`*_\[\]<>#|~&])", r"\\\1", " ".join(line.splitlines()))
