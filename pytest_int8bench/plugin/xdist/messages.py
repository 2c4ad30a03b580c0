"""Messages from a pytest-xdist worker to its controller, sent along with test reports."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from pytest_int8bench.results.base import Record
from pytest_int8bench.results.records import KINDS

#: Name of our attribute on reports, and of our entry in ``workerinput`` and ``workeroutput``.
KEY = "int8bench"
#: Environment variable with a worker's index and the number of workers on its host: ``1/2`` for the
#: second of two. The worker reads it before it imports a ``conftest.py``.
SLOT = "INT8BENCH_SLOT"
_KINDS = {kind.__name__: kind for kind in KINDS.values()}


@dataclass(frozen=True, kw_only=True)
class Message:
    """A message, which holds only plain values."""

    worker: str
    host: str
    gpus: list[str]
    """The worker's own GPU, as named in ``CUDA_VISIBLE_DEVICES``; empty if nothing ran on it."""
    preset: str | None
    point: tuple[str, dict[str, Any]] | None
    """Workload and parameters of the test's point; sent with the report of its setup."""
    environment: dict[str, Any] | None
    """Fingerprint of the machine and software; sent with records."""
    records: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    """Kind and values of each record."""
    timings: list[dict[str, Any]] = field(default_factory=list)
    """Timings in pytest-benchmark's saved form, each with ``has_error``."""
    device_lost: bool = False
    """Whether the worker lost its device and exits before its next test."""
    problems: list[str] = field(default_factory=list)
    """Problems of the worker other than failed tests, one line each."""
    has_short_name: bool = False
    """Whether the run name has the short form, for workloads other than OlmoEarth."""
    attempt: int = 1
    """Number of times that this worker has started the test."""

    @property
    def is_worth_sending(self) -> bool:
        found = (self.point, self.records, self.timings, self.device_lost, self.problems)
        return any(found) or self.attempt > 1

    def to_json(self) -> str:
        """Return the message as JSON: pytest-xdist sends only built-in types, not numpy's."""
        return json.dumps(vars(self), default=_as_pytest_benchmark_does)

    @classmethod
    def from_json(cls, text: str) -> Message:
        return cls(**json.loads(text))


def unpacked(kind: str, values: dict[str, Any]) -> Record:
    return _KINDS[kind].from_dict(values)


def kind_of(record: Record) -> str:
    return type(record).__name__


def _as_pytest_benchmark_does(value: object) -> str:
    return f"UNSERIALIZABLE[{value!r}]"
