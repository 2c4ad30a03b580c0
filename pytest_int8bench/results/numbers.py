"""Check numbers and the values of figures."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TypeGuard


def is_positive(value: object) -> bool:
    """Return whether ``value`` is a positive number that a normal float can hold."""
    return is_number(value) and value >= sys.float_info.min


def is_number(value: object) -> TypeGuard[int | float]:
    """Return whether ``value`` is a finite number that a float can hold."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) <= sys.float_info.max


#: ``Figure.check`` -> a description of valid values, and a function that tests a value.
CHECKS: dict[str, tuple[str, Callable[[object], bool]]] = {
    "positive": ("a number above 0", is_positive),
    "number": ("a number", is_number),
    "text": ("a string", lambda value: isinstance(value, str)),
}
