"""A report as Markdown: the tables of the page, and the figures of its pictures as tables."""

from __future__ import annotations

from pytest_int8bench.report.page.model import View
from pytest_int8bench.report.tables import MISSING, escaped
from pytest_int8bench.version import __version__


def render(view: View) -> str:
    """Return the report as GitHub shows it."""
    parts = [f"# {escaped(view.title)}\n", f"{escaped(view.subtitle)}\n"]
    parts.append(_items(view.summary))
    parts.append("".join(f"- [{escaped(s.title)}](#{_anchor(s.title)})\n" for s in view.sections))
    for section in view.sections:
        parts.append(f"## {escaped(section.title)}\n")
        parts += [f"{escaped(line)}\n" for line in section.intro]
        for chart in section.charts:
            parts += [f"### {escaped(chart.title)}\n", chart.grid().markdown()]
        for titled in section.tables:
            parts += [f"### {escaped(titled.caption)}\n", titled.grid.markdown()]
        parts.append(_items(section.notes))
    version = __version__
    parts.append(
        f"<sub>Written by pytest-int8bench {version}. Intervals are at 95 %; {MISSING} stands for "
        "what was not measured.</sub>\n"
    )
    return "\n".join(part for part in parts if part)


def _items(lines: tuple[str, ...]) -> str:
    return "".join(f"- {escaped(line)}\n" for line in lines)


def _anchor(title: str) -> str:
    """Return the name that GitHub gives a heading."""
    kept = "".join(c for c in title.lower() if c.isalnum() or c in " -_")
    return kept.replace(" ", "-")
