"""Schedule tests on pytest-xdist workers so that a baseline and its candidates stay together."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Sequence
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

from pytest_int8bench.params import RunParams
from pytest_int8bench.plugin.points import params_in

#: A pytest-xdist worker starts a test only once it knows the next one.
_MIN_PENDING = 2


def families(ids: Sequence[str]) -> list[list[int]]:
    """Group the tests that must run on the same worker: those of a baseline and its candidates.

    The tests are sorted by model, baselines first. Points of two workloads may have the same names,
    so the next workload starts where this order is broken: where a candidate is followed by a
    baseline, or by a candidate that comes before it.

    Args:
        ids: node ids in the order of the tests.

    Returns:
        For each group, its indices in ``ids``. A test without a point is a group of its own.
    """
    found: list[list[int]] = []
    family: list[int] = []
    members: list[RunParams] = []
    for index, nodeid in enumerate(ids):
        params = params_in(nodeid)
        if params is None:
            found.append([index])
            continue
        is_next = not members or params.baseline() != members[0].baseline()
        if not is_next and params != members[-1]:
            is_next = params in members or not params.int8_enabled
        if is_next:
            family, members = [], []
            found.append(family)
        family.append(index)
        if params not in members:
            members.append(params)
    return found


class FamilyScheduling(LoadScopeScheduling):  # type: ignore[misc]  # xdist has no types
    """Assigns whole families in the order of the tests, each to the first free worker.

    Args:
        lost: ids of the workers that lost their device. The next test of such a worker is rerun; a
            test that crashed its worker is not.
    """

    workqueue: OrderedDict[str, dict[str, bool]]

    def __init__(self, config: pytest.Config, log: Any, lost: Container[str]) -> None:
        super().__init__(config, log)
        config.option.loadscopereorder = False  # True would assign the largest families first
        self._lost = lost
        self._family_of: dict[str, str] = {}

    def schedule(self) -> None:
        if not self._family_of:
            ids = next(iter(self.registered_collections.values()))
            self._family_of = {ids[i]: ids[family[0]] for family in families(ids) for i in family}
        super().schedule()

    def add_node_collection(self, node: Any, collection: Sequence[str]) -> None:
        super().add_node_collection(node, collection)
        if node not in self.registered_collections:  # it collected different tests
            del self.assigned_work[node]
            node.shutdown()

    def remove_node(self, node: Any) -> str | None:
        work: dict[str, dict[str, bool]] = self.assigned_work.pop(node)
        pending = [(unit, test) for unit in work.values() for test in unit if not unit[test]]
        if not pending:
            return None
        unit, crashed = pending[0]
        unit[crashed] = node.gateway.id not in self._lost
        left = {family: tests for family, tests in work.items() if not all(tests.values())}
        self.workqueue = OrderedDict({**left, **self.workqueue})
        for other in self.nodes:
            self._reschedule(other)
        return crashed

    def _split_scope(self, nodeid: str) -> str:
        return self._family_of.get(nodeid, nodeid)

    def _reschedule(self, node: Any) -> None:
        if node not in self.registered_collections:  # a new worker that is still collecting
            return
        while self.workqueue and not node.shutting_down:
            if self._pending_of(self.assigned_work[node]) >= _MIN_PENDING:
                return
            self._assign_work_unit(node)
        if not node.shutting_down:
            node.shutdown()  # takes effect after its last test


class Scheduling:
    """Acts as the scheduler of ``--dist=load`` until the tests are collected. If any of them has a
    point, it then switches to a scheduler that keeps families together.

    Args:
        usual: the scheduler of ``--dist=load``.
        families: the scheduler to switch to.
    """

    def __init__(self, usual: Any, families: FamilyScheduling) -> None:
        self._now = self._usual = usual
        self._families = families
        self._collections: dict[Any, Sequence[str]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._now, name)

    def add_node_collection(self, node: Any, collection: Sequence[str]) -> None:
        self._collections[node] = collection
        self._now.add_node_collection(node, collection)

    def schedule(self) -> None:
        if self._now is self._usual:
            found = {n: self._collections[n] for n in self._usual.nodes if n in self._collections}
            if any(params_in(nodeid) for nodeid in next(iter(found.values()), ())):
                self._take_over(found)
                return
        self._now.schedule()

    def _take_over(self, collections: dict[Any, Sequence[str]]) -> None:
        self._now = self._families
        self._families.numnodes = len(collections)
        for node, collection in collections.items():
            self._families.add_node(node)
            self._families.add_node_collection(node, collection)
        self._families.schedule()
        for node in self._usual.nodes:
            if node not in collections:  # a new worker that is still collecting
                self._families.add_node(node)
