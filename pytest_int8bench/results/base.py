"""What all saved records share: identity, plain values, and reading them back."""

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
#: Start of the reason of a test that ran where pytest-benchmark is disabled.
NOT_MEASURED = "ran once, not measured"

#: Saved as the workload of a point that failed before its workload was known.
UNKNOWN_WORKLOAD = "unknown workload"


class SchemaError(ValueError):
    """A file that is not ours, is damaged, or was written by a newer version."""


def point_label(workload: str, run_name: str) -> str:
    """Return the run name, with the workload where there is one, and not the default one."""
    return (
        run_name
        if workload in ("olmoearth", PLAIN, UNKNOWN_WORKLOAD)
        else f"{workload}: {run_name}"
    )


@dataclass(frozen=True, kw_only=True)
class Record:
    """What is saved of one test at one point."""

    KIND: ClassVar[str]
    """What it is called in errors."""

    nodeid: str
    """pytest node id; with ``workload`` the identity across commits."""
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
        """What stays the same across commits: node id and workload name."""
        return (self.nodeid, self.workload)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as plain values."""
        kind: Any = type(self)  # mypy takes the class of a dataclass for unhashable
        return {name: _copy(getattr(self, name)) for name in _names(kind)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read what :meth:`to_dict` wrote; fields of later minor versions are left out.

        Raises:
            SchemaError: if ``values`` is nothing of this kind.
        """
        if not isinstance(values, Mapping):
            raise SchemaError(f"not {cls.KIND}: {shown(values)}")
        kind: Any = cls
        names = _names(kind)
        if missing := [name for name in _needed(kind) if name not in values]:
            raise SchemaError(f"not {cls.KIND}: it must have {', '.join(missing)}")
        try:
            return cls(**{name: value for name, value in values.items() if name in names})
        except (TypeError, ValueError) as error:
            raise SchemaError(f"not {cls.KIND}: {error}") from None


@dataclass(frozen=True, kw_only=True)
class Measured(Record):
    """What is saved of a test that measures a time, whatever became of it."""

    IS_PLAIN: ClassVar[bool] = False
    """It is a plain benchmark, which its workload says."""

    status: Annotated[str, one_of(STATUSES)] = "ok"
    """``ok``, ``oom``, ``skipped``, ``failed`` or ``accuracy-failed``."""
    reason: str | None = None
    """Why the point is not ``ok``, or what its reader should know."""

    def __post_init__(self) -> None:
        for figure in FIGURES.values():
            figure.validate(self)
        super().__post_init__()
        if (self.workload == PLAIN) != self.IS_PLAIN:
            rule = repr(PLAIN) if self.IS_PLAIN else f"another name than {PLAIN!r}"
            raise ValueError(f"workload must be {rule}, got {self.workload!r}")

    @property
    def is_disabled(self) -> bool:
        """The test ran without a clock, because pytest-benchmark was turned off."""
        return self.status == "skipped" and (self.reason or "").startswith(NOT_MEASURED)

    @property
    def oom(self) -> bool:
        """Whether the point ran out of memory (``status`` is ``oom``), which is a result."""
        return self.status == "oom"


def _copy(value: Any) -> Any:
    """Return a value of a record; :func:`dataclasses.asdict` takes ten times as long."""
    if isinstance(value, dict):
        return {name: _copy(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_copy(entry) for entry in value]
    return value


@functools.cache
def _names(kind: type[Record]) -> dict[str, None]:
    """Return the fields of a record, in their order."""
    return dict.fromkeys(spec.name for spec in dataclasses.fields(kind))


@functools.cache
def _needed(kind: type[Record]) -> list[str]:
    """Return the fields that a record cannot be without."""
    return [
        spec.name
        for spec in dataclasses.fields(kind)
        if spec.default is spec.default_factory is dataclasses.MISSING
    ]
