"""Figures: the rules for a row, and everything that follows from one."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pytest_int8bench.gate.compare import Comparison, compare
from pytest_int8bench.gate.limits import Rules
from pytest_int8bench.gate.rules import parse_floor, read_rules
from pytest_int8bench.report import compare as compare_report
from pytest_int8bench.report.page import markdown
from pytest_int8bench.report.page.build import build
from pytest_int8bench.report.page.model import View
from pytest_int8bench.report.page.sources import sources
from pytest_int8bench.report.terminal import render
from pytest_int8bench.report.wandb import metrics_of
from pytest_int8bench.results.base import SchemaError
from pytest_int8bench.results.benchmarks import Benchmark
from pytest_int8bench.results.figures import FIGURES, METRICS, Figure, register, unregister
from pytest_int8bench.results.locating import Run, read_runs
from pytest_int8bench.results.reading import read
from pytest_int8bench.results.records import Result, Saved
from toys.results import BASE, environment, result

#: The slowest rounds relative to the median one, from long-standing fields of results.
TOY = """
Figure(
    field="tail_ratio",
    compute=lambda r: r.batch_time_p95_s and r.batch_time_p95_s / r.batch_time_s,
    header="p95/median",
    title="Tail",
    kind="ratio",
    shown="where measured",
    name="tail",
    option="max-tail-growth",
    help="growth of the 95th percentile over the median",
    floor=0.02,
)
"""
IMPORTS = "from pytest_int8bench.results.figures import Figure, register\n"


@pytest.fixture
def toy() -> Iterator[Figure]:
    figure = eval(TOY)
    register(figure)
    yield figure
    unregister(figure)


def measured(tail: float | None = None, **values: Any) -> Result:
    """Return a result of 100 samples/s; with ``tail``, its slowest rounds were timed too."""
    p95_s = None if tail is None else BASE.batch_size / 100.0 * tail
    return result(BASE, 100.0, batch_time_p95_s=p95_s, **values)


def saved_of(*results: Result) -> Saved:
    return Saved(environment("a" * 40), [*results])


def compared(base: Result, new: Result, **rules: Any) -> Comparison:
    sides = [[Run(Path(name), saved_of(one))] for name, one in (("base", base), ("new", new))]
    return compare(sides[0], sides[1], Rules(**rules))


def column(header: str, *results: Result) -> list[str]:
    """Return the cells below a header of the session's table, by their place on the lines."""
    head, *lines = render(saved_of(*results), width=None, color=False).splitlines()
    end = head.index(header) + len(header)
    return [line[:end].split()[-1] for line in lines[: len(results)]]


def view_of(*saved: Saved) -> View:
    return build(sources([(f"{i}.json", one) for i, one in enumerate(saved)]))


# -- rows ---------------------------------------------------------------------------------------


def test_figures_read_fields_that_results_have() -> None:
    for field, figure in FIGURES.items():
        kind = Benchmark if figure.of_benchmarks else Result
        names = {spec.name for spec in dataclasses.fields(kind)}
        assert field == figure.field
        assert (field in names) == (figure.compute is None)
        assert {*(figure.interval or ()), *filter(None, [figure.standard_error])} <= names


def test_metrics_are_the_figures_with_an_option() -> None:
    assert {name: f for f in FIGURES.values() if f.option for name in [f.name]} == METRICS


@pytest.mark.parametrize("missing", ["name", "header", "help", "floor"])
def test_rejects_an_option_without(missing: str) -> None:
    row = {"name": "toy", "header": "toy", "help": "growth of the toy", "floor": 0.02}
    row[missing] = type(row[missing])()
    with pytest.raises(ValueError, match=r"^toy_s: a figure with an option must have") as caught:
        Figure(field="toy_s", option="max-toy-growth", **row)  # type: ignore[arg-type]
    assert str(caught.value).endswith(
        f"got {row['name']!r}, {row['header']!r}, {row['help']!r} and {row['floor']!r}"
    )


@pytest.mark.parametrize(
    ("what", "taken"),
    [("field", "compile_s"), ("name", "p95"), ("header", "km²/s"), ("option", "max-slowdown")],
)
def test_rejects_names_already_taken(what: str, taken: str) -> None:
    row = {"field": "toy_s", "name": "toy", "header": "toy", "option": "max-toy-growth"}
    figure = Figure(**{**row, what: taken}, help="growth of the toy", floor=0.02)  # type: ignore[arg-type]
    before = (dict(FIGURES), dict(METRICS))
    with pytest.raises(ValueError, match="unique") as caught:
        register(figure)
    assert (
        str(caught.value) == f"{what} of a figure must be unique, but {taken!r} is already in use"
    )
    assert before == (FIGURES, METRICS)


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("samples_per_s", 0, "a number above 0"),
        ("peak_memory_bytes", True, "a number above 0"),
        ("feed_exposed_s", "1", "a number"),
        ("feed_wait_s", float("inf"), "a number"),
        ("trace", 5, "a string"),
    ],
)
def test_a_result_rejects(field: str, value: Any, rule: str) -> None:
    with pytest.raises(ValueError, match=field) as caught:
        measured(**{field: value}) if field != "samples_per_s" else result(BASE, **{field: value})
    assert str(caught.value) == f"{field} must be {rule}, got {value!r}"


# -- a figure from outside ----------------------------------------------------------------------


def test_table_shows_a_new_figure_if_measured(toy: Figure) -> None:
    assert "p95/median" not in render(saved_of(measured()), width=None, color=False)
    assert column("p95/median", measured(1.5), measured()) == ["1.50x", "-"]


def test_the_page_shows_a_new_figure(toy: Figure) -> None:
    for name in ("jinja2", "matplotlib"):
        pytest.importorskip(name, reason="needs the extra report")
    from pytest_int8bench.report.page import html

    view = view_of(*(saved_of(measured(tail)) for tail in (1.5, 1.25)))
    text = markdown.render(view)
    assert re.search(r"^\| run \|.*\| p95/median \|", text, re.M)
    assert re.search(r"^\| base\\_cuda.*\| 1\.25x \|", text, re.M)
    assert re.search(r"^### Tail, by file\n\n.*\n.*\n\| .* \| 1\.50x \| 1\.25x \|$", text, re.M)
    page = html.render(view)
    assert '<th scope="col" class="figure">p95/median</th>' in page
    assert "<caption>Tail, by file</caption>" in page
    assert '<td class="figure">1.50x</td>' in page


def test_a_comparison_shows_a_new_figure_and_judges_it_on_request(toy: Figure) -> None:
    found = compared(measured(1.5), measured(1.8))
    assert (found.exit_code, found.runs[0].outcome) == (0, "same")
    text = compare_report.page(found).text(width=None, color=False)
    assert "p95/median" in text.splitlines()[0]
    assert "1.50x -> 1.80x (+20.0%)" in text
    assert "p95/median" not in compare_report.page(compared(measured(), measured())).markdown()

    found = compared(measured(1.5), measured(1.8), limits={"tail": 0.1})
    assert found.exit_code == 1
    assert found.runs[0].reason == "max-tail-growth: +20.0%, limit 10.0% (noise floor 2.0%)"
    values = compare_report.to_dict(found)["int8bench_compare"]["runs"][0]
    assert values["base"]["tail"] == pytest.approx(1.5)
    assert values["changes"][-1]["metric"] == "tail"


def test_the_gate_reads_the_limit_of_a_new_figure(toy: Figure, tmp_path: Path) -> None:
    pyproject = tmp_path / "pyproject.toml"
    pyproject.write_text(
        '[tool.int8bench.gate]\nmax-tail-growth = "7%"\nnoise-floor = { tail = "1%" }\n'
        '[tool.int8bench.gate.runs."*_bs1"]\nmax-tail-growth = "off"\n'
    )
    rules = read_rules(pyproject)
    assert rules.limit("tail", "x_bs2") == pytest.approx(0.07)
    assert rules.limit("tail", "x_bs1") is None
    assert rules.floors == {"tail": 0.01}
    assert parse_floor("tail=3%") == ("tail", pytest.approx(0.03))


def test_int8bench_compare_has_the_option_of_a_new_figure(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    pytester.makepyprojecttoml("")
    files = {"base.json": 1.5, "new.json": 1.8}
    for name, tail in files.items():
        block = json.dumps({"benchmarks": [], "int8bench": saved_of(measured(tail)).to_dict()})
        Path(name).write_text(block)
    script = pytester.makepyfile(
        f"{IMPORTS}register({TOY})\n"
        "import sys\nfrom pytest_int8bench.cli.main import main\nsys.exit(main(sys.argv[1:]))"
    )
    command = (sys.executable, script, "compare")
    assert pytester.run(*command, *files).ret == 0
    assert pytester.run(*command, *files, "--max-tail-growth=10%").ret == 1
    shown = " ".join(" ".join(pytester.run(*command, "--help").outlines).split())
    meaning = "largest growth of the 95th percentile over the median: a percentage, or off"
    assert f" --max-tail-growth LIMIT {meaning} (default: off) " in shown


def test_pytest_has_the_option_of_a_figure_that_an_early_plugin_registers(
    pytester: pytest.Pytester,
) -> None:
    pytester.makepyfile(toy_figure=f"{IMPORTS}register({TOY})\n")
    pytester.syspathinsert()
    found = pytester.runpytest_subprocess("-p", "toy_figure", "--help")
    assert found.ret == pytest.ExitCode.OK
    shown = " ".join(" ".join(found.outlines).split())
    assert (
        "--int8-max-tail-growth=LIMIT With --int8-compare, the largest growth of the 95th "
        "percentile over the median: a percentage, or off. Default: off" in shown
    )
    assert " int8_max_tail_growth (string): Same as --int8-max-tail-growth " in shown


def test_a_new_figure_is_logged(toy: Figure) -> None:
    assert metrics_of(measured(1.5), None)["tail_ratio"] == pytest.approx(1.5)
    assert "tail_ratio" not in metrics_of(measured(), None)


@pytest.fixture
def hooks() -> Any:
    """Return the module that writes the tables of the documentation."""
    pytest.importorskip("mkdocs", reason="needs the extra docs")
    path = Path(__file__).parents[2] / "docs" / "hooks.py"
    spec = importlib.util.spec_from_file_location("hooks", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_site_documents_a_new_figure(toy: Figure, hooks: Any) -> None:
    table = hooks.on_page_markdown("<!-- metrics: pytest_int8bench.results.figures.METRICS -->")
    meaning = "growth of the 95th percentile over the median"
    assert table.splitlines()[-1] == f"| `tail` | {meaning} | `--max-tail-growth` | off | 2% |"


def test_the_site_finds_options_of_figures_by_pattern(hooks: Any) -> None:
    holder = "pytest_int8bench.plugin.options.OPTIONS"
    table = hooks.options(holder, "allow", "max-slowdown", "max-*-growth", "max-p95-growth")
    found = re.findall(r"^\| `--int8-(\S+) ", table, re.M)
    assert found == ["allow", *(metric.option for metric in METRICS.values())]
    with pytest.raises(hooks.PluginError, match=r"^no option is called 'max-slow'$"):
        hooks.options(holder, "max-slow")


def test_saved_results_have_a_new_figure(toy: Figure, tmp_path: Path) -> None:
    path = tmp_path / "saved.json"
    block = saved_of(measured(1.5)).to_dict()
    path.write_text(json.dumps({"benchmarks": [], "int8bench": block}))
    [found] = read(path).results
    assert toy.of(found) == pytest.approx(1.5)


def test_a_figure_may_read_a_field_of_a_subclass() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Widened(Result):
        watts: float | None = None

    figure = Figure(field="watts", check="positive", header="W")
    register(figure)
    try:
        point = {"nodeid": "t", "workload": "toy", "run_name": "x", "params": {}}
        widened = Widened(**point, samples_per_s=1.0, watts=350.0)
        assert column("W", widened, Result(**point, samples_per_s=1.0)) == ["350", "-"]
        assert Widened.from_dict(widened.to_dict()) == widened
        with pytest.raises(SchemaError, match=r"watts must be a number above 0, got -1$"):
            Widened.from_dict({**widened.to_dict(), "watts": -1})
    finally:
        unregister(figure)


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_gate_skips_values_without_growth(value: float) -> None:
    figure = dataclasses.replace(eval(TOY), compute=lambda r: value)
    register(figure)
    try:
        found = compared(measured(), measured(), limits={"tail": 0.1})
        assert found.runs[0].change("tail") is None
        assert found.exit_code == 0
    finally:
        unregister(figure)


# -- energy -------------------------------------------------------------------------------------


def powered(joules: float, **values: Any) -> Result:
    return measured(joules_per_sample=joules, samples_per_joule=1 / joules, **values)


def test_table_shows_energy_if_measured() -> None:
    assert "J/sample" not in render(saved_of(measured()), width=None, color=False)
    assert column("J/sample", powered(0.25), measured()) == ["0.25", "-"]


def test_more_energy_is_a_regression_on_request() -> None:
    found = compared(powered(2.0), powered(2.5))
    change = found.runs[0].change("energy")
    assert change is not None
    assert (change.growth, change.limit, change.floor) == (0.25, None, 0.03)
    assert (found.exit_code, change.outcome) == (0, "not judged")
    text = compare_report.page(found).text(width=None, color=False)
    assert "J/sample" in text.splitlines()[0]
    assert "2.00 -> 2.50 (+25.0%)" in text

    found = compared(powered(2.0), powered(2.5), limits={"energy": 0.1})
    assert found.exit_code == 1
    assert found.runs[0].reason == "max-energy-growth: +25.0%, limit 10.0% (noise floor 3.0%)"
    assert compared(powered(2.5), powered(2.0), limits={"energy": 0.1}).exit_code == 0
    hot = powered(2.5, throttled=["power brake"])
    assert compared(powered(2.0), hot, limits={"energy": 0.1}).runs[0].outcome == "incomparable"


def test_energy_is_logged() -> None:
    logged = metrics_of(powered(0.5, energy_ratio=1.5), None)
    names = ("joules_per_sample", "samples_per_joule", "energy_ratio")
    assert [logged[name] for name in names] == [0.5, 2.0, 1.5]


def test_files_saved_before_a_field_existed_compare_with_files_saved_after(tmp_path: Path) -> None:
    block = saved_of(measured()).to_dict()
    [old] = block["results"]
    for name in ("joules_per_sample", "samples_per_joule", "energy_ratio"):
        del old[name]
    files = [tmp_path / name for name in ("before.json", "after.json")]
    files[0].write_text(json.dumps({"benchmarks": [], "int8bench": block}))
    new = {"benchmarks": [], "int8bench": saved_of(powered(2.0)).to_dict()}
    files[1].write_text(json.dumps(new))
    before, after = ([run] for run in read_runs(files))
    asked = Rules(limits={"energy": 0.0})
    for sides, cell in (((before, after), "- -> 2.00"), ((after, before), "2.00 -> -")):
        found = compare(*sides, Rules())
        assert (found.exit_code, found.runs[0].outcome) == (0, "same")
        assert found.runs[0].change("energy") is None
        judged = compare(*sides, asked)
        assert (judged.exit_code, judged.runs[0].outcome) == (2, "incomparable")
        assert cell in compare_report.page(found).text(width=None, color=False)
