"""The content of reports, and the HTML pages and Markdown rendered from it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from pytest_int8bench.params import RunParams
from pytest_int8bench.printing import one_line
from pytest_int8bench.report.page import html, markdown
from pytest_int8bench.report.page.build import build
from pytest_int8bench.report.page.charts import Bars, Lines, Pareto, Stacks
from pytest_int8bench.report.page.model import Section, View
from pytest_int8bench.report.page.sections.history import MOST_FILES
from pytest_int8bench.report.page.sources import sources
from pytest_int8bench.report.tables import number
from pytest_int8bench.report.terminal import render
from pytest_int8bench.results.records import Result, Saved
from toys.results import (
    BASE,
    CPU,
    GPU,
    W8,
    W8A8,
    commits,
    environment,
    everything,
    faster,
    plain,
    result,
    verdict,
)


def view_of(*saved: Saved) -> View:
    return build(sources([(f"{i}.json", one) for i, one in enumerate(saved)]))


def section(view: View, name: str) -> Section:
    [found] = [section for section in view.sections if section.id == name]
    return found


def charts_of(results: list[Result], name: str = "throughput", env: Any = GPU) -> list[Any]:
    return list(section(view_of(Saved(env, results)), name).charts)


def series_of(chart: Lines) -> dict[str, list[float | None]]:
    return {series.name: [point.y for point in series.points] for series in chart.series}


# -- throughput -------------------------------------------------------------------------------


def test_a_sweep_has_a_line_per_mode_with_the_saved_rates() -> None:
    [chart] = section(view_of(everything()), "throughput").charts
    assert isinstance(chart, Lines)
    assert chart.title == "Throughput against batch"
    assert series_of(chart) == {
        "BF16": [40.0, 190.0, 360.0],
        "W8A8": [48.0, 228.0, None],
        "W8": [39.2, pytest.approx(186.2), pytest.approx(352.8)],
    }
    assert [point.x for point in chart.series[0].points] == [1, 8, 64]
    lost = chart.series[1].points[2]
    assert (lost.note, chart.shown(lost)) == ("OOM", "-")


def test_a_rate_gets_its_interval_from_the_batch_time() -> None:
    [chart] = charts_of([result(BASE, 100.0, batch_time_standard_error=0.01), result(W8A8, 110.0)])
    point = chart.series[0].points[0]
    assert point.low == pytest.approx(100 / 1.0196)
    assert point.high == pytest.approx(100 / 0.9804)


def test_a_rate_without_standard_error_has_no_interval() -> None:
    [chart] = charts_of([result(BASE, 100.0, batch_time_standard_error=None)])
    point = chart.series[0].points[0]
    assert (point.low, point.high, chart.shown(point)) == (None, None, "100")


def test_every_swept_axis_has_its_chart() -> None:
    points = [
        BASE,
        *(BASE.replace(batch_size=size) for size in (1, 2)),
        BASE.replace(compile_mode="reduce-overhead"),
        BASE.replace(extra={"width": 2}),
        BASE.replace(extra={"width": 4}),
    ]
    charts = charts_of([result(point, 50.0) for point in points])
    assert [chart.title for chart in charts] == [
        "Throughput against batch",
        "Throughput against compile_mode",
        "Throughput against width",
    ]
    assert charts[1].names == ("default", "reduce-overhead")
    assert not charts[1].joined


def test_a_numeric_axis_is_sorted() -> None:
    [chart] = charts_of([result(BASE.replace(batch_size=size), 1.0) for size in (64, 8, 128)])
    assert [point.x_shown for point in chart.series[0].points] == ["8", "64", "128"]


def test_without_a_sweep_modes_are_compared() -> None:
    [chart] = charts_of([result(BASE, 100.0), result(W8A8, 120.0)])
    assert chart.title == "Throughput by mode"
    assert chart.names == ("BF16", "W8A8")


def test_many_results_without_a_sweep_are_split_into_charts() -> None:
    charts = charts_of([replace(result(BASE, 100.0), nodeid=f"t.py::test_{i}") for i in range(30)])
    assert [chart.title for chart in charts] == [
        "Throughput by mode (1 of 2)",
        "Throughput by mode (2 of 2)",
    ]
    assert [len(chart.series) for chart in charts] == [24, 6]


def test_too_many_lines_are_split_into_charts() -> None:
    points = [
        BASE.replace(batch_size=batch, image_size=image)
        for batch in (1, 2)
        for image in (8, 16, 24, 32, 40, 48, 56)
    ]
    charts = charts_of([result(point, 5.0) for point in points])
    batch = [chart for chart in charts if chart.x_label == "batch"]
    assert [len(chart.series) for chart in batch] == [6, 1]
    assert batch[0].title == "Throughput against batch (1 of 2)"
    assert [series.name for series in batch[0].series][:2] == ["BF16, image 8", "BF16, image 16"]
    assert len({series.style for series in batch[0].series}) == 6


def test_baselines_are_not_distinguished_by_int8_backend() -> None:
    [chart] = charts_of([result(BASE, 1.0), result(W8A8.replace(int8_backend="torchao"), 2.0)])
    assert chart.names == ("BF16", "W8A8")


def test_workloads_and_devices_have_separate_charts() -> None:
    other = replace(result(BASE, 7.0), workload="vit")
    view = view_of(Saved(GPU, [result(BASE, 5.0), other]), Saved(CPU, [result(BASE, 3.0)]))
    assert [chart.title for chart in section(view, "throughput").charts] == [
        "Throughput by mode: olmoearth, A100",
        "Throughput by mode: vit, A100",
        "Throughput by mode: olmoearth, EPYC",
    ]


def test_two_tests_of_one_point_are_distinguished() -> None:
    again = replace(result(BASE, 7.0), nodeid="b/test_t.py::test_again[x]")
    [chart] = charts_of([result(BASE, 5.0), again])
    assert chart.names == ("BF16 (b/test_t.py::test_t)", "BF16 (b/test_t.py::test_again)")


# -- the other sections -----------------------------------------------------------------------


def test_saved_speedups_with_their_upper_bound() -> None:
    found = section(view_of(everything()), "speedup")
    [chart] = found.charts
    assert isinstance(chart, Bars)
    assert [(b.name, b.value, b.low, b.high, b.most) for b in chart.bars][:2] == [
        ("W8A8, batch 1", 1.2, 1.18, 1.23, 1.6),
        ("W8, batch 1", 0.98, 0.96, 1.01, None),
    ]
    assert chart.reference == 1
    assert found.tables[0].grid.rows[0] == [
        W8A8.replace(batch_size=1).run_name,
        "1.20x [1.18, 1.23]",
        "1.60x",
        "1.40x",
        "33%",
        "97%",
        "matmuls 60%, attention 30%, rest 10%",
    ]


def test_a_speedup_of_separate_measurements_is_marked() -> None:
    apart = faster(W8A8, 5.0, 1.1, speedup_method="separate", speedup_low=None, speedup_high=None)
    [chart] = charts_of([result(BASE, 4.5), apart], "speedup")
    assert (chart.shown(chart.bars[0]), chart.bars[0].note) == ("1.10", "separate")


def test_accuracy_against_throughput() -> None:
    [chart] = section(view_of(everything()), "accuracy").charts
    assert isinstance(chart, Pareto)
    assert chart.limits == (1.0,)
    spots = {spot.name: spot for spot in chart.spots}
    assert {name: (s.drop, s.rate, s.verdict, s.best) for name, s in spots.items()} == {
        "BF16, batch 8": (0, 190.0, "baseline", True),
        "W8A8, batch 8": (pytest.approx(1.4), 228.0, "FAIL", True),
        "W8, batch 8": (pytest.approx(0.2), pytest.approx(186.2), "PASS", False),
    }
    assert spots["W8, batch 8"].low == pytest.approx(-0.1)


@pytest.mark.parametrize(("limit", "value", "unit"), [("0.5%", 0.5, "%"), ("2pp", 2.0, "pp")])
def test_the_line_is_the_saved_limit(limit: str, value: float, unit: str) -> None:
    saved = Saved(GPU, [result(W8A8, 5.0)], [verdict(W8A8, 0.001, "PASS", limit=limit)])
    [chart] = section(view_of(saved), "accuracy").charts
    assert isinstance(chart, Pareto)
    assert (chart.limits, chart.drop_unit) == ((value,), unit)


def test_a_verdict_on_random_weights_is_marked_as_a_pipeline_check() -> None:
    judged = verdict(W8A8, 0.02, "FAIL", random_weights=True)
    view = view_of(Saved(GPU, [result(W8A8, 5.0)], [judged]))
    found = section(view, "accuracy")
    [chart] = found.charts
    assert isinstance(chart, Pareto)
    assert chart.spots[0].verdict == "FAIL*"
    assert found.tables[0].grid.rows[0][-1] == "FAIL*"
    assert found.notes[-1].startswith("* pipeline check: the weights are random")
    assert view.summary[-1] == (
        "1 verdict on random weights (a pipeline check, which says nothing about a trained model)."
    )


def test_infinite_bound_is_shown_as_unbounded() -> None:
    judged = verdict(W8A8, 0.001, "INCONCLUSIVE", drop_high=float("inf"))
    view = view_of(Saved(GPU, [result(W8A8, 5.0)], [judged]))
    [chart] = section(view, "accuracy").charts
    assert chart.grid().rows[0][1] == "0.10 [-0.20, no bound]"
    assert html.render(view)


def test_verdicts_without_timings_have_a_table() -> None:
    found = section(view_of(Saved(GPU, [], [verdict(W8A8, 0.001, "PASS")])), "accuracy")
    assert found.charts == ()
    assert len(found.tables[0].grid.rows) == 1
    assert found.notes == (
        "Not drawn against throughput: no point has both a verdict and a throughput.",
    )


def test_output_comparisons_are_noted() -> None:
    proxy = verdict(W8A8, 0, "proxy-ok", metric="outputs", limit=None)
    proxy = replace(proxy, distance={"cosine": 0.999, "sqnr_db": 40.0}, floor={"cosine": 1.0})
    [note] = section(view_of(Saved(GPU, [], [proxy])), "accuracy").notes
    assert note.startswith(f"proxy-ok: {W8A8.run_name}: its outputs are close")
    assert "cosine 0.99900, SQNR 40.0 dB (without INT8: 1.00000, infinite)" in note
    equal = replace(proxy, distance={"cosine": 1.0, "sqnr_db": None}, floor={"sqnr_db": 50.0})
    [note] = section(view_of(Saved(GPU, [], [equal])), "accuracy").notes
    assert "SQNR infinite (equal outputs) (without INT8: infinite, 50.0 dB)" in note


def test_memory_and_the_first_call() -> None:
    view = view_of(everything())
    [memory] = section(view, "memory").charts
    [compiling] = section(view, "compile").charts
    assert isinstance(memory, Bars)
    assert isinstance(compiling, Bars)
    assert memory.bars[0].value == 501
    lost = next(bar for bar in memory.bars if bar.value is None)
    assert (lost.name, lost.note) == ("W8A8, batch 64", "OOM when allocating 16,384 MiB")
    assert {(bar.value, bar.note) for bar in compiling.bars} == {(20.0, "cold")}


def test_device_time() -> None:
    [chart] = section(view_of(everything()), "device-time").charts
    assert isinstance(chart, Stacks)
    assert chart.parts == ("INT8 matmuls", "other matmuls", "attention", "rest")
    stack = next(stack for stack in chart.stacks if stack.name == "W8A8, batch 8")
    assert stack.values == pytest.approx((30, 10, 30, 20))
    row = next(row for row in chart.grid().rows if row[0] == "W8A8, batch 8")
    assert row[1:] == ["30.0 (33%)", "10.0 (11%)", "30.0 (33%)", "20.0 (22%)", "90.0"]


def test_points_with_the_same_coverage_share_a_row() -> None:
    covered, why = (
        titled.grid.rows for titled in section(view_of(everything()), "coverage").tables
    )
    name = f"{W8A8.replace(batch_size=1).run_name} and 1 more"
    assert covered == [[name, "48 of 50", "85.0%", "47", "1", "-"]]
    assert why == [
        [name, "not quantized", "filtered", "2", "embed.proj, head"],
        [name, "on torchao's kernels", "a hook <on> it", "1", "blocks.0.attn.proj"],
    ]


def test_smoothed_layers_are_counted_in_older_files_too() -> None:
    old = {"smoothed_folded": {"norm": ["q", "k"]}, "smoothed_runtime": ["proj"]}
    new = {"smoothed_folded": {}, "smoothed_runtime": ["q", "k", "proj", "fc1"]}
    other = W8A8.replace(batch_size=4)
    results = [result(W8A8, 5.0, coverage=old), result(other, 5.0, coverage=new)]
    [table] = section(view_of(Saved(GPU, results)), "coverage").tables
    assert [row[-1] for row in table.grid.rows] == ["3 layers", "4 layers"]


def test_layer_sensitivity() -> None:
    [chart] = section(view_of(everything()), "sensitivity").charts
    assert isinstance(chart, Bars)
    assert [(bar.value, bar.note) for bar in chart.bars] == [
        (21.5, ""),
        (33.0, ""),
        (None, "equal outputs"),
    ]


def test_points_without_figures_are_listed_with_reasons() -> None:
    rows = section(view_of(everything()), "problems").tables[0].grid.rows
    assert [row[2:] for row in rows] == [
        ["OOM", "out of memory: 16 GiB"],
        ["failed", "EvidenceError: flash <ran> & more"],
        ["skipped", "image_size=2 is too small"],
    ]


def test_missing_sections_are_listed() -> None:
    view = view_of(Saved(CPU, [result(BASE, 5.0, peak_memory_bytes=None, compile_s=None)]))
    assert [section.id for section in view.sections] == ["throughput", "environment", "missing"]
    assert len(view.sections[-1].notes) == 7


def test_a_report_without_measurements() -> None:
    view = view_of(Saved(GPU, [result(W8A8, status="failed", reason="boom")]))
    assert view.summary == ("1 point: 1 failed.",)
    assert "boom" in markdown.render(view)
    assert "boom" in html.render(view)


# -- several files ----------------------------------------------------------------------------


def test_history_has_a_point_for_each_file_and_marks_the_changed_driver() -> None:
    found = section(build(sources(commits())), "history")
    rates, speedups = found.charts
    assert isinstance(rates, Lines)
    assert isinstance(speedups, Lines)
    assert series_of(rates)["BF16"] == [100.0, 101.0, 120.0, 119.0]
    assert series_of(speedups) == {"W8A8": [1.1, 1.11, 1.12, pytest.approx(1.13)]}
    assert rates.names == ("0abcdef", "1abcdef", "2abcdef", "3abcdef")
    [mark] = rates.marks
    assert (mark.x, mark.letter, mark.text) == (1.5, "A", "driver 550 → 570")
    assert found.notes[0] == "A, before 2abcdef: driver 550 → 570"
    files = found.tables[0].grid
    assert [row[-1] for row in files.rows] == ["-", "-", "A: driver 550 → 570", "-"]
    verdicts = found.tables[-1].grid.rows
    assert verdicts[0][1:] == ["PASS 0.00%", "PASS 0.10%", "PASS 0.20%", "PASS 0.30%"]


def test_a_history_is_limited_to_the_last_files() -> None:
    count = MOST_FILES + 50
    files = [Saved(environment(f"{n:07x}"), [result(BASE, 100.0 + n)]) for n in range(count)]
    found = section(view_of(*files), "history")
    assert found.notes[0] == "Only the last 200 of 250 files are shown."
    [chart] = found.charts
    assert [point.y for point in chart.series[0].points] == [100.0 + n for n in range(50, count)]
    assert found.tables[1].grid.columns == ["run", *(f"{n:07x}" for n in range(50, count))]


def test_a_history_shows_later_failures() -> None:
    oom = result(W8A8, status="oom", reason="out of memory")
    view = view_of(
        *(Saved(environment(c), [result(W8A8, 5.0)]) for c in "ab"), Saved(environment("c"), [oom])
    )
    [chart] = section(view, "history").charts
    assert [(p.y, p.note) for p in chart.series[0].points] == [(5.0, ""), (5.0, ""), (None, "OOM")]


def test_the_last_file_with_a_point_counts() -> None:
    view = build(sources(commits()))
    [chart] = section(view, "throughput").charts
    assert series_of(chart)["BF16"] == [119.0]
    grid = section(view, "throughput").tables[0].grid
    assert (grid.columns[-1], grid.rows[0][-1]) == ("file", "3abcdef")


def test_files_of_different_points_make_one_report() -> None:
    view = view_of(Saved(GPU, [result(BASE, 5.0)]), Saved(GPU, [], [verdict(W8A8, 0.001, "PASS")]))
    assert len(section(view, "throughput").tables[0].grid.rows) == 1
    assert len(section(view, "accuracy").tables[0].grid.rows) == 1


def test_each_distinct_environment_has_a_column() -> None:
    grid = section(build(sources(commits())), "environment").tables[0].grid
    assert grid.columns == [
        "property",
        "0abcdef … 1abcdef (2 files)",
        "2abcdef … 3abcdef (2 files)",
    ]
    changed = [row for row, style in zip(grid.rows, grid.styles, strict=True) if style == "changed"]
    assert changed == [["driver", "550", "570"]]


def test_labels_are_commits_and_unique() -> None:
    one = Saved(environment("0123456789"), [])
    dirty = Saved(environment("0123456789", dirty=True), [])
    unknown = Saved({**GPU, "commit": None}, [])
    named = [("a/1.json", one), ("a/2.json", one), ("a/3.json", dirty), ("a/4.json", unknown)]
    assert [(s.label, s.name) for s in sources(named)] == [
        ("0123456", "1.json"),
        ("0123456 #2", "2.json"),
        ("0123456+", "3.json"),
        ("4.json", "4.json"),
    ]
    assert [s.name for s in sources([("a/1.json", one), ("b/1.json", one)])] == [
        "a/1.json",
        "b/1.json",
    ]


# -- the page ---------------------------------------------------------------------------------


class Page(HTMLParser):
    """The elements of a page, and its data."""

    VOID = frozenset(("meta", "link", "br", "wbr", "hr"))

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.data = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1:] == ["script"]:
            self.data += data
        elif self._open[-1:] != ["style"]:
            self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def text() -> str:
    return html.render(view_of(everything()))


@pytest.fixture(scope="module")
def parsed(text: str) -> Page:
    return Page(text)


def test_the_page_needs_no_network(text: str) -> None:
    addresses = set(re.findall(r"(?:https?:)?//[\w./-]+", text))
    # XML namespaces, which browsers do not load.
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert "default-src 'none'" in text
    assert "@import" not in text


def test_every_chart_has_a_name_description_and_table(parsed: Page) -> None:
    charts = [c.id for s in view_of(everything()).sections for c in s.charts]
    pictures = parsed.all("svg")
    assert [p["aria-labelledby"] for p in pictures] == [f"{c}-title {c}-desc" for c in charts]
    assert {p["role"] for p in pictures} == {"img"}
    assert [figure["id"] for figure in parsed.all("figure")] == charts
    assert len(parsed.all("details")) == len(charts)


def test_ids_are_unique_and_links_have_targets(parsed: Page) -> None:
    ids = [attributes["id"] for _, attributes in parsed.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [a["href"] for a in parsed.all("a")]
    links += [use["xlink:href"] for use in parsed.all("use")]
    assert links
    assert {str(link).removeprefix("#") for link in links} <= set(ids)


def test_headings_are_in_order_and_tables_are_marked_up(parsed: Page) -> None:
    levels = [int(tag[1]) for tag, _ in parsed.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert set(levels[1:]) == {2}
    assert parsed.all("html") == [{"lang": "en"}]
    assert len(parsed.all("caption")) == len(parsed.all("table"))
    assert {th.get("scope") for th in parsed.all("th")} == {"col", "row"}
    regions = [div for div in parsed.all("div") if div.get("role") == "region"]
    assert len(regions) == len(parsed.all("table"))
    assert all(div["tabindex"] == "0" and div["aria-label"] for div in regions)


def test_the_page_has_the_figures_of_the_file(parsed: Page) -> None:
    saved = everything()
    charts = {chart["id"]: chart for chart in json.loads(parsed.data)["charts"]}
    rates = {
        point["name"]: point["y"]
        for series in charts["throughput-1-batch-size-1"]["series"]
        for point in series["points"]
    }
    swept = [r for r in saved.results if r.status in ("ok", "oom")]
    assert rates == {r.run_name: r.samples_per_s for r in swept}
    speedups = [(b["value"], b["low"], b["high"]) for b in charts["speedup-1"]["bars"]]
    assert sorted(speedups) == sorted(
        (r.speedup, r.speedup_low, r.speedup_high) for r in swept if r.speedup is not None
    )
    drops = [s["drop"] for s in charts["pareto-1-1"]["spots"] if s["verdict"] != "baseline"]
    assert drops == [100 * (v.drop or 0) for v in saved.accuracy]


def test_tables_have_the_figures_of_the_terminal(parsed: Page) -> None:
    shown = " ".join("".join(parsed.texts).split())
    for result_ in everything().results:
        if result_.samples_per_s is not None:
            line = next(
                line
                for line in render(everything(), width=None, color=False).splitlines()
                if line.startswith(f"{result_.run_name} ")
            )
            assert number(result_.samples_per_s) in line.split()
            cells = [result_.run_name, number(result_.samples_per_s)]
            assert " ".join(cells) in shown


HOSTILE = "<script>alert(1)</script> & \"quotes\" 'it' $x_1$ \\frac \x1b[31m ‮ 日本 |pipe|"


def hostile() -> View:
    """Return a view with hostile text in workload, axes, reasons, layers, file and commit."""
    point = W8A8.replace(extra={"data": HOSTILE.replace("\x1b", "")})
    other = point.replace(extra={"data": "plain"})
    results = [
        faster(
            p,
            rate,
            1.1,
            workload=HOSTILE,
            reason=HOSTILE,
            coverage={"left_out": {HOSTILE: HOSTILE}},
        )
        for p, rate in ((point, 3.0), (other, 4.0))
    ]
    results.append(result(W8, workload=HOSTILE, status="failed", reason=HOSTILE))
    judged = [verdict(point, 0.02, "FAIL", workload=HOSTILE, metric=HOSTILE, reason=HOSTILE)]
    where = {**GPU, "gpu": {**GPU["gpu"], "name": HOSTILE}, "commit": None}
    saved = Saved(where, results, judged).cleaned()
    return build(sources([(f"{HOSTILE}/\udcff.json", saved), ("</style>.json", saved)]))


def test_user_texts_are_escaped_in_html() -> None:
    text = html.render(hostile())
    found = Page(text)
    assert found.all("script") == [{"type": "application/json", "id": "report-data"}]
    assert "\x1b" not in text
    assert "<script>alert" not in text
    assert one_line(HOSTILE) in found.texts
    assert json.loads(found.data)["charts"]
    text.encode()  # half a character in a file name is invalid


def test_user_texts_are_escaped_in_markdown() -> None:
    text = markdown.render(hostile())
    assert "<script" not in text.replace("\\<script", "")
    for line in text.splitlines():
        if line.startswith("| run"):
            cells = len(re.split(r"(?<!\\)\|", line))
        elif line.startswith("|") and "alert" in line:
            assert re.search(r"(?<!\\)\|pipe", line) is None
    assert cells


def test_the_same_file_makes_the_same_page(text: str) -> None:
    assert html.render(view_of(everything())) == text


def test_markdown_has_the_tables_of_the_page() -> None:
    view = view_of(everything())
    text = markdown.render(view)
    for part in view.sections:
        assert f"## {part.title}\n" in text
        for titled in part.tables:
            assert titled.grid.markdown() in text
        for chart in part.charts:
            assert chart.grid().markdown() in text
    assert "| W8A8 | 8 | 228 \\[226, 230\\] | - |" in text
    assert "The diamond" not in text


def test_a_journal_and_a_file_make_the_same_report(tmp_path: Path) -> None:
    from pytest_int8bench.results.journal import Journal
    from pytest_int8bench.results.reading import read

    journal = Journal(tmp_path / "j.jsonl", GPU)
    for record in (*everything().results, *everything().accuracy, *everything().sensitivity):
        journal.append(record)
    read_again = read(tmp_path / "j.jsonl")
    assert view_of(read_again) == view_of(everything())


def test_parameters_of_other_versions_are_shown() -> None:
    odd = replace(result(BASE, 5.0), params={"new_field": [1, 2]}, run_name="odd")
    view = view_of(Saved(GPU, [odd, result(RunParams(), 6.0)]))
    assert "odd" in markdown.render(view)
    assert html.render(view)


def test_plain_benchmarks_have_a_section_and_a_history() -> None:
    first = Saved(GPU, [result(W8A8, 100)], benchmarks=[plain("a"), plain("b")])
    bad = plain("b", status="failed", reason="boom")
    view = view_of(first, Saved({"only": []}, [], benchmarks=[plain("a", 2e-3), bad]))
    assert "4 plain benchmarks: 3 ok, 1 failed." in view.summary
    [table] = section(view, "benchmarks").tables
    assert [row[:2] for row in table.grid.rows] == [
        ["test_a.py::a", "1.00 ms"],
        ["test_a.py::b", "1.00 ms"],
        ["test_a.py::a", "2.00 ms"],
        ["test_a.py::b", "1.00 ms"],
    ]
    assert "timer does not wait" in section(view, "benchmarks").notes[0]
    assert section(view, "problems").tables[0].grid.rows[0][0] == "test_a.py::b"
