"""Compare each point of a pytest session with a saved file as soon as it is measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from pytest_int8bench.environment import differences
from pytest_int8bench.errors import ClearError
from pytest_int8bench.gate.compare import compare
from pytest_int8bench.gate.limits import Rules
from pytest_int8bench.gate.notes import partial_notes
from pytest_int8bench.gate.outcomes import NEW, PASSES, REGRESSES, SUSPECTED, RunChange
from pytest_int8bench.gate.renames import Renames, new_nodeid
from pytest_int8bench.results.base import point_label
from pytest_int8bench.results.locating import Run
from pytest_int8bench.results.records import Saved, Timed
from pytest_int8bench.words import some


class RegressionError(ClearError, AssertionError):
    """Raised if a point got worse than its limits allow."""


class IncomparableError(ClearError, RuntimeError):
    """Raised if a point cannot be compared."""


class SessionGate:
    """Compares the points of a session with those in saved files.

    Args:
        base: the saved files, one process each.
        rules: limits, and what may differ.
    """

    def __init__(self, base: Sequence[Run], rules: Rules) -> None:
        self._base = list(base)
        self._rules = rules
        self._judged: dict[str, RunChange] = {}
        self._timed: list[Timed] = []

    @property
    def name(self) -> str:
        """Files that points are compared with, as text."""
        return some([str(run.path) for run in self._base])

    def check_machine(self, environment: Mapping[str, Any]) -> None:
        """Reject results of a different machine or software.

        Raises:
            IncomparableError: one line with what differs.
        """
        found: dict[str, tuple[Any, Any]] = {}
        for run in self._base:
            found |= differences(run.saved.environment, environment)
        if blocking := {k: v for k, v in found.items() if k not in self._rules.allow}:
            listed = ", ".join(f"{name} {base} -> {new}" for name, (base, new) in blocking.items())
            allow = " ".join(f"--int8-allow {name}" for name in blocking)
            raise IncomparableError(
                f"{self.name} was measured on another machine or software: {listed}; to compare "
                f"all the same: {allow}"
            )

    def judge(self, result: Timed, environment: Mapping[str, Any]) -> None:
        """Compare one point.

        Raises:
            RegressionError: if it got worse.
            IncomparableError: if it cannot be compared.
        """
        self._timed.append(result)
        run = Run(self._base[0].path, Saved.of(environment, [result]))
        found = compare(self._base, [run], self._rules)
        [change] = [entry for entry in found.runs if _is_of(entry, result)]
        self._judged[result.nodeid] = change
        if change.exit_code == PASSES or change.outcome == SUSPECTED:
            return  # one process cannot show it: the summary lists it
        error = RegressionError if change.exit_code == REGRESSES else IncomparableError
        name = point_label(result.workload, result.run_name)
        raise error(f"{change.outcome}: {name}: {change.reason}; compared with {self.name}")

    def forget(self, nodeid: str) -> None:
        """Forget the comparison of a test that runs again."""
        self._judged.pop(nodeid, None)

    def problems(
        self,
        collected: Collection[str],
        deselected: Collection[str],
        *,
        by_node: bool,
        is_gone: Callable[[str], bool],
    ) -> list[str]:
        """Return problems that must fail the session, one line each.

        Args:
            collected: node ids of all tests that were found.
            deselected: those among them that were not to be run.
            by_node: the tests were named one by one, so that others are not missing.
            is_gone: says whether a file of tests was to be collected, and is not there any more.
        """
        measured = [r for run in self._base for r in run.saved.timed if r.status in ("ok", "oom")]
        renames = self._renames()
        expected = {self._nodeid_now(result, renames, collected) for result in measured}
        files = {nodeid.partition("::")[0] for nodeid in collected}
        files |= {file for nodeid in expected if is_gone(file := nodeid.partition("::")[0])}
        lines = []
        if not any(change.outcome != NEW for change in self._judged.values()):
            lines.append(f"nothing was compared with {self.name}")
        if self._rules.allow_missing:
            return lines
        for nodeid in sorted(expected - set(self._judged) - set(deselected)):
            if nodeid in collected:
                lines.append(f"not measured, so not compared: {nodeid}")
            elif not by_node and nodeid.partition("::")[0] in files:
                lines.append(f"missing: {nodeid} is in {self.name} and not in this session")
        return lines

    def _renames(self) -> Renames:
        return Renames([*(r for run in self._base for r in run.saved.timed), *self._timed])

    def _nodeid_now(self, result: Timed, renames: Renames, collected: Collection[str]) -> str:
        """Return the node id of a base point in this session; unchanged if there is none."""
        name = renames.of(result).nodeid
        if name in collected or name != result.nodeid:
            return name
        name = new_nodeid(result, collected)
        return result.nodeid if name in self._judged else name  # one judged is another model's

    def summary(self) -> list[str]:
        """Return the outcome, the suspected points, and those without a baseline."""
        count = Counter(change.outcome for change in self._judged.values())
        listed = ", ".join(f"{number} {outcome}" for outcome, number in count.items()) or "nothing"
        found = [c for o in (SUSPECTED, NEW) for c in self._judged.values() if c.outcome == o]
        return [
            f"compared with {self.name}: {listed}",
            *self._renames().lines,
            *(f"{run.path}: {broken}" for run in self._base if (broken := run.saved.broken())),
            *(f"note: {note}" for note in partial_notes(self._base)),
            *(f"{c.outcome}: {point_label(c.workload, c.run_name)}: {c.reason}" for c in found),
        ]


def _is_of(change: RunChange, result: Timed) -> bool:
    return (change.nodeid, change.workload) == (result.nodeid, result.workload)
