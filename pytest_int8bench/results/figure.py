"""What is known of one figure of a result; :mod:`.figures` has the rows.

pytest imports this module when it starts: nothing heavy is imported here. Nor is
:mod:`~.result`, which imports this module; results are ``Any`` for that reason.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from pytest_int8bench.results.numbers import CHECKS

#: Workload of plain benchmarks of pytest-benchmark, which have none.
PLAIN = "pytest-benchmark"


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)  # made at every start of pytest
class Figure:
    """One quantity of a result, or a text that belongs to its figures."""

    field: str
    """Field of ``Result``; of a computed figure, a name that ``Result`` does not have. It is also
    the figure's name in Weights & Biases."""
    compute: Callable[[Any], Any] | None = None
    """Computes the figure from a result that has no field for it."""
    applies: Callable[[Any], bool] | None = None
    """Returns whether a result can have the figure; None for every result."""
    of_benchmarks: bool = False
    """A field of plain benchmarks, ``Benchmark``, and not of ``Result``."""
    check: Literal["positive", "number", "text"] | None = None
    """What a value must be for a result to be read; None checks nothing."""
    wandb_alias: str = ""
    """Second name in Weights & Biases: the one of the project that this one comes from."""

    header: str = ""
    """Header of its column in tables; empty for a figure without a column."""
    title: str = ""
    """What charts, and the report's table of all files, call it; empty leaves it out of that
    table."""
    unit: str = ""
    """Unit of the values that are shown."""
    scale: float = 1.0
    """Factor from the unit of the field to ``unit``."""
    kind: Literal["number", "share", "ratio", "text", "time"] = "number"
    """How a value is written: ``1,235``, ``42%``, ``1.85x``, as it is, or seconds as ``3.5 µs``."""
    interval: tuple[str, str] | None = None
    """Fields that hold the ends of its 95 % interval."""
    standard_error: str = ""
    """Field that holds the standard error of the time that it comes from, relative."""
    no_interval: str = ""
    """Stands in place of an interval that a result does not have."""
    mark: Callable[[Any], str] | None = None
    """Returns what a result adds to the value in a table, such as `` (warm)``."""
    shown: Literal["always", "where measured", "where judged"] = "always"
    """When tables have the column: always; if a result has a value; or only in comparisons, if a
    limit judges the figure."""
    leads: bool = False
    """The column comes first where a table is split to fit a terminal."""
    shows_status: bool = False
    """A point that ran out of memory, failed or was throttled says so in this column."""

    higher_is_better: bool = False
    """A higher value is better, and its cost is the inverse."""
    name: str = ""
    """What the gate and the JSON of a comparison call it; needed with ``option``."""
    option: str = ""
    """Name of its limit, on the command line and in ``pyproject.toml``; empty for a figure that
    the gate does not compare."""
    help: str = ""
    """What the limit limits; needed with ``option``."""
    limit: float | None = None
    """Largest growth of the cost that passes by default, relative; None judges nothing."""
    floor: float = 0.0
    """Relative difference between two processes of the same code that counts as noise where files
    are too few to show it; needed with ``option``."""
    spread: float | None = None
    """Standard deviation between processes of the same code, relative, that is assumed where files
    are too few to show it; None takes twice the floor."""
    depends_on_clocks: bool = True
    """A GPU that is slowed down by heat changes it."""

    def __post_init__(self) -> None:
        if self.option and not (self.name and self.header and self.help and self.floor > 0):
            raise ValueError(
                f"{self.field}: a figure with an option must have a name, a header, a help and a "
                f"noise floor above 0, got {self.name!r}, {self.header!r}, {self.help!r} and "
                f"{self.floor!r}"
            )

    @property
    def assumed_spread(self) -> float:
        """Standard deviation between processes that is assumed."""
        return 2 * self.floor if self.spread is None else self.spread

    @property
    def is_time_of_batch(self) -> bool:
        """``int8bench ab`` measures it."""
        return self.field in ("samples_per_s", "batch_time_s", "call_time_s")

    def of(self, result: Any) -> Any:
        """Return the value that ``result`` has, None where it was not measured."""
        is_of_kind = self.of_benchmarks == (getattr(result, "workload", None) == PLAIN)
        if not is_of_kind or (self.applies is not None and not self.applies(result)):
            return None
        if self.compute is not None:
            return self.compute(result)
        return getattr(result, self.field, None)

    def scaled(self, value: float) -> float:
        """Return a value of the field in the unit that is shown."""
        return value * self.scale

    def growth(self, base: float, new: float) -> float:
        """Return by how much the cost grew, relative to the base's: 0.05 means 5 % worse."""
        return (base / new if self.higher_is_better else new / base) - 1

    def validate(self, result: Any) -> None:
        """Check the value of ``result`` when it is made or read.

        Raises:
            ValueError: naming the field, the rule and the value.
        """
        if self.check is None or self.compute is not None:
            return
        value = getattr(result, self.field, None)
        rule, is_valid = CHECKS[self.check]
        if value is not None and not is_valid(value):
            raise ValueError(f"{self.field} must be {rule}, got {reprlib.repr(value)}")
