"""Test run names in a suite with several workloads."""

from __future__ import annotations

import json

import pytest

from pytest_int8bench.results.reading import read
from toys.projects import CONFTEST, SMOKE, THROUGHPUT, ids, load, make_project, without

HOOK = CONFTEST.partition("@pytest.hookimpl")
FIXTURE = """
import pytest
import toy


@pytest.fixture(scope="module")
def int8_workload({}):
    return {}
"""
OWN = """
import pytest
import toy
from pytest_int8bench import RunParams

POINT = RunParams(gpu_type="cpu", image_size=224)


@pytest.mark.parametrize("int8_workload", [toy.make("direct")], ids=["w"])
@pytest.mark.parametrize("int8_params", [POINT], indirect=True)
def test_direct(int8_params, int8_workload):
    assert int8_params == POINT and int8_params.has_short_name


@pytest.mark.int8(workload="digits")
@pytest.mark.parametrize("int8_params", [POINT], indirect=True)
def test_digits(int8_params):
    assert int8_params == POINT.replace(image_size=64)


@pytest.mark.parametrize("int8_params", [POINT, POINT.replace(image_size=30)])
def test_olmoearth(int8_params):
    pass
"""
MARKED = """
import pytest


@pytest.mark.int8(workload="{}")
def test_marked(int8_throughput):
    int8_throughput()
"""


@pytest.fixture
def project(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, forked: None
) -> pytest.Pytester:
    """Return a project whose session uses OlmoEarth while some tests use another workload."""
    conftest = "import pytest\n\n\n" + "".join(HOOK[1:])
    return make_project(pytester, monkeypatch, conftest=conftest)


def test_only_olmoearth_names_contain_its_fields(project: pytest.Pytester) -> None:
    project.makepyfile(
        test_a=FIXTURE.format("", 'toy.make("bert")') + THROUGHPUT,
        test_b=FIXTURE.format("int8_workload", "int8_workload") + THROUGHPUT,
        test_c=MARKED.format("digits"),
        test_d=MARKED.format("toy.py:make"),
        test_e=THROUGHPUT,
        test_f=FIXTURE.format("request", "toy.make()") + "def test_point(int8_params):\n    pass\n",
        test_g=OWN,
    )
    options = (*SMOKE, "--int8-no-baseline", "--int8-set=image_size=32,64", *without())
    collected = ids(project.runpytest_subprocess(*options, "--collect-only", "-q"))
    name, seed = "cpu_bf16_int8_w8a8_off{}_bs4", "nano_cpu_bf16_int8_w8a8_off_s2_is{}_ps4_ts3_bs4"
    sizes = ("_is32", "")  # 64 is the default
    assert sorted(collected) == sorted(
        [
            *(f"test_a.py::test_throughput[{name.format(size)}]" for size in sizes),
            *(f"test_b.py::test_throughput[{seed.format(size)}]" for size in (32, 64)),
            f"test_c.py::test_marked[digits-{name.format('')}]",  # which ignores it
            *(f"test_d.py::test_marked[toy.py:make-{name.format(size)}]" for size in sizes),
            *(f"test_e.py::test_throughput[{seed.format(size)}]" for size in (32, 64)),
            *(f"test_f.py::test_point[{name.format(size)}]" for size in sizes),
            "test_g.py::test_direct[cpu_bf16_is224_bs128-w]",
            "test_g.py::test_digits[cpu_bf16_bs128]",
            "test_g.py::test_olmoearth[base_cpu_bf16_s2_is224_ps4_ts12_bs128]",
            "test_g.py::test_olmoearth[base_cpu_bf16_s2_is30_ps4_ts12_bs128]",
        ]
    )
    result = project.runpytest_subprocess(*options, "test_g.py")
    result.assert_outcomes(passed=4)


def test_tables_distinguish_models_and_older_files_match(project: pytest.Pytester) -> None:
    project.makepyfile(
        test_a=FIXTURE.format("", 'toy.make("bert")') + THROUGHPUT,
        test_b=FIXTURE.format("", 'toy.make("vit")') + THROUGHPUT,
        test_c=MARKED.format("toy.py:make"),
    )
    options = (*SMOKE, "--int8-mode=off", *without())
    result = project.runpytest_subprocess(*options, "--benchmark-json=old.json")
    result.assert_outcomes(passed=3)
    name, old = (
        "cpu_bf16_bs4_compile_mode-off",
        "nano_cpu_bf16_s2_is16_ps4_ts3_bs4_compile_mode-off",
    )
    saved = load(project.path / "old.json")
    assert {entry["fullname"]: entry["name"] for entry in saved["benchmarks"]} == {
        f"test_a.py::test_throughput[{name}]": f"test_throughput[bert-{name}]",
        f"test_b.py::test_throughput[{name}]": f"test_throughput[vit-{name}]",
        f"test_c.py::test_marked[toy.py:make-{name}]": f"test_marked[toy.py:make-{name}]",
    }
    assert [r.params["model_size"] for r in read(project.path / "old.json").results] == ["base"] * 3

    text = json.dumps(saved).replace("toy.py:make-", "").replace(name, old)
    stored = project.path / ".benchmarks" / "Linux" / "0001_old.json"
    stored.parent.mkdir(parents=True)
    stored.write_text(text)
    result = project.runpytest_subprocess(
        *options,
        f"--int8-compare={stored}",
        "--int8-max-slowdown=1000000%",
        "--benchmark-storage=.benchmarks",
        "--benchmark-compare=*/0001",
    )
    lines = result.stdout.str()
    assert "missing" not in lines
    assert f"3 records have new names, such as {old} is {name} now" in lines
    for row in (f"test_throughput[bert-{name}]", f"test_marked[toy.py:make-{name}]"):
        assert lines.count(f"{row} (") == 2  # NOW and 0001


def test_rejects_marker_fields_that_the_workload_ignores(project: pytest.Pytester) -> None:
    project.makepyfile(test_a=MARKED.format('digits", model_size="nano'))
    result = project.runpytest_subprocess(*SMOKE, *without())
    result.stdout.fnmatch_lines(
        ["@pytest.mark.int8 of *: model_size is OlmoEarth's and does nothing for digits"]
    )
