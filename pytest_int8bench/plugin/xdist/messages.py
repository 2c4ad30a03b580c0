"""What a worker of pytest-xdist tells the process that started it, with the report of a test."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from pytest_int8bench.results.base import Record
from pytest_int8bench.results.records import KINDS

#: Name of what is ours, on reports and in what pytest-xdist hands to and from workers.
KEY = "int8bench"
#: Environment variable that tells a worker, before it reads anything else, which of how many it is
#: on its host: ``1/2`` for the second of two.
SEAT = "INT8BENCH_SEAT"
_KINDS = {kind.__name__: kind for kind in KINDS.values()}


@dataclass(frozen=True, kw_only=True)
class Message:
    """Plain values only."""

    worker: str
    host: str
    gpus: list[str]
    """The worker's own GPU, as ``CUDA_VISIBLE_DEVICES`` names it, if it was measured on."""
    preset: str | None
    point: tuple[str, dict[str, Any]] | None
    """Workload and parameters of the test, when it is set up."""
    environment: dict[str, Any] | None
    """Fingerprint of what the records were measured on."""
    records: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    """Kind and values of each record."""
    timings: list[dict[str, Any]] = field(default_factory=list)
    """What pytest-benchmark timed, as it would save it, and ``has_error``."""
    device_lost: bool = False
    """The worker ends before its next test."""
    problems: list[str] = field(default_factory=list)
    """What failed in the worker beside its tests, a line each."""
    has_short_name: bool = False
    """The point is named for a workload other than OlmoEarth."""
    attempt: int = 1
    """How often this worker has started the test."""

    @property
    def says_something(self) -> bool:
        """Whether it is worth sending."""
        found = (self.point, self.records, self.timings, self.device_lost, self.problems)
        return any(found) or self.attempt > 1

    def to_json(self) -> str:
        """Return it as a text: pytest-xdist sends built-in types only, not those of numpy."""
        return json.dumps(vars(self), default=_as_pytest_benchmark_does)

    @classmethod
    def from_json(cls, text: str) -> Message:
        """Read what :meth:`to_json` wrote."""
        return cls(**json.loads(text))


def unpacked(kind: str, values: dict[str, Any]) -> Record:
    """Return a record of a message."""
    return _KINDS[kind].from_dict(values)


def kind_of(record: Record) -> str:
    """Return the name of the kind of ``record``."""
    return type(record).__name__


def _as_pytest_benchmark_does(value: object) -> str:
    return f"UNSERIALIZABLE[{value!r}]"
