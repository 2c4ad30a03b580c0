"""How much worse a metric may get: limits, noise floors, and the table in ``pyproject.toml``::

[tool.int8bench.gate]
max-slowdown = "5%"
allow = ["driver"]

[tool.int8bench.gate.runs."*_bs1"]  # run names or node ids, as in a shell
max-slowdown = "15%"
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pytest_int8bench.environment import FINGERPRINT_NAMES, MAY_DIFFER
from pytest_int8bench.gate.limits import Rules
from pytest_int8bench.results.checks import shown
from pytest_int8bench.results.figures import METRICS

#: What may be allowed to differ: names of the fingerprint, and a GPU that was slowed down by heat.
THROTTLED = "throttled"
ALLOWABLE = (*(name for name in FINGERPRINT_NAMES if name not in MAY_DIFFER), THROTTLED)

_SHARE = re.compile(r"(\d+(?:\.\d+)?)\s*%")


def parse_share(text: str) -> float:
    """Read a percentage, such as ``5%``, as a share.

    Raises:
        ValueError: naming the rule and the value.
    """
    match = _SHARE.fullmatch(text.strip())
    if match is None or not math.isfinite(share := float(match[1]) / 100):
        raise ValueError(f"must be a percentage such as 5%, got {shown(text)}")
    return share


def parse_limit(text: str) -> float | None:
    """Read a limit: a percentage, or ``off``, which is None.

    Raises:
        ValueError: naming the rule and the value.
    """
    if text.strip() == "off":
        return None
    try:
        return parse_share(text)
    except ValueError:
        raise ValueError(f"must be a percentage such as 5%, or off, got {shown(text)}") from None


def parse_floor(text: str) -> tuple[str, float]:
    """Read a noise floor, such as ``throughput=3%``: the metric's name and a share.

    Raises:
        ValueError: naming the rule and the value.
    """
    name, equals, share = text.partition("=")
    if not equals or name.strip() not in METRICS:
        raise ValueError(
            f"must be METRIC=PERCENTAGE with a metric of {', '.join(METRICS)}, got {text!r}"
        )
    return name.strip(), parse_share(share)


def check_allow(names: Iterable[str]) -> frozenset[str]:
    """Return the fingerprint names that may differ.

    Raises:
        ValueError: naming the rule and the value, if one is no name of the fingerprint.
    """
    found = frozenset(names)
    for name in sorted(found):
        if name in MAY_DIFFER:
            raise ValueError(f"{name} may always differ")
        if name not in ALLOWABLE:
            raise ValueError(f"must be one of {', '.join(ALLOWABLE)}, got {name!r}")
    return found


_TABLE = "tool.int8bench.gate"
_FLAGS = {"allow-missing": "allow_missing", "fail-on-inconclusive": "fail_on_inconclusive"}


def find_pyproject(folder: Path) -> Path | None:
    """Return the ``pyproject.toml`` of ``folder`` or of its closest parent that has one."""
    candidates = (parent / "pyproject.toml" for parent in (folder, *folder.parents))
    return next((path for path in candidates if path.is_file()), None)


def read_rules(path: Path | None) -> Rules:
    """Read the rules of a ``pyproject.toml``, or the defaults if it has none.

    Raises:
        ValueError: one line that names file, key, rule and value.
        OSError: if the file cannot be read.
    """
    if path is None:
        return Rules()
    import tomllib

    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not TOML: {error}") from None
    table: Any = document
    for key in _TABLE.split("."):
        table = table.get(key, {}) if isinstance(table, dict) else {}
    try:
        return _rules(table)
    except ValueError as error:
        raise ValueError(f"{path}: {_TABLE}: {error}") from None


def _rules(table: Any) -> Rules:
    limited = [metric.option for metric in METRICS.values()]
    _check_keys(table, [*limited, "noise-floor", "allow", *_FLAGS, "runs"])
    values: dict[str, Any] = {}
    for key, name in _FLAGS.items():
        if key in table:
            if not isinstance(table[key], bool):
                raise ValueError(f"{key} must be true or false, got {table[key]!r}")
            values[name] = table[key]
    allow = table.get("allow", [])
    if not isinstance(allow, list) or not all(isinstance(name, str) for name in allow):
        raise ValueError(f"allow must be a list of names, got {allow!r}")
    try:
        values["allow"] = check_allow(allow)
    except ValueError as error:
        raise ValueError(f"allow: {error}") from None
    floors = table.get("noise-floor", {})
    if not isinstance(floors, dict):
        raise ValueError(f"noise-floor must be a table of metrics, got {floors!r}")
    try:
        values["floors"] = dict(parse_floor(f"{name}={share}") for name, share in floors.items())
    except ValueError as error:
        raise ValueError(f"noise-floor: {error}") from None
    runs = table.get("runs", {})
    if not isinstance(runs, dict):
        raise ValueError(f"runs must be a table of patterns, got {runs!r}")
    patterns = []
    for pattern, limits in runs.items():
        try:
            _check_keys(limits, limited)
            patterns.append((pattern, _limits(limits)))
        except ValueError as error:
            raise ValueError(f"runs.{pattern!r}: {error}") from None
    return Rules(limits=_limits(table), runs=tuple(patterns), **values)


def _check_keys(table: Any, known: Sequence[str]) -> None:
    if not isinstance(table, dict):
        raise ValueError(f"must be a table, got {table!r}")
    for key in table:
        if key not in known:
            raise ValueError(f"unknown key {key!r}; keys are {', '.join(known)}")


def _limits(table: Mapping[str, Any]) -> dict[str, float | None]:
    found = {}
    for metric in METRICS.values():
        if metric.option in table:
            try:
                found[metric.name] = parse_limit(str(table[metric.option]))
            except ValueError as error:
                raise ValueError(f"{metric.option}: {error}") from None
    return found
