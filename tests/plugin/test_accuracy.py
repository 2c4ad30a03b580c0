"""Test accuracy tests as users write them: ``int8_guardrail`` and ``int8_sensitivity``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from pytest_int8bench.cli.main import main
from pytest_int8bench.results.reading import read
from pytest_int8bench.results.records import Saved
from toys import projects
from toys.projects import SMOKE, THROUGHPUT, load, make_project

BF16, W8A8 = projects.bf16(4), projects.int8(4)

# A model with made-up scores: the candidate gets LOST of SAMPLES samples wrong that the
# baseline gets right.
TOY = f"""{projects.TOY}

import numpy as np

from pytest_int8bench import Evaluation

plain = make
SAMPLES, LOST = 1000, int(os.environ.get("LOST", "0"))


def scores_of(samples, lost):
    baseline = []

    def scores(forward):
        x = torch.randn(8, 16, 32, generator=torch.Generator().manual_seed(0))
        exact = nn.functional.normalize(forward(x), dim=-1)
        right = np.ones(samples)
        right[: samples // 10] = 0
        if baseline and not torch.equal(exact, baseline[0]):
            right[samples - lost :] = 0
        baseline.append(exact)
        return np.arange(samples), right

    return scores


def make(name="toy", samples=SAMPLES, lost=LOST, **more):
    evaluation = Evaluation(metric="top1", scores=scores_of(samples, lost))
    return plain(name, evaluation=evaluation, **more)
"""
ACCURACY = """
def test_accuracy(int8_guardrail):
    int8_guardrail()
"""
# Too few samples for a verdict.
FEW = """
import pytest
import toy


@pytest.fixture(scope="module")
def int8_workload():
    return toy.make("few", samples=40, lost=0)


def test_few(int8_guardrail):
    int8_guardrail()
"""
LOST = 18  # of 900 right ones: 2 %


@pytest.fixture
def project(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, forked: None
) -> pytest.Pytester:
    """Return a project with a workload, a throughput test and an accuracy test."""
    # The last plugin takes a second to load.
    without = " ".join(f"-p no:{name}" for name in ("randomly", "codspeed", "hypothesispytest"))
    files = {"toy": TOY, "test_accuracy": ACCURACY, "test_throughput": THROUGHPUT}
    ini = f"addopts = --strict-markers {without}\n"
    return make_project(pytester, monkeypatch, ini=ini, **files)


def run(project: pytest.Pytester, *args: str) -> tuple[pytest.RunResult, Saved | None]:
    path = project.path / "out.json"
    path.unlink(missing_ok=True)
    result = project.runpytest_subprocess(*SMOKE, f"--benchmark-json={path}", *args)
    return result, read(path) if path.exists() else None


def timed(path: Path) -> list[str]:
    """Return the tests in pytest-benchmark's part of the file."""
    return [entry["fullname"].partition("::")[2] for entry in load(path)["benchmarks"]]


def test_lossless_model_passes(project: pytest.Pytester) -> None:
    project.makepyfile(test_few=FEW)
    result, saved = run(project, "--int8-inconclusive=warn")
    # The baseline's throughput too, but not its accuracy.
    result.assert_outcomes(passed=4, warnings=1)
    result.stdout.fnmatch_lines(
        [
            "int8bench: accuracy: top1: 40 samples are too few to pass the limit of 1%, even for *",
            f"*INCONCLUSIVE: few: {W8A8}: top1 dropped by 0.00%*",
        ]
    )
    verdict, few = sorted(saved.accuracy, key=lambda verdict: -verdict.samples)
    assert (few.workload, few.outcome) == ("few", "INCONCLUSIVE")
    assert verdict.nodeid == f"test_accuracy.py::test_accuracy[{W8A8}]"
    assert (verdict.outcome, verdict.samples, verdict.limit) == ("PASS", 1000, "1%")
    assert [r.status for r in saved.results] == ["ok", "ok"]
    out = result.stdout.str()
    assert "accuracy" in out
    row = next(line.split() for line in result.outlines if line.endswith("PASS"))
    assert row[:6] == ["toy", W8A8, "top1", "1,000", "0.9000", "0.9000"]
    assert row[-3:] == ["0/0", "1%", "PASS"]
    [journal] = (project.path / ".benchmarks" / "int8bench").glob("*.jsonl")
    assert read(journal).accuracy == saved.accuracy
    assert main(["show", str(project.path / "out.json")]) == 0


def test_failing_marks_timings(project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOST", str(LOST))
    project.makepyfile(test_few=FEW, test_later=THROUGHPUT)
    files = ("test_throughput.py", "test_accuracy.py", "test_later.py", "test_few.py")
    result, saved = run(project, *files)
    result.assert_outcomes(passed=4, failed=2)
    result.stdout.fnmatch_lines(
        [
            f"AccuracyError: FAIL: toy: {W8A8}: top1 dropped by 2.00% [[]1.*%, *], limit 1%",
            "  BF16 0.9000, INT8 0.8820, 1000 samples: 18 got worse, 0 better *",
            "  next step: SmoothQuant (--int8-smoothquant, int8_smoothquant=True)",
            "--int8-remedy tries SmoothQuant, BF16 for the worst layers, and W8",
        ]
    )
    assert "guardrail.py" not in result.stdout.str()  # no traceback of the plugin
    verdict, few = sorted(saved.accuracy, key=lambda verdict: -verdict.samples)
    assert verdict.outcome == "FAIL"
    assert [(r.nodeid, r.status) for r in saved.results] == [
        (f"test_{name}.py::test_throughput[{point}]", status)
        for point, status in ((BF16, "ok"), (W8A8, "accuracy-failed"))
        for name in ("throughput", "later")
    ]
    for marked in saved.results[2:]:
        assert marked.reason.startswith(f"FAIL: toy: {W8A8}: top1 dropped by 2.00%")
        assert marked.samples_per_s > 0  # measured, and kept
    # A failed timing is not a baseline for comparisons.
    assert timed(project.path / "out.json") == [f"test_throughput[{BF16}]"] * 2
    # The verdict reports it once.
    assert sum(line.startswith(f"FAIL: toy: {W8A8}: ") for line in result.outlines) == 1
    result.stdout.no_fnmatch_line("accuracy-failed: *")
    # Too few samples fail too.
    assert few.needed > 40
    result.stdout.fnmatch_lines(
        [
            f"UndecidedError: INCONCLUSIVE: few: {W8A8}: top1 dropped by 0.00% *",
            f"  40 samples are too few to decide; about {few.needed:,} are needed",
            "--int8-inconclusive=warn makes inconclusive verdicts warnings, not failures",
        ]
    )


@pytest.mark.slow
def test_inconclusive_verdict_does_not_mark_timings(
    project: pytest.Pytester, capsys: pytest.CaptureFixture[str]
) -> None:
    project.makepyfile(
        test_few=f"""{FEW}

def test_throughput(int8_throughput):
    int8_throughput()


def test_both(int8_throughput, int8_guardrail):
    int8_throughput()
    int8_guardrail()
"""
    )
    result, saved = run(project, "test_few.py")
    result.assert_outcomes(passed=2, failed=2, skipped=1)  # a baseline has no verdict
    names = {f"test_{test}[{p}]" for test in ("throughput", "both") for p in (BF16, W8A8)}
    assert {r.nodeid.partition("::")[2] for r in saved.results if r.status == "ok"} == names
    base, new = project.path / "out.json", project.path / "new.json"
    assert set(timed(base)) == names
    slower = json.loads(base.read_text())
    for values in slower["int8bench"]["results"]:
        values["samples_per_s"] /= 2
        for name in ("batch_time_s", "batch_time_mean_s", "batch_time_min_s", "batch_time_p95_s"):
            values[name] *= 2
    new.write_text(json.dumps(slower))
    capsys.readouterr()
    assert main(["compare", str(base), str(new)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "int8bench compare: REGRESSED (4 runs: 4 regressed; 2 verdicts: 0 regressed)" in lines
    rows = [line.split() for line in lines if "INCONCLUSIVE" in line]
    assert [row[-4:] for row in rows] == [["top1", "INCONCLUSIVE", "INCONCLUSIVE", "same"]] * 2


def test_random_weights_are_marked_and_outputs_compared(
    project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOST", str(LOST))
    # In the second one, a channel takes up the whole range of a row but does not affect the output.
    project.makepyfile(
        test_random="""
        import pytest
        import toy
        from torch import nn


        class Broken(toy.Toy):
            def __init__(self):
                super().__init__()
                self.fc2 = nn.Linear(64, 32, bias=False)
                nn.init.constant_(self.fc1.bias[:1], 1e5)
                nn.init.zeros_(self.fc2.weight[:, :1])


        @pytest.fixture
        def int8_workload(request):
            build = Broken if "broken" in request.node.name else toy.Toy
            name = build.__name__.lower()
            return toy.make(name, build=lambda p: build(), load=lambda p, weights: build())


        def test_toy(int8_guardrail):
            int8_guardrail()


        def test_broken(int8_guardrail):
            int8_guardrail()
        """
    )
    result, saved = run(project, "test_random.py")
    result.assert_outcomes(passed=1, failed=1)
    assert [v.outcome for v in saved.accuracy if v.workload == "toy"] == ["FAIL", "proxy-ok"]
    rows = [line.split() for line in result.outlines if "dropped" not in line and "top1" in line]
    assert rows[0][-1] == "FAIL*"
    result.stdout.fnmatch_lines(["[*] pipeline check: the weights are random, so the verdict *"])
    result.stdout.fnmatch_lines(
        [f"AccuracyError: FAIL: broken: {W8A8}: SQNR must be at least 10 dB, got * dB"]
    )


def test_remedies_and_limits(project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOST", str(LOST))
    project.makepyfile(
        test_own="def test_own(int8_guardrail):\n    int8_guardrail(max_drop='20%')\n"
    )
    files = ("test_accuracy.py", "test_own.py")
    result, saved = run(project, *files, "--int8-remedy", "--int8-max-drop=1pp")
    result.assert_outcomes(failed=1, passed=1)
    # Every INT8 model of this workload loses 2 %.
    result.stdout.fnmatch_lines(
        [
            f"int8bench: remedies for {W8A8}: trying SmoothQuant (alpha=0.3)",
            f"AccuracyError: FAIL: toy: {W8A8}: top1 dropped by 1.80pp *, limit 1pp",
            "  tried SmoothQuant (alpha=0.3): drop 2.* on 500 selection samples",
            "  tried BF16 for the worst layers (fc?): drop 2.* on 500 selection samples",
            "  tried weights only (w8): drop 2.* on 500 selection samples",
            "  remedy: none of these passes",
        ]
    )
    verdict, own = saved.accuracy
    assert (verdict.limit, own.limit) == ("1pp", "20%")
    assert [row["outcome"] for row in verdict.remedies] == [None] * 8


def test_any_failed_accuracy_test_marks_the_timing(project: pytest.Pytester) -> None:
    project.makepyfile(
        toy=TOY.replace("return np.arange(samples), right", "return next(SCORES)(right)").replace(
            "class Toy",
            "SCORES = iter([lambda right: right, lambda right: right * np.nan])\n\n\nclass Toy",
        ),
        test_accuracy="""
        def test_throughput(int8_throughput):
            int8_throughput()


        def test_accuracy(int8_guardrail):
            int8_guardrail()


        def test_limit(int8_guardrail):
            int8_guardrail(max_drop="5")


        def test_both(int8_throughput, int8_guardrail):
            int8_throughput()
            int8_guardrail()
        """,
    )
    result, saved = run(project, "test_accuracy.py", "-k", "test_")
    result.stdout.fnmatch_lines(
        ["ScoreError: top1: scores must be finite, got 1000 non-finite scores for the candidate"]
    )
    result.stdout.fnmatch_lines(
        ["int8_guardrail: max_drop must be a percentage such as 1% (relative) or 1pp (absolute)*"]
    )
    statuses = {r.nodeid.partition("::")[2]: r.status for r in saved.results}
    assert statuses[f"test_throughput[{W8A8}]"] == "accuracy-failed"
    # A measured baseline stays ok, though it has nothing to be compared with.
    assert statuses[f"test_both[{BF16}]"] == "ok"
    assert statuses[f"test_throughput[{BF16}]"] == "ok"
    names = timed(project.path / "out.json")
    assert f"test_both[{BF16}]" in names
    assert not [name for name in names if W8A8 in name]


def test_skips_points_that_cannot_be_judged(project: pytest.Pytester) -> None:
    project.makepyfile(
        test_accuracy="""
        import pytest


        @pytest.mark.int8(int8_enabled=False)
        def test_baseline(int8_guardrail):
            int8_guardrail()


        @pytest.mark.int8(batch_size=6)
        def test_memory(int8_guardrail):
            int8_guardrail()
        """,
        test_few=FEW,
    )
    files = ("test_accuracy.py", "test_few.py")
    result, saved = run(project, *files, "-rs", "--int8-inconclusive=skip")
    result.assert_outcomes(skipped=3)
    result.stdout.fnmatch_lines(
        [
            "*nothing to compare: the point is a baseline",
            "*not judged: out of memory: CUDA out of memory. Tried to *",
        ]
    )
    # Inconclusive verdicts are saved, too.
    result.stdout.fnmatch_lines(["SKIPPED*INCONCLUSIVE: few: *"])
    assert [(v.workload, v.outcome) for v in saved.accuracy] == [("few", "INCONCLUSIVE")]


def test_accuracy_needs_no_benchmarks(project: pytest.Pytester) -> None:
    result = project.runpytest_subprocess(*SMOKE, "-p", "no:benchmark", "test_accuracy.py")
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["*PASS"])


@pytest.mark.slow
def test_ranks_layers(project: pytest.Pytester, capfd: pytest.CaptureFixture[str]) -> None:
    project.makepyfile(
        test_layers="""
        def test_layers(int8_sensitivity):
            found = int8_sensitivity(metric=True)
            assert {row["name"] for row in found.layers} == {"fc1", "fc2"}
        """
    )
    result, saved = run(project, "test_layers.py")
    result.assert_outcomes(passed=1)
    [table] = saved.sensitivity
    assert (table.by, table.metric, table.samples) == ("layer", "top1", 1000)
    assert table.layers[0]["sqnr_db"] <= table.layers[1]["sqnr_db"]
    assert {row["drop"] for row in table.layers} == {0.0}
    result.stdout.fnmatch_lines(
        [
            f"int8bench: sensitivity of {W8A8}: 2 layers: about * s (* s for the first)",
            f"toy: {W8A8}, 1,000 samples",
            "INT8 in one layer alone SQNR dB top1 drop worse/better",
            "fc? * 0.00pp * 0/0",
        ]
    )
    command = Path(sys.executable).with_name("int8bench")
    args = ("--int8-workload=toy.py:make", "--by=block", f"--json={project.path / 'layers.json'}")
    done = project.run(command, "sensitivity", *args, *SMOKE)
    assert done.ret == 0
    assert "warnings summary" not in done.stdout.str()
    done.stdout.fnmatch_lines(["INT8 in one block alone SQNR dB", "fc? *"])
    [table] = read(project.path / "layers.json").sensitivity
    assert (table.by, table.metric, len(table.layers)) == ("block", None, 2)
