"""Where reports go, and what they need: said before anything is measured."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

from pytest_int8bench.files import FileError, check_writable, write
from pytest_int8bench.results.records import Saved

SUFFIXES = (".html", ".md")
_NEEDED = ("jinja2", "matplotlib")


def check_output(text: str) -> Path:
    """Return the path of a report.

    Raises:
        FileError: one line, if it is of another kind, cannot be written, or needs a package that
            is not installed.
    """
    path = Path(text)
    if path.suffix.lower() not in SUFFIXES:
        raise FileError(f"must be a file that ends in {' or '.join(SUFFIXES)}, got {text!r}")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise FileError(f"must be in a folder that is there and can be written to, got {text!r}")
    try:
        check_writable(path)
    except OSError as error:
        raise FileError(f"{path} is not written: {error.strerror or error}") from None
    if path.suffix.lower() == ".html":
        absent = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
        if absent:
            raise FileError(
                f"{path.name} needs {' and '.join(absent)}: pip install 'pytest-int8bench[report]'"
            )
    return path


def publish(named: Sequence[tuple[str, Saved]], path: Path) -> None:
    """Write a report, whole or not at all.

    Args:
        named: what it shows, oldest first: the name of each file and what it holds.
        path: as :func:`check_output` returns it.

    Raises:
        FileError: one line, if it cannot be written.
    """
    from pytest_int8bench.report.page.build import build
    from pytest_int8bench.report.page.sources import sources

    view = build(sources(named))
    if path.suffix.lower() == ".html":
        from pytest_int8bench.report.page import html

        write(path, html.render(view))
    else:
        from pytest_int8bench.report.page import markdown

        write(path, markdown.render(view))
