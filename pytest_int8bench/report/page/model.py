"""The parts of a report, independent of its output format."""

from __future__ import annotations

from dataclasses import dataclass

from pytest_int8bench.report.page.charts import AnyChart
from pytest_int8bench.report.tables import Grid


@dataclass(frozen=True, kw_only=True)
class Titled:
    """A table with its caption."""

    caption: str
    grid: Grid


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading with its text, charts and tables."""

    id: str
    title: str
    intro: tuple[str, ...] = ()
    """Paragraphs that explain how to read the section."""
    pictures: tuple[str, ...] = ()
    """Paragraphs that explain how to read its charts; shown only by formats that draw them."""
    charts: tuple[AnyChart, ...] = ()
    tables: tuple[Titled, ...] = ()
    notes: tuple[str, ...] = ()
    """Remarks below the charts and tables."""


@dataclass(frozen=True, kw_only=True)
class View:
    """The content of a report."""

    title: str
    subtitle: str
    """The machine and its software."""
    summary: tuple[str, ...]
    """The main results, one sentence each."""
    sections: tuple[Section, ...]
