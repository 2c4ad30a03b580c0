"""Writes the tables of the site from the code, so that the pages hold no copies.

A line of a page such as ``<!-- fields: pytest_int8bench.params.RunParams -->`` becomes a table when
the site is built. Objects are read without importing them, but for the tables that the package
holds as data, whose modules load neither torch nor numpy.
"""

from __future__ import annotations

import fnmatch
import functools
import importlib
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import griffe
from mkdocs.exceptions import PluginError

ROOT = Path(__file__).parent.parent

_TABLE = re.compile(r"^<!-- (\w+): (.*?) -->$", re.MULTILINE)
_ROLE = re.compile(r":\w+:(`|<code>)~?(?:[\w.]+\.)?(\w+)")
#: What is shown as code in the help of an option: other options, and settings such as name=value.
_CODE = re.compile(r"--[a-z][\w-]*|[\w.]+=\w+")
_JSON = {
    "str": "string",
    "int": "integer",
    "float": "number",
    "bool": "boolean",
    "dict": "object",
    "list": "array",
    "None": "null",
    "Count": "integer",
    "Share": "number",
    "Bound": "number",
    **dict.fromkeys(
        ("Params", "Breakdown", "Ceiling", "Coverage", "Distance", "GpuState", "Worker"), "object"
    ),
}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the lines that name a table by the table."""
    return _TABLE.sub(lambda match: TABLES[match[1]](*match[2].split()), markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Show the roles of docstrings, such as ``:class:`RunParams```, as code."""
    return _ROLE.sub(r"\1\2", html)


def options(holder: str, *patterns: str) -> str:
    """Return a table of the options whose names match ``patterns``, such as ``max-*-growth``."""
    known = _import(holder)
    rows = []
    for name in _matching(known, patterns):
        option = known[name]
        flag = option.flag if option.metavar is None else f"{option.flag} {option.metavar}"
        meaning, _, default = option.help.rpartition(" Default: ")
        rows.append((f"`{flag}`", _CODE.sub(r"`\g<0>`", meaning), default))
    return _table(("option", "meaning", "default"), rows)


def sweeps(holder: str) -> str:
    """Return a table of the sweep keys but ``all``."""
    sweeps = _import(holder)
    rows = [
        (
            f"`{key}`",
            f"`{field}`",
            ", ".join(f"`{value}`" for value in values),
            sweeps.help.get(key, ""),
        )
        for key, axes in sweeps.items()
        if key != "all"
        for field, values in axes.items()
    ]
    return _table(("key", "field", "values", "meaning"), rows)


def workloads(holder: str) -> str:
    """Return a table of the workloads that have a name."""
    rows = [(f"`{row.usage}`", row.help, f"`{row.extra}`") for row in _import(holder)]
    return _table(("workload", "what it is", "extra"), rows)


def metrics(holder: str) -> str:
    """Return a table of the metrics that the gate compares, with their limits."""
    rows = [
        (
            f"`{metric.name}`",
            metric.help,
            f"`--{metric.option}`",
            "off" if metric.limit is None else f"{metric.limit:.0%}",
            f"{metric.floor:.0%}",
        )
        for metric in _import(holder).values()
    ]
    head = ("metric", "what is limited", "option", "default limit", "noise floor, one file a side")
    return _table(head, rows)


def meanings(holder: str) -> str:
    """Return a table of a mapping from names to meanings."""
    rows = [(f"`{name}`", _text(meaning)) for name, meaning in _import(holder).items()]
    return _table(("name", "meaning"), rows)


def fields(path: str) -> str:
    """Return a table of the fields of a dataclass: name, default and docstring."""
    rows = [(f"`{f.name}`", _default(f), _doc(f)) for f in _fields(path)]
    return _table(("field", "default", "meaning"), rows)


def record(path: str, *properties: str) -> str:
    """Return a table of the JSON fields of a record: name, type and docstring; ``properties`` are
    saved beside the fields."""
    found = [*_fields(path), *(_object(f"{path}.{name}") for name in properties)]
    rows = [(f"`{f.name}`", _json_type(str(f.annotation)), _doc(f)) for f in found]
    return _table(("field", "type", "meaning"), rows)


def fixtures(path: str) -> str:
    """Return a table of the public fixtures of a module."""
    found = [m for name, m in _object(path).members.items() if name.startswith("int8_")]
    return _table(("fixture", "what it is"), [(f"`{f.name}`", _doc(f)) for f in found])


TABLES: dict[str, Callable[..., str]] = {
    table.__name__: table
    for table in (options, sweeps, workloads, metrics, meanings, fields, record, fixtures)
}


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines
    )


def _matching(known: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """Return names in the order of ``patterns``; those that match several, once."""
    found: dict[str, None] = {}
    for pattern in patterns:
        names = fnmatch.filter(known, pattern)
        if not names:
            raise PluginError(f"no option is called {pattern!r}")
        found.update(dict.fromkeys(names))
    return [*found]


def _import(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


@functools.cache
def _package() -> griffe.Module:
    return griffe.load("pytest_int8bench", search_paths=[ROOT])


def _object(path: str) -> Any:
    return _package()[path.removeprefix("pytest_int8bench.")]


def _fields(path: str) -> list[Any]:
    """Return the fields of a dataclass, without those that it inherits."""
    return [
        member
        for member in _object(path).members.values()
        if member.is_attribute
        and member.annotation is not None
        and "instance-attribute" in member.labels  # neither a property nor a ClassVar
    ]


def _default(field: Any) -> str:
    """Return the default of a field as written; the meaning describes one that is a function."""
    if field.value is None:
        return "needed"
    value = str(field.value)
    if value.startswith("_"):
        return "a function"
    return "`{}`" if "default_factory" in value else f"`{value}`"


def _json_type(annotation: str) -> str:
    # The type of an annotated one comes first, what it must be beyond that behind it.
    annotation = re.sub(r"Annotated\[(\w+), [^]]*\]", r"\1", annotation)
    return ", ".join(_JSON[part.partition("[")[0].strip()] for part in annotation.split("|"))


def _doc(documented: Any) -> str:
    if documented.docstring is None:
        raise PluginError(f"{documented.path} needs a docstring: the site shows it")
    return _text(documented.docstring.value)


def _text(docstring: str) -> str:
    """Return a docstring in Markdown, on one line."""
    return " ".join(_ROLE.sub(r"\1\2", docstring).replace("``", "`").split())
