"""Options of the gate that both pytest and ``int8bench`` take: ``--int8-NAME`` and ``--NAME``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from pytest_int8bench.results.figures import METRICS


class Flag(NamedTuple):  # made at every start of pytest, where a dataclass takes 1 ms more
    """An option shared by pytest and ``int8bench``."""

    name: str
    dest: str
    """Attribute name of its value."""
    help: str
    """Meaning, without a full stop and without the default."""
    default: str
    """The default, as shown in help."""
    metavar: str | None = None
    """None for a switch."""
    repeatable: bool = False
    read: Callable[[Any], Any] | None = None
    """Converts the text, or the list of texts of a repeatable option, or raises a ValueError that
    names rule and value. None for a switch."""


def _read_limit(text: str) -> float | None:
    from pytest_int8bench.gate.rules import parse_limit

    return parse_limit(text)


def _read_allow(names: list[str]) -> frozenset[str]:
    from pytest_int8bench.gate.rules import check_allow

    return check_allow(names)


LIMITS = tuple(
    Flag(
        metric.option,
        metric.name,
        f"largest {metric.help}: a percentage, or off",
        "off" if metric.limit is None else f"{metric.limit:.0%}",
        "LIMIT",
        read=_read_limit,
    )
    for metric in METRICS.values()
)
ALLOW = Flag(
    "allow",
    "allow",
    "part of the fingerprint that may differ, such as driver, or throttled to accept "
    "throttled points",
    "none",
    "NAME",
    repeatable=True,
    read=_read_allow,
)
ALLOW_MISSING = Flag(
    "allow-missing",
    "allow_missing",
    "ignore runs of the base that are missing or skipped in the new run",
    "off",
)
GATE_FLAGS = (*LIMITS, ALLOW, ALLOW_MISSING)
