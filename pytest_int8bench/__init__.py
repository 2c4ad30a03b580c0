"""INT8 inference benchmarks as pytest tests.

Public names load on first use: pytest imports this package at every start, and that must not
load torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytest_int8bench.attention import FlashSDPA
    from pytest_int8bench.compiler.api import compile_for_a100
    from pytest_int8bench.params import RunParams
    from pytest_int8bench.quantization.api import apply_int8_quant, coverage
    from pytest_int8bench.quantization.filters import is_transformer_linear
    from pytest_int8bench.results.records import Result
    from pytest_int8bench.runner import ThroughputBenchmarkRunner, ThroughputBenchmarkRunnerConfig
    from pytest_int8bench.sweep import SWEEPS
    from pytest_int8bench.version import __version__ as __version__
    from pytest_int8bench.workloads.workload import Evaluation, Workload


__all__ = [
    "SWEEPS",
    "Evaluation",
    "FlashSDPA",
    "Result",
    "RunParams",
    "ThroughputBenchmarkRunner",
    "ThroughputBenchmarkRunnerConfig",
    "Workload",
    "apply_int8_quant",
    "compile_for_a100",
    "coverage",
    "is_transformer_linear",
]

_HOME = {
    "SWEEPS": "sweep",
    "Evaluation": "workloads.workload",
    "FlashSDPA": "attention",
    "Result": "results.records",
    "RunParams": "params",
    "ThroughputBenchmarkRunner": "runner",
    "ThroughputBenchmarkRunnerConfig": "runner",
    "Workload": "workloads.workload",
    "__version__": "version",
    "apply_int8_quant": "quantization.api",
    "compile_for_a100": "compiler.api",
    "coverage": "quantization.api",
    "is_transformer_linear": "quantization.filters",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
