"""The public names, the layering of the modules, and the examples of the documentation."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pytest_int8bench

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "pytest_int8bench"
EDGE = {"plugin", "fixtures", "options", "collection", "session", "progress"}
#: Library -> the one module that knows it.
HOMES = {
    "jinja2": "report/page",
    "matplotlib": "report/figures",
    "olmoearth_pretrain_minimal": "workloads/olmoearth",
    "timm": "workloads/timm",
    "torchao": "quantize",
    "transformers": "workloads/huggingface",
}


def test_public_names_are_these_and_resolve() -> None:
    assert sorted(pytest_int8bench.__all__) == [
        "Evaluation",
        "FlashSDPA",
        "Result",
        "RunParams",
        "SWEEPS",
        "ThroughputBenchmarkRunner",
        "ThroughputBenchmarkRunnerConfig",
        "Workload",
        "apply_int8_quant",
        "compile_for_a100",
        "coverage",
        "is_transformer_linear",
    ]
    for name in pytest_int8bench.__all__:
        assert getattr(pytest_int8bench, name) is not None
        assert name in dir(pytest_int8bench)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'pytest_int8bench' has no attribute 'nope'"):
        importlib.import_module("pytest_int8bench").nope  # noqa: B018


def test_the_package_itself_loads_no_torch() -> None:
    code = "import sys, pytest_int8bench, pytest_int8bench.plugin; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def imports_of(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    names = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_modules_import_inwards_only(path: Path) -> None:
    module = path.relative_to(PACKAGE).with_suffix("").as_posix()
    imported = imports_of(path)
    top = {name.split(".")[0] for name in imported}
    if module not in EDGE and not module.startswith("suite/"):
        assert "pytest" not in top
        edge = {f"pytest_int8bench.{name}" for name in EDGE}
        assert not imported & edge
    for library, home in HOMES.items():
        assert module == home or library not in top


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL)


def test_readme_example_from_python_runs(capsys: pytest.CaptureFixture[str]) -> None:
    example = blocks(ROOT / "README.md", "python")[3]
    names: dict[str, object] = {}
    exec(compile(example, "README.md", "exec"), names)
    assert capsys.readouterr().out.startswith("2 of ")
    import torch

    fast = names["fast"]
    assert callable(fast)
    x = torch.randn(32, 64, dtype=torch.bfloat16)
    assert fast(x).shape == (32, 10)


def test_readme_example_of_a_sweep_builds() -> None:
    example = blocks(ROOT / "README.md", "python")[4]
    names: dict[str, object] = {}
    exec(compile(example, "README.md", "exec"), names)
    points = [(p.int8_mode, p.batch_size) for p in names["runner"].points]  # type: ignore[attr-defined]
    assert points == [("w8a8", 64), ("w8a8", 128), ("w8", 64), ("w8", 128)]


def test_examples_of_a_model_and_of_its_accuracy_run(pytester: pytest.Pytester) -> None:
    conftest, tests, *_ = blocks(ROOT / "README.md", "python")
    pytester.makeconftest(conftest)
    pytester.makepyfile(tests)

    test, example = blocks(ROOT / "docs" / "accuracy.md", "python")
    assert "def test_accuracy(int8_guardrail):" in (ROOT / "README.md").read_text()
    # The workload of the README with the evaluation of the docs, and as many outputs as classes.
    with_evaluation = conftest.replace(
        'name="encoder-layer",', 'name="encoder-layer", evaluation=evaluation,'
    ).replace("torch.nn.Linear(1024, 256)", "torch.nn.Linear(1024, 10)")
    folder = pytester.mkpydir("accuracy")
    (folder / "conftest.py").write_text(example + with_evaluation)
    (folder / "test_accuracy.py").write_text(test)

    result = pytester.runpytest_subprocess(
        "--int8-preset=smoke",
        "--int8-set=compile_mode=off",
        "--int8-set=benchmark_interval_s=0.05",
        "--int8-max-drop=5pp",
    )
    # Throughput of the BF16 twin and of the candidate, the shapes of the candidate; its accuracy.
    result.assert_outcomes(passed=4)


def test_readme_holds_two_set_up_commands_and_ci_runs_them() -> None:
    (setup,) = blocks(ROOT / "README.md", "bash")
    first, second = setup.strip().splitlines()
    assert first.endswith("&& pytest benchmarks --int8-mode=w8a8")
    assert second.endswith("&& pytest -n 2")
    assert "README.md" in (ROOT / ".ci" / "run").read_text()


def test_readme_lists_every_option() -> None:
    from pytest_int8bench.options import OPTIONS

    table = (ROOT / "README.md").read_text()
    for option in OPTIONS.values():
        assert f"| `{option.flag}" in table
