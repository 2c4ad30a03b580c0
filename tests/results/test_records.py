"""Records, the journal, and files that readers reject."""

from __future__ import annotations

import dataclasses
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_int8bench.params import RunParams
from pytest_int8bench.results.base import NOT_MEASURED, STATUSES, SchemaError
from pytest_int8bench.results.journal import Journal
from pytest_int8bench.results.reading import read
from pytest_int8bench.results.records import SCHEMA, Result, Saved, latest
from pytest_int8bench.results.verdicts import Accuracy, Sensitivity
from toys import results as toys
from toys.records import results, tables, verdicts

POINT = RunParams(int8_enabled=True, extra={"act": "relu"})
ENVIRONMENT = {"gpu": None, "packages": {"torch": "2.11.0"}, "cpu": "Zen ☃"}


def result_of(nodeid: str = "test_a.py::test[x]", **values: Any) -> Result:
    return toys.result_of(POINT, **{"nodeid": nodeid, "workload": "olmoearth", **values})


MEASURED = result_of(
    samples_per_s=1000.5,
    batch_time_s=0.128,
    rounds=20,
    steady=True,
    speedup=1.5,
    speedup_low=1.4,
    speedup_high=1.6,
    kernels=[{"name": "int8_gemm", "seconds": 0.1, "calls": 3}],
    coverage={"quantized": ["blocks.0.attn.q"], "converted_layers": 1},
    throttled=["power brake"],
)


def verdict_of(**values: Any) -> Accuracy:
    olmoearth = {"nodeid": "test_a.py::test[x]", "workload": "olmoearth", "limit": None}
    return toys.verdict_of(**{**olmoearth, **values})


def table_of(**values: Any) -> Sensitivity:
    point = {"nodeid": "test_a.py::test[x]", "workload": "olmoearth", "run_name": "x"}
    return Sensitivity(
        **{**point, "params": {}, "by": "layer", "samples": 8, "layers": [], **values}
    )


# -- results ----------------------------------------------------------------------------------

TIMES_AND_RATES = (
    *("samples_per_s", "batch_time_s", "batch_time_mean_s", "batch_time_p95_s"),
    *("batch_time_min_s", "compile_s", "feed_copy_s"),
)
ENERGIES = ("joules_per_sample", "samples_per_joule", "energy_ratio")


@given(results)
def test_result_round_trip_through_json(result: Result) -> None:
    values = json.loads(json.dumps(result.to_dict()))
    assert Result.from_dict(values) == result
    assert values["oom"] is (result.status == "oom")


@given(st.lists(results | verdicts | tables, max_size=6))
def test_journal_round_trip(written: list[Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        journal = Journal(Path(folder) / "new" / "run.jsonl", ENVIRONMENT)
        for record in written:
            journal.append(record)
        saved = read(journal.path)
        reopened = Journal.reopen(journal.path).saved()
    kinds = (Result, Accuracy, Sensitivity)
    assert saved == Saved(
        ENVIRONMENT, *(latest([r for r in written if isinstance(r, kind)]) for kind in kinds)
    )
    assert saved == journal.saved() == reopened
    assert saved.results == journal.results
    assert saved.accuracy == journal.accuracy


def lists_of(kind: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Any]]:
    return st.lists(kind, max_size=4, unique_by=lambda record: record.identity)


@given(lists_of(results), lists_of(verdicts), lists_of(tables))
def test_json_round_trip(
    written: list[Result], judged: list[Accuracy], scanned: list[Sensitivity]
) -> None:
    saved = Saved(ENVIRONMENT, written, judged, scanned)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "0001_run.json"
        path.write_text(json.dumps({"benchmarks": [], "int8bench": saved.to_dict()}, indent=4))
        assert read(path) == saved


def test_files_without_tables_of_layers_are_read(tmp_path: Path) -> None:
    block = Saved(ENVIRONMENT, [MEASURED]).to_dict()
    del block["sensitivity"]
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"benchmarks": [], "int8bench": block}))
    assert read(path) == Saved(ENVIRONMENT, [MEASURED])


def test_rejects_unknown_outcome() -> None:
    with pytest.raises(
        ValueError, match=r"^outcome must be one of PASS, FAIL, INCONCLUSIVE, proxy-ok, got 'OK'$"
    ):
        verdict_of(outcome="OK")
    with pytest.raises(
        SchemaError, match=r"^not a verdict: it must also have nodeid, .*, samples$"
    ):
        Accuracy.from_dict({"outcome": "PASS"})
    with pytest.raises(SchemaError, match=r"^not a table of layers: 5$"):
        Sensitivity.from_dict(5)


def test_a_metric_of_random_weights_is_a_pipeline_check() -> None:
    assert verdict_of(random_weights=True).is_pipeline_check
    assert not verdict_of().is_pipeline_check
    assert not verdict_of(random_weights=True, metric="outputs").is_pipeline_check


def test_unknown_fields_are_ignored() -> None:
    assert Result.from_dict({**MEASURED.to_dict(), "watts_per_sample": 0.1}) == MEASURED


def test_nothing_is_measured_by_default() -> None:
    result = result_of()
    given_fields = {"nodeid", "workload", "run_name", "params", "status", "oom"}
    others = {name: value for name, value in result.to_dict().items() if name not in given_fields}
    assert others.pop("kernels") == []
    assert others.pop("throttled") == []
    assert set(others.values()) == {None}
    assert result.status == "ok"


@pytest.mark.parametrize("status", STATUSES)
def test_oom_is_a_status(status: str) -> None:
    assert result_of(status=status).oom is (status == "oom")


BAD_STATUS = "status must be one of ok, oom, skipped, failed, accuracy-failed, got 'fine'"


def test_rejects_bad_status() -> None:
    with pytest.raises(ValueError, match=rf"^{BAD_STATUS}$"):
        result_of(status="fine")
    with pytest.raises(SchemaError, match=rf"^not a result: {BAD_STATUS}$"):
        Result.from_dict({**MEASURED.to_dict(), "status": "fine"})


@pytest.mark.parametrize("name", ["samples_per_s", "tokens_per_s", "pixels_per_s"])
@pytest.mark.parametrize("rate", [1e308, 1e20, 1e-20])
def test_rates_fit_the_batch_time(name: str, rate: float) -> None:
    why = re.escape(f"{name} must be a batch's count divided by batch_time_s (0.01), got {rate}")
    with pytest.raises(SchemaError, match=rf"^not a result: {why}$"):
        Result.from_dict({**MEASURED.to_dict(), name: rate, "batch_time_s": 0.01})
    assert getattr(result_of(**{name: rate}), name) == rate  # unknown without a time


@pytest.mark.parametrize("name", [*TIMES_AND_RATES, *ENERGIES, "peak_memory_bytes"])
@pytest.mark.parametrize("value", [0, 0.0, -1.5, float("nan"), float("inf"), "1", True])
def test_times_rates_and_bytes_are_positive(name: str, value: Any) -> None:
    why = re.escape(f"{name} must be a number above 0, got {value!r}")
    with pytest.raises(ValueError, match=rf"^{why}$"):
        result_of(**{name: value})
    with pytest.raises(SchemaError, match=rf"^not a result: {why}$"):
        Result.from_dict({**MEASURED.to_dict(), name: value})
    assert getattr(result_of(**{name: None}), name) is None


@pytest.mark.parametrize("name", ["feed_exposed_s", "feed_wait_s"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf"), "1", True, 10**400])
def test_differences_are_numbers(name: str, value: Any) -> None:
    shown = "100000000000000000...0000000000000000000" if value == 10**400 else repr(value)
    why = re.escape(f"{name} must be a number, got {shown}")
    with pytest.raises(SchemaError, match=rf"^not a result: {why}$"):
        Result.from_dict({**MEASURED.to_dict(), name: value})
    for good in (None, 0, -1.5, 2.5):
        assert getattr(result_of(**{name: good}), name) == good


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("nodeid", 5, "nodeid must be a string, got 5"),
        ("workload", None, "workload must be a string, got None"),
        ("run_name", ["x"], "run_name must be a string, got ['x']"),
        ("reason", 5, "reason must be a string, got 5"),
        ("compile_cache", "hot", "compile_cache must be one of cold, warm, got 'hot'"),
        ("throttled", None, "throttled must be a list of strings, got None"),
    ],
)
def test_rejects_values_of_wrong_types(name: str, value: Any, why: str) -> None:
    with pytest.raises(SchemaError, match=rf"^not a result: {re.escape(why)}$"):
        Result.from_dict({**MEASURED.to_dict(), name: value})
    if name in ("nodeid", "workload", "run_name"):
        for record in (verdict_of(), table_of()):
            with pytest.raises(SchemaError, match=rf"^not a (verdict|table of layers): {why[:8]}"):
                type(record).from_dict({**record.to_dict(), name: value})


def test_an_untimed_test_is_disabled() -> None:
    reason = f"{NOT_MEASURED}: pytest-benchmark is disabled"
    assert result_of(status="skipped", reason=reason).is_disabled
    assert not result_of(status="failed", reason=reason).is_disabled
    assert not result_of(status="skipped", reason="no GPU").is_disabled
    assert not result_of(status="skipped").is_disabled


def test_a_result_needs_its_identity() -> None:
    why = "not a result: it must also have nodeid, workload, run_name, params"
    with pytest.raises(SchemaError, match=rf"^{why}$"):
        Result.from_dict({"status": "ok"})


# -- later results ----------------------------------------------------------------------------


def test_later_result_of_an_identity_wins() -> None:
    first, other, again = result_of("a"), result_of("b"), result_of("a", status="failed")
    elsewhere = result_of("a", workload="vit")
    assert latest([first, other, elsewhere, again]) == [other, elsewhere, again]


def test_the_run_name_is_not_the_identity(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "run.jsonl", ENVIRONMENT)
    journal.append(result_of("a", run_name="one", samples_per_s=1.0))
    journal.append(result_of("a", run_name="two", samples_per_s=2.0))
    assert [r.run_name for r in journal.results] == ["two"]
    assert [r.run_name for r in read(journal.path).results] == ["two"]
    # The file still has all lines.
    assert len(journal.path.read_text().splitlines()) == 3


def test_each_result_is_written_immediately(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "run.jsonl", ENVIRONMENT)
    assert read(journal.path) == Saved(ENVIRONMENT, [], [])
    for count in (1, 2):
        journal.append(result_of(str(count)))
        assert len(read(journal.path).results) == count


# -- damaged files ----------------------------------------------------------------------------


@pytest.fixture
def journal_path(tmp_path: Path) -> Path:
    journal = Journal(tmp_path / "run.jsonl", ENVIRONMENT)
    for result in (MEASURED, result_of("b"), result_of("c", reason="naïve ☃\u2028x")):
        journal.append(result)
    return journal.path


def refused(path: Path) -> str:
    """Return the error about ``path`` without its name."""
    with pytest.raises(SchemaError) as info:
        read(path)
    message = str(info.value)
    assert "\n" not in message
    assert str(path) in message
    return message.replace(str(path), "FILE")


def test_a_torn_last_line_keeps_earlier_results(journal_path: Path) -> None:
    whole = read(journal_path).results
    assert len(whole) == 3
    lines = journal_path.read_bytes().splitlines(keepends=True)
    head, last = b"".join(lines[:-1]), lines[-1]
    for length in (1, 2, len(last) // 2, len(last) - 2):
        journal_path.write_bytes(head + last[:length])
        assert read(journal_path).results == whole[:-1]
    journal_path.write_bytes(head + last.rstrip(b"\n"))
    assert read(journal_path).results == whole


@pytest.mark.parametrize("broken", ["{half", "\0\0\0", "x", '{"a": 1}{"b": 2}'])
def test_a_broken_line_is_skipped_and_reported(journal_path: Path, broken: str) -> None:
    whole = read(journal_path)
    lines = journal_path.read_text().splitlines()
    for at in (1, 2, len(lines)):
        journal_path.write_text("\n".join([*lines[:at], broken, *lines[at:]]) + "\n")
        found = read(journal_path)
        assert found == whole
        assert found.skipped == (at + 1,)


def test_rejects_a_torn_header(journal_path: Path) -> None:
    journal_path.write_text(journal_path.read_text()[:20])
    assert refused(journal_path) == "FILE is not JSON: it is cut off (line 1, column 16)"


def test_rejects_a_journal_line_without_a_result(journal_path: Path) -> None:
    with journal_path.open("a") as file:
        file.write('{"nodeid": "d"}\n')
    with pytest.raises(
        SchemaError, match=r"not a result: it must also have workload, run_name, params$"
    ):
        read(journal_path)


@pytest.mark.parametrize("record", ["5", "null", "[]", '"text"'])
def test_rejects_a_journal_line_without_an_object(journal_path: Path, record: str) -> None:
    with journal_path.open("a") as file:
        file.write(record + "\n")
    with pytest.raises(SchemaError, match="not a result"):
        read(journal_path)


# -- foreign files ----------------------------------------------------------------------------

NO_BLOCK = "FILE has no int8bench block: it was not saved by pytest-int8bench"
NO_HEADER = "FILE is not a journal of pytest-int8bench: it has no header"
QUOTES = "Expecting property name enclosed in double quotes"
CUT_OFF = "FILE is not JSON: it is cut off (line 1, column 45)"
NEWER = "FILE has schema 2, but this version reads only up to 1; update pytest-int8bench"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "FILE is empty"),
        (" \n\n", "FILE is empty"),
        ("{'a': 1}", f"FILE is not JSON: {QUOTES} (line 1, column 2)"),
        ('{\n"a": [1,\n', "FILE is not JSON: it is cut off (line 3, column 1)"),
        ('{"a": "b', "FILE is not JSON: it is cut off (line 1, column 7)"),
        ('{"a": "{b}', "FILE is not JSON: it is cut off (line 1, column 7)"),
        ('{"benchmarks": [], "int8bench": {"schema": 1', CUT_OFF),
        ("hello\n", "FILE is neither JSON nor a journal (line 1)"),
        ('{"benchmarks": [], "version": "5.1.0"}', NO_BLOCK),
        ('{"benchmarks": [], "int8bench": 5}', NO_BLOCK),
        ("[1]", NO_BLOCK),
        ("5", NO_BLOCK),
        ('{"a": 1}\n{"b": 2}\n', NO_HEADER),
        ("[1]\n[2]\n", NO_HEADER),
        ('{"int8bench": 1}\n', NO_HEADER),
        ('{"int8bench": {"schema": 2, "environment": {}}}\n', NEWER),
        ('{"int8bench": {"schema": 2, "environment": {}}}\n{"later": 1}\n', NEWER),
        ('{"benchmarks": [], "int8bench": {"schema": 2}}', NEWER),
        ('{"benchmarks": [], "int8bench": {}}', "FILE: schema must be a whole number, got None"),
        (
            '{"benchmarks": [], "int8bench": {"schema": "1"}}',
            "FILE: schema must be a whole number, got '1'",
        ),
    ],
)
def test_rejects_invalid_files(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)
    assert refused(path) == message


def test_rejects_a_truncated_file(tmp_path: Path) -> None:
    block = Saved(ENVIRONMENT, [MEASURED], [verdict_of()]).to_dict()
    whole = json.dumps({"benchmarks": [], "int8bench": block}, indent=1)
    path = tmp_path / "run.json"
    for length in range(1, len(whole)):
        path.write_text(whole[:length])
        assert re.fullmatch(
            r"FILE is not JSON: it is cut off \(line \d+, column \d+\)", refused(path)
        )


@pytest.mark.parametrize(
    ("name", "kind"), [("environment", "an object"), ("results", "a list"), ("accuracy", "a list")]
)
def test_rejects_an_incomplete_block(tmp_path: Path, name: str, kind: str) -> None:
    block = Saved(ENVIRONMENT, [MEASURED], []).to_dict()
    del block[name]
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"benchmarks": [], "int8bench": block}))
    assert refused(path) == f"FILE: {name} must be {kind}, got None"


def test_rejects_a_header_without_environment(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text(json.dumps({"int8bench": {"schema": SCHEMA}}) + "\n")
    assert refused(path) == "FILE: environment must be an object, got None"


@pytest.mark.parametrize(
    ("records", "kind", "identity"),
    [
        (([result_of("a"), result_of("b"), result_of("a")], []), "a result", "a, olmoearth"),
        (([], [verdict_of()] * 3), "a verdict", "test_a.py::test[x], olmoearth, top1"),
    ],
)
def test_an_identity_is_saved_once(tmp_path: Path, records: Any, kind: str, identity: str) -> None:
    path = tmp_path / "run.json"
    saved = Saved(ENVIRONMENT, *records)
    path.write_text(json.dumps({"benchmarks": [], "int8bench": saved.to_dict()}))
    times = 3 if records[1] else 2
    assert refused(path) == f"FILE holds {kind} {times} times: {identity}"


def test_errors_name_the_test_of_a_damaged_result(tmp_path: Path) -> None:
    block = Saved(ENVIRONMENT, [MEASURED]).to_dict()
    block["results"].append({**result_of("b").to_dict(), "batch_time_s": -1})
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"benchmarks": [], "int8bench": block}))
    why = "not a result: batch_time_s must be a number above 0, got -1"
    assert refused(path) == f"FILE: b: {why}"
    journal = Journal(tmp_path / "run.jsonl", ENVIRONMENT)
    with journal.path.open("a") as file:
        file.write(json.dumps(block["results"][1]) + "\n")
    assert refused(journal.path) == f"FILE: b: {why}"


@pytest.mark.parametrize("name", ["gpu", "packages"])
def test_rejects_fingerprint_parts_of_wrong_types(tmp_path: Path, name: str) -> None:
    path = tmp_path / "run.json"
    for value in ("A100", [], 5):
        block = Saved({**ENVIRONMENT, name: value}, []).to_dict()
        path.write_text(json.dumps({"benchmarks": [], "int8bench": block}))
        assert refused(path) == f"FILE: environment.{name} must be an object, got {value!r}"
    block = Saved({**ENVIRONMENT, name: None}, []).to_dict()
    path.write_text(json.dumps({"benchmarks": [], "int8bench": block}))
    assert read(path).environment[name] is None


@pytest.mark.parametrize("value", [5, [5], None, [None], "text"])
def test_rejects_results_of_wrong_types(tmp_path: Path, value: Any) -> None:
    block = {**Saved(ENVIRONMENT, [], []).to_dict(), "results": value}
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"benchmarks": [], "int8bench": block}))
    with pytest.raises(SchemaError):
        read(path)


def test_rejects_a_binary_file(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_bytes(b"\x80\x81\x00")
    assert refused(path)


def test_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=re.escape("nothing.json")):
        read(tmp_path / "nothing.json")


def test_reads_the_block_of_a_benchmark_file(tmp_path: Path) -> None:
    failed = result_of("b", status="failed", reason="boom")
    block = Saved(ENVIRONMENT, [MEASURED, failed], [verdict_of(outcome="FAIL")]).to_dict()
    assert set(block) == {"schema", "environment", "results", "accuracy", "sensitivity"}
    assert block["schema"] == SCHEMA == 1
    data = {
        "machine_info": {"node": "host"},
        "commit_info": {"id": "abc"},
        "benchmarks": [{"name": "test[x]", "extra_info": {"speedup": 1.5}, "stats": {"min": 1}}],
        "datetime": "2025-01-01T00:00:00",
        "version": "5.1.0",
        "int8bench": block,
    }
    path = tmp_path / "0001_run.json"
    path.write_text(json.dumps(data, indent=4))
    saved = read(path)
    assert saved.environment == ENVIRONMENT
    assert saved.results == [MEASURED, failed]
    assert saved.accuracy == [verdict_of(outcome="FAIL")]
    assert RunParams.from_dict(saved.results[0].params) == POINT


@pytest.mark.parametrize("end", ["", "\n", '\n{"nodeid": "half'])
def test_a_journal_can_be_reopened(tmp_path: Path, end: str) -> None:
    path = tmp_path / "journal.jsonl"
    first = dataclasses.replace(MEASURED, nodeid="first")
    Journal(path, {"commit": "abc"}).append(first)
    path.write_text(path.read_text().rstrip("\n") + end)
    journal = Journal.reopen(path)
    assert journal.results == [first]
    second = dataclasses.replace(MEASURED, nodeid="second")
    journal.append(second)
    saved = read(path)
    assert saved.environment == {"commit": "abc"}
    assert saved.results == journal.results == [first, second]
