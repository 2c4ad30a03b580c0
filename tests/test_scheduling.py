"""Which worker runs which tests, on workers that are simulated."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import pytest

from pytest_int8bench import RunParams
from pytest_int8bench.distributed.scheduling import ModelScheduling, Scheduling, families


def point(batch: int, mode: str | None = None) -> str:
    params = RunParams(batch_size=batch, compile_mode="default")
    return (params if mode is None else params.replace(int8_enabled=True, int8_mode=mode)).run_name


def node_id(batch: int, mode: str | None = None, test: str = "test_a.py::test_t") -> str:
    return f"{test}[{point(batch, mode)}]"


def grouped(*ids: str) -> list[list[int]]:
    return families(ids)


# -- families -----------------------------------------------------------------------------------


def test_a_baseline_and_its_candidates_are_a_family_and_other_tests_are_alone() -> None:
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


def test_other_parameters_do_not_hide_a_point() -> None:
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
def test_where_points_start_again_another_workload_begins(
    ids: list[str], expected: list[list[int]]
) -> None:
    assert grouped(*ids) == expected


# -- handing out --------------------------------------------------------------------------------


class Node:
    """A worker as pytest-xdist's: it runs a test when it knows the next one, or that there is
    none."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.queue: deque[int] = deque()
        self.ran: list[int] = []
        self.shutting_down = False

    def __repr__(self) -> str:
        return self.name

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
    """Let workers of the same speed run all that they get."""
    while True in {node.step(scheduler) for node in nodes}:
        pass


IDS = [node_id(batch, mode) for batch in (1, 2, 3, 4) for mode in (None, "w8", "w8a8")]


def start(*nodes: Node, ids: Sequence[str] = IDS) -> ModelScheduling:
    scheduler = ModelScheduling(dict.fromkeys(nodes, ids))
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


def test_who_is_free_first_gets_the_next_family() -> None:
    fast, slow = Node("gw0"), Node("gw1")
    scheduler = start(fast, slow)
    run(scheduler, fast)  # the other one is still at its first test
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
    assert scheduler.remove_node(nodes[2]) is None


def test_a_crash_costs_the_test_that_ran_and_a_new_worker_goes_on() -> None:
    nodes = Node("gw0"), Node("gw1")
    scheduler = start(*nodes)
    nodes[0].step(scheduler)
    assert scheduler.remove_node(nodes[0]) == IDS[1]
    new = Node("gw2")
    scheduler.add_node(new)
    run(scheduler, nodes[1])  # goes on meanwhile
    scheduler.add_node_collection(new, IDS)
    scheduler.schedule()
    run(scheduler, nodes[1], new)
    assert scheduler.tests_finished
    assert sorted(nodes[0].ran + nodes[1].ran + new.ran) == [0, *range(2, 12)]


def test_the_last_test_can_be_run_again_in_a_new_worker() -> None:
    node = Node("gw0")
    scheduler = start(node, ids=IDS[:2])
    node.step(scheduler)
    assert scheduler.remove_node(node) == IDS[1]
    scheduler.mark_test_pending(IDS[1])
    assert not scheduler.tests_finished
    new = Node("gw1")
    scheduler.add_node(new)
    scheduler.add_node_collection(new, IDS[:2])
    scheduler.schedule()
    run(scheduler, new)
    assert (node.ran, new.ran) == ([0], [1])


def test_a_new_worker_that_collects_other_tests_gets_none() -> None:
    node, new = Node("gw0"), Node("gw1")
    scheduler = start(node)
    scheduler.add_node(new)
    scheduler.add_node_collection(new, IDS[1:])
    assert new.shutting_down
    assert scheduler.nodes == [node]


# -- who schedules ------------------------------------------------------------------------------


class Usual:
    """Stands for the scheduler of pytest-xdist."""

    def __init__(self, nodes: list[Node]) -> None:
        self.nodes = nodes
        self.has_pending = "its own"
        self.scheduled = 0

    def add_node_collection(self, node: Node, collection: Sequence[str]) -> None:
        pass

    def schedule(self) -> None:
        self.scheduled += 1


@pytest.mark.parametrize(
    ("first", "second", "is_ours"),
    [
        (IDS, IDS, True),
        (["test_b.py::test_plain", *IDS[:1]], ["test_b.py::test_plain", *IDS[:1]], True),
        (["test_b.py::test_plain[a]"], ["test_b.py::test_plain[a]"], False),
        (IDS, IDS[1:], False),  # pytest-xdist says so
        ([], [], False),
    ],
)
def test_tests_without_points_are_scheduled_as_ever(
    first: list[str], second: list[str], is_ours: bool
) -> None:
    nodes = [Node("gw0"), Node("gw1")]
    usual = Usual(nodes)
    scheduler = Scheduling(usual)
    for node, ids in zip(nodes, (first, second), strict=True):
        scheduler.add_node_collection(node, ids)
    scheduler.schedule()
    assert usual.scheduled == (not is_ours)
    assert scheduler.has_pending == (is_ours or "its own")
