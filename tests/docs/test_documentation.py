"""Test the documentation: examples run, commands parse, and the pages have every option, field and
public name, and load nothing from elsewhere."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import pytest_int8bench
from pytest_int8bench.cli.commands import run_command
from pytest_int8bench.environment import FINGERPRINT_NAMES
from pytest_int8bench.params import RunParams
from pytest_int8bench.plugin import fixtures
from pytest_int8bench.plugin.options import OPTIONS
from pytest_int8bench.plugin.reading import read_settings
from pytest_int8bench.results.benchmarks import Benchmark
from pytest_int8bench.results.figures import METRICS
from pytest_int8bench.results.records import Result
from pytest_int8bench.results.verdicts import Accuracy, Sensitivity
from pytest_int8bench.runner import ThroughputBenchmarkRunnerConfig
from pytest_int8bench.sweep import SWEEPS
from pytest_int8bench.workloads import Evaluation, Workload
from pytest_int8bench.workloads.registry import GROUP, WORKLOADS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", *DOCS.glob("*.md")])
PACKAGE = ROOT / "pytest_int8bench"


def text_of(name: str) -> str:
    return (ROOT / "README.md" if name == "README.md" else DOCS / name).read_text()


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL)


# -- names that the pages mention --------------------------------------------------------------


def test_environment_variables_are_listed() -> None:
    sources = "".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    variables = set(re.findall(r'_VARIABLE = "(INT8BENCH_\w+)"', sources))
    assert {"INT8BENCH_PRODUCT", "INT8BENCH_TUNING_DIR"} <= variables
    assert [name for name in variables if f"| `{name}` |" not in text_of("options.md")] == []


def test_documents_every_extra() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extra in extras["optional-dependencies"]:
        assert f"| `{extra}` |" in text_of("index.md")


def test_extra_of_every_workload_exists() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {row.extra for row in WORKLOADS} <= set(extras["optional-dependencies"])


def test_entry_point_example_names_the_group() -> None:
    [example] = blocks(DOCS / "workloads.md", "toml")
    assert list(tomllib.loads(example)["project"]["entry-points"]) == [GROUP]


# -- examples ---------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.stem)
def test_examples_run(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Examples of one page share a namespace, as if a reader copied them in order."""
    from pytest_int8bench.runner import ThroughputBenchmarkRunner

    # Measuring takes minutes and is tested separately.
    monkeypatch.setattr(ThroughputBenchmarkRunner, "run", lambda self: [])
    names: dict[str, Any] = {"__name__": "example"}
    for number, source in enumerate(blocks(page, "python"), start=1):
        exec(compile(source, f"{page.name}, example {number}", "exec"), names)
        known = {name for name in {**vars(fixtures), **names} if not name.startswith("test_")}
        assert _fixtures_asked_for(source) <= known | {"benchmark"}, number


def _fixtures_asked_for(source: str) -> set[str]:
    """Return the arguments of an example's tests that no ``parametrize`` provides."""
    asked = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            marks = " ".join(ast.unparse(mark) for mark in node.decorator_list)
            asked |= {arg.arg for arg in node.args.args if f"'{arg.arg}'" not in marks}
    return asked


def test_quantization_example_quantizes_its_model(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    names: dict[str, Any] = {}
    example = blocks(DOCS / "api.md", "python")[0]
    assert 'mode="default"' in example
    # Compiling is tested separately.
    exec(compile(example.replace('mode="default"', 'mode="off"'), "api.md", "exec"), names)
    assert capsys.readouterr().out.startswith("2 of 3 linear layers in INT8 (w8a8)")
    x = torch.randn(32, 64, dtype=torch.bfloat16)
    assert names["fast"](x).shape == (32, 10)


def test_sweep_example_creates_its_points() -> None:
    names: dict[str, Any] = {}
    exec(compile(blocks(DOCS / "api.md", "python")[2], "api.md", "exec"), names)
    points = [(p.int8_mode, p.batch_size) for p in names["runner"].points]
    assert points == [("w8a8", 64), ("w8a8", 128), ("w8", 64), ("w8", 128)]


@pytest.mark.slow
def test_examples_of_a_model_and_of_its_accuracy_run(pytester: pytest.Pytester) -> None:
    conftest, tests, *_ = blocks(DOCS / "workloads.md", "python")
    pytester.makeconftest(conftest)
    pytester.makepyfile(tests)

    test, example = blocks(DOCS / "accuracy.md", "python")
    assert "def test_accuracy(int8_guardrail):" in text_of("README.md")
    # Combine one page's workload with the other's evaluation, and use as many outputs as classes.
    with_evaluation = conftest.replace(
        'name="encoder-layer",', 'name="encoder-layer", evaluation=evaluation,'
    ).replace("torch.nn.Linear(1024, 256)", "torch.nn.Linear(1024, 10)")
    folder = pytester.mkpydir("accuracy")
    (folder / "conftest.py").write_text(example + with_evaluation)
    (folder / "test_accuracy.py").write_text(test)

    result = pytester.runpytest_subprocess(
        "--int8-preset=smoke",
        "--int8-set=compile_mode=off",
        "--int8-set=benchmark_interval_s=0.05",
        "--int8-max-drop=5pp",
    )
    # Throughput of baseline and candidate, shapes of the candidate, and its accuracy.
    result.assert_outcomes(passed=4)


def test_ini_file_example_is_valid(pytester: pytest.Pytester) -> None:
    [example] = blocks(DOCS / "options.md", "ini")
    pytester.makeini(example)
    settings = read_settings(pytester.parseconfig())
    assert settings.modes == ("w8a8", "w8")
    assert settings.changes == {"compile_mode": "default"}
    assert settings.axes == {"batch_size": [1, 32, 128]}
    assert str(settings.max_drop) == "0.5%"
    with pytest.raises(pytest.UsageError) as error:
        read_settings(pytester.parseconfig("--int8-mode=w4"))
    assert f"    ERROR: {error.value}\n" in text_of("options.md")


# -- commands ---------------------------------------------------------------------------------


def commands(page: Path) -> list[str]:
    """Return the lines of code on a page that start with one of our commands."""
    text = re.sub(r"\\\n\s*", "", page.read_text())
    code = re.findall(r"^ {4,}(.*)$", text, re.MULTILINE)
    code += [line for block in blocks(page, "bash") for line in block.splitlines()]
    parts = [part.strip() for line in code for part in line.split("&&")]
    bare = [re.sub(r"^(\w+=\S+ )+", "", part) for part in parts]
    return [line for line in bare if re.match(r"(python -m )?pytest( |$)|int8bench [a-z]", line)]


COMMANDS = [(page, command) for page in PAGES for command in commands(page)]


def test_finds_commands_on_every_page() -> None:
    by_page = {page.name for page, _ in COMMANDS}
    assert {"README.md", "index.md", "options.md", "gate.md", "accuracy.md", "faq.md"} <= by_page


@pytest.mark.parametrize("page", sorted({page for page, _ in COMMANDS}), ids=lambda p: p.stem)
def test_commands_are_valid(
    page: Path, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _, command in [found for found in COMMANDS if found[0] == page]:
        # Brackets enclose optional parts.
        words = shlex.split(re.sub(r"\[options\]|[][]", "", command), comments=True)
        try:
            if "pytest" in words[:3]:
                check_pytest(pytester, words[words.index("pytest") + 1 :])
            else:
                check_int8bench(pytester, monkeypatch, words[1:])
        except (pytest.UsageError, SystemExit, AssertionError) as error:
            pytest.fail(f"{command}: {error}", pytrace=False)


def check_pytest(pytester: pytest.Pytester, words: list[str]) -> None:
    for word in words:
        value = word.rpartition("=")[2]
        if value.endswith(".json") and "json=" not in word:  # the reader's files
            pytester.path.joinpath(value).touch()
    read_settings(pytester.parseconfig(*words))


class Parsed(Exception):
    """Raised instead of running a parsed ``int8bench`` command."""


def check_int8bench(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    parse = argparse.ArgumentParser.parse_known_args

    def only_parse(parser: Any, args: Any = None, namespace: Any = None) -> Any:
        found = parse(parser, args, namespace)
        if parser.prog == "int8bench":
            raise Parsed(*found)
        return found

    at = words.index("--") if "--" in words else len(words)
    with monkeypatch.context() as patched:
        patched.setattr(argparse.ArgumentParser, "parse_known_args", only_parse)
        with pytest.raises(Parsed) as parsed:
            run_command(words[:at])
    namespace, rest = parsed.value.args
    assert not rest or namespace.command == "sensitivity", f"unknown {rest}"
    check_pytest(pytester, [*rest, *words[at + 1 :]])


def test_detects_wrong_command(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(pytest.UsageError, match="unrecognized arguments: --int8-modes"):
        check_pytest(pytester, ["benchmarks", "--int8-modes=w8a8"])
    with pytest.raises(pytest.UsageError, match="--int8-mode: must be a comma-separated list of"):
        check_pytest(pytester, ["benchmarks", "--int8-mode=w4"])
    with pytest.raises(AssertionError, match="unknown"):
        check_int8bench(pytester, monkeypatch, ["compare", "--slowdown", "a", "b"])


def test_every_documented_option_exists() -> None:
    known = {option.flag for option in OPTIONS.values()}
    for page in PAGES:
        named = set(re.findall(r"(?<![\w-])--int8-[a-z0-9]+(?:-[a-z0-9]+)*", page.read_text()))
        assert named <= known, page.name


# -- set-up -----------------------------------------------------------------------------------


def test_ci_runs_the_two_set_up_commands_of_the_readme() -> None:
    (setup,) = blocks(ROOT / "README.md", "bash")
    first, second = setup.strip().splitlines()
    assert first.endswith("&& pytest benchmarks --int8-mode=w8a8")
    assert second.endswith("&& pytest -n 2")
    assert "README.md" in (ROOT / ".ci" / "run").read_text()
    assert first in text_of("index.md")


# -- the site ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for name in ("material", "mkdocstrings"):
        pytest.importorskip(name, reason="needs the extra docs")
    folder = tmp_path_factory.mktemp("site")
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
    ]  # --quiet hides warnings from it
    done = subprocess.run(
        [*command, f"--config-file={ROOT / 'mkdocs.yml'}", f"--site-dir={folder}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_the_site_has_every_page(site: Path) -> None:
    pages = {path.stem for path in site.glob("*.html")} - {"404"}
    assert pages == {page.stem for page in DOCS.glob("*.md")}
    assert (site / "int8-gate.yml").is_file()


def fields_of(record: Any) -> list[str]:
    return [spec.name for spec in dataclasses.fields(record)]


#: Page of the site -> names that must each have a row in a generated table.
ROWS: dict[str, list[str]] = {
    "options": [
        *(option.flag for option in OPTIONS.values()),
        *fields_of(RunParams),
        *(key for key in SWEEPS if key != "all"),
    ],
    "fixtures": [name for name in vars(fixtures) if name.startswith("int8_")],
    "workloads": [
        *(row.usage for row in WORKLOADS),
        *fields_of(Workload),
        *fields_of(Evaluation),
    ],
    "gate": list(METRICS),
    "schema": [
        *{name for kind in (Result, Benchmark, Accuracy, Sensitivity) for name in fields_of(kind)},
        "oom",
        *FINGERPRINT_NAMES,
    ],
    "api": fields_of(ThroughputBenchmarkRunnerConfig),
}


@pytest.mark.parametrize("page", ROWS)
def test_the_site_has_a_row_for_every_name(site: Path, page: str) -> None:
    rows = re.findall(
        r"<tr>\s*<td><code>(\S+?)(?: [^<]*)?</code></td>", (site / f"{page}.html").read_text()
    )
    assert [name for name in ROWS[page] if rows.count(name) < ROWS[page].count(name)] == []


@pytest.mark.parametrize(
    ("page", "cells"),
    [
        ("options", ["<code>--int8-max-slowdown LIMIT</code>", None, "5%"]),
        (
            "options",
            ["<code>--int8-journal PATH</code>", None, "a new file in .benchmarks/int8bench"],
        ),
        (
            "options",
            [
                "<code>patch</code>",
                "<code>patch_size</code>",
                None,
                "patch height and width in pixels",
            ],
        ),
        ("options", ["<code>batch_size</code>", "<code>128</code>", "Samples per forward pass."]),
        ("options", ["<code>extra</code>", "<code>{}</code>", None]),
        ("workloads", ["<code>timm:NAME</code>", "an image model of timm", "<code>timm</code>"]),
        ("workloads", ["<code>build</code>", "needed", None]),
        ("schema", ["<code>rounds</code>", "integer, null", "Number of timed rounds."]),
        ("schema", ["<code>throttled</code>", "array", None]),
        ("schema", ["<code>oom</code>", "boolean", None]),
    ],
)
def test_generated_rows_match_the_code(site: Path, page: str, cells: list[str | None]) -> None:
    row = r"\s*".join(f"<td>{'[^|]*?' if c is None else re.escape(c)}</td>" for c in cells)
    assert re.search(rf"<tr>\s*{row}\s*</tr>", (site / f"{page}.html").read_text())


def test_the_site_documents_every_public_name(site: Path) -> None:
    html = (site / "api.html").read_text()
    methods = {
        f"RunParams.{name}"
        for name in vars(RunParams)
        if not name.startswith("_") and name not in fields_of(RunParams)
    }
    found = re.findall(r'<h[34] id="pytest_int8bench\.([\w.]+)"', html)
    assert {*pytest_int8bench.__all__, *methods} - set(found) == set()


@pytest.mark.parametrize("name", ["apply_int8_quant", "compile_for_a100"])
def test_the_site_documents_every_parameter(site: Path, name: str) -> None:
    _, _, entry = (site / "api.html").read_text().partition(f'id="pytest_int8bench.{name}"')
    entry, _, _ = entry.partition("<h3")
    found = re.findall(r"<tr[^>]*>\s*<td>\s*<code>(\w+)</code>", entry)
    assert found == list(inspect.signature(getattr(pytest_int8bench, name)).parameters)


def test_every_placeholder_is_replaced(site: Path) -> None:
    for page in site.glob("*.html"):
        assert re.findall(r"<!-- \w+: pytest_int8bench|<p>::: ", page.read_text()) == [], page.name


def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    for page in site.glob("*.html"):
        html = page.read_text()
        loaded = re.findall(r'<(?:script|link|img|iframe)\b[^>]*?(?:src|href)="?([^"\s>]+)', html)
        assert len(loaded) > 3, page.name
        assert [url for url in loaded if re.match(r"(https?:)?//", url)] == [], page.name
    for style in site.rglob("*.css"):
        assert "url(http" not in style.read_text()
        assert "@import" not in style.read_text()


@pytest.mark.parametrize("picture", sorted(DOCS.glob("images/*.svg")), ids=lambda path: path.name)
def test_pictures_load_nothing_from_elsewhere(picture: Path) -> None:
    text = picture.read_text()
    assert picture.stat().st_size < 100_000
    assert re.findall(r'(?:href|src)="http|url\(["\']?http', text) == []


def test_readme_links_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)", text_of("README.md")):
        assert re.match(r"https?://", target) or (ROOT / target).exists(), target
