"""Reading plain benchmarks from saved files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pytest_int8bench.environment import differences
from pytest_int8bench.results.base import SchemaError
from pytest_int8bench.results.benchmarks import Benchmark, partly_known, unsynchronized
from pytest_int8bench.results.reading import read
from pytest_int8bench.results.records import Result, Saved
from toys.results import CPU, GPU, entry, plain, timed, write, write_journal, write_plain

NODE = "test_a.py::test_sort[10]"


def test_reads_a_plain_pytest_benchmark_file(tmp_path: Path) -> None:
    data = [0.002, 0.003]  # with --benchmark-save-data
    stats = {"iterations": 30, "rounds": 16, "stddev": 4e-3, "iqr": 2.698e-4, "data": data}
    path = write_plain(tmp_path / "0001_x.json", entry(NODE, 2e-3, **stats))
    [found] = read(path).benchmarks
    assert found.identity == (NODE, "pytest-benchmark")
    assert (found.call_time_s, found.rounds, found.iterations) == (2e-3, 16, 30)
    # sqrt(pi / 2) standard deviations, estimated from quartiles if there are many rounds
    assert found.call_time_standard_error == pytest.approx(1.2533 * 2e-4 / 4 / 2e-3, rel=1e-3)
    assert found.timer == "perf_counter"
    assert read(path).environment["commit"] == "abc"


@pytest.mark.parametrize(
    ("stats", "error"),
    [
        ({"rounds": 1, "stddev": 0}, None),
        ({"rounds": 4, "stddev": 1e-4, "iqr": 0}, 1.2533 * 0.1 / 2),
        ({"rounds": 100, "stddev": 1e-4, "iqr": None}, 1.2533 * 0.1 / 10),
        ({"rounds": 100, "stddev": None, "iqr": None}, None),
    ],
)
def test_standard_error_of_a_median(stats: dict[str, Any], error: float | None) -> None:
    found = Benchmark.from_timing(entry(NODE, **stats)).call_time_standard_error
    assert found == (None if error is None else pytest.approx(error, rel=1e-3))


def test_reads_sparse_entries_of_older_versions() -> None:
    old = {"fullname": NODE, "stats": {"median": 1, "min": 1, "rounds": 5}}
    found = Benchmark.from_timing(old)
    assert (found.call_time_s, found.timer, found.iterations) == (1, None, None)


def test_a_call_with_time_0_is_skipped() -> None:
    found = Benchmark.from_timing(entry(NODE, 0.0))
    assert (found.call_time_s, found.call_time_min_s) == (None, None)
    assert (found.status, found.reason) == ("skipped", "the timer is too coarse to time a call")


@pytest.mark.parametrize(
    ("timing", "why"),
    [
        (5, "5"),
        ({"name": "BM_x", "real_time": 3}, "fullname must be a string, got None"),
        ({**entry(NODE), "stats": []}, "stats must be an object, got []"),
        (entry(NODE, median=-1), "median must be a number of at least 0, got -1"),
        (entry(NODE, median=float("nan")), "median must be a number of at least 0, got nan"),
        (entry(NODE, min="1"), "min must be a number of at least 0, got '1'"),
        (entry(NODE, rounds=1.5), "rounds must be a whole number of at least 0, got 1.5"),
        ({**entry(NODE), "options": {"timer": 3}}, "options.timer must be a string, got 3"),
    ],
)
def test_an_invalid_entry_is_a_one_line_error(tmp_path: Path, timing: Any, why: str) -> None:
    path = write_plain(tmp_path / "a.json", timing)
    where = f"{path}: {NODE}" if NODE in json.dumps(timing) else str(path)
    with pytest.raises(SchemaError) as caught:
        read(path)
    assert str(caught.value) == f"{where}: not a plain benchmark: {why}"


@pytest.mark.parametrize(
    ("head", "why"),
    [
        ({"machine_info": []}, "machine_info must be an object, got []"),
        ({"machine_info": {"cpu": "EPYC"}}, "machine_info.cpu must be an object, got 'EPYC'"),
        ({"commit_info": {"id": 5}}, "commit_info.id must be a string, got 5"),
        ({"int8bench": "x"}, "has no int8bench block: it was not saved by pytest-int8bench"),
    ],
)
def test_an_invalid_file_is_a_one_line_error(tmp_path: Path, head: Any, why: str) -> None:
    path = write_plain(tmp_path / "a.json", entry(NODE), **head)
    with pytest.raises(SchemaError, match=r"a\.json") as caught:
        read(path)
    assert str(caught.value).removeprefix(str(path)).strip(": ") == why


def test_plain_benchmarks_next_to_points(tmp_path: Path) -> None:
    point, failed = timed(), plain("test_b", status="failed", reason="boom")
    entries = [entry(point.nodeid), entry(NODE), entry(failed.nodeid), {"name": "no test"}]
    # A test that is run again is timed again; the last attempt counts.
    entries.append(entry(NODE, 5e-3))
    saved = Saved(CPU, [point], benchmarks=[failed, plain()])
    path = write(tmp_path / "a.json", saved, benchmarks=entries, machine_info={"cpu": 5})
    found = read(path)
    assert found.results == [point]
    assert {b.nodeid: b.call_time_s for b in found.benchmarks if b.status == "ok"} == {NODE: 5e-3}
    assert [b for b in found.benchmarks if b.status != "ok"] == [failed]
    assert "benchmarks" not in Saved(CPU, [point], benchmarks=[plain()]).to_dict()


def test_a_journal_keeps_plain_benchmarks(tmp_path: Path) -> None:
    saved = Saved(CPU, [timed()], benchmarks=[plain(), plain("b", status="failed", reason="no")])
    assert read(write_journal(tmp_path / "a.jsonl", saved)) == saved


def test_the_fingerprint_comes_from_machine_info(tmp_path: Path) -> None:
    alone = read(write_plain(tmp_path / "a.json", entry(NODE))).environment
    assert partly_known(alone) == (
        "saved without pytest-int8bench: only machine_info (python, system, cpu) could be checked, "
        "not GPU and package versions"
    )
    here = {**CPU, "system": "Linux x86_64"}
    assert differences(alone, here) == differences(here, alone) == {}
    assert differences(here, {**alone, "python": "3.12.1"}) == {"python": ("3.11.7", "3.12.1")}
    assert differences(alone, {**alone, "cpu": "Xeon"}) == {"cpu": ("EPYC", "Xeon")}
    # Properties that one file lacks cannot differ. Host names change with each container.
    little = read(write_plain(tmp_path / "b.json", entry(NODE), machine_info={"node": "other"}))
    assert differences(alone, little.environment) == {}
    assert "only machine_info (empty) could" in str(partly_known(little.environment))
    assert partly_known(CPU) is None


def test_warns_about_timers_that_do_not_synchronize() -> None:
    ours = plain("c", timer="synchronized_perf_counter")
    said = unsynchronized([plain("a"), plain("b"), ours], GPU)
    assert str(said).startswith(
        "timer does not wait for the GPU: test_a.py::a and 1 more: unless the function synchronizes"
    )
    assert unsynchronized([ours, plain("d", status="failed", call_time_s=None)], GPU) is None
    assert unsynchronized([plain("a")], CPU) is None


@pytest.mark.parametrize(
    ("kind", "record", "workload", "rule"),
    [
        (Benchmark, plain(), "toy", "'pytest-benchmark'"),
        (Result, timed(), "pytest-benchmark", "another name than 'pytest-benchmark'"),
    ],
)
def test_the_workload_must_match_the_kind(kind: Any, record: Any, workload: str, rule: str) -> None:
    with pytest.raises(SchemaError, match=f"workload must be {rule}, got '{workload}'"):
        kind.from_dict({**record.to_dict(), "workload": workload})
