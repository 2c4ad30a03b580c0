"""Tables and pages as Markdown: nothing in them is markup, and what is too large is cut."""

from __future__ import annotations

from pytest_int8bench.report.tables import Grid, Page, plain_grid

ROWS = [["good", "1"], ["worst", "2"], ["doubtful", "3"], ["better", "4"]]
GRID = Grid(columns=["run", "n"], rows=ROWS, styles=["green", "red", "yellow", None], name="run")
PAGE = Page(title="t", headline="h", grids=[GRID], remarks=["first", "second"], footer=["x" * 500])


def names(markdown: str) -> list[str]:
    rows = [line for line in markdown.splitlines() if line.startswith("| ")]
    return [line.split(" | ")[0].removeprefix("| ") for line in rows[2:]]


def test_names_of_columns_are_no_markup() -> None:
    text = plain_grid(["a|b`c`\n<d>[e](f)", "\x1bg_h*"], [["i|j", "k"]]).markdown()
    assert text.splitlines() == [
        r"| a\|b\`c\` \<d\>\[e\](f) | \\x1bg\_h\* |",
        "| --- | ---: |",
        r"| i\|j | k |",
    ]


def test_a_table_that_is_cut_keeps_its_worst_rows() -> None:
    assert names(GRID.markdown()) == ["good", "worst", "doubtful", "better"]
    assert names(GRID.markdown(2)) == ["worst", "doubtful"]
    assert "\n2 of 4 rows are left out, the worst come first; all are in the log" in GRID.markdown(
        2
    )


def test_a_page_is_as_large_as_it_may_be() -> None:
    whole = PAGE.markdown()
    assert PAGE.markdown(limit_bytes=len(whole)) == whole
    for limit in range(len(whole)):
        text = PAGE.markdown(limit_bytes=limit)
        assert text.startswith("## t: h\n")
        assert len(text) <= max(limit, len("## t: h\n"))
    assert PAGE.markdown(limit_bytes=-5) == "## t: h\n"
