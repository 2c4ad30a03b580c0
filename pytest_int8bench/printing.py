"""Make text harmless that comes from files, and print text by a function that cannot fail."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import unicodedata
from typing import IO, Any

#: Unicode's categories of characters that nobody sees and terminals obey: controls (ESC, NUL, C1),
#: formats (bidirectional overrides), surrogates, and separators of lines and paragraphs.
_UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
#: Formats that scripts and emoji are written with: the zero-width joiner and non-joiner.
_JOINERS = "\u200c\u200d"
#: What XML, and so SVG and JUnit, cannot hold besides.
_NO_CHARACTERS = "\ufffe\uffff"
# Controls but for tabs, newlines, and the escapes that set colors.
_CONTROL = re.compile(r"\x1b(?!\[[0-9;]*m)|[\x00-\x08\x0b-\x1a\x1c-\x1f\x7f-\x9f]")
# What the log of a CI server would take for a command: GitHub Actions at the start of a line
# (`::error::`), others anywhere in it (`##[error]`, `##vso[task…]`, `##teamcity[…]`).
_COMMAND = re.compile(r"^([^\S\n]*):(?=:)|#(?=#(?:vso|teamcity)?\[)", re.MULTILINE)


def one_line(text: str) -> str:
    r"""Return ``text`` as one line that a terminal shows and does not obey: runs of white space
    are one space where they hold more than spaces, and unseen characters are written as in
    Python, such as ``\x1b``."""
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
    """Return what was read from a file with all its texts, keys too, as :func:`one_line` has
    them."""
    if isinstance(value, str):
        return one_line(value)
    if isinstance(value, dict):
        return {cleaned(key): cleaned(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [cleaned(entry) for entry in value]
    return value


def printable(text: str, encoding: str | None = None) -> str:
    """Return lines that a stream of this encoding can take, in which neither a terminal nor the
    log of a CI server finds a command. Colors stay."""
    text = _CONTROL.sub(lambda found: _seen(found[0]), text)
    text = _COMMAND.sub(lambda found: f"{found[1] or ''}\\:" if ":" in found[0] else "#\\", text)
    encoding = encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def show(text: str, *, error: bool = False, end: str = "\n") -> None:
    """Print to stdout, or with ``error`` to stderr, at once.

    What was measured must not depend on who reads along: a stream that is closed, full or a broken
    pipe swallows this text and all that follows.
    """
    stream = sys.stderr if error else sys.stdout
    if stream is None:  # closed before Python started
        return
    try:
        stream.write(printable(text + end, getattr(stream, "encoding", None)))
        stream.flush()
    except (OSError, ValueError) as problem:  # ValueError: closed since
        _silence(stream)
        if not error and not isinstance(problem, BrokenPipeError):
            why = getattr(problem, "strerror", None) or problem
            show(f"int8bench: what is printed is lost: {why}", error=True)


def _silence(stream: IO[str]) -> None:
    """Lead a stream to nowhere: what it still holds would fail when Python ends, which changes
    the exit code."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, stream.fileno())
        finally:
            os.close(nowhere)
