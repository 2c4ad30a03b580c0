"""Read JSON from files that anybody may have written, within limits.

Whatever a path or a text turns out to be, reading it ends, and what comes back can be walked
through, printed and shown in an error.
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

#: Files of 10,000 results take some 50 MB.
MAX_BYTES = 2**30
MAX_CHARACTERS = 1_000_000
"""Of one text."""
MAX_LEVELS = 32
"""Of objects and lists in each other; records have five."""

_MARKS = {
    codecs.BOM_UTF8: "starts with a byte order mark: save it as UTF-8 without one",
    codecs.BOM_UTF32_LE: "is UTF-32 text, and must be UTF-8",
    codecs.BOM_UTF32_BE: "is UTF-32 text, and must be UTF-8",
    codecs.BOM_UTF16_LE: "is UTF-16 text, and must be UTF-8",
    codecs.BOM_UTF16_BE: "is UTF-16 text, and must be UTF-8",
}
_KINDS = (
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def read_text(path: Path) -> str:
    """Return the text of a file, which may be changed meanwhile, but not be a pipe or a device.

    Raises:
        SchemaError: one line, if it is no UTF-8 text, or too large.
        OSError: if it cannot be read.
    """
    # A pipe without a writer would block here, one with a writer would block later.
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
    if b"\0" in raw[:4]:  # UTF-16 and UTF-32 without their marks
        raise SchemaError(f"{path} is not UTF-8 text: it starts with a NUL")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SchemaError(f"{path} is not UTF-8 text: {error}") from None


def parse(path: Path, text: str) -> Any:
    """Return the values of a text in JSON.

    Raises:
        SchemaError: one line, if they are beyond all limits.
        json.JSONDecodeError: if it is not JSON.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise SchemaError(f"{path} {_TOO_DEEP}") from None
    except ValueError as error:  # thousands of digits
        raise SchemaError(f"{path} cannot be read as JSON: {error}") from None


def cleaned_values(path: Path, values: Any) -> Any:
    """Return parsed values with all texts harmless.

    Raises:
        SchemaError: one line, if they are nested too deeply, or hold a text that is too long.
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
            f"{path} holds a text of {len(text):,} characters, more than {MAX_CHARACTERS:,}"
        )
    return text.isprintable()


_TOO_DEEP = f"is nested too deeply, beyond {MAX_LEVELS} levels"


def _open(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _check_size(path: Path, size: int) -> None:
    if size > MAX_BYTES:
        raise SchemaError(f"{path} is too large: {size:,} bytes, at most {MAX_BYTES:,} are read")
