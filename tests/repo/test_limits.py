"""Limit the lines of files and functions, to keep the package readable."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "pytest_int8bench"
MOST_OF_FILE, MOST_OF_FUNCTION = 400, 60


def too_long(name: str, text: str) -> Iterator[str]:
    """Yield the file, and the functions in it, that have too many lines."""
    if (lines := len(text.splitlines())) > MOST_OF_FILE:
        yield f"{name}: {lines} lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > MOST_OF_FUNCTION:
                yield f"{name}:{node.lineno} {node.name}: {lines} lines"


def test_too_long_names_files_and_functions() -> None:
    body = "\n".join(["    class B:", "        async def f(self):", *["            pass"] * 60])
    assert list(too_long("a.py", f"def g():\n{body}\n")) == [
        "a.py:1 g: 63 lines",
        "a.py:3 f: 61 lines",
    ]
    assert list(too_long("a.py", "x = 1\n" * 401)) == ["a.py: 401 lines"]
    assert list(too_long("a.py", "def f():\n" + "    pass\n" * 59 + "x = 1\n" * 340)) == []


def test_no_file_and_no_function_is_too_long() -> None:
    """Triton kernels are exempt, because they cannot be split freely."""
    paths = {path.relative_to(PACKAGE).as_posix(): path for path in PACKAGE.rglob("*.py")}
    found = [
        line
        for name, path in sorted(paths.items())
        if not name.startswith("kernels/triton/")
        for line in too_long(name, path.read_text())
    ]
    assert found == []
