"""Check the files that pytest-benchmark is told to write to and to compare with."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pytest

from pytest_int8bench.files import probe
from pytest_int8bench.plugin.pytest_benchmark import (
    is_disabled_by_user,
    json_target,
    rename_entries,
    storage_target,
)

if TYPE_CHECKING:
    from pytest_int8bench.results.records import Result

_RECORDS = pytest.StashKey[list[Any]]()
"""Results in the files of ``--benchmark-compare``, as they are in JSON."""
_COMPARED = pytest.StashKey[list[dict[str, Any]]]()
"""Fingerprints of the files of ``--benchmark-compare``."""


def check_saving(config: pytest.Config) -> None:
    """Refuse a path of ``--benchmark-json``, or a folder of ``--benchmark-storage``, that cannot be
    written, before anything is measured.

    Raises:
        pytest.UsageError: one line.
    """
    if is_disabled_by_user(config):
        return
    if (path := json_target(config)) is not None:
        with _refused(f"--benchmark-json: must be a file that can be written, got {str(path)!r}"):
            probe(path)
    if (folder := storage_target(config)) is not None:
        given = config.getoption("benchmark_storage")
        with _refused(
            f"--benchmark-storage: must be a folder that can be written to, got {given!r}"
        ):
            there = next(part for part in (folder, *folder.parents) if part.exists())
            probe(there / "int8bench.json")


@contextlib.contextmanager
def _refused(rule: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise pytest.UsageError(f"{rule}: {error.strerror or error}") from None


def note_compared(config: pytest.Config, compared: Mapping[str, Any]) -> None:
    """Remember the fingerprint in a file of ``--benchmark-compare``, for :func:`check_compared`:
    ours needs torch, which is not loaded before a test does."""
    from pytest_int8bench.results.benchmarks import partial_environment

    block = compared.get("int8bench") or {}
    found = block.get("environment") or partial_environment(compared)
    config.stash.setdefault(_COMPARED, []).append(found)
    config.stash.setdefault(_RECORDS, []).extend(block.get("results") or ())


def rename_compared(config: pytest.Config, results: Sequence[Result]) -> list[str]:
    """Let pytest-benchmark, which compares by node id, find points of ``results`` in older files
    of ``--benchmark-compare`` under their older names. Return lines that say so."""
    if not (saved := config.stash.get(_RECORDS, [])):
        return []
    from pytest_int8bench.gate.renames import Renames
    from pytest_int8bench.results.base import SchemaError
    from pytest_int8bench.results.records import Result

    older = []
    for values in saved:
        with contextlib.suppress(SchemaError):
            older.append(Result.from_dict(values))
    renames = Renames([*older, *results])
    rename_entries(config, renames.nodeids)
    return renames.lines


def check_compared(
    config: pytest.Config, environment: Callable[[], Mapping[str, Any]], allowed: Container[str]
) -> None:
    """Warn once if a file of ``--benchmark-compare`` was measured on another machine or software,
    of which pytest-benchmark checks only a part.

    Args:
        config: of this session.
        environment: returns its fingerprint; called if a file is compared with.
        allowed: parts of the fingerprint that may differ.

    Raises:
        IncomparableError: with ``--benchmark-compare-fail``, whose verdict would mean nothing.
    """
    from pytest_int8bench.environment import differences
    from pytest_int8bench.gate.session import IncomparableError
    from pytest_int8bench.results.benchmarks import partly_known

    for base in config.stash.get(_COMPARED, []):
        found = differences(base, environment())
        listed = [f"{k} {a} -> {b}" for k, (a, b) in found.items() if k not in allowed]
        partly = partly_known(base)
        if listed:
            problem = f"was measured on another machine or software: {', '.join(listed)}; see "
            text = f"the file that is compared with {problem}--int8-allow"
        elif partly is not None:
            text = f"the file that is compared with was {partly}"
        else:
            continue
        if listed and config.getoption("benchmark_compare_fail"):
            raise IncomparableError(f"--benchmark-compare-fail: {text}")
        warnings.warn(f"int8bench: {text}", stacklevel=2)
        config.stash[_COMPARED] = []
        return
