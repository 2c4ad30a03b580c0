"""Test sessions with several workers: the messages between controller and workers, and that the
outcome equals a serial run."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pytest_int8bench.params import RunParams
from pytest_int8bench.plugin.pytest_benchmark import Benchmark
from pytest_int8bench.plugin.reading import read_settings
from pytest_int8bench.plugin.session import Session
from pytest_int8bench.plugin.xdist.controller import Controller, limit_workers
from pytest_int8bench.plugin.xdist.messages import KEY, SLOT, Message, unpacked
from pytest_int8bench.plugin.xdist.worker import Worker
from pytest_int8bench.results.reading import read
from pytest_int8bench.results.records import Result
from toys import projects, results

PLUGINS = ("-pxdist", "-pbenchmark", "-pint8bench")

# The fake machine has two GPUs, and models run on the CPU.
NVML = """
class NVMLError(Exception):
    pass


def nvmlInit():
    pass


def nvmlDeviceGetCount():
    return 2


def nvmlDeviceGetHandleByIndex(index):
    return index


def nvmlDeviceGetMigMode(handle):
    raise NVMLError


def nvmlDeviceGetUUID(handle):
    return f"GPU-{handle}"
"""
CONFTEST = f"""{projects.CONFTEST.replace("return toy.make()", "return toy.make(build=build)")}

def build(p):
    import toy

    with open("built", "a") as file:
        print(p.batch_size, file=file)
    return toy.Toy()


@pytest.fixture(scope="session", autouse=True)
def on_the_cpu():
    import torch

    from pytest_int8bench.measure import building, pool

    building.find_device = pool.find_device = lambda params: torch.device("cpu")
"""
MEASURING = """
import pytest

pytestmark = pytest.mark.benchmark(group="toys")


def test_throughput(int8_throughput, int8_params):
    int8_throughput()
    assert int8_params.batch_size != 3 or not int8_params.int8_enabled


def test_accuracy(int8_guardrail):
    int8_guardrail()


def test_plain():
    pass
"""
# Builds nothing, to be fast.
POINTS = """
import os


def test_points(int8_params):
    with open("gpus", "a") as file:
        gpu = os.environ.get("CUDA_VISIBLE_DEVICES")
        print(int8_params.batch_size, os.environ["AT_FIRST"], gpu, file=file)
    if int8_params.batch_size == 3:
        os._exit(3)
"""
SMOKE = (*projects.SMOKE, "--int8-set=gpu_type=cuda")


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    pytest.importorskip("xdist")
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return projects.make_project(pytester, monkeypatch, pynvml=NVML, conftest=CONFTEST)


def run(project: pytest.Pytester, *options: str) -> pytest.RunResult:
    return project.runpytest_subprocess(*PLUGINS, *SMOKE, *options)


def name_of(batch: int, *, int8: bool = True) -> str:
    mode = "int8_w8a8_off_" if int8 else ""
    return f"cuda_bf16_{mode}bs{batch}{'' if int8 else '_compile_mode-off'}"


# -- whole sessions -----------------------------------------------------------------------------


@pytest.mark.slow
def test_two_workers_give_the_results_of_one_process(project: pytest.Pytester) -> None:
    project.makepyfile(test_one=MEASURING)
    sweep = "--int8-set=batch_size=2,3"
    serial = run(project, sweep, "--benchmark-json=serial.json")
    spread = run(project, sweep, "--benchmark-json=spread.json", "--int8-journal=it.jsonl", "-n2")
    for result in (serial, spread):
        result.assert_outcomes(passed=6, failed=1)
        assert "disabled" not in result.stdout.str() + result.stderr.str()

    # Both sessions built every model equally often, and each family in one worker.
    built = (project.path / "built").read_text().split()
    assert sorted(built[: len(built) // 2]) == sorted(built[len(built) // 2 :])
    a, b = (
        json.loads((project.path / f"{name}.json").read_text()) for name in ("serial", "spread")
    )
    ids = [entry["fullname"] for entry in a["benchmarks"]]
    assert ids == [entry["fullname"] for entry in b["benchmarks"]]
    assert len(ids) == 3  # the test of the candidate with 3 samples fails by its own assertion
    assert a.keys() == b.keys()
    for before, after in zip(a["benchmarks"], b["benchmarks"], strict=True):
        assert before.keys() == after.keys()
        assert before["stats"].keys() == after["stats"].keys()
        assert before["extra_info"].keys() == after["extra_info"].keys()
        for key in ("name", "group", "param", "params", "options"):
            assert before[key] == after[key]
        assert after["stats"]["rounds"] == len(after["stats"]["data"])
        assert after["stats"]["iterations"] == after["extra_info"]["iterations"]
        batch_s = after["extra_info"]["batch_time_s"]
        assert after["stats"]["median"] == pytest.approx(batch_s)

    before, after = (read(project.path / f"{name}.json") for name in ("serial", "spread"))
    assert {**after.environment, "gpu_count": 0} == before.environment  # torch sees no GPU here
    assert after.environment["gpu_count"] == 2
    for kind in ("results", "accuracy"):
        pairs = [*zip(getattr(before, kind), getattr(after, kind), strict=True)]
        assert [(x.identity, x.params) for x, _ in pairs] == [
            (y.identity, y.params) for _, y in pairs
        ]
    assert [r.status for r in after.results] == ["ok", "ok", "ok", "failed"]
    reasons = [[r.reason for r in each.results if r.status == "failed"] for each in (before, after)]
    assert reasons[0] == reasons[1]
    places = {tuple(r.worker.values()) for r in after.results if r.worker}
    assert {(worker, gpu) for worker, _, gpu in places} == {("gw0", "GPU-0"), ("gw1", "GPU-1")}
    for batch in (2, 3):
        assert len({r.worker["id"] for r in after.results if r.params["batch_size"] == batch}) == 1
    assert all(r.worker is None for r in before.results)

    # One journal, one table.
    [journal] = (project.path / ".benchmarks").glob("**/*.jsonl")  # from the serial run
    assert read(journal).results == before.results
    written = {(r.nodeid, r.status) for r in read(project.path / "it.jsonl").results}
    assert written == {(r.nodeid, r.status) for r in after.results}
    for result in (serial, spread):
        assert [line.split()[1] for line in result.outlines if line.startswith("toy ")] == [
            name_of(batch, int8=int8) for batch in (2, 3) for int8 in (False, True)
        ]
    spread.stdout.fnmatch_lines(
        ["preset smoke (as asked)", "measured by gw0 (*, GPU-0), gw1 (*, GPU-1)"]
    )
    spread.stdout.fnmatch_lines(["saved: spread.json", "journal: it.jsonl"])


def test_crashed_worker_loses_one_point(project: pytest.Pytester) -> None:
    project.makepyfile(test_one=POINTS)
    project.makeconftest(
        "import os\nos.environ['AT_FIRST'] = os.environ.get('CUDA_VISIBLE_DEVICES', '')\n"
    )
    result = run(project, "--int8-set=batch_size=2,3,4,5", "--int8-no-baseline", "-n2")
    result.assert_outcomes(passed=3, failed=1)
    [path] = (project.path / ".benchmarks").glob("**/*.jsonl")
    [crashed] = read(path).results
    name = "nano_cuda_bf16_int8_w8a8_off_s2_is16_ps4_ts3_bs3"  # this conftest has no workload
    assert (crashed.run_name, crashed.status) == (name, "failed")
    assert crashed.reason in [
        f"worker '{worker}' crashed while running '{crashed.nodeid}'" for worker in ("gw0", "gw1")
    ]
    ran = (project.path / "gpus").read_text().splitlines()
    assert sorted(line.split()[0] for line in ran) == ["2", "3", "4", "5"]
    assert {tuple(line.split()[1:]) for line in ran} == {("GPU-0", "GPU-0"), ("GPU-1", "GPU-1")}


def test_rejects_more_workers_than_gpus(project: pytest.Pytester) -> None:
    project.makepyfile(test_one=POINTS)
    result = run(project, "--int8-set=batch_size=2,4,5", "-n3")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    [error] = [line for line in result.errlines if line.startswith("ERROR")]
    assert error == (
        "ERROR: -n 3 asks for 3 workers, but this machine has 2 GPUs, and each worker needs its own"
    )
    assert not (project.path / "gpus").exists()


# -- the controller -----------------------------------------------------------------------------


class Spec(SimpleNamespace):
    """How pytest-xdist starts a worker."""

    def __init__(self, **given: str) -> None:
        super().__init__(**{"via": None, "ssh": None, "socket": None, **given})


class Node:
    """A worker that does nothing."""

    def __init__(self, gateway: Any, nodemanager: Any) -> None:
        self.gateway, self.nodemanager = gateway, nodemanager
        self.workerinput: dict[str, Any] = {}
        self.ran: list[str] = []
        gateway.remote_exec = self.remote_exec

    def remote_exec(self, source: str) -> Any:
        self.ran.append(source)
        return SimpleNamespace(waitclose=lambda: None)


class Workers:
    """Start workers that do nothing."""

    def __init__(self, controller: Controller, *specs: Spec, proxies: Any = ()) -> None:
        self.controller = controller
        self.specs = specs
        self.group = {name: SimpleNamespace(spec=spec) for name, spec in dict(proxies).items()}

    def start(self, spec: Spec, name: str = "gw0") -> Any:
        gateway = SimpleNamespace(spec=spec, id=name)
        node = Node(gateway, self)
        self.controller.pytest_configure_node(node)
        return node

    def slots(self) -> list[tuple[int, int]]:
        given = [self.start(spec).workerinput[KEY] for spec in self.specs]
        return [(slot["number"], slot["count"]) for slot in given]


@pytest.fixture
def controller(pytester: pytest.Pytester) -> Controller:
    return controller_of(pytester)


def controller_of(pytester: pytest.Pytester, *options: str) -> Controller:
    config = pytester.parseconfig(*options)
    config.option.dist = "load"
    return Controller(Session(config, read_settings(config)))


def test_workers_are_numbered_by_host(controller: Controller) -> None:
    here, there = Spec(), Spec(ssh="me@there")
    assert Workers(controller, here, there, here, there).slots() == [(0, 2), (0, 2), (1, 2), (1, 2)]


def test_workers_behind_a_proxy_run_on_its_host(controller: Controller) -> None:
    proxy, behind = Spec(ssh="there"), Spec(via="proxy")
    workers = Workers(controller, behind, Spec(ssh="there"), Spec(), proxies={"proxy": proxy})
    assert workers.slots() == [(0, 2), (1, 2), (0, 1)]


def test_recognizes_this_host_by_other_names(controller: Controller) -> None:
    local = Spec(socket="127.0.0.1:8888"), Spec(ssh="localhost"), Spec()
    assert Workers(controller, *local).slots() == [(0, 3), (1, 3), (2, 3)]


def test_new_worker_takes_the_slot_of_a_crashed_one(controller: Controller) -> None:
    workers = Workers(controller, Spec(), Spec(), Spec())
    nodes = [workers.start(spec) for spec in workers.specs]
    controller.pytest_testnodedown(nodes[1])
    assert workers.start(Spec()).workerinput[KEY] == {"number": 1, "count": 3}


def test_rejects_running_the_same_points_in_every_worker(controller: Controller) -> None:
    workers = Workers(controller, Spec())
    controller.config.option.dist = "each"
    with pytest.raises(pytest.UsageError) as caught:
        controller.pytest_xdist_node_collection_finished(
            workers.start(workers.specs[0]), [f"a.py::t[{name_of(1)}]"]
        )
    assert str(caught.value) == "--dist=each: not supported, every worker would measure all points"


def test_workers_for_other_tests_need_no_gpus(controller: Controller) -> None:
    workers = Workers(controller, *[Spec()] * 8)
    cpu = name_of(1).replace("cuda", "cpu")
    controller.pytest_xdist_node_collection_finished(
        workers.start(workers.specs[0]), ["a.py::t", f"a.py::t[{cpu}]"]
    )


@pytest.mark.parametrize(
    ("options", "there", "workers"),
    [
        (["--int8-mode=w8"], ["0", "1"], 2),
        (["--int8-mode=w8"], [str(i) for i in range(32)], 16),
        (["--int8-mode=w8"], [], 1),
        (["--int8-mode=w8"], None, 16),
        ([], ["0", "1"], 16),
        (["-o", "int8_mode=w8"], ["0", "1"], 16),  # for every session, even of other tests
    ],
)
def test_auto_starts_one_worker_per_gpu(
    pytester: pytest.Pytester,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    there: list[str] | None,
    workers: int,
) -> None:
    monkeypatch.setattr("pytest_int8bench.nvml.visible", lambda: there)
    assert limit_workers(pytester.parseconfig(*options), 16) == workers


# -- results of workers -------------------------------------------------------------------------

MACHINE = {"gpu": {"name": "A100"}, "commit": "abc", "packages": {"torch": "2.13.0"}}


def result_of(batch: int, **changes: Any) -> Result:
    params = RunParams.from_run_name(name_of(batch))
    return results.result_of(params, "a.py::t", **{"samples_per_s": 10.0, **changes})


def send(controller: Controller, worker: str, *results: Result, **changes: Any) -> None:
    """Deliver a report with ``results``."""
    message = Message(
        **{
            "worker": worker,
            "host": "h",
            "gpus": [],
            "preset": None,
            "point": None,
            "environment": MACHINE,
            "records": [("Result", result.to_dict()) for result in results],
            **changes,
        }
    )
    report = SimpleNamespace(nodeid=results[0].nodeid, when="call", failed=False)
    setattr(report, KEY, message.to_json())
    controller.pytest_runtest_logreport(report)  # type: ignore[arg-type]


def crash(controller: Controller, nodeid: str) -> None:
    report = SimpleNamespace(nodeid=nodeid, when="???", failed=True, longrepr="gw0 crashed")
    controller.pytest_runtest_logreport(report)  # type: ignore[arg-type]


def test_failure_in_a_worker_fails_the_session(controller: Controller) -> None:
    send(controller, "gw1", result_of(1), problems=["int8bench: recording failed: bug"])
    assert controller.reported == ["gw1: int8bench: recording failed: bug"]
    assert not controller.finish()


def test_invalid_message_does_not_end_the_session(controller: Controller) -> None:
    one, two = result_of(1), result_of(2)
    send(controller, "gw0", one, records=[("Unknown", {})])
    send(controller, "gw0", two)
    assert controller.reported == ["int8bench: recording failed: KeyError: 'Unknown'"]
    assert controller.results_of(two.nodeid) == [two]


def test_invalid_record_loses_no_other(controller: Controller) -> None:
    one, two = result_of(1), result_of(2)
    records = [("Unknown", {}), ("Result", two.to_dict())]
    send(controller, "gw0", one, records=records)
    assert controller.reported == ["int8bench: recording failed: KeyError: 'Unknown'"]
    assert controller.results_of(two.nodeid) == [two]


def test_failure_after_the_last_report_fails_the_session(
    controller: Controller, pytester: pytest.Pytester
) -> None:
    worker = worker_of(pytester, 0, 1)
    with worker.guard("sending results"):
        raise KeyError("bug")
    output: dict[str, Any] = {}
    worker.config.workeroutput = output  # type: ignore[attr-defined]
    next(worker.pytest_sessionfinish())
    node = Workers(controller, Spec()).start(Spec())
    node.workeroutput = output
    controller.pytest_testnodedown(node)
    assert controller.reported == ["gw0: int8bench: sending results failed: KeyError: 'bug'"]
    assert not controller.finish()


FAILED = {"status": "failed", "reason": "first attempt", "samples_per_s": None}


@pytest.mark.parametrize("again", [{"attempt": 2}, {"worker": "gw1"}], ids=["same", "another"])
def test_the_last_attempt_of_a_test_counts(controller: Controller, again: dict[str, Any]) -> None:
    send(controller, "gw0", result_of(1, **FAILED))
    send(controller, again.pop("worker", "gw0"), result_of(1), records=[], **again)
    assert controller.journal is not None
    assert controller.journal.results == []
    assert read(controller.journal.path).results == []  # type: ignore[arg-type]


def test_attempt_after_a_crash_replaces_the_failure(controller: Controller) -> None:
    first, second = result_of(1), result_of(2)
    send(controller, "gw0", second)
    crash(controller, first.nodeid)
    crash(controller, second.nodeid)
    assert [r.status for r in controller.journal.results] == ["failed", "failed"]  # type: ignore[union-attr]
    send(controller, "gw1", first)
    send(controller, "gw1", second)
    assert controller.journal.results == [first, second]  # type: ignore[union-attr]


def test_attempt_after_a_crash_of_the_first_test_replaces_the_failure(
    controller: Controller,
) -> None:
    crash(controller, result_of(1).nodeid)
    send(controller, "gw1", result_of(1))
    assert controller.journal.results == [result_of(1)]  # type: ignore[union-attr]


def test_worker_counts_its_attempts(pytester: pytest.Pytester) -> None:
    worker = worker_of(pytester, 0, 1)
    for attempt, is_said in ((1, False), (2, True)):
        worker.begin_attempt("a.py::t")
        report = SimpleNamespace(nodeid="a.py::t", when="teardown")
        worker.pytest_runtest_logreport(report)  # type: ignore[arg-type]
        assert hasattr(report, KEY) is is_said
        if is_said:
            assert Message.from_json(getattr(report, KEY)).attempt == attempt


def test_results_are_shown_in_the_order_of_the_tests(controller: Controller) -> None:
    workers = Workers(controller, Spec())
    results = [result_of(batch) for batch in (1, 2, 3)]
    controller.pytest_xdist_node_collection_finished(
        workers.start(workers.specs[0]), [result.nodeid for result in results]
    )
    for result in reversed(results):
        send(controller, "gw0", result)
    assert controller.journal is not None
    assert controller.journal.saved().results == results
    assert controller.journal.results == results[::-1]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"gpu": {"name": "H100"}}, "gpu A100 -> H100"),
        ({"commit": "def"}, "commit abc -> def"),
        ({"packages": {"torch": "2.12.0"}}, "torch 2.13.0 -> 2.12.0"),
    ],
)
def test_reports_other_machine(controller: Controller, change: dict[str, Any], what: str) -> None:
    one, two, three = (result_of(batch) for batch in (1, 2, 3))
    send(controller, "gw0", one)
    send(controller, "gw1", two, environment={**MACHINE, **change})
    send(controller, "gw1", three, environment={**MACHINE, **change})
    journal = controller.journal
    assert journal is not None
    assert journal.path is not None
    assert journal.results == [one]
    apart = journal.path.with_name(f"{journal.path.stem}-gw1.jsonl")
    assert read(apart).results == [two, three]
    assert read(apart).environment == {**MACHINE, **change}
    name = what.partition(" ")[0]
    remedy = f"add --int8-allow {name}"
    if name == "commit":
        remedy = "check out the same commit on all hosts"
    [problem] = controller.problems()
    assert problem == (
        "gw1 (h) measured on another machine or with other software than the first worker: "
        f"{what}; its 2 results are in a separate file, {apart}; to merge them, {remedy}"
    )


def test_accepts_allowed_machine_differences(pytester: pytest.Pytester) -> None:
    controller = controller_of(pytester, "--int8-allow=gpu")
    send(controller, "gw0", result_of(1))
    send(controller, "gw1", result_of(2), environment={**MACHINE, "gpu": {"name": "H100"}})
    assert controller.problems() == []
    assert controller.journal is not None
    assert len(controller.journal.results) == 2


def test_crash_fails_measured_point(controller: Controller) -> None:
    send(controller, "gw0", result_of(1))
    crash(controller, result_of(1).nodeid)
    assert controller.journal is not None
    [result] = controller.journal.results
    assert (result.status, result.reason, result.samples_per_s) == ("failed", "gw0 crashed", 10.0)


def test_crash_before_the_first_result_is_recorded_later(controller: Controller) -> None:
    crash(controller, result_of(1).nodeid)
    crash(controller, "a.py::test_plain")
    assert controller.journal is None
    point = ("toy", RunParams.from_run_name(name_of(2)).to_dict())
    send(controller, "gw1", result_of(2), point=point)
    journal = controller.journal
    assert journal is not None
    assert journal.environment == MACHINE
    assert [(r.run_name, r.status) for r in journal.results] == [
        (name_of(1), "failed"),
        (name_of(2), "ok"),
    ]


def test_lost_device_restarts_worker(controller: Controller) -> None:
    again: list[str] = []
    sched = SimpleNamespace(mark_test_pending=again.append)
    reports = []
    for worker in ("gw0", "gw1"):
        node = SimpleNamespace(gateway=SimpleNamespace(id=worker))
        reports.append(SimpleNamespace(node=node, outcome="failed", when="???"))
    send(controller, "gw1", result_of(1, status="failed"), device_lost=True)
    for report, item in zip(reports, ("first", "second"), strict=True):
        controller.pytest_handlecrashitem(item, report, sched)
    assert again == ["second"]
    assert [report.outcome for report in reports] == ["failed", "rerun"]
    assert controller.pytest_report_teststatus(reports[0]) is None
    assert controller.pytest_report_teststatus(reports[1]) == ("", "", "")


# -- in a worker --------------------------------------------------------------------------------


def worker_of(
    pytester: pytest.Pytester, number: int, count: int, *options: str, has_slot: bool = True
) -> Worker:
    if has_slot:
        os.environ[SLOT] = f"{number}/{count}"  # which parsing removes again
    config: Any = pytester.parseconfig(*options)
    assert SLOT not in os.environ
    config.workerinput = {"workerid": f"gw{number}"}
    if has_slot:
        config.workerinput[KEY] = {"number": number, "count": count}
    return Worker(Session(config, read_settings(config)))


CUDA, CPU = RunParams(), RunParams(gpu_type="cpu")


@pytest.fixture
def three_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    monkeypatch.setattr("pytest_int8bench.nvml._uuids", lambda: None)


def test_int8_option_pins_workers_to_their_gpu_immediately(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, three_gpus: None
) -> None:
    worker = worker_of(pytester, 1, 3)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "4,5,6"  # the worker may run other tests
    worker.pin()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "5"
    worker.pin()
    monkeypatch.setattr("pytest_int8bench.environment.fingerprint", lambda *_: {"gpu_count": 1})
    assert worker.environment() == {"gpu_count": 3}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    worker_of(pytester, 2, 3, "--int8-mode=w8")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "6"


def test_single_worker_keeps_all_gpus(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, three_gpus: None
) -> None:
    worker = worker_of(pytester, 0, 1, "--int8-mode=w8")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "4,5,6"
    monkeypatch.setattr("pytest_int8bench.environment.fingerprint", lambda *_: {"gpu_count": 3})
    assert worker.environment() == {"gpu_count": 3}
    assert worker.why_no_gpu(CUDA) is None


def test_reports_worker_without_a_gpu(pytester: pytest.Pytester, three_gpus: None) -> None:
    worker = worker_of(pytester, 3, 4, "--int8-mode=w8")
    assert worker.why_no_gpu(CPU) is None
    assert worker.why_no_gpu(CUDA) == (
        "worker gw3 has no GPU of its own: 4 workers on this host share 3 GPUs"
    )


def test_reports_worker_pinned_too_late(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, three_gpus: None
) -> None:
    worker = worker_of(pytester, 1, 2, "--int8-mode=w8")
    late = (
        "worker gw1 sees 3 GPUs instead of only its own: a module imported before this test "
        "initialized CUDA; add an --int8 option to the command line, so that workers select their "
        "GPU before importing anything"
    )
    for seen, why in ((1, None), (3, late)):
        monkeypatch.setattr("pytest_int8bench.nvml.seen_by_cuda", lambda seen=seen: seen)
        assert worker.why_no_gpu(CUDA) == why


def test_explains_why_a_worker_does_not_time(pytester: pytest.Pytester, three_gpus: None) -> None:
    several, alone = worker_of(pytester, 0, 2), worker_of(pytester, 0, 1)
    assert several.why_not_timed(CUDA) is None
    assert alone.why_not_timed(CPU) is None
    assert several.why_not_timed(CPU) == "2 workers on one CPU slow each other down; run with -n1"
    off = worker_of(pytester, 0, 2, "--benchmark-disable")
    assert off.why_not_timed(CUDA) == "pytest-benchmark is disabled"
    on = worker_of(pytester, 0, 2, "--benchmark-disable", "--benchmark-enable")
    assert on.why_not_timed(CUDA) is None


def test_worker_enables_pytest_benchmark_for_points_it_can_time(
    pytester: pytest.Pytester, three_gpus: None
) -> None:
    worker = worker_of(pytester, 0, 2)
    fixture = SimpleNamespace(disabled=True)  # pytest-benchmark sets this in every worker
    assert worker.why_not_benchmarked(Benchmark(fixture), CUDA) is None
    assert not fixture.disabled
    assert worker.why_not_benchmarked(Benchmark(fixture), CPU) == worker.why_not_timed(CPU)
    assert fixture.disabled


def test_does_not_measure_if_the_controller_lacks_the_plugin(pytester: pytest.Pytester) -> None:
    worker = worker_of(pytester, 0, 1, has_slot=False)
    why = "the pytest-xdist controller runs without pytest-int8bench"
    assert worker.why_not_kept() == worker.why_not_timed(CUDA) == why


def test_messages_contain_only_plain_values() -> None:
    message = Message(
        worker="gw0",
        host="h",
        gpus=["0"],
        preset=None,
        point=None,
        environment=None,
        records=[("Result", result_of(1, samples_per_s=np.float64(3.5)).to_dict())],
        timings=[{"params": {"int8_params": CUDA}}],
    )
    read_back = Message.from_json(message.to_json())
    assert unpacked(*read_back.records[0]) == result_of(1, samples_per_s=3.5)
    assert read_back.timings == [{"params": {"int8_params": f"UNSERIALIZABLE[{CUDA!r}]"}}]
