"""Check the files that pytest-benchmark will write to and compare with."""

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
"""Results read from the files of ``--benchmark-compare``, as plain JSON values."""
_COMPARED = pytest.StashKey[list[dict[str, Any]]]()
"""Fingerprints read from the files of ``--benchmark-compare``."""


def check_saving(config: pytest.Config) -> None:
    """Check before anything is measured that ``--benchmark-json`` and ``--benchmark-storage`` are
    writable.

    Raises:
        pytest.UsageError: if one is not; one line.
    """
    if is_disabled_by_user(config):
        return
    if (path := json_target(config)) is not None:
        with _usage_error(f"--benchmark-json: must be a writable file, got {str(path)!r}"):
            probe(path)
    if (folder := storage_target(config)) is not None:
        given = config.getoption("benchmark_storage")
        with _usage_error(f"--benchmark-storage: must be a writable directory, got {given!r}"):
            existing = next(part for part in (folder, *folder.parents) if part.exists())
            probe(existing / "int8bench.json")


@contextlib.contextmanager
def _usage_error(rule: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise pytest.UsageError(f"{rule}: {error.strerror or error}") from None


def note_compared(config: pytest.Config, compared: Mapping[str, Any]) -> None:
    """Remember the fingerprint and results of a ``--benchmark-compare`` file.

    :func:`check_compared` compares the fingerprint later: computing ours needs torch, which is
    loaded only when a test needs it.
    """
    from pytest_int8bench.results.benchmarks import partial_environment

    block = compared.get("int8bench") or {}
    found = block.get("environment") or partial_environment(compared)
    config.stash.setdefault(_COMPARED, []).append(found)
    config.stash.setdefault(_RECORDS, []).extend(block.get("results") or ())


def rename_compared(config: pytest.Config, results: Sequence[Result]) -> list[str]:
    """Let pytest-benchmark, which compares by node id, find points of ``results`` that have other
    names in older files of ``--benchmark-compare``. Return a line for each renaming."""
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
    """Warn once if a file of ``--benchmark-compare`` was measured on a different machine or with
    different software. pytest-benchmark itself checks only part of that.

    Args:
        config: pytest's configuration.
        environment: returns this session's fingerprint; called only if there is a file to check.
        allowed: parts of the fingerprint that may differ.

    Raises:
        IncomparableError: with ``--benchmark-compare-fail``, whose verdict would be meaningless.
    """
    from pytest_int8bench.environment import differences
    from pytest_int8bench.gate.session import IncomparableError
    from pytest_int8bench.results.benchmarks import partly_known

    for base in config.stash.get(_COMPARED, []):
        found = differences(base, environment())
        listed = [f"{k} {a} -> {b}" for k, (a, b) in found.items() if k not in allowed]
        partly = partly_known(base)
        if listed:
            text = (
                "the file given by --benchmark-compare was measured on another machine or with "
                f"other software: {', '.join(listed)}; see --int8-allow"
            )
        elif partly is not None:
            text = f"the file given by --benchmark-compare was {partly}"
        else:
            continue
        if listed and config.getoption("benchmark_compare_fail"):
            raise IncomparableError(f"--benchmark-compare-fail: {text}")
        warnings.warn(f"int8bench: {text}", stacklevel=2)
        config.stash[_COMPARED] = []
        return
