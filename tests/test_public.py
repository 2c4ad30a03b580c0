"""Test the public names, and that each library is imported in one place."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import pytest_int8bench

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "pytest_int8bench"
#: Only these import pytest.
EDGE = ("plugin/", "suite/")
#: Library -> the only module or folder that imports it.
HOMES = {
    "jinja2": "report/page/html",
    "matplotlib": "report/page/svg",
    "olmoearth_pretrain_minimal": "workloads/olmoearth",
    "pytest_benchmark": "plugin/pytest_benchmark",
    "timm": "workloads/timm",
    "torchao": "quantization/",
    "transformers": "workloads/huggingface",
    "wandb": "report/wandb",
}


def test_lists_the_public_names_and_they_resolve() -> None:
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


def test_unknown_name_raises_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'pytest_int8bench' has no attribute 'nope'"):
        importlib.import_module("pytest_int8bench").nope  # noqa: B018


def test_importing_the_package_does_not_load_torch() -> None:
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
def test_each_library_is_imported_in_one_place(path: Path) -> None:
    module = path.relative_to(PACKAGE).with_suffix("").as_posix()
    top = {name.split(".")[0] for name in imports_of(path)}
    if not module.startswith(EDGE):
        assert "pytest" not in top
    for library, home in HOMES.items():
        assert module.startswith(home) or library not in top
