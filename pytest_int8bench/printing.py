"""Sanitize text that comes from files, and print without ever failing."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import unicodedata
from typing import IO, Any

#: Unicode categories of invisible characters that affect terminals: controls (ESC, NUL, C1),
#: formats (bidirectional overrides), surrogates, and line and paragraph separators.
_UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
#: Format characters that scripts and emoji need: the zero-width joiner and non-joiner.
_JOINERS = "\u200c\u200d"
#: Further characters that XML (hence SVG and JUnit) cannot contain.
_NO_CHARACTERS = "\ufffe\uffff"
# Control characters except tabs, newlines and color escapes.
_CONTROL = re.compile(r"\x1b(?!\[[0-9;]*m)|[\x00-\x08\x0b-\x1a\x1c-\x1f\x7f-\x9f]")
# Text that CI servers interpret as log commands: GitHub Actions at the start of a line
# (`::error::`), others anywhere in it (`##[error]`, `##vso[task…]`, `##teamcity[…]`).
_COMMAND = re.compile(r"^([^\S\n]*):(?=:)|#(?=#(?:vso|teamcity)?\[)", re.MULTILINE)


def one_line(text: str) -> str:
    r"""Return ``text`` as one line that is safe to print in a terminal.

    White space other than plain spaces collapses to one space, and invisible characters become
    Python escapes such as ``\x1b``."""
    if text.isprintable():
        return text
    flat = re.sub(r"\s+", lambda found: " " if found[0].strip(" ") else found[0], text)
    return flat if flat.isprintable() else "".join(map(_seen, flat))


def _seen(character: str) -> str:
    is_unseen = unicodedata.category(character) in _UNSEEN and character not in _JOINERS
    if is_unseen or character in _NO_CHARACTERS:
        return character.encode("unicode-escape").decode("ascii")
    return character


def cleaned(value: Any) -> Any:
    """Return data read from a file with :func:`one_line` applied to all its strings and keys."""
    if isinstance(value, str):
        return one_line(value)
    if isinstance(value, dict):
        return {cleaned(key): cleaned(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [cleaned(entry) for entry in value]
    return value


def printable(text: str, encoding: str | None = None) -> str:
    """Return ``text`` without terminal or CI log commands and limited to ``encoding``; colors
    stay."""
    text = _CONTROL.sub(lambda found: _seen(found[0]), text)
    text = _COMMAND.sub(lambda found: f"{found[1] or ''}\\:" if ":" in found[0] else "#\\", text)
    encoding = encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def show(text: str, *, error: bool = False, end: str = "\n") -> None:
    """Print to stdout, or to stderr with ``error``, and flush.

    Output must not affect a measurement: a closed, full or broken stream silently drops this text
    and all that follows.
    """
    stream = sys.stderr if error else sys.stdout
    if stream is None:  # stdout was closed before Python started
        return
    try:
        stream.write(printable(text + end, getattr(stream, "encoding", None)))
        stream.flush()
    except (OSError, ValueError) as problem:  # ValueError: the stream was closed
        _silence(stream)
        if not error and not isinstance(problem, BrokenPipeError):
            why = getattr(problem, "strerror", None) or problem
            show(f"int8bench: what is printed is lost: {why}", error=True)


def _silence(stream: IO[str]) -> None:
    """Redirect a stream to devnull: flushing its buffer at exit would fail and change the exit
    code."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, stream.fileno())
        finally:
            os.close(nowhere)
