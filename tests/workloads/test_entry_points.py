"""Test a workload of another distribution, from its entry point to all outputs."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from pytest_int8bench.cli.main import main
from pytest_int8bench.plugin.reading import read_settings
from pytest_int8bench.results.reading import read

TOY = """
import torch
from pytest_int8bench import Workload


def make():
    return Workload(
        name="toy",
        build=lambda p: torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Linear(64, 32)),
        inputs=lambda p, device: (torch.randn(p.batch_size, 32, device=device),),
        filter_fn=lambda module, name: True,
    )
"""
TEST = """
def test_throughput(int8_throughput):
    int8_throughput()
"""
SMOKE = (
    "--int8-preset=smoke",
    "--int8-set=compile_mode=off",
    "--int8-set=benchmark_interval_s=0.05",
)


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """Return a project with a test and an installed distribution that offers the workload."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    without = " ".join(f"-p no:{name}" for name in ("randomly", "codspeed", "hypothesispytest"))
    pytester.makeini(f"[pytest]\npythonpath = installed\naddopts = {without}\n")
    pytester.makepyfile(test_toy=TEST)
    info = pytester.path / "installed" / "int8_toy-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: int8-toy\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[pytest_int8bench.workloads]\ntoy = toy_models:make\n")
    (info.parent / "toy_models.py").write_text(TOY)
    return pytester


def test_entry_point_workload_appears_in_all_outputs(
    project: pytest.Pytester, forked: None, capsys: pytest.CaptureFixture[str]
) -> None:
    result = project.runpytest_subprocess(
        *SMOKE, "--int8-workload=toy", "--benchmark-json=base.json", "--int8-report=page.md"
    )
    result.assert_outcomes(passed=2)
    result.stdout.re_match_lines([r"^workload run ", r"^toy +cpu_\S+ ", r"^toy +cpu_\S+ "])

    saved = read(Path("base.json"))
    assert [found.workload for found in saved.results] == ["toy", "toy"]
    assert re.search(r"\btoy\b", Path("page.md").read_text())

    shutil.copy("base.json", "new.json")
    capsys.readouterr()
    assert main(["compare", "base.json", "new.json"]) == 0
    shown = capsys.readouterr().out
    assert all(f"toy: {found.run_name}" in shown for found in saved.results)


def test_error_for_unknown_name_lists_the_entry_point(
    project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(project.path / "installed")
    assert read_settings(project.parseconfig("--int8-workload=toy")).workload == "toy"
    with pytest.raises(pytest.UsageError) as error:
        read_settings(project.parseconfig("--int8-workload=toys"))
    assert str(error.value) == (
        "--int8-workload: must be olmoearth, digits, timm:NAME, hf:NAME, toy, module:callable or "
        "path.py:callable, got 'toys'"
    )
