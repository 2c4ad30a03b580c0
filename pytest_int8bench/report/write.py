"""Check before anything is measured that a report can be written, and write it at the end."""

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
    """Return the path of a report after checking that it can be written.

    Raises:
        FileError: one line, if the suffix is not supported, the file cannot be written, or a
            required package is not installed.
    """
    path = Path(text)
    if path.suffix.lower() not in SUFFIXES:
        raise FileError(f"must be a file that ends in {' or '.join(SUFFIXES)}, got {text!r}")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise FileError(f"must be in an existing, writable directory, got {text!r}")
    try:
        check_writable(path)
    except OSError as error:
        raise FileError(f"cannot write {path}: {error.strerror or error}") from None
    if path.suffix.lower() == ".html":
        absent = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
        if absent:
            raise FileError(
                f"{path.name} needs {' and '.join(absent)}: pip install 'pytest-int8bench[report]'"
            )
    return path


def publish(named: Sequence[tuple[str, Saved]], path: Path) -> None:
    """Write a report atomically.

    Args:
        named: the name and the content of each saved file, oldest first.
        path: the report's path, as :func:`check_output` returned it.

    Raises:
        FileError: one line, if the report cannot be written.
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
