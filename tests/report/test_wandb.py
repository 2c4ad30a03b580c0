"""Logging to Weights & Biases: exactly the figures of the saved results."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_int8bench.params import RunParams
from pytest_int8bench.report import wandb
from pytest_int8bench.report.wandb import Tracked, check_installed, log, metrics_of, runs_of
from pytest_int8bench.results.figures import FIGURES
from pytest_int8bench.results.records import Result, Saved
from pytest_int8bench.results.verdicts import Accuracy
from toys import results
from toys.projects import SMOKE, make_project, without

W8A8 = RunParams(int8_enabled=True, wandb_enabled=True)
BF16 = RunParams(wandb_enabled=True)
GPU = "NVIDIA H200"
ENVIRONMENT = {"gpu": {"name": GPU}, "cuda": "13.0"}


def result_of(params: RunParams = W8A8, test: str = "test_it", **fields: Any) -> Result:
    return results.result_of(params, f"test_it.py::{test}", **fields)


def verdict_of(params: RunParams = W8A8, **fields: Any) -> Accuracy:
    values = {"metric": "top-1", "samples": 300, "limit": None, **fields}
    return results.verdict_of(point=params, test="test_it.py::test_accuracy", **values)


MEASURED = result_of(
    samples_per_s=64.0,
    tokens_per_s=6400.0,
    pixels_per_s=128.0,
    square_km_per_s=0.5,
    batch_time_s=0.5,
    batch_time_mean_s=0.64,
    peak_memory_bytes=2**20,
    compile_s=3.0,
    speedup=1.25,
    speedup_low=1.2,
    speedup_high=1.3,
    int8_time_share=0.25,
    attention_kernel="flash",
)


# -- what is logged -----------------------------------------------------------------------------


def test_logs_figures_under_original_and_own_names() -> None:
    assert metrics_of(MEASURED, GPU) == {
        "oom_occurred": 0,
        "gpu_name": GPU,
        "mean_batch_time": 0.64,
        "mean_batch_token_rate": 5000.0,
        "num_tokens_per_batch": 3200.0,
        "square_km_per_second": 0.5,
        "pixels_per_second": 128.0,
        "status": "ok",
        "samples_per_s": 64.0,
        "tokens_per_s": 6400.0,
        "pixels_per_s": 128.0,
        "square_km_per_s": 0.5,
        "batch_time_s": 0.5,
        "batch_time_mean_s": 0.64,
        "peak_memory_bytes": 2**20,
        "compile_s": 3.0,
        "speedup": 1.25,
        "speedup_low": 1.2,
        "speedup_high": 1.3,
        "int8_time_share": 0.25,
        "attention_kernel": "flash",
    }


def test_a_point_out_of_memory_has_no_rates() -> None:
    oom = result_of(status="oom", reason="out of memory", requested_bytes=2**31)
    assert metrics_of(oom, None) == {
        "oom_occurred": 1,
        "status": "oom",
        "reason": "out of memory",
        "requested_bytes": 2**31,
    }


def test_every_figure_comes_from_a_result() -> None:
    ours = (figure for figure in FIGURES.values() if not figure.of_benchmarks)
    names = {figure.field for figure in ours if figure.compute is None}
    assert names <= set(Result.__dataclass_fields__)
    assert set(wandb._VERDICT) <= set(Accuracy.__dataclass_fields__)


def test_each_result_is_a_run_with_its_verdicts() -> None:
    saved = Saved(
        ENVIRONMENT,
        [
            MEASURED,
            result_of(test="test_again"),
            result_of(BF16),
            result_of(BF16, "test_oom", status="oom"),
            result_of(BF16, "test_no", status="failed", reason="ValueError: no"),
            result_of(BF16, "test_never", status="skipped"),
        ],
        [verdict_of(drop=0.001, limit="1%"), verdict_of(metric="outputs", outcome="proxy-ok")],
    )
    runs = runs_of(saved, every=False)
    assert [(run.name, run.metrics["status"], run.failed) for run in runs] == [
        (W8A8.run_name, "ok", False),
        (W8A8.run_name, "ok", False),
        (BF16.run_name, "ok", False),
        (BF16.run_name, "oom", False),
        (BF16.run_name, "failed", True),
    ]
    assert runs[0].config == {
        **W8A8.to_dict(),
        "workload": "toy",
        "run_name": W8A8.run_name,
        "nodeid": MEASURED.nodeid,
        "environment": ENVIRONMENT,
    }
    judged = {
        "accuracy/top-1/outcome": "PASS",
        "accuracy/top-1/samples": 300,
        "accuracy/top-1/limit": "1%",
        "accuracy/top-1/drop": 0.001,
        "accuracy/outputs/outcome": "proxy-ok",
        "accuracy/outputs/samples": 300,
    }
    assert runs[0].metrics == metrics_of(MEASURED, GPU) | judged
    assert judged.items() <= runs[1].metrics.items()
    assert not any(name.startswith("accuracy/") for run in runs[2:] for name in run.metrics)


@pytest.mark.parametrize(("outcome", "failed"), [("PASS", False), ("FAIL", True)])
def test_a_point_with_a_verdict_only_is_a_run_without_figures(outcome: str, failed: bool) -> None:
    saved = Saved({}, [result_of(BF16)], [verdict_of(outcome=outcome)])
    _, run = runs_of(saved, every=False)
    assert (run.name, run.failed) == (W8A8.run_name, failed)
    assert run.metrics == {"accuracy/top-1/outcome": outcome, "accuracy/top-1/samples": 300}


def test_logs_requested_points_or_all() -> None:
    silent = W8A8.replace(wandb_enabled=False, batch_size=2)
    other = W8A8.replace(wandb_enabled=False, batch_size=4)
    saved = Saved({}, [result_of(), result_of(silent)], [verdict_of(other)])
    names = {every: [run.name for run in runs_of(saved, every=every)] for every in (False, True)}
    assert names == {False: [W8A8.run_name], True: [W8A8.run_name, silent.run_name, other.run_name]}


def test_a_point_on_the_cpu_has_no_gpu() -> None:
    saved = Saved(ENVIRONMENT, [result_of(W8A8.replace(gpu_type="cpu"))])
    assert "gpu_name" not in runs_of(saved, every=False)[0].metrics


# -- what goes wrong ----------------------------------------------------------------------------


class FakeWandb:
    """Takes ``good`` runs, then raises."""

    def __init__(self, good: int, error: BaseException) -> None:
        self.good, self.error = good, error
        self.given: list[dict[str, Any]] = []
        self.finished: list[int] = []

    def Settings(self, **values: Any) -> dict[str, Any]:
        return values

    def setup(self) -> Any:
        return SimpleNamespace(settings=SimpleNamespace(run_group=None, project="mine"))

    def init(self, **values: Any) -> Any:
        print("wandb: says a lot")
        print("wandb: and warns", file=sys.stderr)
        assert not sys.stdin.isatty()
        self.given.append(values)
        if len(self.given) > self.good:
            raise self.error
        return SimpleNamespace(
            log=lambda metrics: None,
            finish=lambda exit_code: self.finished.append(exit_code),
            disabled=False,
            offline=False,
            group=values["group"],
            project_url="https://wandb.ai/me/mine",
        )


def logged(monkeypatch: pytest.MonkeyPatch, fake: FakeWandb, folder: Path) -> Tracked:
    monkeypatch.setitem(sys.modules, "wandb", fake)  # type: ignore[arg-type]
    monkeypatch.setattr(wandb, "check_installed", lambda: None)
    saved = Saved({}, [result_of(), result_of(BF16, status="failed"), result_of(BF16, "test_b")])
    return log(runs_of(saved, every=False), folder=folder, group="sweep")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError("no network\n  at all"), "OSError: no network at all"),
        (KeyboardInterrupt(), "interrupted"),
    ],
)
def test_first_failure_ends_logging_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    error: BaseException,
    said: str,
) -> None:
    fake, stdin = FakeWandb(1, error), sys.stdin
    line = f"wandb: 1 of 3 runs logged, then {said}; the journal has all results"
    assert logged(monkeypatch, fake, tmp_path) == Tracked(line, failed=True)
    assert len(fake.given) == 2
    assert capsys.readouterr() == ("", "")
    assert sys.stdin is stdin


def test_logs_one_group_in_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = FakeWandb(3, OSError())
    line = "wandb: 3 runs in group sweep: https://wandb.ai/me/mine"
    assert logged(monkeypatch, fake, tmp_path) == Tracked(line, failed=False)
    assert [given["name"] for given in fake.given] == [W8A8.run_name, *[BF16.run_name] * 2]
    assert {(given["group"], given["project"]) for given in fake.given} == {("sweep", "mine")}
    assert fake.finished == [0, 1, 0]


def test_nothing_to_log(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    line = "wandb: nothing logged: no point was measured"
    assert log([], folder=tmp_path) == Tracked(line, failed=False)


def test_own_folder_is_not_wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    (tmp_path / "wandb").mkdir()
    with pytest.raises(ValueError, match=r"^needs wandb: pip install 'pytest-int8bench\[wandb\]'$"):
        check_installed()
    (tmp_path / "wandb" / "__init__.py").touch()
    check_installed()


# -- a session, for real ------------------------------------------------------------------------


TEST = """
import pytest

from pytest_int8bench import RunParams

SIX = RunParams(model_size="nano", gpu_type="cpu", compile_mode="off", batch_size=6)


def test_one(int8_throughput):
    int8_throughput()


def test_two(int8_throughput):
    int8_throughput()


@pytest.mark.parametrize("int8_params", [SIX])
def test_six(int8_throughput):
    assert int8_throughput().oom
"""


def logged_runs(folder: Path) -> Iterator[tuple[Any, dict[str, Any], dict[str, Any]]]:
    """Return the run, configuration and metrics in each of wandb's files."""
    for path in folder.glob("offline-run-*/run-*.wandb"):
        records = {record.WhichOneof("record_type"): record for record in read_records(path)}
        run = records["run"].run
        config = {item.key: json.loads(item.value_json) for item in run.config.update}
        items = records["history"].history.item
        metrics = {"/".join(item.nested_key): json.loads(item.value_json) for item in items}
        yield run, config, {k: v for k, v in metrics.items() if not k.startswith("_")}


def read_records(path: Path) -> Iterator[Any]:
    """Yield the records of a log in LevelDB's format: blocks of 32 KiB with parts of records, each
    after 7 bytes of checksum, length and kind (1: whole, 2: first, 3: middle, 4: last)."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, block, head = path.read_bytes(), 2**15, 7
    at, body = head, b""  # the file has a head of its own
    while at < len(data):
        if block - at % block < head:
            at += block - at % block
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + head])
        body += data[at + head : at + head + length]
        at += head + length
        if kind in (1, 4):
            record = Record()
            record.ParseFromString(body)
            body = b""
            yield record


@pytest.mark.slow
def test_session_logs_results(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="needs wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_PROJECT", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_RUN_GROUP", "nightly")
    make_project(pytester, monkeypatch, test_it=TEST)
    result = pytester.runpytest_subprocess(
        *SMOKE,
        *without(),
        "--int8-mode=w8",
        "--int8-wandb",
        "--int8-profile=profiles",
        "--benchmark-json=out.json",
    )
    result.assert_outcomes(passed=5)
    result.stdout.fnmatch_lines(
        [
            "int8bench: logging to Weights & Biases ...",
            "profiles: profiles: 2 traces for ui.perfetto.dev, tables of kernels beside them",
            "wandb: 5 runs in group nightly, offline; to upload them: wandb sync wandb/offline-*",
        ]
    )

    saved = json.loads((pytester.path / "out.json").read_text())
    results = {entry["nodeid"]: entry for entry in saved["int8bench"]["results"]}
    means = {entry["fullname"]: entry["stats"]["mean"] for entry in saved["benchmarks"]}
    runs = {config["nodeid"]: (run, config, m) for run, config, m in logged_runs(Path("wandb"))}
    assert set(runs) == set(results)
    for nodeid, (run, config, metrics) in runs.items():
        entry = results[nodeid]
        assert (run.display_name, run.run_group) == (entry["run_name"], "nightly")
        assert run.project == "int8bench"
        assert entry["params"].items() <= config.items()
        assert config["environment"] == saved["int8bench"]["environment"]
        assert metrics["oom_occurred"] == int(entry["params"]["batch_size"] == 6)
        if metrics["oom_occurred"]:
            assert set(metrics) == {"oom_occurred", "status", "reason", "requested_bytes"}
            continue
        assert metrics["mean_batch_time"] == entry["batch_time_mean_s"]
        assert metrics["mean_batch_time"] == pytest.approx(means[nodeid])
        assert metrics["num_tokens_per_batch"] == 64
        assert metrics["mean_batch_token_rate"] == pytest.approx(64 / means[nodeid])
        for name in ("samples_per_s", "tokens_per_s", "speedup", "speedup_low", "int8_time_share"):
            assert metrics.get(name) == entry[name]
        assert ("speedup" in metrics) is entry["params"]["int8_enabled"]

        # Both tests of a point name the one forward that was profiled.
        trace = pytester.path / entry["trace"]
        assert (
            entry["trace"] == metrics["trace"] == f"profiles/toy_{run.display_name}.trace.json.gz"
        )
        assert trace.stat().st_size > 0
        assert trace.with_name(f"toy_{run.display_name}.kernels.csv").stat().st_size > 0
    extra = {entry["fullname"]: entry["extra_info"]["trace"] for entry in saved["benchmarks"]}
    assert extra == {nodeid: entry["trace"] for nodeid, entry in results.items() if entry["trace"]}
