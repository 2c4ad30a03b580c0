"""Test the A/B of two revisions on a fake machine: what is measured when, and the outcomes."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import random
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import pytest
from filelock import FileLock
from scipy import stats

from pytest_int8bench import files
from pytest_int8bench.errors import ClearError
from pytest_int8bench.gate.ab import blocks, experiment
from pytest_int8bench.gate.ab import plan as ab_plan
from pytest_int8bench.gate.ab.design import Design, DesignError
from pytest_int8bench.gate.ab.journal import AbError, AbJournal
from pytest_int8bench.gate.ab.judging import Estimate, Judged, Screened
from pytest_int8bench.gate.ab.plan import AbResult, AbRun, Plan
from pytest_int8bench.gate.ab.side import Measured, Side
from pytest_int8bench.gate.ab.worktrees import Revision
from pytest_int8bench.report.ab import page
from pytest_int8bench.results.base import NOT_MEASURED
from toys.disks import failing
from toys.results import plain, result_of

BASE, NEW = Revision("main", "a" * 40), Revision("HEAD", "b" * 40)
ENVIRONMENT: dict[str, Any] = {
    "cpu": "EPYC",
    "cpu_threads": 8,
    "packages": {"torch": "2.11.0"},
    "commit": "c",
    "dirty": False,
}
PROCESS_S = 8.0
WARMING = ["base", "new"]


def order(root: Path, stage: str, blocks: int, start: int = 0) -> list[str]:
    """Return the sides in the order drawn for the last journal, at the first attempt."""
    seed = journals(root)[-1].stem
    numbers = range(start, blocks)
    return [side for block in numbers for side in ab_plan.order_of(stage, block, 0, seed)]


def screening(root: Path) -> list[str]:
    return order(root, "screening", 4)


def verdict(root: Path, blocks: int = 2) -> list[str]:
    """Return the order of the verdict stage, by default up to the first look."""
    return order(root, "verdict", blocks)


def nodeid(name: str) -> str:
    return f"test_a.py::test[{name}]"


class Machine:
    """Measure runs of known times, with 0.2 % noise between processes."""

    def __init__(self, **times: tuple[float, float]) -> None:
        self.times = times
        """Name -> seconds per batch of base and new."""
        self.plain: set[str] = set()
        """Names that are plain benchmarks."""
        self.calls: list[str] = []
        """Sides, in the order they were measured."""
        self.onlys: list[Sequence[str] | None] = []
        self.args: set[tuple[str, ...]] = set()
        self.number = 0
        """Number of the next process, which determines its noise."""
        self.change: Callable[[int, str, str], dict[str, Any] | None] = lambda *_: {}
        """Number, side and name -> fields of the result that differ; None for no result."""
        self.before: Callable[[int], object] = lambda number: None
        """Called when a process starts."""
        self.environment: Callable[[int], dict[str, Any]] = lambda number: ENVIRONMENT
        self.sides: dict[str, Side] = {}
        self.installed: list[tuple[str, str]] = []
        self.now = 1000.0
        self.said: list[str] = []

    def measure(
        self, side: Side, pytest_args: Sequence[str], only: Sequence[str] | None
    ) -> Measured:
        key, number = side.tree.name, self.number
        self.before(number)
        self.number += 1
        self.sides[key] = side
        self.calls.append(key)
        self.onlys.append(only)
        self.args.add(tuple(pytest_args))
        self.now += PROCESS_S
        results = []
        for name, times in self.times.items():
            noise = random.Random(f"{number} {name}").gauss(0, 0.002)
            change = self.change(number, key, name)
            if change is None or (only is not None and nodeid(name) not in only):
                continue
            if name in self.plain:
                seconds = times[key == "new"] * (1 + noise)
                results.append(dataclasses.replace(plain(f"test[{name}]", seconds), **change))
                continue
            measured = {"batch_time_s": times[key == "new"] * (1 + noise), **change}
            results.append(result_of(name, **measured))
        return Measured(self.environment(number), results, PROCESS_S)


Compare = Callable[..., AbResult]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    """Return a machine on which x is as fast in both revisions."""
    machine = Machine(x=(0.01, 0.01))
    trees = tmp_path / "trees"

    @contextlib.contextmanager
    def worktrees(root: Path, revisions: Mapping[str, Revision]) -> Iterator[dict[str, Path]]:
        for key in revisions:
            (trees / key).mkdir(parents=True, exist_ok=True)
        try:
            yield {key: trees / key for key in revisions}
        finally:
            machine.said.append("(worktrees removed)")

    monkeypatch.setattr(experiment, "worktrees", worktrees)
    monkeypatch.setattr(Side, "measure", lambda side, args, only: machine.measure(side, args, only))
    monkeypatch.setattr(
        Side, "install", lambda side, command: machine.installed.append((side.tree.name, command))
    )
    clock = SimpleNamespace(
        monotonic=lambda: machine.now,
        gmtime=lambda: machine.now,
        strftime=lambda form, now: f"{now:.0f}",
    )
    for module in (blocks, files):
        monkeypatch.setattr(module, "time", clock)
    return machine


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "repository"
    root.mkdir()
    return root


@pytest.fixture
def compare(machine: Machine, root: Path) -> Compare:
    """Run a comparison."""

    def compare(**changes: Any) -> AbResult:
        values = {"root": root, "folder": root, "base": BASE, "new": NEW, **changes}
        return experiment.run(Plan(**values), machine.said.append)

    return compare


def journals(root: Path) -> list[Path]:
    return sorted((root / ".benchmarks" / "int8bench" / "ab").glob("*.jsonl"))


def only_run(result: AbResult) -> AbRun:
    [run] = result.runs
    return run


def estimate_of(stage: Screened | Judged | None) -> Estimate:
    assert stage is not None
    assert stage.estimate is not None
    return stage.estimate


# -- stages -----------------------------------------------------------------------------------


def test_unchanged_code_is_cleared_by_screening(
    machine: Machine, compare: Compare, root: Path
) -> None:
    result = compare(pytest_args=("benchmarks", "-x"))
    assert machine.calls == WARMING + screening(root)
    assert machine.onlys == [None] * 10
    assert machine.args == {("benchmarks", "-x")}
    run = only_run(result)
    assert (run.outcome, run.exit_code, run.judged, run.reason) == ("PASS", 0, None, None)
    assert estimate_of(run.screened).blocks == 4
    assert result.exit_code == 0
    assert (result.processes, result.seconds) == (10, 10 * PROCESS_S)
    assert result.environment == ENVIRONMENT
    assert result.notes == ()


def test_verdict_blocks_run_flagged_tests_only(
    machine: Machine, compare: Compare, root: Path
) -> None:
    machine.times["slow"] = (0.02, 0.0216)
    result = compare()
    assert machine.calls == WARMING + screening(root) + verdict(root)
    assert machine.onlys == [None] * 10 + [[nodeid("slow")]] * 8
    passed, failed = result.runs
    assert (passed.outcome, passed.judged) == ("PASS", None)
    assert (failed.outcome, failed.exit_code) == ("FAIL", 1)
    assert estimate_of(failed.judged).slowdown == pytest.approx(0.08, abs=0.008)
    assert estimate_of(failed.judged).blocks == 2
    assert failed.base_s == pytest.approx(0.02, rel=0.004)
    assert failed.new_s == pytest.approx(0.0216, rel=0.004)
    assert result.exit_code == 1


@pytest.mark.parametrize(
    ("statistic", "gpu", "used"),
    [
        ("auto", None, "fastest"),
        ("auto", {"name": "A100"}, "median"),
        ("median", None, "median"),
        ("fastest", {"name": "A100"}, "fastest"),
    ],
)
def test_chooses_statistic_by_device(
    machine: Machine, compare: Compare, statistic: str, gpu: dict[str, str] | None, used: str
) -> None:
    # Every other process has a far slower median but the same fastest round.
    machine.environment = lambda number: {**ENVIRONMENT, "gpu": gpu}
    machine.change = lambda number, key, name: {
        "batch_time_s": 0.01 * (1 + number % 2),
        "batch_time_min_s": 0.008,
    }
    result = compare(statistic=statistic)
    assert result.statistic == used
    run = only_run(result)
    assert (run.outcome, run.judged is None) == (
        ("PASS", True) if used == "fastest" else (run.outcome, False)
    )
    assert (run.base_s == 0.008) == (used == "fastest")


def test_uses_median_without_a_fastest_round(machine: Machine, compare: Compare) -> None:
    # As from a revision with an older plugin.
    machine.change = lambda number, key, name: {"batch_time_min_s": 0.1} if key == "new" else {}
    assert compare().statistic == "median"
    with pytest.raises(
        AbError,
        match=r"^--statistic fastest: the pytest-int8bench of one revision is too old to save it$",
    ):
        compare(statistic="fastest")


def test_measures_only_undecided_runs_further(
    machine: Machine, compare: Compare, root: Path
) -> None:
    """A clear slowdown is decided at the first look, a noisy run at none."""
    machine.times |= {"slow": (1, 1.1), "noisy": (1, 1)}
    noise = random.Random(0)
    machine.change = lambda number, key, name: (
        {"batch_time_s": noise.uniform(0.01, 0.03)} if name == "noisy" else {}
    )
    result = compare()
    assert machine.calls == WARMING + screening(root) + verdict(root, 6)
    both, one = [nodeid("noisy"), nodeid("slow")], [nodeid("noisy")]
    assert machine.onlys == [None] * 10 + [both] * 8 + [one] * 16
    assert [run.outcome for run in result.runs] == ["PASS", "FAIL", "INCONCLUSIVE"]
    blocks = [estimate_of(run.judged).blocks for run in result.runs[1:]]
    assert blocks == [2, 6]


def test_clear_pass_ends_after_the_first_look(
    machine: Machine, compare: Compare, root: Path
) -> None:
    machine.change = lambda number, key, name: (
        {"batch_time_s": 0.02} if key == "new" and number < 10 else {}
    )
    result = compare()
    assert machine.calls == WARMING + screening(root) + verdict(root)
    assert (only_run(result).outcome, result.exit_code) == ("PASS", 0)


def test_draws_orders_for_each_comparison() -> None:
    """All orders are equally likely for every block, attempt and seed."""
    drawn = Counter(
        ab_plan.order_of("verdict", block, attempt, str(seed))
        for block in range(6)
        for attempt in range(2)
        for seed in range(500)
    )
    assert len(drawn) == 6
    assert all(order.count("new") == 2 for order in drawn)
    assert stats.chisquare([*drawn.values()]).pvalue > 0.001
    pairs = Counter(
        (*ab_plan.order_of("screening", 0, 0, seed), *ab_plan.order_of("screening", 1, 0, seed))
        for seed in map(str, range(500))
    )
    assert set(pairs) == {("base", "new", "new", "base"), ("new", "base", "base", "new")}
    assert stats.binomtest(min(pairs.values()), 500).pvalue > 0.001


def test_verdict_ignores_screening_blocks(machine: Machine, compare: Compare) -> None:
    machine.change = lambda number, key, name: (
        {"batch_time_s": 0.02} if key == "new" and number < 10 else {}
    )
    run = only_run(compare())
    assert (run.outcome, run.exit_code) == ("PASS", 0)
    assert run.judged is not None
    assert run.screened is not None
    assert run.screened.flagged


def test_unstable_base_is_inconclusive(machine: Machine, compare: Compare) -> None:
    """The second base process of each block is the control."""
    machine.change = lambda number, key, name: (
        {"batch_time_s": 0.012}
        if key == "new" or (number >= 10 and machine.calls[10:].count("base") % 2 == 0)
        else {}
    )
    result = compare()
    run = only_run(result)
    assert (run.outcome, run.exit_code, result.exit_code) == ("INCONCLUSIVE", 2, 2)
    assert re.fullmatch(
        r"the base differs from itself by (19\.9|20\.\d)% \[.*\]: the machine was not steady",
        run.reason or "",
    )


def test_faster_revision_passes(machine: Machine, compare: Compare, root: Path) -> None:
    machine.times["x"] = (0.01, 0.005)
    assert compare().exit_code == 0
    assert machine.calls == WARMING + screening(root)


def test_each_side_has_separate_folders(machine: Machine, compare: Compare, root: Path) -> None:
    (root / "sub").mkdir()
    for key in ("base", "new"):
        (root.parent / "trees" / key / "sub").mkdir(parents=True)
    compare(folder=root / "sub")
    base, new = machine.sides["base"], machine.sides["new"]
    assert (base.revision, new.revision) == (BASE, NEW)
    assert [side.folder for side in (base, new)] == [base.tree / "sub", new.tree / "sub"]
    assert len({base.cache, new.cache, base.site, new.site}) == 4
    assert base.site.parent == new.site.parent == base.tree.parent
    assert base.log == new.log == journals(root)[0].with_suffix(".log")


def test_rejects_revision_without_folder(machine: Machine, compare: Compare, root: Path) -> None:
    (root / "sub").mkdir()
    with pytest.raises(AbError) as caught:
        compare(folder=root / "sub")
    assert str(caught.value) == "main (aaaaaaaaaa) has no folder sub"


def test_installs_packages_on_both_sides_first(machine: Machine, compare: Compare) -> None:
    def before(number: int) -> None:
        assert machine.installed == [("base", "make it"), ("new", "make it")]

    machine.before = before
    compare(install="make it")
    assert machine.said[:2] == ["installing main (aaaaaaaaaa)", "installing HEAD (bbbbbbbbbb)"]


def test_installs_nothing_by_default(machine: Machine, compare: Compare) -> None:
    compare()
    assert machine.installed == []


def test_reports_progress(machine: Machine, compare: Compare, root: Path) -> None:
    compare(design=Design(screening_blocks=2))
    names = {"base": "base main (aaaaaaaaaa)", "new": "new HEAD (bbbbbbbbbb)"}
    drawn = [names[side] for side in order(root, "screening", 2)]
    assert machine.said == [
        "warm-up: base main (aaaaaaaaaa), 8 s",
        "warm-up: new HEAD (bbbbbbbbbb), 8 s",
        (
            "1 run, about 8 s per process: screening takes about 32 s, verdicts on flagged runs at "
            "most 3 min more"
        ),
        *(f"screening {1 + place // 2}/2: {name}, 8 s" for place, name in enumerate(drawn)),
        "(worktrees removed)",
    ]


def test_reports_flagged_runs(machine: Machine, compare: Compare) -> None:
    machine.times |= {"slow": (1, 2), "slower": (1, 3)}
    compare()
    assert "measuring 2 flagged runs again: slow, slower" in machine.said


def test_comparing_one_commit_checks_the_machine(machine: Machine, compare: Compare) -> None:
    result = compare(new=Revision("HEAD", BASE.commit))
    assert result.notes == ("both revisions are the same commit: this only checks the machine",)
    assert result.exit_code == 0
    assert machine.sides["base"].cache != machine.sides["new"].cache


def test_notes_submodules(machine: Machine, compare: Compare, root: Path) -> None:
    tree = root.parent / "trees" / "new"
    tree.mkdir(parents=True)
    (tree / ".gitmodules").write_text("")
    assert compare().notes == ("HEAD (bbbbbbbbbb): submodules are not checked out; see --install",)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (99.4, "99 s"), (100, "2 min"), (5999, "100 min"), (9000, "2.5 h")],
)
def test_formats_durations(seconds: float, text: str) -> None:
    assert ab_plan.duration(seconds) == text


def test_plain_benchmarks_are_compared_too(machine: Machine, compare: Compare, root: Path) -> None:
    machine.times |= {"sort": (2e-6, 2.2e-6), "same": (5e-3, 5e-3)}
    machine.plain = {"sort", "same"}

    def stop(number: int) -> None:
        if number == 10:
            raise KeyboardInterrupt

    machine.before = stop
    with pytest.raises(KeyboardInterrupt):
        compare()
    machine.before = lambda number: None
    result = compare()  # resumes from the journal, which contains them
    assert len(machine.calls) == len(WARMING + screening(root) + verdict(root))
    runs = {(run.run_name, run.workload): run.outcome for run in result.runs}
    assert runs == {
        ("x", "toy"): "PASS",
        ("test_a.py::test[sort]", "pytest-benchmark"): "FAIL",
        ("test_a.py::test[same]", "pytest-benchmark"): "PASS",
    }
    [grid] = page(result).grids
    at = grid.columns.index("time/call")
    assert [row[at].split()[1::3] for row in grid.rows] == [[], ["µs", "µs"], ["ms", "ms"]]
    assert [row[grid.columns.index("ms/batch")] == "-" for row in grid.rows] == [False, True, True]


def test_does_not_compare_times_of_different_timers(machine: Machine, compare: Compare) -> None:
    machine.plain = {"x"}
    ours = {"timer": "synchronized_perf_counter"}
    machine.change = lambda number, key, name: ours if key == "new" else {}
    run = only_run(compare())
    assert (run.outcome, run.exit_code) == ("failed", 2)
    assert run.reason == "timed with other timers: perf_counter, synchronized_perf_counter"


# -- runs that cannot be compared -------------------------------------------------------------

OK: dict[str, Any] = {}
OOM = {"status": "oom", "reason": "2 GiB asked for", "batch_time_s": None}
FAILED = {"status": "failed", "reason": "broken", "batch_time_s": None}


def test_compares_points_renamed_by_the_new_revision(machine: Machine, compare: Compare) -> None:
    old, new = "nano_cpu_bf16_s2_is16_ps4_ts3_bs4", "cpu_bf16_bs4"
    machine.times = {old: (0.01, 0.01), new: (0.01, 0.013)}
    machine.change = lambda number, side, name: (
        {"workload": "digits"} if (side == "base") == (name == old) else None
    )
    found = compare()
    [run] = found.runs
    assert (run.run_name, run.nodeid, run.outcome) == (new, nodeid(new), "FAIL")
    assert run.new_s == pytest.approx(1.3 * run.base_s, rel=0.01)
    assert found.notes == (f"1 record has a new name: {old} is {new} now",)
    # Each side is asked for both names and has one of them.
    both = tuple(sorted(map(nodeid, (old, new))))
    assert {tuple(only) for only in machine.onlys if only} == {both}


SKIPPED = {"status": "skipped", "reason": "no modality", "batch_time_s": None}
DISABLED = {"status": "skipped", "reason": f"{NOT_MEASURED}: off", "batch_time_s": None}


@pytest.mark.parametrize(
    ("old", "new", "outcome", "exit_code", "reason"),
    [
        (OK, None, "missing", 2, "not in the new revision"),
        (FAILED, None, "missing", 2, "not in the new revision"),
        (SKIPPED, None, "missing", 0, "not in the new revision"),
        (None, OK, "new", 0, "not in the base"),
        (FAILED, OK, "new", 0, "was failed: broken"),
        (OOM, OK, "new", 0, "was oom: 2 GiB asked for"),
        (OK, OOM, "oom", 1, "2 GiB asked for"),
        (OOM, OOM, "oom", 0, "as in the base: 2 GiB asked for"),
        (FAILED, OOM, "oom", 2, "2 GiB asked for"),
        (None, OOM, "oom", 0, "2 GiB asked for"),
        (OK, FAILED, "failed", 2, "broken"),
        (None, FAILED, "failed", 2, "broken"),
        (FAILED, FAILED, "failed", 2, "broken"),
        (OK, SKIPPED, "skipped", 2, "no modality"),
        (SKIPPED, SKIPPED, "skipped", 0, "no modality"),
        (None, SKIPPED, "skipped", 0, "no modality"),
        (OK, DISABLED, "disabled", 2, "ran once, not measured: off"),
    ],
)
def test_outcomes_of_runs_not_measured_on_both_sides(
    machine: Machine,
    compare: Compare,
    old: dict[str, Any] | None,
    new: dict[str, Any] | None,
    outcome: str,
    exit_code: int,
    reason: str,
) -> None:
    machine.times["y"] = (1.0, 1.0)
    machine.change = lambda number, key, name: {} if name == "x" else {"base": old, "new": new}[key]
    result = compare()
    run = next(run for run in result.runs if run.run_name == "y")
    assert (run.outcome, run.exit_code, run.reason) == (outcome, exit_code, reason)
    assert (run.nodeid, run.workload) == (nodeid("y"), "toy")
    assert result.exit_code == exit_code
    # If only one side ran out of memory, it is measured again.
    assert len(machine.calls) == (11 if OOM in (old, new) and OK in (old, new) else 10)


@pytest.mark.parametrize("new", [None, SKIPPED, DISABLED])
def test_allows_missing(machine: Machine, compare: Compare, new: dict[str, Any] | None) -> None:
    machine.times["y"] = (1.0, 1.0)
    machine.change = lambda number, key, name: new if (key, name) == ("new", "y") else {}
    assert compare(allow_missing=True).exit_code == 0


@pytest.mark.parametrize("new", [FAILED, OOM])
def test_never_allows_failures(machine: Machine, compare: Compare, new: dict[str, Any]) -> None:
    machine.times["y"] = (1.0, 1.0)
    machine.change = lambda number, key, name: new if (key, name) == ("new", "y") else {}
    assert compare(allow_missing=True).exit_code == {"failed": 2, "oom": 1}[new["status"]]


@pytest.mark.parametrize("change", [SKIPPED, DISABLED, FAILED, OOM])
def test_fails_if_nothing_is_compared(
    machine: Machine, compare: Compare, change: dict[str, Any]
) -> None:
    machine.change = lambda *_: change
    result = compare()
    assert result.exit_code == 2
    assert result.is_empty
    assert machine.calls == WARMING
    assert not any("screening" in line for line in machine.said)


def test_retries_warm_up_that_ran_out_of_memory(
    machine: Machine, compare: Compare, root: Path
) -> None:
    # The third process is the new side's second warm-up.
    machine.change = lambda number, key, name: OOM if number == 1 else {}
    result = compare()
    assert (only_run(result).outcome, result.exit_code) == ("PASS", 0)
    assert machine.calls == ["base", "new", "new", *screening(root)]
    assert "new ran out of memory while compiling, warming up again" in machine.said


def test_new_side_copies_base_compile_cache(machine: Machine, compare: Compare) -> None:
    """Otherwise autotuning could choose different kernels for the same code."""

    def environment(number: int) -> dict[str, Any]:
        if number == 0:
            (machine.sides["base"].cache / "chosen").write_text("x")
        if number == 1:
            assert (machine.sides["new"].cache / "chosen").read_text() == "x"
        return ENVIRONMENT

    machine.environment = environment
    compare()
    (machine.sides["base"].cache / "chosen").write_text("y")
    compare()  # both are warm now and stay unchanged
    assert (machine.sides["new"].cache / "chosen").read_text() == "x"


def test_other_arguments_start_new_journal(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan(root=root, folder=root, base=BASE, new=NEW)
    keys = {plan.key, dataclasses.replace(plan, statistic="median").key}
    monkeypatch.setenv("PYTEST_ADDOPTS", "--int8-mode=w8")
    keys.add(plan.key)
    assert len(keys) == 3


@pytest.mark.usefixtures("same_orders")  # some orders would reach a decision
def test_allows_inconclusive(machine: Machine, compare: Compare) -> None:
    noise = random.Random(2)
    machine.change = lambda number, key, name: {"batch_time_s": noise.uniform(0.01, 0.03)}
    assert only_run(compare()).outcome == "INCONCLUSIVE"
    machine.change = lambda number, key, name: {"batch_time_s": noise.uniform(0.01, 0.03)}
    result = compare(allow_inconclusive=True)
    assert (only_run(result).outcome, result.exit_code) == ("INCONCLUSIVE", 0)


def test_budget_estimate_counts_flagged_runs_only(
    machine: Machine, compare: Compare, root: Path
) -> None:
    machine.times["slow"] = (0.02, 0.0216)
    # The run that screening clears takes all but one second of each process.
    machine.change = lambda number, key, name: {"compile_s": 7.0} if name == "x" else {}
    result = compare(budget_s=10 * PROCESS_S + 4.5)
    assert result.notes == ("--budget ended verdict after 1 of 6 blocks",)
    assert compare(budget_s=1e6).notes == ()  # the same command resumes
    assert machine.calls == WARMING + screening(root) + verdict(root)


def test_slower_run_determines_exit_code_before_missing_run(
    machine: Machine, compare: Compare
) -> None:
    machine.times |= {"slow": (1, 2), "gone": (1, 1)}
    machine.change = lambda number, key, name: None if (key, name) == ("new", "gone") else {}
    result = compare()
    assert [run.exit_code for run in result.runs] == [0, 1, 2]
    assert result.exit_code == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (FAILED, "failed: broken"),
        (OOM, "oom: 2 GiB asked for"),
        (None, "not measured"),
        ({"batch_time_s": None}, "not measured"),
    ],
)
@pytest.mark.parametrize(("number", "stage"), [(7, "screening"), (16, "verdict")])
def test_run_missing_from_one_process(
    machine: Machine,
    compare: Compare,
    change: dict[str, Any] | None,
    reason: str,
    number: int,
    stage: str,
) -> None:
    machine.times |= {"slow": (1, 2), "y": (1, 2)}
    machine.change = lambda n, key, name: change if (n, name) == (number, "y") else {}
    result = compare()
    kept, slow, broken = result.runs
    assert (kept.outcome, slow.outcome) == ("PASS", "FAIL")
    assert (broken.outcome, broken.exit_code) == ("failed", 2)
    assert broken.reason == f"in a process of the {stage}: {reason}"
    assert result.exit_code == 1


def test_failure_in_screening_fails(machine: Machine, compare: Compare) -> None:
    machine.change = lambda number, key, name: FAILED if number == 5 else {}
    result = compare()
    assert (result.exit_code, result.is_empty) == (2, True)
    assert len(machine.calls) == 10


def test_workloads_of_one_test_are_separate_runs(machine: Machine, compare: Compare) -> None:
    machine.times = {"x": (0.01, 0.01), "y": (0.01, 0.02)}
    machine.change = lambda number, key, name: {"nodeid": "t.py::test", "workload": name}
    machine.times["y"] = (1, 1)
    result = compare()
    assert [(run.nodeid, run.workload) for run in result.runs] == [
        ("t.py::test", "x"),
        ("t.py::test", "y"),
    ]


# -- heat -------------------------------------------------------------------------------------

HOT = {"throttled": ["thermal (hardware)"]}


def test_measures_hot_blocks_again(machine: Machine, compare: Compare, root: Path) -> None:
    machine.change = lambda number, key, name: {**HOT, "batch_time_s": 9.0} if number == 4 else {}
    result = compare()
    assert machine.calls == WARMING + screening(root)[:4] + screening(root)[2:]
    run = only_run(result)
    assert (run.outcome, run.judged) == ("PASS", None)
    assert result.notes == ()
    assert result.processes == 12
    said = "screening 2/4: the GPU was throttled (thermal (hardware)), measuring the block again"
    assert machine.said.count(said) == 1


def test_drops_blocks_that_stay_hot(machine: Machine, compare: Compare) -> None:
    machine.change = lambda number, key, name: HOT if 4 <= number < 12 else {}
    result = compare(retries=2)
    # Block 2 is measured three times, then block 3 once, because no retry is left.
    assert len(machine.calls) == 2 + 2 + 3 * 2 + 2 + 2
    assert result.notes == tuple(
        f"dropped screening block {block}: the GPU was throttled (thermal (hardware))"
        for block in (2, 3)
    )


def test_hot_block_is_dropped_without_retries(
    machine: Machine, compare: Compare, root: Path
) -> None:
    machine.change = lambda number, key, name: HOT if number == 2 else {}
    result = compare(retries=0)
    assert machine.calls == WARMING + screening(root)
    run = only_run(result)
    assert (run.outcome, estimate_of(run.screened).blocks) == ("PASS", 3)


def test_retries_are_shared_by_both_stages(machine: Machine, compare: Compare) -> None:
    machine.times["x"] = (1, 2)
    machine.change = lambda number, key, name: HOT if number in (2, 12) else {}
    result = compare(retries=1)
    # The first look has one block, too few; the second one has three.
    assert len(machine.calls) == 2 + 8 + 2 + 16
    assert result.notes == ("dropped verdict block 1: the GPU was throttled (thermal (hardware))",)
    run = only_run(result)
    assert (run.outcome, estimate_of(run.judged).blocks) == ("FAIL", 3)


def test_always_hot_machine_is_inconclusive(machine: Machine, compare: Compare) -> None:
    machine.change = lambda *_: HOT
    result = compare()
    run = only_run(result)
    assert (run.outcome, run.exit_code, run.reason) == (
        "INCONCLUSIVE",
        2,
        "measured only 0 of 6 blocks",
    )
    assert (run.base_s, run.new_s) == (None, None)
    assert len(machine.calls) == 2 + 8 + 3 * 2 + 24
    assert len(result.notes) == 10


def test_heat_affects_only_the_runs_measured_hot(
    machine: Machine, compare: Compare, root: Path
) -> None:
    """Heat during warm-up, or in a run that is not compared, does not count."""
    machine.times["gone"] = (1, 1)

    def change(number: int, key: str, name: str) -> dict[str, Any] | None:
        if name == "gone":
            return None if key == "new" else HOT
        return HOT if number < 2 else {}

    machine.change = change
    compare(allow_missing=True)
    assert machine.calls == WARMING + screening(root)


# -- the journal ------------------------------------------------------------------------------


def test_journals_each_process_immediately(machine: Machine, compare: Compare, root: Path) -> None:
    def before(number: int) -> None:
        [journal] = journals(root)
        records = [json.loads(line) for line in journal.read_text().splitlines()]
        assert sum("results" in record for record in records) == number

    machine.before = before
    compare()
    assert len(machine.calls) == 10


def test_journal_header_describes_the_comparison(
    machine: Machine, compare: Compare, root: Path
) -> None:
    compare(pytest_args=("-k", "größer"), install="make")
    header = json.loads(journals(root)[0].read_text().splitlines()[0])["int8bench_ab"]
    assert header == {
        "schema": 2,
        "base": "a" * 40,
        "new": "b" * 40,
        "pytest_args": ["-k", "größer"],
        "install": "make",
        "design": dataclasses.asdict(Design()),
    }


def interrupt(
    machine: Machine,
    compare: Compare,
    at: int,
    error: type[BaseException] = KeyboardInterrupt,
    **changes: Any,
) -> list[str]:
    """End a comparison when a process would start; return the calls until then and clear them."""

    def before(number: int) -> None:
        if number == at:
            machine.before = lambda number: None
            raise error

    machine.before, machine.calls = before, []
    with pytest.raises(error):
        compare(**changes)
    calls, machine.calls = machine.calls, []
    return calls


def start_of_block(number: int) -> int:
    """Return the first process of the block of a process."""
    if number < 2:
        return number
    return number - number % 2 if number < 10 else number - (number - 10) % 4


@pytest.fixture
def same_orders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every comparison draw the same orders, even for retried blocks."""

    def order_of(stage: str, block: int, attempt: int, seed: str) -> tuple[str, ...]:
        return ab_plan.order_of(stage, block, 0, "x")

    monkeypatch.setattr(blocks, "order_of", order_of)


# First and last processes of each stage and their neighbours, within and between blocks.
@pytest.mark.parametrize("at", [0, 1, 2, 3, 4, 9, 10, 11, 13, 14, 17])
@pytest.mark.usefixtures("same_orders")
def test_resumes_after_interrupt(machine: Machine, compare: Compare, root: Path, at: int) -> None:
    machine.times = {"same": (1, 1), "Größe": (1, 1.05), "slow": (1, 1.03)}
    whole = compare()
    assert len(machine.calls) == 18

    machine.number, machine.calls, machine.said, machine.now = 0, [], [], 5000.0
    interrupt(machine, compare, at)
    journal = journals(root)[-1]
    hint = f"{at} processes are saved in {journal}; run the same command again to resume"
    assert (hint in machine.said) is (at > 0)

    machine.number, machine.calls, machine.said = start_of_block(at), [], []
    resumed = compare()
    assert len(machine.calls) == 18 - start_of_block(at)
    assert resumed.runs == whole.runs
    assert resumed.exit_code == 1
    assert resumed.processes == 18 + at - start_of_block(at)
    assert len(journals(root)) == 2
    if at:
        assert machine.said[0] == f"resuming with {at} processes from {journal}"


@pytest.mark.usefixtures("same_orders")
def test_resumes_after_several_interrupts(machine: Machine, compare: Compare) -> None:
    machine.times = {"same": (1, 1), "slow": (1, 1.03)}
    whole = compare()
    machine.number, machine.now, begun = 0, 5000.0, []
    for at in (1, 3, 3, 11, 12, 17):
        machine.number = start_of_block(machine.number)
        begun.append(len(interrupt(machine, compare, at)))
    machine.number = start_of_block(machine.number)
    assert compare().runs == whole.runs
    assert begun == [1, 2, 1, 9, 2, 7]


@pytest.mark.usefixtures("same_orders")
def test_same_blocks_are_hot_after_resume(machine: Machine, compare: Compare, root: Path) -> None:
    """Used retries stay used, and dropped blocks stay dropped."""
    machine.times["x"] = (1, 2)
    machine.change = lambda number, key, name: HOT if number in (2, 4, 8, 17) else {}
    whole = compare(retries=1)
    assert [note.partition(":")[0] for note in whole.notes] == [
        "dropped screening block 1",
        "dropped screening block 3",
        "dropped verdict block 2",
    ]

    machine.number, machine.calls, machine.now = 0, [], 5000.0
    interrupt(machine, compare, 20, retries=1)
    machine.number, machine.calls = 20, []
    resumed = compare(retries=1)
    assert len(machine.calls) == whole.processes - 20 > 0
    assert (resumed.runs, resumed.notes) == (whole.runs, whole.notes)


def test_resume_rejects_hot_block_if_killed_before_the_heat_check(
    machine: Machine, compare: Compare, monkeypatch: pytest.MonkeyPatch, root: Path
) -> None:
    """The journal ends with the last process of a hot block."""
    machine.change = lambda number, key, name: HOT if number == 2 else {}
    with monkeypatch.context() as patch:

        def killed(*_: object) -> Iterator[str]:
            raise KeyboardInterrupt

        patch.setattr(blocks, "throttle_reasons", killed)
        with pytest.raises(KeyboardInterrupt):
            compare()
    assert len(machine.calls) == 4
    compare()
    assert machine.calls == [*WARMING, *screening(root)[:2], *screening(root)]


@pytest.mark.parametrize("end", ['{"stage": "scr', '{"stage": "screening"}', "Grö"])
def test_drops_partial_journal_line(
    machine: Machine, compare: Compare, root: Path, end: str
) -> None:
    interrupt(machine, compare, 5)
    [journal] = journals(root)
    whole = journal.read_bytes()
    journal.write_bytes(whole + end.encode()[:-1])
    assert interrupt(machine, compare, 6) == [screening(root)[2]]
    text = journal.read_bytes()
    assert text.startswith(whole)
    assert all(json.loads(line) for line in text.splitlines())
    assert text.count(b"\n") == whole.count(b"\n") + 1


@pytest.mark.parametrize("left", [b"", b'{"int8bench_ab": {"sch'])
def test_needs_journal_header(machine: Machine, compare: Compare, root: Path, left: bytes) -> None:
    interrupt(machine, compare, 0)
    [journal] = journals(root)
    journal.write_bytes(left)
    assert compare().exit_code == 0
    assert len(machine.calls) == 10


@pytest.mark.parametrize(
    "line",
    [
        "\0\0\0",
        "[]",
        '"text"',
        '{"stage": "screening"}',
        '{"results": [{"nodeid": "x"}]}',
        '{"results": [], "stage": "screening", "another": 1}',
        "\udce4",
    ],
)
def test_rejects_damaged_journal(machine: Machine, compare: Compare, root: Path, line: str) -> None:
    interrupt(machine, compare, 2)
    [journal] = journals(root)
    whole = journal.read_bytes()
    journal.write_bytes(whole + os.fsencode(line) + b"\n")
    with pytest.raises(AbError) as caught:
        compare()
    assert str(caught.value) == f"{journal} is damaged (line 5); remove it to start over"
    assert journal.read_bytes().startswith(whole)


def test_ignores_journal_of_other_version(machine: Machine, compare: Compare, root: Path) -> None:
    interrupt(machine, compare, 5)
    [journal] = journals(root)
    text = journal.read_text().replace('"schema": 2', '"schema": 1', 1)
    journal.write_text(text)
    machine.calls, machine.said, machine.now = [], [], 5000.0
    compare()
    assert len(machine.calls) == 10
    assert journal.read_text() == text
    assert machine.said[0] == (
        f"{journal} was written by another version of int8bench ab (schema 1 instead of 2): "
        "keeping it, and starting a new journal"
    )


def test_finished_comparison_starts_over(machine: Machine, compare: Compare, root: Path) -> None:
    compare()
    [first] = journals(root)
    text = first.read_text()
    machine.calls, machine.said = [], []
    compare()
    assert len(machine.calls) == 10
    assert not any("resuming" in line for line in machine.said)
    assert first.read_text() == text
    assert len(journals(root)) == 2


def test_journals_started_in_one_second_have_different_names(
    machine: Machine, compare: Compare, root: Path
) -> None:
    for _ in range(2):
        machine.now = 1000.0
        compare()
    machine.now = 1000.0
    interrupt(machine, compare, 25)
    assert len(journals(root)) == 3
    machine.calls = []
    machine.now = 1000.0
    compare()
    assert len(machine.calls) == 6
    assert len(journals(root)) == 3


@pytest.mark.parametrize(
    "change",
    [
        {"pytest_args": ("benchmarks",)},
        {"install": "make"},
        {"new": Revision("HEAD", "c" * 40)},
        {"base": Revision("HEAD", "c" * 40)},
        {"design": Design(screening_blocks=6)},
    ],
)
def test_other_comparison_starts_its_own_journal(
    machine: Machine, compare: Compare, root: Path, change: dict[str, Any]
) -> None:
    interrupt(machine, compare, 5)
    compare(**change)
    assert machine.calls[:2] == WARMING
    assert len(journals(root)) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"new": Revision("topic", NEW.commit)},
        {"retries": 5},
        {"budget_s": 1e6},
        {"allow_missing": True},
    ],
)
def test_resumes_despite_changed_name_retries_budget_or_allowances(
    machine: Machine, compare: Compare, root: Path, change: dict[str, Any]
) -> None:
    interrupt(machine, compare, 5)
    compare(**change)
    assert len(machine.calls) == 10 - 4
    assert len(journals(root)) == 1


class FullDisk:
    """A file that accepts only what fits on the disk."""

    def __init__(self, file: BinaryIO, room: int) -> None:
        self._file, self._room = file, room

    def __enter__(self) -> FullDisk:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, data: bytes) -> None:
        self._file.write(data[: self._room])
        self._file.flush()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_full_disk_is_one_line_and_keeps_earlier_records(
    machine: Machine, compare: Compare, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Path.open
    with monkeypatch.context() as patch:

        def full(path: Path, mode: str = "r", **options: Any) -> Any:
            file = opened(path, mode, **options)
            is_full = path.suffix == ".jsonl" and mode == "ab" and machine.number == 5
            return FullDisk(file, 20) if is_full else file

        patch.setattr(Path, "open", full)
        with pytest.raises(AbError) as caught:
            compare()
    [journal] = journals(root)
    assert str(caught.value) == f"cannot write {journal}: No space left on device"
    assert "(worktrees removed)" in machine.said
    machine.calls = []
    assert compare().exit_code == 0
    assert machine.calls == screening(root)[2:]


@pytest.mark.parametrize("room", [0, 1, 200])
def test_briefly_full_disk_loses_no_process(
    machine: Machine, compare: Compare, root: Path, room: int
) -> None:
    """Records that could not be written are written when the command ends."""

    def full(number: int, key: str, name: str) -> dict[str, Any]:
        if number == 5:
            stack.enter_context(failing(room, errno.ENOSPC, keeps_half=room > 1))
        return {}

    machine.change = full
    with contextlib.ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        saving = AbJournal._is_saved

        def saved(journal: AbJournal) -> bool:
            stack.close()
            return saving(journal)

        patch.setattr(AbJournal, "_is_saved", saved)
        with pytest.raises(AbError, match=r"^cannot write .*: No space left on device$"):
            compare()
    [journal] = journals(root)
    assert all(json.loads(line) for line in journal.read_text().splitlines())
    assert machine.said[-1].startswith(f"6 processes are saved in {journal}; ")
    machine.calls, machine.change = [], lambda *_: {}
    assert compare().exit_code == 0
    assert machine.calls == screening(root)[4:]


def test_verdict_survives_if_the_journal_cannot_be_finished(
    machine: Machine, compare: Compare, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = AbJournal.finish

    def full(journal: AbJournal) -> None:
        with failing(3, errno.EDQUOT):
            finish(journal)

    monkeypatch.setattr(AbJournal, "finish", full)
    assert compare().exit_code == 0
    [journal] = journals(root)
    assert machine.said[-1].startswith("cannot write ")
    assert all(json.loads(line) for line in journal.read_text().splitlines())


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ClearError, RuntimeError])
def test_explains_how_to_resume_after_an_error(
    machine: Machine, compare: Compare, root: Path, error: type[BaseException]
) -> None:
    interrupt(machine, compare, 3, error)
    assert machine.said[-2:] == [
        "(worktrees removed)",
        f"3 processes are saved in {journals(root)[0]}; run the same command again to resume",
    ]


def test_rejects_a_second_gate_in_one_folder(
    machine: Machine, compare: Compare, root: Path
) -> None:
    compare()
    folder = root / ".benchmarks" / "int8bench" / "ab"
    said = len(machine.said)
    with FileLock(folder / "lock"), pytest.raises(AbError) as caught:
        compare()
    assert str(caught.value) == (
        f"another int8bench ab is running in {folder}; wait for it to finish: two at once would "
        "disturb each other's timings"
    )
    assert len(machine.said) == said
    assert compare().exit_code == 0


def test_git_ignores_the_folder(machine: Machine, compare: Compare, root: Path) -> None:
    compare()
    assert (root / ".benchmarks" / "int8bench" / ".gitignore").read_text() == "*\n"


# -- the machine ------------------------------------------------------------------------------


def test_rejects_sides_with_different_software(machine: Machine, compare: Compare) -> None:
    machine.environment = lambda number: {**ENVIRONMENT, "packages": {"torch": f"2.{number}"}}
    with pytest.raises(AbError) as caught:
        compare()
    assert str(caught.value) == (
        "HEAD (bbbbbbbbbb) and the base must run with the same software on the same machine, got "
        "torch 2.0 -> 2.1; only the project's own code may differ"
    )
    assert machine.calls == WARMING


@pytest.mark.parametrize("at", [2, 6])
def test_rejects_machine_that_changes_midway(
    machine: Machine, compare: Compare, root: Path, at: int
) -> None:
    machine.environment = lambda number: (
        ENVIRONMENT if number < at else {**ENVIRONMENT, "cpu": "Xeon", "packages": {}}
    )
    with pytest.raises(AbError) as caught:
        compare()
    [journal] = journals(root)
    assert str(caught.value) == (
        "the machine or its software changed since the comparison began: cpu EPYC -> Xeon, "
        f"torch 2.11.0 -> None; remove {journal} to start over"
    )
    assert len(machine.calls) == at + 1
    machine.environment, machine.calls = lambda number: ENVIRONMENT, []
    compare()  # the journal has no results from the other machine
    assert len(machine.calls) == 10 - start_of_block(at)


def test_no_resume_on_another_machine(machine: Machine, compare: Compare, root: Path) -> None:
    interrupt(machine, compare, 4)
    machine.environment = lambda number: {**ENVIRONMENT, "cpu": "Xeon"}
    with pytest.raises(AbError, match="began: cpu EPYC -> Xeon; remove "):
        compare()


def test_commits_may_differ(machine: Machine, compare: Compare) -> None:
    machine.environment = lambda number: {**ENVIRONMENT, "commit": number, "dirty": None}
    assert compare().exit_code == 0


# -- caches -----------------------------------------------------------------------------------


def test_resume_warms_a_lost_cache(machine: Machine, compare: Compare, root: Path) -> None:
    interrupt(machine, compare, 5)
    cache = machine.sides["new"].cache
    for path in cache.iterdir():
        path.unlink()
    machine.calls = []
    compare()
    assert machine.calls == ["new", *screening(root)[2:]]


def test_removes_the_oldest_caches(machine: Machine, compare: Compare, root: Path) -> None:
    for index in range(5):
        machine.now += 1
        compare(base=Revision("x", f"{index}" * 40), new=Revision("y", f"{index + 1}" * 40))
        for key in ("base", "new"):
            os.utime(machine.sides[key].cache, (index, index))
    caches = machine.sides["new"].cache.parent
    names = {f"base-{n}" for n in ("2" * 12, "3" * 12, "4" * 12)}
    names |= {f"new-{str(n) * 12}-{str(n + 1) * 12}" for n in (2, 3, 4)}
    assert {path.name for path in caches.iterdir()} == names


# -- designs and time -------------------------------------------------------------------------


def test_rejects_powerless_design_first(machine: Machine, compare: Compare, root: Path) -> None:
    with pytest.raises(DesignError) as caught:
        compare(design=Design(verdict_blocks=2, noise=0.03))
    assert "2 verdict blocks detect a slowdown of 5% with a probability of only" in str(
        caught.value
    )
    assert "(1 run, noise 3% between processes)" in str(caught.value)
    assert list(root.iterdir()) == []
    assert machine.said == []


def test_rejects_small_design_before_screening(machine: Machine, compare: Compare) -> None:
    machine.times = {f"x{index}": (1, 1) for index in range(30)}
    design = Design(verdict_blocks=2)
    design.check(runs=1)
    with pytest.raises(DesignError) as caught:
        compare(design=design)
    assert "(30 runs, noise 1% between processes)" in str(caught.value)
    assert machine.calls == WARMING


def test_design_counts_compared_runs_only(machine: Machine, compare: Compare) -> None:
    machine.times = {f"x{index}": (1, 1) for index in range(30)}
    machine.change = lambda number, key, name: {} if name == "x0" else SKIPPED
    assert compare(design=Design(verdict_blocks=2)).exit_code == 0


def test_rejects_budget_below_screening(machine: Machine, compare: Compare, root: Path) -> None:
    with pytest.raises(AbError) as caught:
        compare(budget_s=79)
    assert str(caught.value) == (
        "--budget 79 s is too short: screening alone needs about 64 s, after 16 s of warm-up"
    )
    assert machine.calls == WARMING
    machine.calls = []
    assert compare(budget_s=79).exit_code == 0  # the caches are warm now
    assert machine.calls == screening(root)


def test_time_estimate_excludes_compilation(machine: Machine, compare: Compare) -> None:
    """Processes after the first use its compiled code."""
    machine.change = lambda number, key, name: {"compile_s": 6.0} if number < 2 else {}
    compare()
    assert any("about 2 s per process: screening takes about 16 s" in line for line in machine.said)


def test_budget_ends_the_verdict_stage(machine: Machine, compare: Compare, root: Path) -> None:
    noise = random.Random(0)
    machine.change = lambda number, key, name: {"batch_time_s": noise.uniform(0.01, 0.03)}
    result = compare(budget_s=10 * PROCESS_S + 3.9 * 4 * PROCESS_S)
    assert machine.calls == WARMING + screening(root) + verdict(root, 3)
    assert result.notes == ("--budget ended verdict after 3 of 6 blocks",)
    assert estimate_of(only_run(result).judged).blocks == 3


def test_budget_spent_without_a_verdict_fails(machine: Machine, compare: Compare) -> None:
    machine.times["x"] = (1, 2)
    result = compare(budget_s=10 * PROCESS_S)
    run = only_run(result)
    assert (run.outcome, run.reason, result.exit_code) == (
        "INCONCLUSIVE",
        "measured only 0 of 6 blocks",
        2,
    )
    assert result.notes == ("--budget ended verdict after 0 of 6 blocks",)


def test_budget_ends_slow_screening(machine: Machine, compare: Compare, root: Path) -> None:
    def before(number: int) -> None:
        machine.now += 20 if number == 4 else 0

    machine.before = before
    result = compare(budget_s=10 * PROCESS_S)
    assert machine.calls == WARMING + screening(root)[:4]
    assert result.notes == ("--budget ended screening after 2 of 4 blocks",)
    assert estimate_of(only_run(result).screened).blocks == 2


OVERRUN = (
    "--budget 80 s is used up: waiting for the processes of this block; no other block will start"
)


def test_reports_block_that_overruns_the_budget(machine: Machine, compare: Compare) -> None:
    def before(number: int) -> None:
        machine.now += 60 if number == 4 else 0

    machine.before = before
    result = compare(budget_s=10 * PROCESS_S)
    assert machine.said.count(OVERRUN) == 1
    assert result.notes == ("--budget ended screening after 2 of 4 blocks",)


def test_reports_process_that_overruns_the_budget(
    machine: Machine, compare: Compare, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = []

    class Timer(threading.Timer):
        def start(self) -> None:
            waits.append(self.interval)
            if len(waits) == 3:
                self.function()

    monkeypatch.setattr(blocks.threading, "Timer", Timer)
    compare(budget_s=10 * PROCESS_S)
    assert waits == [80, 72, 64]
    assert machine.said.count(OVERRUN) == 1


def test_no_hot_retry_over_budget(machine: Machine, compare: Compare) -> None:
    machine.change = lambda number, key, name: HOT if number == 8 else {}
    result = compare(budget_s=10 * PROCESS_S)
    assert len(machine.calls) == 10
    assert result.notes == ("--budget ended screening after 3 of 4 blocks",)


def test_budget_applies_to_one_command(machine: Machine, compare: Compare, root: Path) -> None:
    """A resumed comparison has a full budget, and saved results cost nothing."""
    interrupt(machine, compare, 8)
    result = compare(budget_s=2 * PROCESS_S)
    assert machine.calls == screening(root)[6:]
    assert (result.exit_code, result.notes) == (0, ())


def test_resumes_within_small_budget(machine: Machine, compare: Compare) -> None:
    interrupt(machine, compare, 6)
    result = compare(budget_s=1)
    assert machine.calls == []
    assert result.notes == ("--budget ended screening after 2 of 4 blocks",)


def test_resume_keeps_screening_of_begun_verdicts(
    machine: Machine, compare: Compare, root: Path
) -> None:
    """This holds with more retries, too, which might flag runs without verdict blocks."""
    machine.times["x"] = (1, 2)
    machine.change = lambda number, key, name: HOT if number == 2 else {}
    interrupt(machine, compare, 12, retries=0)
    result = compare(retries=3)
    # The half-finished block is measured again, in a new order.
    again = [*ab_plan.order_of("verdict", 0, 1, journals(root)[-1].stem)]
    assert machine.calls == again + verdict(root)[4:]
    assert result.notes == (
        "dropped screening block 1: the GPU was throttled (thermal (hardware))",
    )


def test_resumed_screening_uses_additional_retries(
    machine: Machine, compare: Compare, root: Path
) -> None:
    machine.change = lambda number, key, name: HOT if number == 2 else {}
    interrupt(machine, compare, 8, retries=0)
    assert compare(retries=1).notes == ()
    assert machine.calls == screening(root)[:2] + screening(root)[6:]
