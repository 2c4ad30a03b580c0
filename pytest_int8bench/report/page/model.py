"""The parts of a report, whatever it is written in."""

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
    """One heading and what is below it."""

    id: str
    title: str
    intro: tuple[str, ...] = ()
    """How to read it: paragraphs."""
    pictures: tuple[str, ...] = ()
    """How to read its charts, where they are drawn."""
    charts: tuple[AnyChart, ...] = ()
    tables: tuple[Titled, ...] = ()
    notes: tuple[str, ...] = ()
    """What must be known beyond charts and tables."""


@dataclass(frozen=True, kw_only=True)
class View:
    """All that a report shows."""

    title: str
    subtitle: str
    """What was measured on."""
    summary: tuple[str, ...]
    """What came out, a sentence each."""
    sections: tuple[Section, ...]
