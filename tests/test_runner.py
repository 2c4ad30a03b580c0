"""Test the Python API: how it expands configurations, and how it handles failing points."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import types
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from pytest_int8bench.params import RunParams
from pytest_int8bench.processes.runner_files import Handover
from pytest_int8bench.report.wandb import Tracked, TrackedRun
from pytest_int8bench.results.reading import read
from pytest_int8bench.results.records import Result
from pytest_int8bench.runner import (
    RunnerError,
    ThroughputBenchmarkRunner,
    ThroughputBenchmarkRunnerConfig,
)
from pytest_int8bench.suite import runner_side
from pytest_int8bench.sweep import SWEEPS
from toys import projects
from toys.processes import runs

INT8_BASE = {"model_size": "base", "batch_size": 128, "int8_enabled": True}

# The configurations from the original requirements: fields of default_run_params, the rest of
# the configuration, and the expected points.
EXAMPLES: dict[str, tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]] = {
    "int8_baseline": (
        {
            **INT8_BASE,
            "int8_mode": "w8a8",
            "int8_smoothquant": False,
            "compile_mode": "max-autotune",
            "compile_fullgraph": True,
            "bf16": True,
        },
        {"sweep_keys": ["batch"]},
        [{"batch_size": 2**n} for n in range(14)],
    ),
    "int8_mode_comparison": (
        INT8_BASE,
        {"sweep_keys": ["int8_mode"]},
        [{"int8_mode": "w8a8"}, {"int8_mode": "w8"}],
    ),
    "compile_mode_sweep": (
        {**INT8_BASE, "int8_mode": "w8a8"},
        {"sweep_keys": ["compile_mode"]},
        [{"compile_mode": mode} for mode in ("default", "reduce-overhead", "max-autotune")],
    ),
    "int8_vs_fp16": (
        {"model_size": "base", "batch_size": 128},
        {"sweep_keys": ["int8_enabled"]},
        [{"int8_enabled": True}, {"int8_enabled": False}],
    ),
    "w8a8_vs_w8": (
        INT8_BASE,
        {"sweep_keys": ["int8_mode"]},
        [{"int8_mode": "w8a8"}, {"int8_mode": "w8"}],
    ),
    "int8_batch_sweep": (
        {"model_size": "base", "int8_enabled": True, "int8_mode": "w8a8"},
        {"sweep_keys": ["batch"]},
        [{"batch_size": 2**n} for n in range(14)],
    ),
    "int8_batch_cross": (
        {"model_size": "base"},
        {
            "sweep_dict": {"int8_enabled": [True, False], "batch_size": [64, 128, 256]},
            "cross_product_sweep": True,
        },
        [
            {"int8_enabled": enabled, "batch_size": size}
            for enabled in (True, False)
            for size in (64, 128, 256)
        ],
    ),
}

TOY = (
    projects.toy(
        bs5=projects.FAILS,
        bs6=projects.OUT_OF_MEMORY,
        bs7="os.kill(os.getpid(), signal.SIGKILL)",
        bs8="Toy.forward = still; broken('an illegal memory access')",
        bs9="os.kill(os.getpid(), signal.SIGINT)",
    )
    + """

def broken(why):
    raise torch.AcceleratorError(f"CUDA error: {why}")


def still(self, x):
    broken("the device is still broken")
"""
)
SMALL = RunParams(
    model_size="nano",
    image_size=8,
    num_timesteps=1,
    batch_size=2,
    gpu_type="cpu",
    compile_mode="off",
    int8_enabled=True,
    model_version="v1.2",
    benchmark_interval_s=0.02,
)
#: For tests of processes, which a quantized model would only slow down.
PLAIN = SMALL.replace(int8_enabled=False)


def example(name: str, **changes: Any) -> ThroughputBenchmarkRunnerConfig:
    params, config, _ = EXAMPLES[name]
    return ThroughputBenchmarkRunnerConfig(
        default_run_params=RunParams(**params).replace(**changes), sweep_group_name=name, **config
    )


def toy_runner(
    folder: Path, batches: list[int], params: RunParams = PLAIN, **more: Any
) -> ThroughputBenchmarkRunner:
    (folder / "toy.py").write_text(TOY)
    config = ThroughputBenchmarkRunnerConfig(
        default_run_params=params,
        sweep_dict={"batch_size": batches},
        sweep_group_name="toy",
        work_dir=folder,
        **{"workload": "toy.py:make", **more},
    )
    return config.build()


def outcome(results: list[Result]) -> list[tuple[int, str]]:
    return [(result.params["batch_size"], result.status) for result in results]


# -- expanding configurations -----------------------------------------------------------------


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_expand_to_their_points(name: str) -> None:
    params, _, changes = EXAMPLES[name]
    default = RunParams(**params)
    assert example(name).build().points == [default.replace(**change) for change in changes]


def test_sweeps_keys_one_at_a_time_or_crossed() -> None:
    def points(cross: bool) -> list[RunParams]:
        config = ThroughputBenchmarkRunnerConfig(
            sweep_keys=["bf16", "patch"], cross_product_sweep=cross
        )
        return config.build().points

    assert len(points(False)) == 5  # bf16=True is patch_size=4
    assert len(points(True)) == 8


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "neither": ({}, "set exactly one of sweep_keys and sweep_dict, got neither"),
    "both": (
        {"sweep_keys": ["batch"], "sweep_dict": {"batch_size": [1]}},
        "set exactly one of sweep_keys and sweep_dict, got both",
    ),
    "no keys": ({"sweep_keys": []}, "sweep_keys and sweep_dict must not be empty"),
    "text": ({"sweep_keys": "batch"}, "sweep_keys must be a list of keys, got 'batch'"),
    "unknown key": (
        {"sweep_keys": ["batches"]},
        f"unknown sweep key 'batches'; keys are {', '.join(SWEEPS)}",
    ),
    "no list": (
        {"sweep_dict": {"batch_size": 4}},
        "sweep over batch_size must be a list of values, got 4",
    ),
    "bad value": (
        {"sweep_dict": {"int8_mode": ["w4"]}},
        "int8_mode must be one of w8a8, w8, fp8, got 'w4'",
    ),
    "measuring": (
        {"sweep_dict": {"benchmark_interval_s": [1, 2]}},
        "benchmark_interval_s is not part of the run name, so it cannot be swept",
    ),
    "wandb": (
        {"sweep_keys": ["batch"], "pytest_args": ["--int8-wandb"]},
        "pytest_args must not contain --int8-wandb; set wandb_enabled",
    ),
    "group": (
        {"sweep_keys": ["batch"], "sweep_group_name": "a/b"},
        "sweep_group_name must be letters, digits, dots, underscores and hyphens, got 'a/b'",
    ),
    "json": (
        {"sweep_keys": ["batch"], "pytest_args": ["--benchmark-json=mine.json"]},
        "pytest_args must not contain --benchmark-json; set save_folder",
    ),
    "field of OlmoEarth": (
        {"sweep_keys": ["image"], "workload": "hf:bert"},
        "image_size is OlmoEarth's and does nothing for hf:bert; its own axes are extra.NAME=VALUE",
    ),
    "workload": ({"sweep_keys": ["batch"], "workload": "olmo"}, "must be olmoearth, "),
}


@pytest.mark.parametrize("case", BAD)
def test_reports_bad_configuration_in_one_line(case: str) -> None:
    given, message = BAD[case]
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        ThroughputBenchmarkRunnerConfig(**given).build()
    assert "\n" not in str(caught.value)


# -- running it -------------------------------------------------------------------------------


@pytest.mark.slow
# At a small size w8a8_vs_w8 is int8_mode_comparison, and int8_baseline is int8_batch_sweep.
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[] if n == "int8_batch_cross" else pytest.mark.slow)
        for n in EXAMPLES
        if n not in ("w8a8_vs_w8", "int8_baseline")
    ],
)
@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
            ],
        ),
    ],
)
def test_examples_run_at_a_small_size(
    device: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = {"cpu": [1, 2], "cuda": [32, 64]}[device]
    monkeypatch.setitem(SWEEPS, "batch", {"batch_size": batches})
    small = {k: v for k, v in SMALL.to_dict().items() if not k.startswith("int8_")}
    small |= {"gpu_type": device, "batch_size": batches[0]}
    if name == "compile_mode_sweep":
        small.pop("compile_mode")
    elif device == "cuda":
        small["compile_mode"] = "default"
    config = example(name, **small)
    if config.sweep_dict is not None:
        config.sweep_dict = {"int8_enabled": [True, False], "batch_size": batches}
    config.work_dir = tmp_path
    # One of them runs a real encoder, the others run models that start fast.
    if name != "int8_vs_fp16":
        whole, one_layer = "self.fc2(nn.functional.gelu(self.fc1(x)))", "self.fc1(x)"
        is_compiled = name == "compile_mode_sweep"  # would run six times; fewer points suffice
        (tmp_path / "toy.py").write_text(TOY.replace(whole, one_layer) if is_compiled else TOY)
        config.workload = "toy.py:make"
    runner = config.build()
    results = runner.run()
    assert [r.run_name for r in results] == [p.run_name for p in runner.points]
    assert [r.params for r in results] == [p.to_dict() for p in runner.points]
    for result in results:
        assert result.status == "ok", result.reason
        assert result.samples_per_s is not None
        assert (result.speedup is not None) == result.params["int8_enabled"]
        assert (result.coverage is not None) == result.params["int8_enabled"]


@pytest.mark.slow
def test_failing_points_do_not_affect_the_others(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[tuple[str, int, Path, str]] = []

    def log(runs: list[TrackedRun], *, folder: Path, group: str) -> Tracked:
        logged.extend((run.name, run.metrics["oom_occurred"], folder, group) for run in runs)
        return Tracked("wandb: all logged", failed=False)

    monkeypatch.setattr("pytest_int8bench.report.wandb.check_installed", lambda: None)
    monkeypatch.setattr("pytest_int8bench.report.wandb.log", log)
    params = SMALL.replace(profiler_enabled=True, wandb_enabled=True)
    if importlib.util.find_spec("wandb") is None:  # the processes look for it themselves
        params = SMALL.replace(profiler_enabled=True)
    runner = toy_runner(tmp_path, [16, 5, 6, 7, 8, 4, 2], params, save_folder=tmp_path / "saved")
    results = runner.run()
    expected = [
        (16, "ok"),
        (5, "failed"),
        (6, "oom"),
        (7, "failed"),
        (8, "failed"),
        (4, "ok"),
        (2, "ok"),
    ]
    assert outcome(results) == expected
    reasons = {result.params["batch_size"]: result.reason for result in results}
    assert reasons[5] == "ValueError: five is too many"
    assert reasons[7] == "the process ended while measuring this point: SIGKILL"
    assert reasons[8] == "torch.AcceleratorError: CUDA error: an illegal memory access"
    assert {result.workload for result in results} == {"toy"}
    for result in results:
        assert result.nodeid == f"test_throughput.py::test_throughput[{result.run_name}]"
    printed = capfd.readouterr().out
    assert "int8bench: results of all 3 processes:" in printed
    # Logged once, by this process, for all three.
    oom = [(r.run_name, int(r.status == "oom"), tmp_path, "toy") for r in results]
    assert logged == (oom if params.wandb_enabled else [])
    assert printed.count("wandb: ") == int(params.wandb_enabled)
    folder = tmp_path / ".benchmarks" / "int8bench" / "profiles"
    traces = [f"{folder.relative_to(tmp_path)}/toy_{r.run_name}.trace.json.gz" for r in results]
    measured_traces = [(r.trace, t) for r, t in zip(results, traces, strict=True) if r.trace]
    assert measured_traces == [(trace, trace) for trace in (traces[0], *traces[-2:])]
    # Everything is also on disk: in the journals of the three processes and in one JSON file.
    journaled = [result for path in runner.journals for result in read(path).results]
    assert sorted(outcome(journaled)) == sorted(expected)
    assert len(runner.journals) == 3
    assert runner.saved is not None
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == sorted(
        [runner.saved.name, *(path.name for path in runner.journals)]
    )
    assert read(runner.saved).results == results
    benchmarks = json.loads(runner.saved.read_text())["benchmarks"]
    measured = {benchmark["extra_info"]["run_name"] for benchmark in benchmarks}
    # The killed process lost the file of its first point, but its journal has it.
    assert measured == {r.run_name for r in results if r.params["batch_size"] in (4, 2)}
    assert {benchmark["group"] for benchmark in benchmarks} == {"toy"}


@pytest.mark.slow
def test_ignores_pytest_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_ADDOPTS", "--collect-only -p no:int8bench")
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")  # pytest-benchmark turns itself off
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --collect-only\nint8_mode = w8\n")
    (tmp_path / "conftest.py").write_text("raise RuntimeError('not for the runner')\n")
    runner = toy_runner(tmp_path, [2], SMALL, pytest_args=["--int8-no-baseline"])
    (result,) = runner.run()
    assert result.status == "ok"
    assert result.speedup is None
    assert runner.saved is None
    (journal,) = runner.journals
    assert journal.parent == tmp_path / ".benchmarks" / "int8bench"
    assert read(journal).results == [result]


@pytest.mark.slow
def test_pytest_arguments_can_exclude_points(tmp_path: Path) -> None:
    results = toy_runner(tmp_path, [5, 4], pytest_args=["-x"]).run()
    assert outcome(results) == [(5, "failed")]


def test_process_that_dies_after_its_points_loses_none(tmp_path: Path) -> None:
    runner = toy_runner(tmp_path, [2, 4])
    dying = "\nimport atexit\natexit.register(os.kill, os.getpid(), signal.SIGKILL)\n"
    (tmp_path / "toy.py").write_text(TOY + dying)
    assert outcome(runner.run()) == [(2, "ok"), (4, "ok")]


@pytest.mark.slow
def test_missing_workload_fails_every_point(tmp_path: Path) -> None:
    runner = toy_runner(tmp_path, [2, 4], workload="toy.py:none")
    results = runner.run()
    assert outcome(results) == [(2, "failed"), (4, "failed")]
    reasons = {result.reason for result in results}
    assert reasons == {"toy.py has no 'none'"}


@pytest.mark.slow
def test_excluded_points_stay_excluded_after_a_kill(tmp_path: Path) -> None:
    runner = toy_runner(tmp_path, [4, 7, 2], pytest_args=["-k", "bs4 or bs7"])
    assert outcome(runner.run()) == [(4, "ok"), (7, "failed")]


@pytest.mark.slow
def test_writes_pytest_benchmark_file_without_measurements(tmp_path: Path) -> None:
    runner = toy_runner(tmp_path, [7], save_folder=tmp_path / "saved")
    (result,) = runner.run()
    assert (result.workload, result.status) == ("toy", "failed")
    assert runner.saved is not None
    assert read(runner.saved).results == [result]
    saved = json.loads(runner.saved.read_text())
    assert saved["benchmarks"] == []
    assert {"machine_info", "commit_info", "datetime", "version"} <= set(saved)


@pytest.mark.slow
def test_collection_error_raises(tmp_path: Path) -> None:
    (tmp_path / "test_broken.py").write_text("import no_such_module")
    runner = toy_runner(tmp_path, [2], pytest_args=["test_broken.py"])
    with pytest.raises(RunnerError, match="measured nothing: the tests could not be collected"):
        runner.run()


def test_pytest_usage_error_raises(tmp_path: Path) -> None:
    with pytest.raises(RunnerError, match="pytest measured nothing: usage error"):
        toy_runner(tmp_path, [2], pytest_args=["--no-such-option"]).run()


@pytest.mark.slow
@pytest.mark.parametrize(
    "whom", [pytest.param("the point itself", marks=pytest.mark.slow), "the script alone"]
)
def test_ctrl_c_saves_finished_points(tmp_path: Path, whom: str) -> None:
    (tmp_path / "toy.py").write_text(TOY.replace("os.kill(os.getpid(), signal.SIGINT)", "wait()"))
    interrupt = "os.kill(os.getpid(), signal.SIGINT)"
    slow = "import pathlib, time; pathlib.Path('waiting').touch(); time.sleep(60)"
    wait = interrupt if whom == "the point itself" else slow
    with (tmp_path / "toy.py").open("a") as toy:
        toy.write(f"\n\ndef wait():\n    {wait}\n")
    (tmp_path / "script.py").write_text(
        "import signal\n"
        "from pytest_int8bench import RunParams, ThroughputBenchmarkRunnerConfig\n"
        # Background processes of a shell ignore SIGINT, and child processes inherit that.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"small = RunParams.from_dict({PLAIN.to_dict()!r})\n"
        "runner = ThroughputBenchmarkRunnerConfig(\n"
        "    default_run_params=small, sweep_dict={'batch_size': [4, 9, 2]},\n"
        "    workload='toy.py:make', save_folder='saved',\n"
        ").build()\n"
        "try:\n"
        "    runner.run()\n"
        "except KeyboardInterrupt:\n"
        "    print('interrupted', runner.saved)\n"
    )
    # A separate session, so that a signal to one process does not reach the other.
    process = subprocess.Popen(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    if whom == "the script alone":
        while process.poll() is None and not (tmp_path / "waiting").exists():
            time.sleep(0.1)
        os.kill(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    (saved,) = (tmp_path / "saved").glob("*.json")
    assert f"interrupted {saved}" in output
    assert process.returncode == 0
    assert outcome(read(saved).results) == [(4, "ok")]


def script(folder: Path, toy: str, batches: list[int], *, then: str = "") -> None:
    """Write toy.py and script.py, which runs a sweep of it."""
    (folder / "toy.py").write_text(toy)
    (folder / "script.py").write_text(
        "import signal\n"
        "from pytest_int8bench import RunParams, ThroughputBenchmarkRunnerConfig\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"small = RunParams.from_dict({PLAIN.to_dict()!r})\n"
        "runner = ThroughputBenchmarkRunnerConfig(\n"
        f"    default_run_params=small, sweep_dict={{'batch_size': {batches}}},\n"
        "    workload='toy.py:make', save_folder='saved',\n"
        ").build()\n"
        "try:\n"
        "    runner.run()\n"
        "except BaseException as error:\n"
        "    print(type(error).__name__, error)\n"
        "    raise\n"
    )


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent")
@pytest.mark.parametrize(
    ("number", "expected", "finished"),
    [
        (signal.SIGTERM, 143, 1),
        pytest.param(signal.SIGHUP, 129, 0, marks=pytest.mark.slow),
        (signal.SIGKILL, -9, 1),
        pytest.param(signal.SIGINT, -2, 0, marks=pytest.mark.slow),
    ],
)
def test_ending_the_runner_ends_its_process(
    number: signal.Signals, expected: int, finished: int, tmp_path: Path
) -> None:
    hang = "import time; open('waiting', 'w').write(str(os.getpid())); time.sleep(300)"
    script(tmp_path, projects.toy(bs9=hang), [4] * finished + [9, 2])
    (tmp_path / "temporary").mkdir()
    environ = {**os.environ, "TMPDIR": str(tmp_path / "temporary")}
    process = subprocess.Popen(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        env=environ,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    waiting = tmp_path / "waiting"
    while process.poll() is None and not (waiting.exists() and waiting.read_text()):
        time.sleep(0.05)
    child = int(waiting.read_text())
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == expected
    end = time.monotonic() + 60
    while runs(child):  # a process takes a moment to end
        assert time.monotonic() < end
        time.sleep(0.05)
    assert not [*(tmp_path / "temporary").glob("int8bench*")]
    if number != signal.SIGKILL:
        kind = "KeyboardInterrupt" if number == signal.SIGINT else f"SystemExit {expected}"
        assert kind in output
    found = [read(path) for path in sorted((tmp_path / "saved").glob("*"))]
    assert [outcome(saved.results) for saved in found if saved.results] == (
        [[(4, "ok")]] * (finished if number == signal.SIGKILL else 2 * finished)
    )


@pytest.mark.slow
def test_ctrl_c_before_the_first_point_raises_keyboard_interrupt(tmp_path: Path) -> None:
    script(tmp_path, TOY + "\nos.kill(os.getpid(), signal.SIGINT)\n", [4, 2])
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    assert "KeyboardInterrupt" in done.stdout
    assert "RunnerError" not in done.stdout
    assert not [*(tmp_path / "saved").iterdir()]


# -- other runners, and the disk --------------------------------------------------------------


@pytest.mark.slow
def test_runners_started_in_one_second_use_separate_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pytest_int8bench.runner.timestamp", lambda: "20260131T235959Z")
    batches = [[2, 4], [4, 5], [2]]
    runners = [toy_runner(tmp_path, sizes, save_folder=tmp_path / "saved") for sizes in batches]
    with ThreadPoolExecutor() as pool:
        results = [*pool.map(lambda runner: runner.run(), runners)]
    assert [[r.params["batch_size"] for r in found] for found in results] == batches
    assert len({runner.saved for runner in runners}) == 3
    for runner, found in zip(runners, results, strict=True):
        assert runner.saved is not None
        assert read(runner.saved).results == found
        assert [read(journal).results for journal in runner.journals] == [found]
    assert len([*(tmp_path / "saved").iterdir()]) == 6


def full_disk(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Prevent this process from creating files in ``folder``."""
    opened, made = Path.open, tempfile.mkstemp

    def full(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        if mode in ("xb", "ab") and folder in path.parents:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return opened(path, mode, *args, **options)

    def no_room(*args: Any, **options: Any) -> Any:
        if options.get("dir") == folder:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return made(*args, **options)

    monkeypatch.setattr(Path, "open", full)
    monkeypatch.setattr(tempfile, "mkstemp", no_room)


@pytest.mark.slow
def test_full_disk_loses_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "saved"
    folder.mkdir()
    runner = toy_runner(tmp_path, [4, 7, 5, 2], save_folder=folder)
    full_disk(monkeypatch, folder)
    results = runner.run()
    assert outcome(results) == [(4, "ok"), (7, "failed"), (5, "failed"), (2, "ok")]
    assert (runner.saved, runner.journals) == (None, [])
    assert not [*folder.iterdir()]
    errors = capfd.readouterr().err
    for line in ("cannot write a journal of 2 results: ", ".json: No space left on device"):
        assert errors.count(line) == (2 if "journal" in line else 1)


@pytest.mark.slow
def test_disk_that_fills_up_during_the_sweep_loses_no_result(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The folder becomes a file while the points are measured."""
    gone = "import shutil; shutil.rmtree('saved', ignore_errors=True); open('saved', 'w').close()"
    runner = toy_runner(tmp_path, [4, 2], save_folder=tmp_path / "saved")
    (tmp_path / "toy.py").write_text(projects.toy(bs4=gone))
    results = runner.run()
    assert outcome(results) == [(4, "ok"), (2, "ok")]
    assert (runner.saved, runner.journals) == (None, [])
    errors = capfd.readouterr().err
    assert ".jsonl lacks 2 of 2 results: " in errors
    assert "cannot write " in errors


@pytest.mark.slow
def test_deleted_files_are_written_again(tmp_path: Path) -> None:
    runner = toy_runner(tmp_path, [4, 2], save_folder=tmp_path / "saved")
    gone = "import shutil; shutil.rmtree('saved', ignore_errors=True)"
    (tmp_path / "toy.py").write_text(projects.toy(bs2=gone))
    results = runner.run()
    (journal,) = runner.journals
    assert runner.saved is not None
    assert read(journal).results == read(runner.saved).results == results
    assert read(journal).environment == read(runner.saved).environment != {}


def test_rejects_unwritable_folder_at_start(tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    for name in ("taken", "taken/below", "x" * 300):
        runner = toy_runner(tmp_path, [4], save_folder=tmp_path / name)
        with pytest.raises(RunnerError, match="save_folder must be a writable folder, got"):
            runner.run()


def test_suite_can_only_be_run_by_the_runner() -> None:
    with pytest.raises(RuntimeError, match="can only be run by pytest_int8bench"):
        Handover.from_env_vars({})


@pytest.mark.parametrize("is_in_memory", [True, False])
def test_handover_exchanges_state_with_the_process(
    is_in_memory: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    if not is_in_memory:
        monkeypatch.delattr(os, "memfd_create", raising=False)
    with Handover.start("group", ["a", "b"], wants_json=True) as given:
        assert bool([*tmp_path.iterdir()]) is not is_in_memory
        assert (given.running(), given.asked_for_new_process()) == (None, False)
        taken = Handover.from_env_vars(given.to_env_vars())
        assert taken == given
        taken.note_running("a")
        taken.ask_for_new_process()
        assert (given.running(), given.asked_for_new_process()) == ("a", True)
        taken.note_running("")
        assert given.running() is None
        assert (given.json(), given.lines(), given.is_interrupted()) == (None, [], False)
        taken.note_json({"benchmarks": []})
        taken.note_line('{"int8bench": {}}')
        taken.note_interrupted()
        assert given.json() == {"benchmarks": []}
        assert given.lines() == [{"int8bench": {}}]
        assert given.is_interrupted()
    taken.note_running("b")  # the runner has ended, which is not an error here
    assert not [*tmp_path.iterdir()]


def test_reports_failed_handover(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, line: str) -> None:
        raise OSError(errno.EFBIG, "File too large")

    with Handover.start("group", ["a"]) as given:
        monkeypatch.setattr("pytest_int8bench.processes.runner_files._append", fail)
        with pytest.warns(
            UserWarning, match="cannot send a .record. message to the runner: .*File too large"
        ):
            given.note_line("{}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        given.note_line("{}")  # the runner has ended


def test_xdist_worker_ends_with_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[bool] = []
    monkeypatch.setattr(
        "pytest_int8bench.suite.runner_side.end_with",
        lambda is_parent: ended.append(is_parent(os.getppid())),
    )
    runner_side.pytest_configure(types.SimpleNamespace(workerinput={}))
    assert ended == [True]
