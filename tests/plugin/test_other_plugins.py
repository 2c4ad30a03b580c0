"""Features of pytest, pytest-benchmark and other plugins keep working."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from pytest_int8bench.results.reading import read
from toys import projects
from toys.projects import (
    FAILS,
    SMOKE,
    THROUGHPUT,
    bf16,
    ids,
    int8,
    journals,
    load,
    make_project,
    statuses,
    toy,
    without,
)

# In batches of 7 a signal arrives when the baseline runs again after the candidate, that is, while
# the speedup is measured and the rounds of the candidate's test are over.
TOY = f"""{toy(bs5=FAILS, bs7="interrupt(self)")}

ran = []


def interrupt(model):
    if not ran or ran[-1] != id(model):
        if id(model) in ran:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.kill(os.getpid(), getattr(signal, os.environ["TOY_SIGNAL"]))
        ran.append(id(model))


def sized(name, width):
    # As many tokens as the model is wide, so that results tell models apart.
    units = lambda p: {{"samples": p.batch_size, "tokens": width * p.batch_size}}
    return make(name, lambda p: Toy(width), units=units)


def first():
    return sized("first", 48)


def second():
    return sized("second", 96)
"""
CONFTEST = f"""{projects.CONFTEST}

def pytest_unconfigure():
    import sys
    from pathlib import Path

    Path("torch.loaded").write_text(str("torch" in sys.modules))
"""
MODEL = """
def test_model(int8_model, int8_batch):
    assert int8_model(*int8_batch).shape == int8_batch[0].shape
"""


@pytest.fixture
def project(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, forked: None
) -> pytest.Pytester:
    """Return a project with a workload, a throughput test and a test of its model."""
    files = {"toy": TOY, "conftest": CONFTEST, "test_one": THROUGHPUT, "test_two": MODEL}
    ini = "addopts = --strict-markers\nmarkers =\n    slow\n"
    return make_project(pytester, monkeypatch, ini=ini, **files)


def run(project: pytest.Pytester, *options: str, using: str | None = None) -> pytest.RunResult:
    """Run pytest without optional plugins except ``using``."""
    return project.runpytest_subprocess(*SMOKE, *without(using), *options)


def one(*names: str) -> list[str]:
    """Return node ids of the throughput test."""
    return [f"test_one.py::test_throughput[{name}]" for name in names]


def nothing_saved(project: pytest.Pytester) -> bool:
    return not [*project.path.glob("*.json"), *project.path.glob(".benchmarks/**/*.json*")]


# -- collecting ---------------------------------------------------------------------------------


def test_collecting_builds_and_writes_nothing(project: pytest.Pytester) -> None:
    result = run(project, "--collect-only", "-q", "--benchmark-json=out.json")
    assert result.ret == pytest.ExitCode.OK
    assert ids(result) == [*one(bf16(4), int8(4)), f"test_two.py::test_model[{int8(4)}]"]
    assert (project.path / "torch.loaded").read_text() == "False"
    assert nothing_saved(project)

    # -m selects throughput tests as benchmarks, too.
    result = run(project, "--collect-only", "-q", "-m", "not benchmark")
    assert ids(result) == [f"test_two.py::test_model[{int8(4)}]"]


def test_points_stay_together_if_plugins_reorder_tests(project: pytest.Pytester) -> None:
    project.makeconftest(
        """
        import pytest


        @pytest.fixture(params=["a", "b"])
        def width(request):
            return request.param


        @pytest.fixture
        def int8_workload(width, int8_params):
            pass


        def pytest_collection_modifyitems(items):
            items.reverse()
        """
    )
    project.makepyfile(test_three=THROUGHPUT, test_four="def test_plain():\n    pass\n")
    result = run(project, "--collect-only", "-q")
    assert result.ret == pytest.ExitCode.OK
    tests = [f"test_{name}.py::test_throughput" for name in ("three", "one")]
    # Reversed: test_two, test_three, test_one, test_four; the last parameter first.
    assert ids(result) == [
        line
        for width in ("b", "a")
        for line in (
            *(f"{test}[{width}-{bf16(4)}]" for test in tests),
            f"test_two.py::test_model[{width}-{int8(4)}]",
            *(f"{test}[{width}-{int8(4)}]" for test in tests),
        )
    ] + ["test_four.py::test_plain"]


# -- pytest-benchmark ---------------------------------------------------------------------------


def test_benchmarks_can_be_skipped(project: pytest.Pytester) -> None:
    (project.path / "test_two.py").unlink()
    result = run(project, "--benchmark-skip", "--benchmark-json=out.json", "-rs")
    assert result.ret == pytest.ExitCode.OK
    result.assert_outcomes(skipped=2)
    result.stdout.fnmatch_lines(["SKIPPED [[]2]*: Skipping benchmark (--benchmark-skip active)."])
    result.stdout.no_fnmatch_line("*- int8bench -*")
    assert (project.path / "torch.loaded").read_text() == "False"
    assert nothing_saved(project)


def test_disabled_benchmarks_run_once_unmeasured(project: pytest.Pytester) -> None:
    (project.path / "test_two.py").unlink()
    (project.path / "out.json").write_text("an earlier measurement")
    save = ("--benchmark-json=out.json", "--benchmark-autosave")
    result = run(project, "--benchmark-disable", *save, "-rs")
    assert result.ret == pytest.ExitCode.OK
    result.assert_outcomes(skipped=2)
    reason = "ran once, not measured: pytest-benchmark is disabled"
    result.stdout.fnmatch_lines(["not saved as JSON: pytest-benchmark is disabled"])
    result.stdout.fnmatch_lines([f"SKIPPED [[]2]*: {reason}"])
    # Otherwise comparisons would later find a file without timings.
    assert (project.path / "out.json").read_text() == "an earlier measurement"
    assert not list(project.path.glob(".benchmarks/**/*.json"))
    [path] = journals(project)
    assert [(entry.nodeid, entry.status, entry.reason) for entry in read(path).results] == [
        (nodeid, "skipped", reason) for nodeid in one(bf16(4), int8(4))
    ]


@pytest.mark.slow
def test_supports_groups_markers_saving_and_comparing(project: pytest.Pytester) -> None:
    project.makepyfile(
        test_one="""
        import pytest

        pytestmark = pytest.mark.benchmark(group="of the module", min_rounds=3)


        def test_throughput(int8_throughput, benchmark):
            int8_throughput()
            assert benchmark.stats.options["min_rounds"] == 3


        @pytest.mark.benchmark(group="of the test")
        def test_grouped(int8_throughput, benchmark):
            int8_throughput()
            assert benchmark.stats.options["min_rounds"] == 3


        @pytest.mark.slow
        def test_slow(int8_throughput):
            int8_throughput()


        def test_plain():
            pass
        """
    )
    result = run(project, "--benchmark-only", "-m", "not slow", "--benchmark-save=base", "-rs")
    assert result.ret == pytest.ExitCode.OK
    result.assert_outcomes(passed=4, skipped=2, deselected=2)
    only = "Skipping non-benchmark (--benchmark-only active)."
    result.stdout.fnmatch_lines_random(
        [
            "*- benchmark 'of the module': 2 tests -*",
            "*- benchmark 'of the test': 2 tests -*",
            f"SKIPPED [[]1] test_one.py: {only}",
            f"SKIPPED [[]1] test_two.py: {only}",
            "saved: .benchmarks",
        ]
    )
    grouped = [f"test_one.py::test_grouped[{name}]" for name in (bf16(4), int8(4))]
    plain = one(bf16(4), int8(4))
    [path] = project.path.glob(".benchmarks/*/0001_base.json")
    saved = load(path)
    assert {entry["fullname"]: entry["group"] for entry in saved["benchmarks"]} == {
        **dict.fromkeys(plain, "of the module"),
        **dict.fromkeys(grouped, "of the test"),
    }
    assert statuses(read(path).results) == dict.fromkeys(plain + grouped, "ok")
    [journal] = journals(project)
    assert read(path).results == read(journal).results

    # A candidate without its baseline's test, compared with a far slower run of another
    # commit ...
    saved["int8bench"]["environment"] |= {"commit": "def", "dirty": True}
    scale_times(path, saved, 1e6)
    compare = ("-k", "grouped and w8a8", "--benchmark-compare", "--benchmark-compare-fail")
    result = run(project, *compare, "median:5%", "--benchmark-json=out.json")
    assert result.ret == pytest.ExitCode.OK
    result.assert_outcomes(passed=1, deselected=7)
    result.stdout.no_fnmatch_line("*another machine or software*")
    result.stdout.fnmatch_lines(["*- benchmark 'of the test': 2 tests -*"])
    result.stdout.fnmatch_lines_random(
        [f"test_grouped[[]{int8(4)}] (NOW) *", f"test_grouped[[]{int8(4)}] (0001_base) *"]
    )
    [measured] = read(project.path / "out.json").results
    assert (measured.nodeid, measured.speedup_method) == (grouped[1], "interleaved")
    assert measured.speedup > 0

    # ... and with a far faster one: the table is shown in both cases.
    scale_times(path, saved, 1e-6)
    result = run(project, *compare, "median:5%")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stderr.fnmatch_lines(["Performance has regressed:", f"*{int8(4)}* (0001_base) - *"])
    result.stdout.fnmatch_lines(["*- int8bench -*", f"toy *{int8(4)} *x [[]*", "journal: *"])


def scale_times(path: Path, saved: dict[str, Any], factor: float) -> None:
    """Write ``saved`` to ``path`` as if it had been measured on another machine."""
    scaled = json.loads(json.dumps(saved))
    for entry in scaled["benchmarks"]:
        for name in ("min", "max", "mean", "stddev", "median", "iqr", "q1", "q3"):
            entry["stats"][name] *= factor
    path.write_text(json.dumps(scaled))


# -- choosing tests, and stopping ---------------------------------------------------------------


@pytest.mark.slow
def test_supports_stopping_and_rerunning_failures(project: pytest.Pytester) -> None:
    (project.path / "test_two.py").unlink()
    sweep = "--int8-set=batch_size=4,5,3"
    finished, failed = one(bf16(4), int8(4)), one(bf16(5), int8(5))
    result = run(project, sweep, "-x", "-Werror:Benchmark fixture was not used")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines(
        [f"toy *{int8(4)} *", f"failed: toy: {bf16(5)}: ValueError: five is too many"]
    )
    [first] = journals(project)
    assert statuses(read(first).results) == {**dict.fromkeys(finished, "ok"), failed[0]: "failed"}

    # The failed point first, then model by model up to the second failure.
    result = run(project, sweep, "--ff", "--maxfail=2")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.assert_outcomes(passed=2, failed=2)
    second = journals(project)[1]
    assert [(entry.nodeid, entry.status) for entry in read(second).results] == [
        (failed[0], "failed"),
        (finished[0], "ok"),
        (finished[1], "ok"),
        (failed[1], "failed"),
    ]

    for option, chosen in (
        ("--lf", failed),
        ("--ff", [*failed, *finished, *one(bf16(3), int8(3))]),
    ):
        result = run(project, sweep, option, "--collect-only", "-q")
        assert result.ret == pytest.ExitCode.OK
        assert ids(result) == chosen


@pytest.mark.parametrize(
    ("name", "code"), [("SIGINT", pytest.ExitCode.INTERRUPTED), ("SIGKILL", -signal.SIGKILL)]
)
def test_finished_results_survive_a_signal(
    project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, name: str, code: int
) -> None:
    (project.path / "test_two.py").unlink()
    monkeypatch.setenv("TOY_SIGNAL", name)
    result = run(project, "--int8-set=batch_size=7,3", "--benchmark-json=out.json")
    assert result.ret == code
    finished = one(bf16(7))
    [path] = journals(project)
    assert statuses(read(path).results) == dict.fromkeys(finished, "ok")
    if name == "SIGKILL":
        assert not (project.path / "out.json").exists()
        return
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["*- int8bench -*", f"toy *{bf16(7)} *", "saved: out.json"])
    assert statuses(read(project.path / "out.json").results) == dict.fromkeys(finished, "ok")
    # The interrupted point's rounds were over, but its measurement was not.
    timed = [entry["fullname"] for entry in load(project.path / "out.json")["benchmarks"]]
    assert timed == finished


# -- other plugins ------------------------------------------------------------------------------


@pytest.mark.slow
def test_xdist_workers_on_one_cpu_measure_nothing(project: pytest.Pytester) -> None:
    pytest.importorskip("xdist")
    (project.path / "test_two.py").unlink()
    result = run(
        project, "-n2", "-rs", "--benchmark-json=out.json", "--benchmark-autosave", using="xdist"
    )
    assert result.ret == pytest.ExitCode.OK
    result.assert_outcomes(skipped=2)
    reason = "ran once, not measured: 2 workers on one CPU slow each other down; run with -n1"
    result.stdout.fnmatch_lines([f"SKIPPED [[]2]*: {reason}"])
    result.stdout.fnmatch_lines(["not saved as JSON: pytest-benchmark is disabled"])
    assert not list(project.path.glob("*.json"))
    [path] = journals(project)
    assert {(entry.nodeid, entry.status, entry.reason) for entry in read(path).results} == {
        (nodeid, "skipped", reason) for nodeid in one(bf16(4), int8(4))
    }


@pytest.mark.slow
def test_randomly_keeps_points_and_inputs(project: pytest.Pytester) -> None:
    pytest.importorskip("pytest_randomly")
    project.makepyfile(
        test_two=THROUGHPUT,
        test_three="""
        def test_sums(int8_batch, int8_model):
            with open("sums", "a") as file:
                print(int8_batch[0].sum().item(), int8_model(*int8_batch).sum().item(), file=file)
        """,
    )
    orders = set()
    for seed in (1, 2, 3):
        result = run(
            project,
            f"--randomly-seed={seed}",
            "--int8-set=batch_size=4,3,2",
            "--collect-only",
            "-q",
            using="randomly",
        )
        assert result.ret == pytest.ExitCode.OK
        order = ids(result)
        orders.add(tuple(order))
        points = list(dict.fromkeys(node.partition("[")[2][:-1] for node in order))
        batches = list(dict.fromkeys(int(point.split("_bs")[1][0]) for point in points))
        assert sorted(batches) == [2, 3, 4]
        assert points == [name(batch) for batch in batches for name in (bf16, int8)]
        # A point never comes back after another one.
        assert [node.partition("[")[2][:-1] for node in order] == [
            point for point in points for _ in range(2 if "int8" not in point else 3)
        ]
    assert len(orders) > 1  # otherwise nothing was shuffled

    for seed in (1, 2):
        result = run(
            project, f"--randomly-seed={seed}", "--int8-mode=off", "-k", "sums", using="randomly"
        )
        assert result.ret == pytest.ExitCode.OK
        result.assert_outcomes(passed=1, deselected=2)
    first, second = (project.path / "sums").read_text().splitlines()
    assert first == second


def test_codspeed_installed_but_disabled_changes_nothing(project: pytest.Pytester) -> None:
    pytest.importorskip("pytest_codspeed")
    result = run(project, "--int8-mode=off", using="codspeed")
    assert result.ret == pytest.ExitCode.OK
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(["codspeed: *disabled*"])
    # With mode off, only baselines are measured, and int8_model is one.
    [path] = journals(project)
    [entry] = read(path).results
    assert (entry.nodeid, entry.status, entry.speedup) == (*one(bf16(4)), "ok", None)


@pytest.mark.slow
def test_codspeed_without_pytest_benchmark_measures_no_points(project: pytest.Pytester) -> None:
    pytest.importorskip("pytest_codspeed")
    project.makepyfile(
        test_three="""
        def test_plain(benchmark):
            assert benchmark(lambda: 3) == 3
        """
    )
    result = run(project, "--codspeed", "-rs", "--benchmark-json=out.json", using="codspeed")
    assert result.ret == pytest.ExitCode.OK
    result.assert_outcomes(passed=1, skipped=2, deselected=1)
    reason = "not measured: int8_throughput needs pytest-benchmark, which is not active"
    result.stdout.fnmatch_lines([f"SKIPPED [[]2]*: {reason}"])
    result.stdout.fnmatch_lines(["not saved as JSON: pytest-benchmark is disabled"])
    assert not (project.path / "out.json").exists()
    [path] = journals(project)
    assert statuses(read(path).results) == dict.fromkeys(one(bf16(4), int8(4)), "skipped")


# -- several workloads --------------------------------------------------------------------------


def test_several_workloads_in_one_session(project: pytest.Pytester) -> None:
    (project.path / "conftest.py").unlink()
    (project.path / "test_two.py").unlink()
    project.makepyfile(
        test_one="""
        import pytest


        @pytest.mark.int8(workload="toy.py:first")
        def test_first(int8_throughput):
            int8_throughput()


        @pytest.mark.int8(workload="toy.py:second")
        def test_second(int8_throughput):
            int8_throughput()
        """
    )
    for name, width in (("third", 128), ("fourth", 160)):
        folder = project.mkpydir(name)
        override = f'return toy.sized("{name}", {width})'
        (folder / "conftest.py").write_text(CONFTEST.replace("return toy.make()", override))
        (folder / "test_one.py").write_text(THROUGHPUT)
    result = run(project)
    assert result.ret == pytest.ExitCode.OK
    result.assert_outcomes(passed=8)
    [path] = journals(project)
    results = read(path).results
    tests = {
        "fourth": ("fourth/test_one.py::test_throughput[", 160),
        "first": ("test_one.py::test_first[toy.py:first-", 48),
        "second": ("test_one.py::test_second[toy.py:second-", 96),
        "third": ("third/test_one.py::test_throughput[", 128),
    }
    assert sorted((entry.workload, entry.nodeid) for entry in results) == sorted(
        (name, f"{test}{point}]")
        for name, (test, _) in tests.items()
        for point in (bf16(4), int8(4))
    )
    for before, after in zip(results[::2], results[1::2], strict=True):
        assert (before.workload, before.run_name) == (after.workload, bf16(4))
    for entry in results:
        width = tests[entry.workload][1]
        assert entry.tokens_per_s == pytest.approx(width * entry.samples_per_s)
        assert (entry.speedup is None) is (entry.run_name == bf16(4))
