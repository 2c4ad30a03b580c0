"""Which worker of pytest-xdist runs which tests: those of a baseline and its candidates stay
together."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pytest_int8bench.collection import params_in
from pytest_int8bench.params import RunParams

#: A worker starts a test when it knows the next one.
_AHEAD = 2


def families(ids: Sequence[str]) -> list[list[int]]:
    """Return which tests belong in one worker, as indices of ``ids``: those of one baseline and
    its candidates. A test without a point is alone.

    The tests come model by model, baselines first. Two workloads have points of the same names:
    where a baseline or an earlier candidate follows a candidate, the next workload begins.
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


class ModelScheduling:
    """A scheduler of pytest-xdist that hands out whole families, in their order, each to the first
    worker that is free.

    Args:
        collections: what each worker collected, all the same.
    """

    def __init__(self, collections: Mapping[Any, Sequence[str]]) -> None:
        self._ids = list(next(iter(collections.values())))
        self._left = deque(families(self._ids))
        self._pending: dict[Any, list[int]] = {node: [] for node in collections}
        self._ready = set(collections)

    @property
    def nodes(self) -> list[Any]:
        """The workers that run."""
        return list(self._pending)

    @property
    def collection_is_completed(self) -> bool:
        return True

    @property
    def tests_finished(self) -> bool:
        """No worker has more than the test that it runs."""
        return not self._left and all(len(tests) < _AHEAD for tests in self._pending.values())

    @property
    def has_pending(self) -> bool:
        return bool(self._left) or any(self._pending.values())

    def add_node(self, node: Any) -> None:
        """Note a worker that replaces one that crashed."""
        self._pending[node] = []

    def add_node_collection(self, node: Any, collection: Iterable[str]) -> None:
        """Note that ``node`` is ready. One that collected other tests is of no use."""
        if list(collection) == self._ids:
            self._ready.add(node)
        else:
            del self._pending[node]
            node.shutdown()

    def schedule(self) -> None:
        """Hand out what can be: to each worker something before one gets a second family."""
        ready = [node for node in self._pending if node in self._ready]
        for node in ready:
            if not self._pending[node]:
                self._give(node)
        for node in ready:
            self._feed(node)

    def mark_test_complete(self, node: Any, item_index: int, duration: float = 0) -> None:
        self._pending[node].remove(item_index)
        self._feed(node)

    def mark_test_pending(self, item: str) -> None:
        """Run a test again."""
        self._left.appendleft([self._ids.index(item)])
        self.schedule()

    def remove_pending_tests_from_node(self, node: Any, indices: Sequence[int]) -> None:
        raise NotImplementedError("tests are not taken back from a worker")

    def remove_node(self, node: Any) -> str | None:
        """Forget a worker that ended. Return the test that it crashed in, None if in none; its
        others go to the next worker that is free."""
        self._ready.discard(node)
        pending = self._pending.pop(node)
        if not pending:
            return None
        crashed, *left = pending
        if left:
            self._left.appendleft(left)
            self.schedule()
        return self._ids[crashed]

    def _give(self, node: Any) -> None:
        if self._left and not node.shutting_down:
            family = self._left.popleft()
            self._pending[node] += family
            node.send_runtest_some(family)

    def _feed(self, node: Any) -> None:
        while self._left and len(self._pending[node]) < _AHEAD and not node.shutting_down:
            self._give(node)
        if not self._left and not node.shutting_down:
            node.shutdown()  # when it has run what it has


class Scheduling:
    """pytest-xdist's own scheduler until the tests are collected, and after that too where none of
    them has a point.

    Args:
        usual: the scheduler of ``--dist=load``.
    """

    def __init__(self, usual: Any) -> None:
        self._now = usual
        self._collections: dict[Any, list[str]] = {}
        self._is_decided = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._now, name)

    def add_node_collection(self, node: Any, collection: Sequence[str]) -> None:
        self._collections[node] = list(collection)
        self._now.add_node_collection(node, collection)

    def schedule(self) -> None:
        if not self._is_decided:
            self._is_decided = True
            collected = {n: self._collections[n] for n in self._now.nodes if n in self._collections}
            first = next(iter(collected.values()), [])
            # Where they differ, pytest-xdist's own says in what.
            if all(ids == first for ids in collected.values()) and any(map(params_in, first)):
                self._now = ModelScheduling(collected)
        self._now.schedule()
