"""Describe the parts of a model that were left unquantized."""

from __future__ import annotations

from collections import Counter
from typing import Any

from pytest_int8bench.results.records import Result
from pytest_int8bench.words import some

#: Number of layers to list by name; the others are only counted.
_NAMED = 3


def left_out_remarks(result: Result) -> list[str]:
    """Return remarks on the attention and MLP layers, attention calls and weights that were left
    unquantized."""
    covered = result.coverage or {}
    left = f"left in {result.float_dtype}: {result.label}"
    lines = []
    if names := (covered.get("missed") or {}).get("layers"):
        reasons = covered.get("left_out") or {}
        counted = Counter(str(reasons.get(name, "left out")) for name in names)
        lines.append(
            f"{left}: {len(names)} of {covered['missed'].get('of')} attention "
            f"and MLP layers of repeated blocks ({some(names, _NAMED)}): "
            + some([f"{count} {reason}" for reason, count in counted.items()])
        )
    attention = covered.get("attention") or {}
    if reasons := attention.get("left_out"):
        total = sum(reasons.values())
        lines.append(
            f"{left}: {total} of {total + attention.get('int8', 0)} attention "
            "calls: " + some([f"{count} {reason}" for reason, count in reasons.items()])
        )
    if kinds := (covered.get("elsewhere") or {}).get("weights"):
        listed = some([_kind(kind, found) for kind, found in kinds.items()])
        lines.append(
            f"{left}: {covered['elsewhere'].get('share', 0):.0%} of the weights "
            f"are not in nn.Linear: {listed}"
        )
    return lines


def _kind(kind: str, found: dict[str, Any]) -> str:
    names = [name or "the model itself" for name in found["layers"]]
    return f"{kind} ({found['parameters']:,} in {some(names, _NAMED)})"
