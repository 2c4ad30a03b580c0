"""Workloads, built-in and user-defined, and the registry of their names.

:class:`Workload` and :class:`Evaluation` are imported on first use, because pytest imports this
package at every start to check workload names.
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
