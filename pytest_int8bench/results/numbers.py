"""What numbers must be. pytest imports this when it starts."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TypeGuard


def is_positive(value: object) -> bool:
    """Return whether ``value`` is a number above 0 that a float can hold with all its digits."""
    return is_number(value) and value >= sys.float_info.min


def is_number(value: object) -> TypeGuard[int | float]:
    """Return whether ``value`` is a number that a float can hold."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) <= sys.float_info.max


#: What a figure asks of its values: in words, and whether a value is it.
CHECKS: dict[str, tuple[str, Callable[[object], bool]]] = {
    "positive": ("a number above 0", is_positive),
    "number": ("a number", is_number),
    "text": ("a text", lambda value: isinstance(value, str)),
}
