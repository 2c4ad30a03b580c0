"""What is measured: workloads, and where their names lead.

:class:`Workload` and :class:`Evaluation` are loaded when they are first used, because pytest loads
this package at every start, for the names of the workloads.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytest_int8bench.workloads.workload import Evaluation as Evaluation
    from pytest_int8bench.workloads.workload import Workload as Workload


def __getattr__(name: str) -> Any:
    if name not in ("Evaluation", "Workload"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.workload"), name)
