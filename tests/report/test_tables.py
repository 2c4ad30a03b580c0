"""Tables and pages as Markdown escape all markup, and are cut to a size limit."""

from __future__ import annotations

import pytest

from pytest_int8bench.report.tables import Grid, Page, escaped, plain_grid

ROWS = [["good", "1"], ["worst", "2"], ["doubtful", "3"], ["better", "4"]]
GRID = Grid(columns=["run", "n"], rows=ROWS, styles=["green", "red", "yellow", None], name="run")
PAGE = Page(title="t", headline="h", grids=[GRID], remarks=["first", "second"], footer=["x" * 500])


def names(markdown: str) -> list[str]:
    rows = [line for line in markdown.splitlines() if line.startswith("| ")]
    return [line.split(" | ")[0].removeprefix("| ") for line in rows[2:]]


def test_column_names_are_escaped() -> None:
    text = plain_grid(["a|b`c`\n<d>[e](f)", "\x1bg_h*"], [["i|j", "k"]]).markdown()
    assert text.splitlines() == [
        r"| a\|b\`c\` \<d\>\[e\](f) | \\x1bg\_h\* |",
        "| --- | ---: |",
        r"| i\|j | k |",
    ]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("@torvalds: ask org/@me", "<span>@</span>torvalds: ask org/<span>@</span>me"),
        ("me@evil.example", "me<span>@</span>evil.example"),
        ("HEAD@{1} @ 3", "HEAD@{1} @ 3"),
        ("org/repo#12 gh-7", "org/repo<span>#</span>12 gh<span>-</span>7"),
        ("$x$", "<span>$</span>x<span>$</span>"),
        ("w:100:x", "w<span>:</span>100:x"),
        ("t.py::test", "t.py::test"),
        ("https://evil.example WWW.x.org", r"https\://evil.example WWW\.x.org"),
        ("![x](//y)<!-- z -->", r"!\[x\](//y)\<!-- z --\>"),
        ("1. item", r"1\. item"),
        ("1.5x", "1.5x"),
        ("- item", r"\- item"),
        ("---", r"\---"),
        ("-", "-"),
        ("--int8-mode", "--int8-mode"),
        ("    code", "code"),
    ],
)
def test_escaped_names_are_inert_in_markdown_and_github(name: str, text: str) -> None:
    assert escaped(name) == text


def test_a_log_shows_long_names_and_figures_in_full() -> None:
    columns = ["run", "workload", "samples/s"]
    rows = [["r" * 3000, "w" * 9000, "1,234"], ["short", "toy", "5,678"]]
    grid = Grid(columns=columns, rows=rows, styles=[None] * 2, name="run", keys=["workload"])
    text = grid.text(width=None, color=False)
    assert [text.count(what) for what in ("1,234", "5,678")] == [1, 1]
    assert (text.count("r") - 3, text.count("w") - 1) == (3000, 9000)  # those of headers aside


def test_shortened_table_keeps_its_worst_rows() -> None:
    assert names(GRID.markdown()) == ["good", "worst", "doubtful", "better"]
    assert names(GRID.markdown(2)) == ["worst", "doubtful"]
    assert "\n2 of 4 rows are left out; the worst are shown first; the log" in GRID.markdown(2)


def test_a_page_fills_its_size_limit() -> None:
    whole = PAGE.markdown()
    assert PAGE.markdown(limit_bytes=len(whole)) == whole
    for limit in range(len(whole)):
        text = PAGE.markdown(limit_bytes=limit)
        assert text.startswith("## t: h\n")
        assert len(text) <= max(limit, len("## t: h\n"))
    assert PAGE.markdown(limit_bytes=-5) == "## t: h\n"
