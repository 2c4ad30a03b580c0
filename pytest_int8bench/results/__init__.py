"""Saved results: records, the journal, and reading them back.

``read`` and ``Saved`` are public. They are imported on first use, because pytest imports this
package at every start.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {"read": "reading", "Saved": "records", "SchemaError": "base"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
