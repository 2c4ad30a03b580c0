"""Render a report as one self-contained HTML file."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from pytest_int8bench.report.page.model import View
from pytest_int8bench.report.page.svg import DARK, LIGHT, draw
from pytest_int8bench.report.tables import MISSING, Grid, finite
from pytest_int8bench.version import __version__

#: Version of the JSON data that a page embeds.
SCHEMA = 1
#: Id of the element that holds the data.
DATA_ID = "report-data"
#: First word of a cell -> the CSS class that colors it.
_TONES = {
    "PASS": "good",
    "FAIL": "bad",
    "INCONCLUSIVE": "fair",
    "OOM": "bad",
    "failed": "bad",
    "accuracy-failed": "bad",
}


def render(view: View) -> str:
    """Return the HTML text of the page."""
    environment = Environment(
        loader=PackageLoader("pytest_int8bench.report", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # draw() escapes its texts.
    environment.filters["draw"] = lambda chart: Markup(draw(chart))
    environment.filters["tone"] = _tone
    environment.filters["breakable"] = _breakable
    style, _, _ = PackageLoader("pytest_int8bench.report", "page").get_source(
        environment, "page.css"
    )
    return environment.get_template("page.html.j2").render(
        view=view,
        style=Markup(style),
        light=_variables(LIGHT),
        dark=_variables(DARK),
        data=data(view),
        data_id=DATA_ID,
        version=__version__,
        is_left=_is_left,
        missing=MISSING,
    )


def data(view: View) -> dict[str, Any]:
    """Return the page's charts as plain values for JSON."""
    charts = [chart for section in view.sections for chart in section.charts]
    return {
        "schema": SCHEMA,
        "charts": [{"kind": type(chart).__name__.lower(), **finite(chart)} for chart in charts],
    }


def _variables(style: dict[str, str]) -> str:
    return " ".join(f"--{name}: {color};" for name, color in style.items())


def _is_left(grid: Grid, column: str) -> bool:
    return column == grid.name or column in grid.left


def _tone(cell: str) -> str:
    first, *_ = cell.partition(" ")
    return _TONES.get(first.rstrip("*"), "")


def _breakable(name: str) -> Markup:
    """Return a run name as HTML that browsers may break after underscores."""
    return Markup("_<wbr>").join(escape(part) for part in name.split("_"))
