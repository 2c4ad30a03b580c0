"""Test which simulated worker runs which tests."""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_int8bench.params import RunParams

pytest.importorskip("xdist")

from pytest_int8bench.plugin.xdist.scheduling import FamilyScheduling, Scheduling, families


def point(batch: int, mode: str | None = None) -> str:
    params = RunParams(batch_size=batch, compile_mode="default")
    return (params if mode is None else params.replace(int8_enabled=True, int8_mode=mode)).run_name


def node_id(batch: int, mode: str | None = None, test: str = "test_a.py::test_t") -> str:
    return f"{test}[{point(batch, mode)}]"


def grouped(*ids: str) -> list[list[int]]:
    return families(ids)


# -- families -----------------------------------------------------------------------------------


def test_groups_baseline_with_its_candidates() -> None:
    ids = [
        node_id(1),
        "test_b.py::test_plain",
        node_id(1, "w8"),
        node_id(1, "w8", "test_a.py::Test::test_accuracy"),
        node_id(1, "w8a8"),
        node_id(2),
        "test_b.py::test_other[a-b]",
        node_id(2, "w8"),
    ]
    assert grouped(*ids) == [[0, 2, 3, 4], [1], [5, 7], [6]]


def test_finds_points_among_other_parameters() -> None:
    name, other = point(1), point(1, "w8")
    assert grouped(f"a.py::t[x-{name}-1]", f"a.py::t[x-y-{other}]", f"a.py::t[{other}-z]") == [
        [0, 1, 2]
    ]


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([node_id(1), node_id(1, "w8"), node_id(1), node_id(1, "w8")], [[0, 1], [2, 3]]),
        ([node_id(1, "w8"), node_id(1), node_id(1, "w8")], [[0], [1, 2]]),
        ([node_id(1, "w8"), node_id(1, "w8a8"), node_id(1, "w8")], [[0, 1], [2]]),
        ([node_id(1), node_id(1, test="b.py::t"), node_id(1, "w8")], [[0, 1, 2]]),
    ],
)
def test_repeated_points_start_another_family(ids: list[str], expected: list[list[int]]) -> None:
    assert grouped(*ids) == expected


# -- scheduling ---------------------------------------------------------------------------------


class Node:
    """A worker like pytest-xdist's: it runs a test when it knows the next one or that none
    follows."""

    def __init__(self, name: str) -> None:
        self.gateway = SimpleNamespace(id=name)
        self.queue: deque[int] = deque()
        self.ran: list[int] = []
        self.shutting_down = False

    def __repr__(self) -> str:
        return str(self.gateway.id)

    def send_runtest_some(self, indices: Sequence[int]) -> None:
        assert not self.shutting_down
        self.queue.extend(indices)

    def shutdown(self) -> None:
        self.shutting_down = True

    def step(self, scheduler: Any) -> bool:
        if not self.queue or (len(self.queue) == 1 and not self.shutting_down):
            return False
        index = self.queue.popleft()
        self.ran.append(index)
        scheduler.mark_test_complete(self, index)
        return True


def run(scheduler: Any, *nodes: Node) -> None:
    """Let equally fast workers run everything they get."""
    while True in {node.step(scheduler) for node in nodes}:
        pass


IDS = [node_id(batch, mode) for batch in (1, 2, 3, 4) for mode in (None, "w8", "w8a8")]


class Config:
    """The parts of a pytest configuration that schedulers read."""

    def __init__(self, workers: int) -> None:
        self.option = SimpleNamespace(loadscopereorder=True)
        self.reports: list[pytest.CollectReport] = []
        self.hook = SimpleNamespace(pytest_collectreport=self.note)
        self.workers = workers

    def getvalue(self, name: str) -> list[str]:
        assert name == "tx"
        return ["popen"] * self.workers

    def note(self, report: pytest.CollectReport) -> None:
        self.reports.append(report)


def scheduler_for(workers: int, lost: Container[str] = ()) -> FamilyScheduling:
    config: Any = Config(workers)
    return FamilyScheduling(config, None, lost)


def add(scheduler: Any, node: Node, ids: Sequence[str] = IDS) -> None:
    scheduler.add_node(node)
    scheduler.add_node_collection(node, ids)


def start(*nodes: Node, ids: Sequence[str] = IDS, lost: Container[str] = ()) -> FamilyScheduling:
    scheduler = scheduler_for(len(nodes), lost)
    for node in nodes:
        add(scheduler, node, ids)
    scheduler.schedule()
    return scheduler


def test_families_stay_together_in_the_order_of_the_tests() -> None:
    nodes = Node("gw0"), Node("gw1")
    scheduler = start(*nodes)
    assert scheduler.has_pending
    assert not scheduler.tests_finished
    run(scheduler, *nodes)
    assert [node.ran for node in nodes] == [[0, 1, 2, 6, 7, 8], [3, 4, 5, 9, 10, 11]]
    assert scheduler.tests_finished
    assert not scheduler.has_pending
    assert all(node.shutting_down for node in nodes)


def test_idle_worker_gets_the_next_family() -> None:
    fast, slow = Node("gw0"), Node("gw1")
    scheduler = start(fast, slow)
    run(scheduler, fast)  # the other worker is still running its first test
    run(scheduler, slow)
    assert fast.ran == [0, 1, 2, 6, 7, 8, 9, 10, 11]
    assert slow.ran == [3, 4, 5]


def test_single_tests_go_to_different_workers() -> None:
    nodes = Node("gw0"), Node("gw1")
    run(start(*nodes, ids=[node_id(1), node_id(2)]), *nodes)
    assert [node.ran for node in nodes] == [[0], [1]]


def test_a_worker_without_a_family_ends() -> None:
    nodes = Node("gw0"), Node("gw1"), Node("gw2")
    scheduler = start(*nodes, ids=IDS[:6])
    assert nodes[2].shutting_down
    run(scheduler, *nodes)
    assert [node.ran for node in nodes] == [[0, 1, 2], [3, 4, 5], []]
    assert nodes[2] not in scheduler.nodes
    assert scheduler.remove_node(nodes[0]) is None


def test_larger_families_do_not_overtake_smaller_ones() -> None:
    node = Node("gw0")
    run(start(node, ids=[node_id(1), *IDS[3:9]]), node)
    assert node.ran == [*range(7)]


def test_crash_loses_only_the_running_test() -> None:
    nodes = Node("gw0"), Node("gw1")
    scheduler = start(*nodes)
    nodes[0].step(scheduler)
    assert scheduler.remove_node(nodes[0]) == IDS[1]
    new = Node("gw2")
    scheduler.add_node(new)
    run(scheduler, nodes[1])  # continues in the meantime
    scheduler.add_node_collection(new, IDS)
    scheduler.schedule()
    run(scheduler, nodes[1], new)
    assert scheduler.tests_finished
    assert sorted(nodes[0].ran + nodes[1].ran + new.ran) == [0, *range(2, 12)]


def test_runs_tests_left_by_a_crash_first() -> None:
    nodes = Node("gw0"), Node("gw1")
    scheduler = start(*nodes)
    nodes[0].step(scheduler)
    scheduler.remove_node(nodes[0])
    run(scheduler, nodes[1])
    assert nodes[1].ran == [3, 4, 5, 2, *range(6, 12)]


def test_crash_while_a_new_worker_collects() -> None:
    nodes = Node("gw0"), Node("gw1")
    scheduler = start(*nodes)
    scheduler.remove_node(nodes[0])
    new = Node("gw2")
    scheduler.add_node(new)
    assert scheduler.remove_node(nodes[1]) == IDS[3]
    assert not new.queue
    scheduler.add_node_collection(new, IDS)
    scheduler.schedule()
    run(scheduler, new)
    assert sorted(new.ran) == [1, 2, *range(4, 12)]


def test_reruns_test_whose_worker_lost_its_device() -> None:
    node = Node("gw0")
    scheduler = start(node, ids=IDS[:2], lost={"gw0"})
    node.step(scheduler)
    assert scheduler.remove_node(node) == IDS[1]
    assert not scheduler.tests_finished
    new = Node("gw1")
    add(scheduler, new, IDS[:2])
    scheduler.schedule()
    run(scheduler, new)
    assert (node.ran, new.ran) == ([0], [1])


def test_new_worker_that_collects_other_tests_gets_no_work() -> None:
    node, new = Node("gw0"), Node("gw1")
    scheduler = start(node)
    scheduler.add_node(new)
    scheduler.add_node_collection(new, IDS[1:])
    assert new.shutting_down
    assert scheduler.nodes == [node]


# -- which scheduler -----------------------------------------------------------------------------


class Usual:
    """Replace the scheduler of pytest-xdist."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.has_pending = "its own"
        self.scheduled = 0

    def add_node(self, node: Node) -> None:
        self.nodes.append(node)

    def add_node_collection(self, node: Node, collection: Sequence[str]) -> None:
        pass

    def schedule(self) -> None:
        self.scheduled += 1


@pytest.mark.parametrize(
    ("ids", "is_ours"),
    [
        (IDS, True),
        (["test_b.py::test_plain", *IDS[:1]], True),
        (["test_b.py::test_plain[a]"], False),
        ([], False),
    ],
)
def test_leaves_tests_without_points_to_the_default_scheduler(
    ids: list[str], is_ours: bool
) -> None:
    usual = Usual()
    scheduler = Scheduling(usual, scheduler_for(2))
    for name in ("gw0", "gw1"):
        add(scheduler, Node(name), ids)
    scheduler.schedule()
    assert usual.scheduled == (not is_ours)
    assert scheduler.has_pending == (is_ours or "its own")


def test_reports_workers_that_collect_different_tests() -> None:
    families = scheduler_for(2)
    scheduler = Scheduling(Usual(), families)
    nodes = Node("gw0"), Node("gw1")
    for node, ids in zip(nodes, (IDS, IDS[1:]), strict=True):
        add(scheduler, node, ids)
    scheduler.schedule()
    [report] = families.config.reports  # type: ignore[attr-defined]
    assert "Different tests were collected between gw0 and gw1" in report.longrepr
    assert not any(node.queue for node in nodes)


def test_ignores_worker_that_crashes_before_the_others_are_ready() -> None:
    usual = Usual()
    scheduler = Scheduling(usual, scheduler_for(2))
    gone, node, new = Node("gw0"), Node("gw1"), Node("gw2")
    add(scheduler, gone)
    usual.nodes.remove(gone)
    scheduler.add_node(new)  # which has not collected either
    add(scheduler, node)
    scheduler.schedule()
    run(scheduler, node)
    assert node.ran == [*range(12)]
    assert scheduler.nodes == [node, new]
