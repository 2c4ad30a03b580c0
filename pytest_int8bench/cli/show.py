"""``int8bench show``: print the tables of a saved file."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path


def run_show(path: Path) -> int:
    from pytest_int8bench.report.terminal import render
    from pytest_int8bench.results.reading import read
    from pytest_int8bench.results.records import SchemaError

    try:
        saved = read(path)
    except (OSError, SchemaError) as error:
        problem = str(error)
        if isinstance(error, OSError):
            problem = f"{path} must be a saved JSON file or a journal: {error.strerror or error}"
        print(f"int8bench: {problem}", file=sys.stderr)
        return 2
    is_terminal = sys.stdout.isatty()
    width = shutil.get_terminal_size().columns if is_terminal else None
    print(render(saved, width=width, color=is_terminal), end="")
    return 0
