"""Test the plugin as users see it, with several checks of each pytest subprocess."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pytest_int8bench.plugin.session import Session
from pytest_int8bench.plugin.settings import Settings
from pytest_int8bench.results.reading import read
from pytest_int8bench.workloads import Workload
from toys import projects
from toys.projects import CONFTEST, SMOKE, THROUGHPUT, ids, journaled, load, make_project

BF16, W8A8, W8 = projects.bf16(4), projects.int8(4), projects.int8(4, "w8")

# A transformer of one block.
TOY = f"""{projects.TOY}

Mlp, plain = Toy, make


class Toy(Mlp):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(32, 96)
        self.proj = nn.Linear(32, 32)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.proj(out.transpose(1, 2).flatten(2))
        return x + super().forward(x)


def make():
    return plain(build=lambda p: Toy())
"""
BAD_WORKLOADS = """
from toy import Workload, make


def nothing():
    return Workload(name="nothing", build=lambda p: None, inputs=make().inputs)


def fails():
    def build(p):
        raise KeyError("weights")

    return Workload(name="fails", build=build, inputs=make().inputs)
"""
CLEAR = "WorkloadError: workload 'nothing': build must return a torch.nn.Module, got None"


@pytest.fixture
def project(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, forked: None
) -> pytest.Pytester:
    """Return a project with a workload and one throughput test."""
    # test_other_plugins.py tests the first two, and loading Hypothesis takes a second.
    without = " ".join(f"-p no:{name}" for name in ("randomly", "codspeed", "hypothesispytest"))
    ini = f"addopts = --strict-markers {without}\n"
    return make_project(pytester, monkeypatch, ini=ini, toy=TOY, test_one=THROUGHPUT)


# -- measuring ----------------------------------------------------------------------------------


def test_session_measures_shows_and_saves(project: pytest.Pytester) -> None:
    project.makepyfile(
        test_two="""
        import pytest

        from pytest_int8bench import RunParams
        from pytest_int8bench.clock import synchronized_perf_counter

        OWN = RunParams(
            model_size="nano", gpu_type="cpu", image_size=16, batch_size=3, compile_mode="off",
            int8_enabled=True,
        )


        @pytest.mark.benchmark(group="mine")
        def test_grouped(int8_throughput, benchmark):
            int8_throughput()
            assert benchmark.group == "mine"
            assert benchmark.stats.options["timer"] is synchronized_perf_counter


        @pytest.mark.int8(batch_size=2)
        def test_marked(int8_params, int8_batch, int8_model, int8_baseline, int8_quantized):
            assert int8_params.batch_size == int8_batch[0].shape[0] == 2
            assert int8_model.model is int8_quantized
            assert int8_model.model is not int8_baseline.model
            assert int8_model(*int8_batch).shape == int8_baseline(*int8_batch).shape


        @pytest.mark.parametrize("int8_params", [OWN])
        def test_own(int8_params, int8_batch):
            assert int8_params is OWN
            assert int8_batch[0].shape[0] == 3
        """,
        test_three="""
        import pytest

        from pytest_int8bench import RunParams


        @pytest.fixture
        def int8_params():
            return RunParams(gpu_type="cpu", batch_size=7, compile_mode="off")


        def test_fixture(int8_batch):
            assert int8_batch[0].shape[0] == 7
        """,
    )
    result = project.runpytest_subprocess(
        *SMOKE, "-v", "--int8-mode=w8a8,w8", "--benchmark-json=out.json"
    )
    assert result.ret == pytest.ExitCode.OK
    result.assert_outcomes(passed=10)
    own = "cpu_bf16_int8_w8a8_off_is16_bs3_model_size-nano"
    result.stdout.fnmatch_lines_random(
        [
            "int8bench: preset smoke (as asked)*",
            f"test_one.py::test_throughput[[]{BF16}] PASSED*",
            f"test_one.py::test_throughput[[]{W8A8}] PASSED*",
            f"test_one.py::test_throughput[[]{W8}] PASSED*",
            f"test_two.py::test_own[[]{own}] PASSED*",
            "test_three.py::test_fixture PASSED*",
        ]
    )

    # The table: figures, and a speedup with its interval where there is one.
    result.stdout.re_match_lines(
        [
            r"-+ int8bench -+$",
            r"workload +run +samples/s +tokens/s +ms/batch .* speedup \[95 %\]$",
            rf"toy +{BF16} +[\d,.]+ +[\d,.]+ +[\d,.]+ +- +- +0% +flash +-$",
        ]
    )
    figures = r"[\d,.]+ +[\d,.]+ +[\d,.]+ +- +- +\d+% +flash"
    speedup = r"[\d.]+x \[[\d.]+, [\d.]+\]"
    result.stdout.re_match_lines_random(
        [
            rf"toy +{W8A8} +{figures} +{speedup}$",
            rf"toy +{W8} +{figures} +{speedup}$",
            r".*torch 2\..*, torchao .*$",
            r"saved: out\.json$",
            r"journal: \.benchmarks/int8bench/.*\.jsonl$",
        ]
    )

    saved = load(project.path / "out.json")
    block = saved["int8bench"]
    assert block["schema"] == 1
    # Wheels on PyPI have version "2.14.1", while torch itself reports "2.14.1+cu130".
    assert torch.__version__.startswith(block["environment"]["packages"]["torch"])
    assert block["accuracy"] == []
    measured = [
        f"{test}[{name}]"
        for name in (BF16, W8A8, W8)
        for test in ("test_one.py::test_throughput", "test_two.py::test_grouped")
    ]
    assert sorted(entry["nodeid"] for entry in block["results"]) == sorted(measured)
    assert {entry["status"] for entry in block["results"]} == {"ok"}
    assert list(journaled(project).values()) == read(project.path / "out.json").results

    by_node = {entry["nodeid"]: entry for entry in block["results"]}
    assert len(saved["benchmarks"]) == 6
    for entry in saved["benchmarks"]:
        node = by_node[entry["fullname"]]
        extra = entry["extra_info"]
        assert entry["params"] == {"int8_params": extra["run_name"]}
        assert extra["workload"] == "toy"
        assert extra["batch_time_s"] == pytest.approx(entry["stats"]["median"])
        assert extra["samples_per_s"] == pytest.approx(4 / entry["stats"]["median"])
        assert extra["tokens_per_s"] == pytest.approx(16 * extra["samples_per_s"])
        assert extra["params"]["benchmark_interval_s"] == 0.02
        for name in ("run_name", "speedup", "speedup_low", "speedup_high", "int8_time_share"):
            assert extra[name] == node[name]
        assert (extra["speedup"] is None) is (extra["run_name"] == BF16)
        assert entry["group"] == ("mine" if "test_grouped" in entry["fullname"] else None)
        assert entry["options"]["timer"].endswith("synchronized_perf_counter")


def test_failures_affect_only_their_point(project: pytest.Pytester) -> None:
    folder = project.mkpydir("nowhere")
    unloadable = CONFTEST.replace("return toy.make()", "raise RuntimeError('no weights')")
    (folder / "conftest.py").write_text(unloadable)
    (folder / "test_lost.py").write_text(THROUGHPUT)
    project.makepyfile(
        bad=BAD_WORKLOADS,
        test_two="""
        import bad
        import pytest


        @pytest.fixture
        def int8_workload(request):
            return bad.nothing() if "clear" in request.node.name else bad.fails()


        @pytest.mark.int8(int8_enabled=False)
        def test_clear(int8_throughput):
            int8_throughput()


        @pytest.mark.int8(int8_enabled=False)
        def test_theirs(int8_throughput):
            int8_throughput()
        """,
        test_one="""
        import pytest

        from pytest_int8bench import RunParams

        START = RunParams(
            model_size="nano", gpu_type="cpu", image_size=16, compile_mode="off", batch_size=4,
            benchmark_interval_s=0.05,
        )


        @pytest.mark.parametrize(
            "int8_params", [START.replace(batch_size=size) for size in (4, 5, 6, 7)]
        )
        def test_sizes(int8_throughput):
            result = int8_throughput()
            assert result.oom or result.samples_per_s > 0


        @pytest.mark.parametrize("int8_params", [START])
        def test_too_slow(int8_throughput):
            assert int8_throughput().samples_per_s > 1e12, "too slow"


        @pytest.mark.parametrize("int8_params", [START.replace(feed="host")])
        def test_impossible(int8_throughput):
            int8_throughput()


        @pytest.mark.xfail(reason="known")
        @pytest.mark.parametrize("int8_params", [START.replace(batch_size=5)])
        def test_expected(int8_throughput):
            int8_throughput()


        @pytest.mark.int8(extra={"depth": 2})
        @pytest.mark.int8(batch_size=8)
        def test_axis(int8_params, int8_batch):
            pass
        """,
    )
    result = project.runpytest_subprocess(*SMOKE, "-rs", "--benchmark-json=out.json")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.assert_outcomes(passed=3, failed=4, skipped=1, xfailed=1, errors=3)
    name = "cpu_bf16_is16_bs{}_model_size-nano_compile_mode-off"
    impossible = f"{name.format(4)}_feed-host"
    reason = "feed=host has no device to copy to, gpu_type=cpu"
    axis = "extra.depth is not an axis of workload 'toy'; its axes: none"
    result.stdout.fnmatch_lines_random(
        [
            f"SKIPPED [[]1]*: {reason}",
            f"toy * {name.format(6)} * OOM *",
            f"oom: toy: {name.format(6)}: out of memory: tried to allocate 2.00 GiB",
            f"failed: toy: {name.format(5)}: ValueError: five is too many",
            f"failed: toy: {name.format(4)}: AssertionError: too slow",
            f"skipped: toy: {impossible}: {reason}",
            "E * ValueError: five is too many",
            axis,
            # Errors in the user's code have a traceback ...
            "E*KeyError: *weights*",
            f"E*raised by build of workload 'fails' at {BF16}",
            f"failed: nothing: {BF16}: {CLEAR}",
            f"failed: fails: {BF16}: KeyError: 'weights'",
        ]
    )
    # ... and errors that users can fix are one line, without a traceback of the package.
    text = result.stdout.str()
    clear = text[text.index("_ test_clear[") : text.index("_ test_theirs[")]
    assert CLEAR in clear.splitlines()
    assert "models.py" not in clear

    node = "test_one.py::test_{}[{}]"
    other = "test_two.py::test_{}[{}]"
    lost = "nowhere/test_lost.py::test_throughput[{}]"
    found = journaled(project)
    assert {nodeid: entry.status for nodeid, entry in found.items()} == {
        node.format("sizes", name.format(4)): "ok",
        node.format("sizes", name.format(5)): "failed",
        node.format("sizes", name.format(6)): "oom",
        node.format("sizes", name.format(7)): "ok",
        node.format("too_slow", name.format(4)): "failed",
        node.format("impossible", impossible): "skipped",
        node.format("axis", W8A8.replace("bs4", "bs8") + "_extra.depth-2"): "failed",
        other.format("clear", BF16): "failed",
        other.format("theirs", BF16): "failed",
        # Points whose workload fails are not forgotten.
        lost.format(BF16): "failed",
        lost.format(W8A8): "failed",
    }
    assert found[lost.format(W8A8)].reason == "RuntimeError: no weights"
    assert found[lost.format(W8A8)].workload == "unknown workload"
    slow = found[node.format("too_slow", name.format(4))]
    assert slow.samples_per_s > 0
    assert slow.reason == "AssertionError: too slow"
    assert found[node.format("sizes", name.format(6))].requested_bytes == 2 * 2**30
    assert found[node.format("impossible", impossible)].reason == reason
    assert read(project.path / "out.json").results == list(found.values())
    # Otherwise pytest-benchmark's comparison would use a failed test's timing as a baseline.
    timed = {entry["fullname"] for entry in load(project.path / "out.json")["benchmarks"]}
    assert timed == {nodeid for nodeid, entry in found.items() if entry.status == "ok"}


def test_rejects_measuring_twice_in_one_test(project: pytest.Pytester) -> None:
    project.makepyfile(
        test_one="def test(int8_throughput):\n    int8_throughput()\n    int8_throughput()\n"
    )
    result = project.runpytest_subprocess(*SMOKE, "--int8-mode=off", "--benchmark-json=out.json")
    result.assert_outcomes(failed=1)
    why = (
        "AgainError: int8_throughput must be called once per test, got a second call; to measure "
        "another point, use another test or parametrize int8_params"
    )
    at = result.outlines.index(why)
    assert result.outlines[at - 1].startswith("_")  # nothing precedes it, not even a traceback
    [found] = journaled(project).values()
    assert (found.status, found.reason) == ("failed", why)


def test_saves_session_in_which_every_point_runs_out_of_memory(project: pytest.Pytester) -> None:
    result = project.runpytest_subprocess(
        *SMOKE,
        "--int8-set=batch_size=6",
        "--benchmark-json=out.json",
        "--benchmark-autosave",
        "-Werror:Benchmark fixture was not used",
    )
    assert result.ret == pytest.ExitCode.OK
    result.assert_outcomes(passed=2)
    names = [name.replace("bs4", "bs6") for name in (BF16, W8A8)]
    result.stdout.fnmatch_lines([f"toy * {name} * OOM *" for name in names])
    result.stdout.fnmatch_lines(["saved: out.json, *"])
    [stored] = (project.path / ".benchmarks").glob("*/0001_*.json")
    for path in (project.path / "out.json", stored):
        assert load(path)["benchmarks"] == []
        results = read(path).results
        assert [entry.run_name for entry in results] == names
        assert {entry.status for entry in results} == {"oom"}
        assert {entry.reason for entry in results} == {"out of memory: tried to allocate 2.00 GiB"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_reports_missing_cuda_at_test_setup(project: pytest.Pytester) -> None:
    result = project.runpytest_subprocess("--int8-preset=seed")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.assert_outcomes(errors=2)
    result.stdout.fnmatch_lines(
        [
            "int8bench: preset seed (as asked)*",
            "*_ ERROR at setup of test_throughput*[[]cuda_bf16_bs128] _*",
            (
                "gpu_type=cuda, but torch sees no CUDA device; "
                "use --int8-preset=smoke or --int8-set gpu_type=cpu"
            ),
        ]
    )
    # Nothing surrounds that line.
    result.stdout.no_fnmatch_line("*During handling of the above exception*")
    result.stdout.no_fnmatch_line("*Traceback*")


# -- which points -------------------------------------------------------------------------------


def test_collects_by_model_baselines_first(project: pytest.Pytester) -> None:
    project.makepyfile(
        test_one="""
        import pytest


        def test_plain():
            pass


        def test_throughput(int8_throughput):
            pass


        def test_model(int8_model):
            pass
        """,
        test_two="""
        import pytest

        pytestmark = pytest.mark.int8(batch_size=2)


        @pytest.mark.int8(batch_size=4)
        def test_again(int8_throughput):
            pass


        def test_small(int8_throughput):
            pass


        @pytest.mark.int8(gpu_type="cuda")
        def test_cuda(int8_params):
            pass
        """,
    )
    result = project.runpytest_subprocess(*SMOKE, "--int8-mode=w8,w8a8", "--collect-only", "-q")
    assert result.ret == pytest.ExitCode.OK
    small = [name.replace("bs4", "bs2") for name in (BF16, W8, W8A8)]
    cuda = [name.replace("cpu", "cuda") for name in small[1:]]
    assert ids(result) == [
        "test_one.py::test_plain",
        f"test_one.py::test_throughput[{BF16}]",
        f"test_two.py::test_again[{BF16}]",
        f"test_one.py::test_throughput[{W8}]",
        f"test_one.py::test_model[{W8}]",
        f"test_two.py::test_again[{W8}]",
        f"test_one.py::test_throughput[{W8A8}]",
        f"test_one.py::test_model[{W8A8}]",
        f"test_two.py::test_again[{W8A8}]",
        *(f"test_two.py::test_small[{name}]" for name in small),
        *(f"test_two.py::test_cuda[{name}]" for name in cuda),
    ]


def test_invalid_marker_is_a_collection_error(project: pytest.Pytester) -> None:
    body = """
        import pytest

        @pytest.mark.int8({})
        def test_marked(int8_params):
            pass
        """
    project.makepyfile(
        test_key=body.format("batchsize=8"),
        test_value=body.format("batch_size=0"),
        test_position=body.format("8"),
        test_workload=body.format("workload='nothing'"),
        test_zoo=body.format("workload=8").replace(
            "@", "@pytest.mark.parametrize('int8_params', [], indirect=True)\n        @"
        ),
    )
    result = project.runpytest_subprocess(*SMOKE)
    assert result.ret == pytest.ExitCode.INTERRUPTED
    result.assert_outcomes(errors=5)
    why = {
        "key": "unknown key 'batchsize'; keys are workload, model_size, *, extra",
        "position": "arguments must be keywords, got 8",
        "value": "batch_size must be at least 1, got 0",
        "workload": "workload must be olmoearth, digits, timm:NAME, *, got 'nothing'",
        "zoo": "workload must be a name, got 8",
    }
    for name, problem in why.items():
        result.stdout.fnmatch_lines(
            [
                f"*_ ERROR collecting test_{name}.py _*",
                f"@pytest.mark.int8 of test_{name}.py::test_marked: {problem}",
            ]
        )


def test_no_baseline_omits_baselines_and_speedups(project: pytest.Pytester) -> None:
    result = project.runpytest_subprocess(*SMOKE, "--int8-no-baseline", "--int8-mode=w8a8,w8")
    assert result.ret == pytest.ExitCode.OK
    result.assert_outcomes(passed=2)
    result.stdout.re_match_lines([rf"toy +{name} .* flash +-$" for name in (W8A8, W8)])
    found = journaled(project)
    assert [entry.run_name for entry in found.values()] == [W8A8, W8]
    for entry in found.values():
        assert (entry.speedup, entry.speedup_method) == (None, None)


# -- which workload -----------------------------------------------------------------------------


def test_lean_measures_only_throughput(project: pytest.Pytester) -> None:
    project.makepyfile(
        test_one="""
        import pytest


        @pytest.mark.int8(benchmark_interval_s=0.05)
        def test_throughput(int8_throughput, int8_params):
            assert int8_params.benchmark_interval_s == 0.05
            int8_throughput()


        def test_interval(int8_throughput, int8_params):
            assert int8_params.benchmark_interval_s == 2.0


        def test_model(int8_model):
            pass


        def test_plain():
            pass
        """
    )
    lean = ("--int8-preset=smoke", "--int8-set=compile_mode=off", "--int8-lean")
    result = project.runpytest_subprocess(*lean, "-Wignore:Benchmark fixture was not used")
    assert result.ret == pytest.ExitCode.OK
    result.assert_outcomes(passed=2, deselected=2)
    [(nodeid, measured)] = journaled(project).items()
    assert nodeid == f"test_one.py::test_throughput[{W8A8}]"
    assert measured.samples_per_s is not None
    assert (measured.speedup, measured.int8_time_share, measured.kernels) == (None, None, [])
    # The quantized layers are still reported, as that costs nothing.
    assert measured.coverage is not None


def test_rejects_uncallable_filter_each_time(tmp_path: Path) -> None:
    config: Any = SimpleNamespace(
        inipath=None, rootpath=tmp_path, invocation_params=SimpleNamespace(dir=tmp_path)
    )
    session = Session(config, replace(Settings(), filter="os:sep"))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^--int8-filter: must be a callable, got os:sep$"):
            session.filtered(Workload(name="toy", build=lambda p: None, inputs=lambda p, d: ()))


def test_loads_workload_and_filter_by_name(project: pytest.Pytester) -> None:
    (project.path / "conftest.py").unlink()
    project.makepyfile(
        filters="""
        def only_fc1(module, name):
            return name == "fc1"
        """,
        test_two="""
        import pytest

        @pytest.mark.int8(workload="nowhere.py:make")
        def test_missing(int8_model):
            pass

        @pytest.mark.int8(workload="toy:Toy")
        def test_other(int8_model):
            pass

        @pytest.mark.int8(workload="hub.py:make")
        def test_hub(int8_throughput):
            pass
        """,
        hub="def make():\n    open('asked', 'a').write('x'); raise OSError('no route')\n",
    )
    result = project.runpytest_subprocess(
        *SMOKE, "--int8-workload=toy.py:make", "--int8-filter=filters:only_fc1"
    )
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.assert_outcomes(passed=2, errors=4)
    # An unreachable hub is slow, so it is queried once for both points.
    result.stdout.fnmatch_lines(2 * ["hub.py:make raised OSError: no route"])
    assert (project.path / "asked").read_text() == "x"
    result.stdout.fnmatch_lines_random(
        [
            "int8bench: preset smoke (as asked)",
            "nowhere.py:make: there is no file *nowhere.py",
            "toy:Toy must give a pytest_int8bench.Workload, got Toy(",
        ]
    )
    found = journaled(project).values()
    baseline, candidate, missing, other = (r for r in found if r.workload != "hub.py:make")
    assert (baseline.workload, candidate.workload) == ("toy", "toy")
    # Points whose workload cannot be loaded are results, too.
    assert (missing.workload, other.workload) == ("nowhere.py:make", "toy:Toy")
    assert {missing.status, other.status} == {"failed"}
    assert (missing.reason or "").startswith("there is no file ")
    assert candidate.coverage["converted_layers"] == 1
    assert set(candidate.coverage["left_out"]) == {"qkv", "proj", "fc2"}


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (
            ["--int8-workload=nowhere.py:make"],
            "--int8-workload: nowhere.py:make: there is no file {}/nowhere.py",
        ),
        (
            ["-o", "int8_workload=toy:Toy"],
            "int8_workload: toy:Toy must give a pytest_int8bench.Workload, got Toy(*",
        ),
        (
            ["--int8-workload=toy:make", "--int8-filter=toy:nothing"],
            "--int8-filter: toy:nothing: toy has no 'nothing'",
        ),
        (
            ["--int8-workload=toy:make", "--int8-filter=toy:__name__"],
            "--int8-filter: must be a callable, got toy:__name__",
        ),
        (
            ["--int8-workload=toy:make", "--int8-set=extra.depth=2,3"],
            "--int8-set: extra.depth is not an axis of workload 'toy'; its axes: none",
        ),
    ],
    ids=["file", "kind", "name", "callable", "axis"],
)
def test_rejects_bad_options_once(project: pytest.Pytester, args: list[str], why: str) -> None:
    project.makeconftest("")
    project.makepyfile(toy=TOY + "\n\nprint('said while it is loaded')\n")
    result = project.runpytest_subprocess(*SMOKE, *args)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.assert_outcomes()
    result.stderr.fnmatch_lines([f"ERROR: {why.format(project.path)}"])
    assert "said while it is loaded" not in result.stdout.str() + result.stderr.str()
    # Nothing is loaded if nothing runs.
    assert project.runpytest_subprocess(*SMOKE, *args, "--co").ret == pytest.ExitCode.OK


def test_leaves_other_errors_to_the_tests(project: pytest.Pytester) -> None:
    project.makeconftest("")
    project.makepyfile(
        broken="import nothing_like_that as x",
        test_two="""
        import pytest
        import toy


        @pytest.fixture
        def int8_workload():
            return toy.Workload(
                name="own", build=lambda p: toy.Toy(), inputs=toy.make().inputs, axes={"depth": 1}
            )


        def test_own(int8_batch):
            pass
        """,
    )
    axis = ("--int8-workload=toy:make", "--int8-set=extra.depth=2", "--int8-mode=off")
    result = project.runpytest_subprocess(*SMOKE, *axis)
    result.assert_outcomes(passed=1, errors=1)
    # Errors in the user's code have a traceback.
    result = project.runpytest_subprocess(*SMOKE, "--int8-filter=broken.py:f", "test_two.py")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(
        ["E*No module named 'nothing_like_that'", "broken.py:1: ModuleNotFoundError"]
    )


MARKED = "import pytest\n\n\n@pytest.mark.int8(workload='toy.py:make')" + THROUGHPUT


@pytest.mark.parametrize(
    ("conftest", "body", "owner"),
    [(CONFTEST, THROUGHPUT, "int8_workload in conftest"), ("", MARKED, "@pytest.mark.int8")],
    ids=["fixture", "marker"],
)
def test_rejects_workload_that_no_test_uses(
    project: pytest.Pytester, conftest: str, body: str, owner: str
) -> None:
    project.makeconftest(conftest)
    project.makepyfile(test_one=body)
    result = project.runpytest_subprocess(*SMOKE, "--int8-workload=digits")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    [line] = filter(None, result.errlines)
    assert line == (
        "ERROR: --int8-workload: no collected test uses 'digits': each brings its own workload "
        f"({owner})"
    )
    # An ini value applies only to tests that use it.
    result = project.runpytest_subprocess(*SMOKE, "-o", "int8_workload=digits")
    result.assert_outcomes(passed=2)


@pytest.mark.parametrize("argument", ["int8_workload", "request"])
def test_accepts_workload_of_one_test(project: pytest.Pytester, argument: str) -> None:
    made = {"request": "request.getfixturevalue('int8_workload')"}.get(argument, argument)
    project.makeconftest(
        f"import pytest\n\n\n@pytest.fixture\ndef int8_workload({argument}):\n    return {made}"
    )
    project.makepyfile(
        test_one=MARKED,
        test_two="def test(int8_params, int8_workload): assert int8_workload.name == 'toy'",
    )
    result = project.runpytest_subprocess(*SMOKE, "--int8-workload=toy.py:make")
    result.assert_outcomes(passed=3)


def test_workload_of_any_scope_is_built_once_per_model(project: pytest.Pytester) -> None:
    (project.path / "test_one.py").unlink()
    for scope in ("function", "module", "session"):
        folder = project.mkpydir(scope)
        (folder / "conftest.py").write_text(
            f"""
import pytest
import toy
import torch
from pytest_int8bench import Workload


def build():
    with open("{scope}.built", "a") as file:
        file.write("built ")
    return toy.Toy()


@pytest.fixture(scope="{scope}")
def int8_workload():
    return Workload(
        name="{scope}",
        build=lambda p: build(),
        inputs=lambda p, device: (torch.randn(p.batch_size, 16, 32, device=device),),
    )
"""
        )
        (folder / "test_one.py").write_text(THROUGHPUT)
        (folder / "test_two.py").write_text(THROUGHPUT)
    result = project.runpytest_subprocess(*SMOKE)
    assert result.ret == pytest.ExitCode.OK
    result.assert_outcomes(passed=12)
    found = journaled(project)
    assert [(entry.workload, entry.run_name) for entry in found.values()] == [
        (scope, name)
        for scope in ("function", "module", "session")
        for name in (BF16, BF16, W8A8, W8A8)
    ]
    assert all(entry.workload == nodeid.split("/")[0] for nodeid, entry in found.items())
    # Once for the baseline and once for the candidate. A module-scoped workload is equal in both
    # modules, so it counts as one.
    built = {path.stem: path.read_text().split() for path in project.path.glob("*.built")}
    assert built == {scope: ["built"] * 2 for scope in ("function", "module", "session")}


# -- turned off ---------------------------------------------------------------------------------


def test_works_without_pytest_benchmark(project: pytest.Pytester) -> None:
    project.makepyfile(
        test_two="""
        def test_model(int8_model, int8_batch):
            int8_model(*int8_batch)
        """
    )
    result = project.runpytest_subprocess(*SMOKE, "-p", "no:benchmark", "-rs")
    assert result.ret == pytest.ExitCode.OK
    result.assert_outcomes(passed=1, skipped=2)
    reason = "not measured: int8_throughput needs pytest-benchmark, which is not active"
    result.stdout.fnmatch_lines([f"SKIPPED [[]2]*: {reason}"])


def test_plugin_can_be_disabled(project: pytest.Pytester) -> None:
    project.makepyfile(
        test_two="""
        def test_plain(benchmark):
            assert benchmark(lambda: 3) == 3
        """
    )
    result = project.runpytest_subprocess("-p", "no:int8bench")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["E * fixture 'int8_throughput' not found"])
    result.stdout.no_fnmatch_line("*int8bench:*")
    assert not (project.path / ".benchmarks" / "int8bench").exists()


def test_shows_results_if_the_journal_cannot_be_written(project: pytest.Pytester) -> None:
    project.makepyfile(
        test_one="""
        import pytest

        from pytest_int8bench import RunParams

        START = RunParams(
            model_size="nano", gpu_type="cpu", image_size=16, compile_mode="off", batch_size=4,
            benchmark_interval_s=0.05,
        )


        @pytest.mark.parametrize("int8_params", [START], indirect=True)
        @pytest.mark.parametrize("other", [1])
        def test_one(int8_throughput, other):
            assert int8_throughput().samples_per_s > 0
        """
    )
    (project.path / ".benchmarks").write_text("in the way")
    result = project.runpytest_subprocess(*SMOKE)
    assert result.ret == pytest.ExitCode.OK
    result.stdout.fnmatch_lines(
        [
            "*int8bench: cannot create the journal: *",
            "toy *_bs4_model_size-nano_compile_mode-off * flash *",
            "journal: none, see the warnings",
        ]
    )


def test_shows_full_traceback_on_request(project: pytest.Pytester) -> None:
    project.makepyfile(bad=BAD_WORKLOADS, conftest="")
    workload = "--int8-workload=bad.py:nothing"
    result = project.runpytest_subprocess(*SMOKE, workload, "--int8-mode=off", "--tb=long")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines([f"E*{CLEAR}", "*building.py:*: WorkloadError"])
    assert [found.reason for found in journaled(project).values()] == [CLEAR]
