"""Test ``int8bench export``: formats of services that track history, and their content."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from pytest_int8bench.cli.main import main
from pytest_int8bench.report.exports import BENCHMARK_LENGTH, MEASURE_LENGTH
from pytest_int8bench.results.figures import METRICS, Figure, register, unregister
from pytest_int8bench.results.records import Result
from toys.results import (
    CPU,
    Saved,
    entry,
    everything,
    result_of,
    saved,
    timed,
    verdict_of,
    write,
    write_plain,
)

jsonschema = pytest.importorskip("jsonschema", reason="comes with check-jsonschema")

NUMBER = {"type": "number"}
METRIC = {
    "type": "object",
    "properties": {"value": NUMBER, "lower_value": NUMBER, "upper_value": NUMBER},
    "required": ["value"],
    "additionalProperties": False,
}


def names(length: int, entry: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON schema of an object whose names have at most this many characters."""
    pattern = f"^.{{1,{length}}}$"
    return {
        "type": "object",
        "minProperties": 1,
        "patternProperties": {pattern: entry},
        "additionalProperties": False,
    }


# From https://bencher.dev/docs/reference/bencher-metric-format.
BENCHER = names(BENCHMARK_LENGTH, names(MEASURE_LENGTH, METRIC))
# From the README of github-action-benchmark, on custom tools.
TEXT = {"type": "string", "minLength": 1}
GITHUB = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "properties": {"name": TEXT, "unit": TEXT, "value": NUMBER, "range": TEXT, "extra": TEXT},
        "required": ["name", "unit", "value"],
        "additionalProperties": False,
    },
}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def bencher(of: Saved, capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, Any], str]:
    """Return the Bencher Metric Format of a file, and the text on stderr."""
    write("run.json", of)
    assert main(["export", "run.json", "--format", "bencher"]) == 0
    out, err = capsys.readouterr()
    values = json.loads(out)
    jsonschema.validate(values, BENCHER)
    return values, err


def github(of: Saved) -> dict[str, list[dict[str, Any]]]:
    """Return both files of github-action-benchmark by their suffixes."""
    write("run.json", of)
    command = ["export", "run.json", "--format", "github-action-benchmark"]
    assert main([*command, "--output", "hist.json"]) == 0
    found = {path.stem: json.loads(path.read_text()) for path in Path().glob("hist-*.json")}
    for entries in found.values():
        jsonschema.validate(entries, GITHUB)
        assert len({entry["name"] for entry in entries}) == len(entries)
    return found


def test_exports_all_figures_of_a_session(capsys: pytest.CaptureFixture[str]) -> None:
    values, err = bencher(everything(), capsys)
    measures = {name for entry in values.values() for name in entry}
    fields = {"samples_per_s", "batch_time_s", "peak_memory_bytes", "compile_s", "speedup"}
    assert measures == {*fields, "top1", "top1_drop"}
    [oom] = re.findall(r"left out: (\S+) \(OOM\)", err)
    assert oom not in values
    assert err.count("\n") == 1
    assert {" (failed)", " (skipped)"} <= set(re.findall(r" \([a-z]+\)", err))


def test_exports_values_with_intervals(capsys: pytest.CaptureFixture[str]) -> None:
    errors = {"batch_time_standard_error": 0.01, "joules_per_sample": 0.5}
    speedup = {"speedup": 1.2, "speedup_low": 1.1, "speedup_high": 1.3}
    of = saved(timed("x", **errors, **speedup), verdict_of(candidate=0.9, drop=0.01), **CPU)
    [throughput, accuracy] = bencher(of, capsys)[0].items()
    assert throughput == (
        "toy: test_a.py::test[x]",
        {
            "samples_per_s": {
                "value": 1000,
                "lower_value": pytest.approx(1000 / 1.0196),
                "upper_value": pytest.approx(1000 / 0.9804),
            },
            "batch_time_s": {
                "value": 0.128,
                "lower_value": pytest.approx(0.128 * 0.9804),
                "upper_value": pytest.approx(0.128 * 1.0196),
            },
            "batch_time_p95_s": {"value": 0.13},
            "peak_memory_bytes": {"value": 1 << 30},
            "compile_s": {"value": 20},
            "joules_per_sample": {"value": 0.5},
            "speedup": {"value": 1.2, "lower_value": 1.1, "upper_value": 1.3},
        },
    )
    assert accuracy == (
        "toy: test_a.py::test_accuracy[x]",
        {"top1": {"value": 0.9}, "top1_drop": {"value": 0.01}},
    )


def test_writes_one_file_per_direction(capsys: pytest.CaptureFixture[str]) -> None:
    error = {"batch_time_standard_error": 0.01, "speedup": 1.2}
    found = github(saved(timed("x", **error), verdict_of(candidate=0.9, drop=0.01), **CPU))
    bigger = {entry["name"].rpartition(" ")[2]: entry for entry in found["hist-bigger"]}
    smaller = {entry["name"].rpartition(" ")[2]: entry for entry in found["hist-smaller"]}
    assert list(bigger) == ["samples_per_s", "speedup", "top1"]
    assert {METRICS[name].field for name in ("batch-time", "p95", "memory", "compile")} == {
        *smaller
    } - {"top1_drop"}
    assert bigger["samples_per_s"] == {
        "name": "toy: test_a.py::test[x] samples_per_s",
        "unit": "samples/s",
        "value": 1000,
        "range": "980.777 to 1019.99",
        "extra": "x\nEPYC, 8 threads, torch 2.11.0, triton 3.6.0, torchao 0.18.0",
    }
    assert (smaller["batch_time_s"]["unit"], smaller["batch_time_s"]["value"]) == ("ms", 128)
    assert smaller["peak_memory_bytes"]["value"] == 1024
    assert capsys.readouterr().out == (
        "hist-bigger.json: tool customBiggerIsBetter, 3 figures\n"
        "hist-smaller.json: tool customSmallerIsBetter, 5 figures\n"
    )


def test_writes_no_file_for_a_direction_without_figures(capsys: pytest.CaptureFixture[str]) -> None:
    Path("hist-bigger.json").write_text("[] of an earlier run")
    assert list(github(saved(result_of("x", compile_s=1.0)))) == ["hist-smaller"]
    assert capsys.readouterr().out.startswith("no file: tool customBiggerIsBetter, 0 figures\n")


def test_omits_results_that_do_not_reflect_the_code(capsys: pytest.CaptureFixture[str]) -> None:
    of = saved(
        timed("fine"),
        timed("hot", throttled=["thermal (hardware)"]),
        timed("wrong", status="accuracy-failed", samples_per_s=5.0),
        timed("odd\u202e::error::##[error]", status="failed"),
        verdict_of(point="random", candidate=0.1, drop=0.0, random_weights=True),
        verdict_of(point="few", candidate=0.5, drop=0.0, drop_low=0.0, drop_high=float("inf")),
        verdict_of(point="none", outcome="proxy-ok", metric="outputs", limit=None),
    )
    values, err = bencher(of, capsys)
    assert list(values) == ["toy: test_a.py::test[fine]", "toy: test_a.py::test_accuracy[few]"]
    assert values["toy: test_a.py::test_accuracy[few]"]["top1_drop"] == {
        "value": 0.0,
        "lower_value": 0.0,
    }
    assert err == (
        "int8bench export: left out: toy: test_a.py::test[hot] (throttled); "
        "toy: test_a.py::test[wrong] (accuracy-failed); "
        "toy: test_a.py::test[odd\\u202e::error::#\\#[error]] (failed); "
        "toy: test_a.py::test_accuracy[random] top1 (random weights)\n"
    )


def test_plain_benchmarks_are_exported(capsys: pytest.CaptureFixture[str]) -> None:
    spread = {"stddev": 2e-4, "rounds": 4}  # a standard error of 0.1 * sqrt(pi / 2) / 2
    write_plain("run.json", entry("test_a.py::sort", 2e-3, **spread))
    assert main(["export", "run.json", "--format", "bencher"]) == 0
    values = json.loads(capsys.readouterr().out)
    jsonschema.validate(values, BENCHER)
    assert values == {
        "test_a.py::sort": {
            "call_time_s": {
                "value": 2e-3,
                "lower_value": pytest.approx(1.754e-3, rel=1e-3),
                "upper_value": pytest.approx(2.246e-3, rel=1e-3),
            }
        }
    }


def test_many_omitted_points_are_summarized_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    failed = [timed(str(number), status="failed") for number in range(1000)]
    _, err = bencher(saved(timed("fine"), *failed), capsys)
    assert err.count("(failed)") == 10
    assert err.endswith("; and 990 more\n")


def test_shortened_names_stay_distinct(capsys: pytest.CaptureFixture[str]) -> None:
    tests = [timed("x" * 1020 + end) for end in "ab"]
    verdicts = [verdict_of(metric="m" * 70 + end, candidate=0.5, samples=9) for end in "ab"]
    values, _ = bencher(saved(*tests, *verdicts), capsys)
    assert len(values) == 3
    assert len(list(values.values())[2]) == 2


def test_json_keeps_ci_commands_in_names(capsys: pytest.CaptureFixture[str]) -> None:
    values, _ = bencher(saved(timed("##[error]x")), capsys)
    assert list(values) == ["toy: test_a.py::test[##[error]x]"]


def test_exports_a_registered_figure(capsys: pytest.CaptureFixture[str]) -> None:
    def batches(result: Result) -> float | None:
        return result.batch_time_s and (1 / result.batch_time_s if result.iterations else math.nan)

    figure = Figure(field="batches_per_s", compute=batches, title="Batches", higher_is_better=True)
    register(figure)
    try:
        values, _ = bencher(saved(timed("x", batch_time_s=0.5, iterations=1), timed("y")), capsys)
    finally:
        unregister(figure)
    assert values["toy: test_a.py::test[x]"]["batches_per_s"] == {"value": 2.0}
    assert "batches_per_s" not in values["toy: test_a.py::test[y]"]


@pytest.mark.parametrize(("output", "got"), [("/", "/"), ("", ".")])
def test_output_must_name_a_file(output: str, got: str, capsys: pytest.CaptureFixture[str]) -> None:
    write("fine.json", saved(timed("x")))
    command = ["export", "fine.json", "--format", "github-action-benchmark", "--output", output]
    assert main(command) == 2
    assert capsys.readouterr().err == f"int8bench export: --output must name a file, got {got!r}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.json"], "missing.json does not exist"),
        (["failed.json"], "failed.json contains no successfully measured point to export"),
        (["folder"], "folder must be one saved file, got 2 files"),
        (["fine.json", "--output", "fine.json"], "refusing to overwrite fine.json: it contains "),
        (["fine.json", "--output", "no/such/\0"], "ValueError"),
    ],
)
def test_rejects_files_that_cannot_be_exported(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write("failed.json", saved(timed("x", status="failed")))
    write("fine.json", saved(timed("x")))
    write("folder/a.json", saved(timed("x")))
    write("folder/b.json", saved(timed("x")))
    before = Path("fine.json").read_text()
    assert main(["export", *arguments, "--format", "bencher"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err or message == "ValueError"
    assert err.splitlines()[-1].startswith("int8bench export: ")
    assert Path("fine.json").read_text() == before
