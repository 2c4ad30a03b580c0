"""Parameter values: immutable dictionaries, scalars and their text forms."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias
from urllib.parse import quote

Scalar: TypeAlias = str | int | float | bool

#: Pattern for the names of a workload's axes.
EXTRA_NAME = re.compile(r"[A-Za-z][A-Za-z0-9]*(?:_[A-Za-z0-9]+)*")


class FrozenDict(Mapping[str, Scalar]):
    """A hashable mapping, ordered by key; equality also compares the types of values."""

    __slots__ = ("_items",)

    def __init__(self, values: Mapping[str, Scalar] | None = None) -> None:
        self._items: dict[str, Scalar] = dict(sorted((values or {}).items()))

    def _typed(self) -> tuple[tuple[str, str, Scalar], ...]:
        return tuple((k, type(v).__name__, v) for k, v in self._items.items())

    def __getitem__(self, key: str) -> Scalar:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(self._typed())

    def __eq__(self, other: object) -> bool:
        if isinstance(other, FrozenDict):
            return self._typed() == other._typed()
        if isinstance(other, Mapping):
            return self == FrozenDict(other)
        return NotImplemented

    def __repr__(self) -> str:
        return repr(self._items)


def parse_bool(text: str) -> bool:
    """Parse ``true``/``false``, ``1``/``0``, ``yes``/``no`` or ``on``/``off``.

    Raises:
        ValueError: for any other text; the message names the rule and the value.
    """
    words = {"true": True, "1": True, "yes": True, "on": True}
    words |= {"false": False, "0": False, "no": False, "off": False}
    try:
        return words[text.strip().lower()]
    except KeyError:
        raise ValueError(f"must be true or false, got {text!r}") from None


def parse_extras(text: str) -> FrozenDict:
    try:
        return checked_extra(json.loads(text))
    except (json.JSONDecodeError, RecursionError):
        raise ValueError(f"must be a JSON object, got {text!r}") from None


def parse_extra(text: str) -> Scalar:
    """Parse a value of an ``extra`` axis: ``true``, ``12``, ``0.5``, or text (``"12"`` quoted)."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, str | int | float | bool) else text


def extra_text(value: Scalar) -> str:
    if isinstance(value, str) and parse_extra(value) == value and value:
        return value
    return json.dumps(value)


def to_text(value: Scalar) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def escape(text: str) -> str:
    """Percent-encode characters that separate run name items or break pytest ids or shells."""
    return quote(text, safe=".,+=-").replace("_", "%5F")


def checked_extra(extra: Any) -> FrozenDict:
    if not isinstance(extra, Mapping):
        raise ValueError(f"extra must be a mapping of names to values, got {extra!r}")
    for key, value in extra.items():
        if not isinstance(key, str) or not EXTRA_NAME.fullmatch(key):
            raise ValueError(f"extra names must be identifiers such as seq_len, got {key!r}")
        # Exactly these types: parsing a run name cannot restore a subclass.
        if type(value) not in (str, int, float, bool):
            raise ValueError(f"extra.{key} must be str, int, float or bool, got {value!r}")
        if isinstance(value, float) and value - value != 0:
            raise ValueError(f"extra.{key} must be finite, got {value!r}")
        if isinstance(value, str) and _has_surrogates(value):
            raise ValueError(f"extra.{key} must be text that UTF-8 can hold, got {value!r}")
    return FrozenDict(
        {key: 0.0 if value == 0 and type(value) is float else value for key, value in extra.items()}
    )


def _has_surrogates(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)
