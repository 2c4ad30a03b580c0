"""Read JSON from untrusted files, within limits.

Reading always terminates, whatever a path points to. The returned values are safe to traverse,
print and show in errors.
"""

from __future__ import annotations

import codecs
import json
import os
import stat
from pathlib import Path
from typing import Any

from pytest_int8bench.printing import cleaned
from pytest_int8bench.results.base import SchemaError

MAX_BYTES = 2**30
"""Maximum size of a file in bytes. 10,000 results take about 50 MB."""
MAX_CHARACTERS = 1_000_000
"""Maximum length of a string."""
MAX_LEVELS = 32
"""Maximum depth of nested objects and lists. Records have five levels."""

_MARKS = {
    codecs.BOM_UTF8: "starts with a byte order mark: save it as UTF-8 without one",
    codecs.BOM_UTF32_LE: "must be UTF-8 text, got UTF-32",
    codecs.BOM_UTF32_BE: "must be UTF-8 text, got UTF-32",
    codecs.BOM_UTF16_LE: "must be UTF-8 text, got UTF-16",
    codecs.BOM_UTF16_BE: "must be UTF-8 text, got UTF-16",
}
_KINDS = (
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def read_text(path: Path) -> str:
    """Return the text of a regular file, which other processes may be writing to.

    Raises:
        SchemaError: one line, if it is a pipe or a device, not UTF-8 text, or too large.
        OSError: if it cannot be read.
    """
    # Open without blocking: opening a pipe without a writer, or reading one, could block forever.
    with open(path, "rb", opener=_open) as file:
        found = os.fstat(file.fileno())
        for is_kind, kind in _KINDS:
            if is_kind(found.st_mode):
                raise SchemaError(f"{path} must be a regular file, got {kind}")
        _check_size(path, found.st_size)
        raw = file.read(MAX_BYTES + 1)
    _check_size(path, len(raw))
    for mark, problem in _MARKS.items():
        if raw.startswith(mark):
            raise SchemaError(f"{path} {problem}")
    if b"\0" in raw[:4]:  # UTF-16 or UTF-32 without a byte order mark
        raise SchemaError(f"{path} is not UTF-8 text: it starts with a NUL byte")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SchemaError(f"{path} is not UTF-8 text: {error}") from None


def parse(path: Path, text: str) -> Any:
    """Parse JSON.

    Raises:
        SchemaError: one line, if Python's parser gives up on nesting or on the length of a number.
        json.JSONDecodeError: if it is not JSON.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise SchemaError(f"{path} {_TOO_DEEP}") from None
    except ValueError as error:  # an integer with thousands of digits
        raise SchemaError(f"{path} cannot be read as JSON: {error}") from None


def cleaned_values(path: Path, values: Any) -> Any:
    """Return parsed values with all strings cleaned of control characters.

    Raises:
        SchemaError: one line, if values are nested too deeply or a string is too long.
    """
    names: set[str] = set()
    level: list[Any] = [[values]]
    are_clean = True
    for _ in range(MAX_LEVELS + 1):
        inner = []
        for holder in level:
            if isinstance(holder, dict):
                names.update(holder)
            for value in holder.values() if isinstance(holder, dict) else holder:
                if isinstance(value, str):
                    are_clean = _is_clean(path, value) and are_clean
                elif isinstance(value, dict | list):
                    inner.append(value)
        if not inner:
            for name in names:
                are_clean = _is_clean(path, name) and are_clean
            return values if are_clean else cleaned(values)
        level = inner
    raise SchemaError(f"{path} {_TOO_DEEP}")


def _is_clean(path: Path, text: str) -> bool:
    if len(text) > MAX_CHARACTERS:
        raise SchemaError(
            f"{path} has a string of {len(text):,} characters; at most {MAX_CHARACTERS:,} are "
            "allowed"
        )
    return text.isprintable()


_TOO_DEEP = f"is nested too deeply; at most {MAX_LEVELS} levels are allowed"


def _open(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _check_size(path: Path, size: int) -> None:
    if size > MAX_BYTES:
        raise SchemaError(f"{path} is too large: {size:,} bytes; at most {MAX_BYTES:,} are allowed")
