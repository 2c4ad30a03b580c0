"""Test the CI recipe in the documentation: the workflow is valid and its commands run."""

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

# The times that int8bench ab measures are made up: ten processes that load torch take minutes.
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
    """Validate a file against GitHub's workflow schema."""
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema"]
    return subprocess.run(
        [*command, "vendor.github-workflows", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )


def test_recipe_is_a_valid_workflow(tmp_path: Path) -> None:
    pytest.importorskip("check_jsonschema")
    done = valid(RECIPE)
    assert (done.returncode, done.stdout.strip()) == (0, "ok -- validation done")
    broken = tmp_path / "broken.yml"
    broken.write_text(RECIPE.read_text().replace("runs-on:", "run-on:"))
    assert valid(broken).returncode == 1  # otherwise the check is vacuous


def test_recipe_has_the_set_up_of_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    for job in ("pull-request", "main"):
        [install] = [line for line in steps(job)["Set up"]["run"].splitlines() if "pip" in line]
        assert f"\n{install.removeprefix('.venv/bin/')} && pytest" in readme


def test_gate_example_is_valid(tmp_path: Path) -> None:
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


def test_gate_table_has_limits_and_floors() -> None:
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
    """Return a clone of a repository with benchmarks, one commit ahead of its origin."""
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


def test_push_is_compared_with_the_last_good_runs(project: Path, tmp_path: Path) -> None:
    [measures] = re.findall(r"pytest .*?(?= --benchmark-json)", steps("main")["Measure"]["run"])
    assert measures in steps("pull-request")["Is it INT8, is it accurate"]["run"]
    summary = tmp_path / "summary.md"
    runner = {"HOME": str(tmp_path), "BASELINES": "b/r", "GITHUB_STEP_SUMMARY": str(summary)}
    runner |= {"KEPT": "8", "GITHUB_EVENT_NAME": "push", "GITHUB_RUN_ID": "17"}
    code, out = run(project, "main", "Measure", **runner)
    assert code == 0, out
    kept = tmp_path / "b" / "r" / "main"
    compare = "Compare with the last good runs"
    code, out = run(project, "main", compare, **runner)
    assert (code, out) == (2, f"int8bench compare: {kept} does not exist\n")
    assert run(project, "main", "Keep it", **runner) == (0, "")
    [first] = kept.iterdir()
    saved = json.loads(first.read_text())

    for factor, expected, outcome in ((10, 0, "improved"), (0.1, 1, "regressed")):
        for number in range(8):  # from earlier days
            text = json.dumps(slowed(saved, factor * (1 + number / 1000)))
            (kept / f"20000101T00000{number}Z-1-new-1.json").write_text(text)
        first.unlink(missing_ok=True)
        code, out = run(project, "main", compare, **runner)
        assert (code, f"2 {outcome}" in out) == (expected, True), out
        compared = json.loads((project / "compare.json").read_text())["int8bench_compare"]
        assert compared["counts"] == {outcome: 2}
    assert summary.read_text().count("## int8bench compare: ") == 2

    assert run(project, "main", "Keep it", **runner) == (0, "")
    names = sorted(path.name for path in kept.iterdir())
    assert names[:-1] == [f"20000101T00000{number}Z-1-new-1.json" for number in range(1, 8)]
    assert names[-1].endswith("Z-17-new-1.json")


def slowed(saved: dict[str, Any], factor: float) -> dict[str, Any]:
    """Return a saved file with all times multiplied by ``factor``."""
    copied: dict[str, Any] = json.loads(json.dumps(saved))
    for result in copied["int8bench"]["results"]:
        for field in ("batch_time_s", "batch_time_min_s"):
            result[field] *= factor
        result["samples_per_s"] /= factor
    return copied


def test_manual_run_replaces_the_baseline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(tmp_path, "pytest", 'echo {} > "${3#*=}"')
    kept = tmp_path / "b" / "r" / "main"
    kept.mkdir(parents=True)
    (kept / "20000101T000000Z-1-new-1.json").touch()
    runner = {"HOME": str(tmp_path), "BASELINES": "b/r", "KEPT": "3", "GITHUB_RUN_ID": "17"}
    runner |= {"GITHUB_EVENT_NAME": "workflow_dispatch", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for step in ("Measure", "Keep it"):
        assert run(tmp_path, "main", step, **runner) == (0, "")
    numbers = [path.name.partition("Z-")[2] for path in kept.iterdir()]
    assert sorted(numbers) == [f"17-new-{number}.json" for number in (1, 2, 3)]


@pytest.mark.parametrize("job", ["pull-request", "main"])
def test_job_removes_files_of_earlier_jobs(job: str, tmp_path: Path) -> None:
    written = re.findall(
        r"(?:=|--(?:json|junit|comment) )\"?([\w$-]+\.(?:json|xml|md))", str(steps(job))
    )
    names = {name.replace("$number", "7") for name in written}
    assert len(names) >= 3
    for name in (*names, "kept.py"):
        (tmp_path / name).touch()
    assert next(iter(steps(job))) == "Forget earlier jobs"
    assert run(tmp_path, job, "Forget earlier jobs") == (0, "")
    assert [path.name for path in tmp_path.iterdir()] == ["kept.py"]


def fake(folder: Path, command: str, script: str) -> None:
    path = folder / command
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_posts_and_updates_comments(tmp_path: Path) -> None:
    # The requests to gh, and the comments that --jq would find.
    fake(
        tmp_path,
        "gh",
        'echo "$*" >> calls; case "$*" in *"int8bench ab -->"*) printf "7\\n9\\n";; esac',
    )
    for name in ("ab", "compare"):
        (tmp_path / f"{name}.md").touch()
    runner = {"PULL": "5", "GITHUB_REPOSITORY": "o/r", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    assert run(tmp_path, "comment", next(iter(steps("comment"))), **runner) == (0, "")
    calls = (tmp_path / "calls").read_text().splitlines()
    asked = "api --paginate repos/o/r/issues/5/comments --jq "
    assert [call.startswith(asked) for call in calls] == [True, False, True, False]
    assert calls[1::2] == [
        "api --silent --method PATCH repos/o/r/issues/comments/7 -F body=@ab.md",
        "api --silent --method POST repos/o/r/issues/5/comments -F body=@compare.md",
    ]
    [compare] = re.findall(
        r"int8bench compare .*", steps("pull-request")["Compare with main"]["run"]
    )
    assert "--comment compare.md" in compare
    assert "--comment ab.md" in steps("pull-request")["Compare with the merge base"]["run"]
    for name, call in zip(("ab", "compare"), calls[::2], strict=True):
        assert f'startswith("<!-- int8bench {name} -->")' in call


def test_fork_fails_with_an_error(project: Path) -> None:
    code, out = run(project, "fork", "Code of forks does not run on our machine")
    assert (code, out.startswith("::error::not measured")) == (1, True)


def test_pull_request_is_compared_with_its_merge_base(project: Path) -> None:
    (project / "more").touch()
    git(project, "add", "-A")
    git(project, "commit", "-q", "-m", "second")
    code, out = run(project, "pull-request", "Compare with the merge base", BASE_REF="main")
    assert code == 0, out
    result = json.loads((project / "ab.json").read_text())["int8bench_ab"]
    assert [run["outcome"] for run in result["runs"]] == ["PASS"]
    assert result["base"]["commit"] != result["new"]["commit"]
    assert (project / "ab.xml").exists()
    assert (project / "ab.md").read_text().startswith("<!-- int8bench ab -->\n## int8bench ab: ")
