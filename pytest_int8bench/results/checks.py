"""Check values against type annotations: plain types, ``None``, lists, objects and rules.

:func:`check_fields` checks every record when it is created or read, including nested values, so
that code can rely on the annotations. Numbers must be finite. Fields without an annotation, which
newer versions may add, are accepted.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import reprlib
import types
import typing
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NotRequired, Union

from pytest_int8bench.results.numbers import is_number, is_positive

_MOST_CHARACTERS = 80
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _MOST_CHARACTERS
_Check = Callable[[Any], None]


@dataclasses.dataclass(frozen=True)
class Rule:
    """A rule for values, for use in ``Annotated``."""

    text: str
    """Describes valid values; follows *must be* in errors."""
    holds: Callable[[Any], bool]


@dataclasses.dataclass(frozen=True)
class Needs:
    """Fields that an object must have if it has a certain other field, for use in ``Annotated``."""

    name: str
    """The field that needs others."""
    others: tuple[str, ...]
    """The fields that it needs."""


#: A number above 0.
Positive = Annotated[float, Rule("a number above 0", is_positive)]
#: A non-negative number.
NotNegative = Annotated[
    float, Rule("a number of at least 0", lambda value: is_number(value) and value >= 0)
]
#: A share of a whole; rounding errors may put it slightly above 1.
Share = Annotated[
    float, Rule("a share from 0 to 1", lambda value: is_number(value) and 0 <= value <= 1 + 1e-6)
]
#: End of an interval: a number, or infinite if there are too few samples for a bound.
Bound = Annotated[
    float,
    Rule("a number", lambda value: is_number(value) or value in (-math.inf, math.inf)),
]
#: A non-negative integer.
Count = Annotated[
    int, Rule("a whole number of at least 0", lambda value: _is_whole(value) and value >= 0)
]
#: A single value, such as a workload's own axis.
Scalar = Annotated[
    Any,
    Rule(
        "a string, a number, true or false",
        lambda value: isinstance(value, str | bool) or is_number(value),
    ),
]


def one_of(values: Sequence[str]) -> Rule:
    """Return the rule of a field that takes one of these strings."""
    return Rule(f"one of {', '.join(values)}", values.__contains__)


class WrongValueError(ValueError):
    """Raised for a value that its annotation does not allow."""

    def __init__(self, rule: str, value: Any) -> None:
        super().__init__(rule, value)
        self._rule = rule
        self._value = shown(value)
        self._path = ""

    def inside(self, place: str) -> WrongValueError:
        """Prepend the field or list index that holds the value to the error's path, and return the
        error."""
        self._path = f"{place}{self._path}"
        return self

    def __str__(self) -> str:
        return f"{self._path.removeprefix('.')} must be {self._rule}, got {self._value}"


def check_fields(record: Any) -> None:
    """Check all fields of a dataclass against their annotations.

    Raises:
        ValueError: one line that names field, rule and value.
    """
    kind: Any = type(record)
    for name, check in _checks_of(kind):
        try:
            check(getattr(record, name))
        except WrongValueError as error:
            raise error.inside(name) from None


def check(kind: Any, value: Any) -> None:
    """Check a value against a type, such as a ``TypedDict``.

    Raises:
        ValueError: one line that names the field in ``value``, the rule and the wrong value.
    """
    _check_of(kind)(value)


def shown(value: Any) -> str:
    """Return a value's shortened ``repr`` for errors."""
    return short(_REPR.repr(value))


def short(text: str) -> str:
    """Return a text from a file, such as a node id, cut to a length suitable for an error."""
    most = 2 * _MOST_CHARACTERS
    return text if len(text) <= most else f"{text[: most - 3]}..."


@functools.cache
def _checks_of(kind: type[Any]) -> tuple[tuple[str, _Check], ...]:
    hints = typing.get_type_hints(kind, include_extras=True)
    return tuple((field.name, _check_of(hints[field.name])) for field in dataclasses.fields(kind))


@functools.cache
def _check_of(hint: Any) -> _Check:
    if hint is Any:
        return lambda value: None
    if isinstance(hint, Rule):
        return _rule(hint)
    if isinstance(hint, Needs):
        return _needs(hint)
    if hint in _TYPES:
        return _rule(_TYPES[hint])
    if typing.is_typeddict(hint):
        return _object(hint)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        plain, *further = arguments
        if any(isinstance(argument, Rule) for argument in further):  # its rules check the type too
            return _all(list(map(_check_of, further)))
        return _all([*map(_check_of, further), _check_of(plain)])
    if origin in (Union, types.UnionType):
        [kind] = [argument for argument in arguments if argument is not types.NoneType]
        return _optional(_check_of(kind))
    if origin is dict:
        return _mapping(_check_of(arguments[1]))
    if origin is list:
        return _list(arguments[0])
    raise TypeError(f"a field of a record must have a type that JSON can hold, got {hint}")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and is_number(value)


_TYPES = {
    str: Rule("a string", lambda value: isinstance(value, str)),
    bool: Rule("true or false", lambda value: isinstance(value, bool)),
    int: Rule("a whole number", _is_whole),
    float: Rule("a number", is_number),
}


def _rule(rule: Rule) -> _Check:
    text, holds = rule.text, rule.holds

    def check(value: Any) -> None:
        if not holds(value):
            raise WrongValueError(text, value)

    return check


def _needs(needs: Needs) -> _Check:
    def check(value: Any) -> None:
        if value.get(needs.name) is None:
            return
        if missing := [other for other in needs.others if value.get(other) is None]:
            rule = f"an object with {', '.join(missing)} if it has {needs.name}"
            raise WrongValueError(rule, value)

    return check


def _all(checks: list[_Check]) -> _Check:
    def check(value: Any) -> None:
        for each in checks:
            each(value)

    return check


def _optional(inner: _Check) -> _Check:
    def check(value: Any) -> None:
        if value is not None:
            inner(value)

    return check


def _list(kind: Any) -> _Check:
    inner = _check_of(kind)
    rule = "a list of strings" if kind is str else "a list"

    def check(value: Any) -> None:
        if not isinstance(value, list):
            raise WrongValueError(rule, value)
        for place, entry in enumerate(value):
            try:
                inner(entry)
            except WrongValueError as error:
                raise error.inside(f"[{place}]") from None

    return check


def _mapping(inner: _Check) -> _Check:
    def check(value: Any) -> None:
        if not isinstance(value, dict):
            raise WrongValueError("an object", value)
        for name, entry in value.items():
            try:
                inner(entry)
            except WrongValueError as error:
                raise error.inside(f".{short(str(name))}") from None

    return check


def _object(kind: Any) -> _Check:
    fields = []
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        is_needed = kind.__total__
        if typing.get_origin(hint) is NotRequired:
            is_needed, [hint] = False, typing.get_args(hint)
        fields.append((name, is_needed, _check_of(hint)))

    def check(value: Any) -> None:
        if not isinstance(value, dict):
            raise WrongValueError("an object", value)
        for name, is_needed, inner in fields:
            if name not in value and not is_needed:
                continue
            try:
                inner(value.get(name))
            except WrongValueError as error:
                raise error.inside(f".{name}") from None
            if name not in value:
                raise WrongValueError(f"an object with {name}", value)

    return check
