"""The base classes of all saved records: identity, conversion to plain values, and validation."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

from pytest_int8bench.results.checks import check_fields, one_of, shown
from pytest_int8bench.results.figure import PLAIN
from pytest_int8bench.results.figures import FIGURES
from pytest_int8bench.results.shapes import Params

STATUSES = ("ok", "oom", "skipped", "failed", "accuracy-failed")
#: Start of the reason of a test that ran with pytest-benchmark disabled.
NOT_MEASURED = "ran once, not measured"
#: Start of the remark on a point whose speedup and rates contradict each other.
SPEED_CHANGED = "the machine's speed changed between the two tests"

#: Saved as the workload of a point that failed before its workload was known.
UNKNOWN_WORKLOAD = "unknown workload"


class SchemaError(ValueError):
    """Raised for a file that is not ours, is damaged, or was written by a newer version."""


def point_label(workload: str, run_name: str) -> str:
    """Return the run name, preceded by the workload unless that is the default one or there is
    none."""
    is_plain = workload in ("olmoearth", PLAIN, UNKNOWN_WORKLOAD)
    return run_name if is_plain else f"{workload}: {run_name}"


@dataclass(frozen=True, kw_only=True)
class Record:
    """A saved record of one test at one point."""

    KIND: ClassVar[str]
    """Name of this kind of record in errors."""

    nodeid: str
    """pytest node id; together with ``workload``, it identifies the record across commits."""
    workload: str
    """Name of the workload."""
    run_name: str
    """Run name of the point."""
    params: Params
    """Every field of RunParams."""

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def identity(self) -> tuple[str, ...]:
        """The values that stay the same across commits: node id and workload name."""
        return (self.nodeid, self.workload)

    @property
    def label(self) -> str:
        """Human-readable name of the point: see :func:`point_label`."""
        return point_label(self.workload, self.run_name)

    @property
    def float_dtype(self) -> str:
        """The dtype of everything that is not quantized: ``BF16`` or ``FP32``."""
        return "BF16" if self.params.get("bf16", True) else "FP32"

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as plain values."""
        kind: Any = type(self)  # mypy believes that dataclass types are unhashable
        return {name: _copy(getattr(self, name)) for name in _names(kind)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Create a record from the values of :meth:`to_dict`, ignoring unknown fields.

        Raises:
            SchemaError: if ``values`` is not a valid record of this kind.
        """
        if not isinstance(values, Mapping):
            raise SchemaError(f"not {cls.KIND}: {shown(values)}")
        kind: Any = cls
        names = _names(kind)
        if missing := [name for name in _needed(kind) if name not in values]:
            raise SchemaError(f"not {cls.KIND}: it must also have {', '.join(missing)}")
        try:
            return cls(**{name: value for name, value in values.items() if name in names})
        except (TypeError, ValueError) as error:
            raise SchemaError(f"not {cls.KIND}: {error}") from None


@dataclass(frozen=True, kw_only=True)
class Measured(Record):
    """A saved record of a test that measures a time, whatever its status."""

    IS_PLAIN: ClassVar[bool] = False
    """Whether records of this class are plain benchmarks."""

    status: Annotated[str, one_of(STATUSES)] = "ok"
    """``ok``, ``oom``, ``skipped``, ``failed`` or ``accuracy-failed``."""
    reason: str | None = None
    """Why the point is not ``ok``, or a note on an ``ok`` point."""

    def __post_init__(self) -> None:
        for figure in FIGURES.values():
            figure.validate(self)
        super().__post_init__()
        if (self.workload == PLAIN) != self.IS_PLAIN:
            rule = repr(PLAIN) if self.IS_PLAIN else f"another name than {PLAIN!r}"
            raise ValueError(f"workload must be {rule}, got {self.workload!r}")

    @property
    def is_disabled(self) -> bool:
        """Whether the test ran without being timed, because pytest-benchmark was disabled."""
        return self.status == "skipped" and (self.reason or "").startswith(NOT_MEASURED)

    @property
    def oom(self) -> bool:
        """Whether the point ran out of memory (``status`` is ``oom``), which counts as a result."""
        return self.status == "oom"


def _copy(value: Any) -> Any:
    """Return a deep copy of a record's value, ten times as fast as :func:`dataclasses.asdict`."""
    if isinstance(value, dict):
        return {name: _copy(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_copy(entry) for entry in value]
    return value


@functools.cache
def _names(kind: type[Record]) -> dict[str, None]:
    """Return the names of a record's fields, in order."""
    return dict.fromkeys(spec.name for spec in dataclasses.fields(kind))


@functools.cache
def _needed(kind: type[Record]) -> list[str]:
    """Return the names of a record's required fields."""
    return [
        spec.name
        for spec in dataclasses.fields(kind)
        if spec.default is spec.default_factory is dataclasses.MISSING
    ]
