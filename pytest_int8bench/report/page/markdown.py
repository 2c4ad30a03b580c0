"""Render a report as Markdown. Charts become tables."""

from __future__ import annotations

from pytest_int8bench.report.page.model import Section, View
from pytest_int8bench.report.tables import (
    MARKDOWN_BYTES,
    MISSING,
    Grid,
    as_much_as_fits,
    escaped,
)
from pytest_int8bench.version import __version__

_ELSEWHERE = "the worst are shown first; int8bench show prints every row of a saved file"


def render(view: View, limit_bytes: int = MARKDOWN_BYTES) -> str:
    """Return the report as Markdown for GitHub, with all rows and remarks or, in each section, as
    many as fit into ``limit_bytes``."""
    text = _text(view)
    if len(text.encode()) <= limit_bytes:
        return text
    sizes = [len(view.summary)]
    for section in view.sections:
        sizes += [len(grid.rows) for _, grid in _grids(section)]
        sizes.append(len(section.notes))
    return as_much_as_fits(lambda most: _text(view, most), max(sizes), limit_bytes)


def _text(view: View, most: int | None = None) -> str:
    """Return the report with at most ``most`` rows per table and ``most`` remarks per section."""
    parts = [f"# {escaped(view.title)}\n", f"{escaped(view.subtitle)}\n"]
    parts.append(_items(view.summary, most))
    parts.append("".join(f"- [{escaped(s.title)}](#{_anchor(s.title)})\n" for s in view.sections))
    for section in view.sections:
        parts.append(f"## {escaped(section.title)}\n")
        parts += [f"{escaped(line)}\n" for line in section.intro]
        for title, grid in _grids(section):
            parts += [f"### {escaped(title)}\n", grid.markdown(most, _ELSEWHERE)]
        parts.append(_items(section.notes, most))
    parts.append(
        f"<sub>Written by pytest-int8bench {__version__}. Intervals are at the 95 % level; "
        f"{MISSING} means not measured.</sub>\n"
    )
    return "\n".join(part for part in parts if part)


def _grids(section: Section) -> list[tuple[str, Grid]]:
    charts = [(chart.title, chart.grid()) for chart in section.charts]
    return [*charts, *((titled.caption, titled.grid) for titled in section.tables)]


def _items(lines: tuple[str, ...], most: int | None) -> str:
    text = "".join(f"- {escaped(line)}\n" for line in lines[:most])
    if left_out := len(lines) - len(lines[:most]):
        text += f"- {left_out:,} of {len(lines):,} remarks are left out\n"
    return text


def _anchor(title: str) -> str:
    """Return the anchor that GitHub derives from a heading."""
    kept = "".join(c for c in title.lower() if c.isalnum() or c in " -_")
    return kept.replace(" ", "-")
