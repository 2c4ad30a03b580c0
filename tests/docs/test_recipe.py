"""The recipe for CI in the documentation: a valid workflow, and commands that run."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pytest_int8bench.gate.rules import METRICS, read_rules
from toys import projects
from toys.repositories import git, isolate, isolate_pytest

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "docs" / "int8-gate.yml"

# Where int8bench ab measures, times are made up: ten processes that load torch take minutes.
CONFTEST = f"""{projects.CONFTEST}

@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    import subprocess
    from pathlib import Path

    from pytest_int8bench.results.journal import Journal
    from pytest_int8bench.results.records import Result

    if not config.getoption("int8_lean"):
        return
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    path = Path(config.getoption("int8_journal"))
    path.unlink()  # the plugin's own, which it leaves alone from here on
    journal = Journal(path, {{"commit": commit.strip()}})
    for item in items:
        named = {{"nodeid": item.nodeid, "workload": "toy", "run_name": item.name, "params": {{}}}}
        journal.append(Result(**named, batch_time_s=float(Path("speed").read_text())))
    items.clear()
"""
INI = """
[pytest]
addopts = -p int8bench -p benchmark
pythonpath = .
int8_preset = smoke
int8_set =
    compile_mode=off
    benchmark_interval_s=0.02
"""


def steps(job: str) -> dict[str, dict[str, Any]]:
    """Return the named steps of a job."""
    jobs = yaml.safe_load(RECIPE.read_text())["jobs"]
    return {step["name"]: step for step in jobs[job]["steps"] if "name" in step}


def valid(path: Path) -> subprocess.CompletedProcess[str]:
    """Hold a file to GitHub's schema of workflows."""
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema"]
    return subprocess.run(
        [*command, "vendor.github-workflows", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_recipe_is_a_workflow(tmp_path: Path) -> None:
    pytest.importorskip("check_jsonschema")
    done = valid(RECIPE)
    assert (done.returncode, done.stdout.strip()) == (0, "ok -- validation done")
    broken = tmp_path / "broken.yml"
    broken.write_text(RECIPE.read_text().replace("runs-on:", "run-on:"))
    assert valid(broken).returncode == 1  # or the check checks nothing


def test_the_recipe_sets_up_as_the_readme_does() -> None:
    readme = (ROOT / "README.md").read_text()
    for job in ("pull-request", "main"):
        [install] = [line for line in steps(job)["Set up"]["run"].splitlines() if "pip" in line]
        assert f"\n{install.removeprefix('.venv/bin/')} && pytest" in readme


def test_the_documentation_of_the_gate(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "gate.md").read_text()
    assert "(int8-gate.yml)" in text
    assert "docs/gate.md" in (ROOT / "README.md").read_text()
    example = tmp_path / "pyproject.toml"
    [(toml)] = re.findall(r"^```toml\n(.*?)^```$", text, re.M | re.S)
    example.write_text(toml)
    rules = read_rules(example)
    assert rules.limit("throughput", "base_bs1") == 0.15
    assert rules.limit("throughput", "base_bs8") == 0.03
    assert rules.floors == {"throughput": 0.015}


def test_the_table_of_the_gate_has_limits_and_floors() -> None:
    pytest.importorskip("mkdocs", reason="needs the extra docs")
    [holder] = re.findall(
        r"^<!-- metrics: (\S+) -->$", (ROOT / "docs" / "gate.md").read_text(), re.M
    )
    table = runpy.run_path(str(ROOT / "docs" / "hooks.py"))["metrics"](holder)
    for metric in METRICS.values():
        limit = "off" if metric.limit is None else f"{metric.limit:.0%}"
        assert re.search(
            rf"^\| `{metric.name}`.* `--{metric.option}` \| {limit} \| {metric.floor:.0%} \|$",
            table,
            re.M,
        )


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clone of a repository with benchmarks, one commit ahead of its origin."""
    isolate(monkeypatch, tmp_path)
    isolate_pytest(monkeypatch)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    origin = tmp_path / "origin"
    (origin / "benchmarks").mkdir(parents=True)
    files = {"conftest.py": CONFTEST, "toy.py": projects.TOY, "pytest.ini": INI, "speed": "0.01"}
    files |= {
        "benchmarks/test_toy.py": projects.THROUGHPUT,
        ".gitignore": "__pycache__\n.pytest_cache\n*.json\n",
    }
    for name, text in files.items():
        (origin / name).write_text(text)
    git(origin, "init", "-q", "-b", "main")
    git(origin, "add", "-A")
    git(origin, "commit", "-q", "-m", "first")
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "-q", str(origin), str(clone))
    return clone


def run(project: Path, job: str, name: str, **env: str) -> tuple[int, str]:
    """Run the commands of a step as GitHub does; return the exit code and what it printed."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", steps(job)[name]["run"]],
        cwd=project,
        env={**os.environ, "PATH": path, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


def test_a_push_is_compared_with_the_last_good_one(project: Path, tmp_path: Path) -> None:
    measure = steps("main")["Measure"]["run"]
    assert steps("pull-request")["Is it INT8, is it accurate"]["run"] == measure
    code, out = run(project, "main", "Measure")
    assert code == 0, out
    summary = tmp_path / "summary.md"
    runner = {"HOME": str(tmp_path), "BASELINES": "b/r", "GITHUB_STEP_SUMMARY": str(summary)}
    baseline = tmp_path / "b" / "r" / "main.json"
    compare = "Compare with the last good run"
    code, out = run(project, "main", compare, **runner)
    assert (code, out) == (2, f"int8bench compare: {baseline} is not there\n")
    assert run(project, "main", "Make it the baseline", **runner) == (0, "")
    saved = json.loads(baseline.read_text())

    for factor, expected, outcome in ((10, 0, "improved"), (0.1, 1, "regressed")):
        scaled = json.loads(json.dumps(saved))
        for result in scaled["int8bench"]["results"]:
            result["batch_time_s"] *= factor
            result["samples_per_s"] /= factor
        baseline.write_text(json.dumps(scaled))
        code, out = run(project, "main", compare, **runner)
        assert (code, f"2 {outcome}" in out) == (expected, True), out
        compared = json.loads((project / "compare.json").read_text())["int8bench_compare"]
        assert compared["counts"] == {outcome: 2}
    assert summary.read_text().count("## int8bench compare: ") == 2


def test_code_of_a_fork_is_refused_aloud(project: Path) -> None:
    code, out = run(project, "fork", "Code of forks does not run on our machine")
    assert (code, out.startswith("::error::not measured")) == (1, True)


def test_a_pull_request_is_compared_with_its_merge_base(project: Path) -> None:
    (project / "more").touch()
    git(project, "add", "-A")
    git(project, "commit", "-q", "-m", "second")
    code, out = run(project, "pull-request", "Compare with the merge base", BASE_REF="main")
    assert code == 0, out
    result = json.loads((project / "ab.json").read_text())["int8bench_ab"]
    assert [run["outcome"] for run in result["runs"]] == ["PASS"]
    assert result["base"]["commit"] != result["new"]["commit"]
    assert (project / "ab.xml").exists()
