"""Describe one figure of a result; :mod:`.figures` has the instances.

pytest imports this module at every start, so it imports nothing heavy. Results are ``Any``, as
:mod:`~.result` imports this module.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

#: Stands for the workload of plain benchmarks, which have none.
PLAIN = "pytest-benchmark"


# Not frozen, and without eq and repr, because these cost time at every start of pytest.
@dataclass(kw_only=True, eq=False, repr=False)
class Figure:
    """One quantity of a result, or a text that is shown along with the quantities."""

    field: str
    """Field of ``Result``, or a new name for a computed figure. It is also the figure's name in
    Weights & Biases."""
    compute: Callable[[Any], Any] | None = None
    """Computes the figure from a result that has no field for it."""
    applies: Callable[[Any], bool] | None = None
    """Returns whether a result can have the figure; None for every result."""
    of_benchmarks: bool = False
    """Whether it is a field of ``Benchmark`` (plain benchmarks) instead of ``Result``."""
    check: Literal["positive", "number", "text"] | None = None
    """The check that a value must pass when a result is created or read; None checks nothing."""
    wandb_alias: str = ""
    """Additional name in Weights & Biases, as used by the original project."""

    header: str = ""
    """Header of its column in tables; empty for a figure without a column."""
    title: str = ""
    """Title in charts and in the report's history; empty to leave the figure out of the history."""
    unit: str = ""
    """Unit in which values are shown."""
    scale: float = 1.0
    """Factor that converts the field's unit to ``unit``."""
    kind: Literal["number", "share", "ratio", "text", "time"] = "number"
    """Format of values: ``1,235``, ``42%``, ``1.85x``, the text itself, or a time as ``3.5 µs``."""
    interval: tuple[str, str] | None = None
    """Names of the fields that hold the lower and upper end of its 95 % interval."""
    standard_error: str = ""
    """Name of the field that holds the relative standard error of the time underlying the
    figure."""
    no_interval: str = ""
    """Text shown instead of the interval if a result has none."""
    mark: Callable[[Any], str] | None = None
    """Returns a suffix for the value in tables, such as `` (warm)``."""
    shown: Literal["always", "where measured", "where judged"] = "always"
    """When tables have the column: always; if any result has a value; or only in comparisons, if a
    limit applies to the figure."""
    leads: bool = False
    """Whether the column comes first when a table is split to fit a terminal."""
    shows_status: bool = False
    """Whether this column shows that a point ran out of memory, failed or was throttled."""

    higher_is_better: bool = False
    """Whether higher values are better, in which case the cost is the inverse of the value."""
    name: str = ""
    """Name in the gate and in the JSON of comparisons; required with ``option``."""
    option: str = ""
    """Name of the option for its limit, on the command line and in ``pyproject.toml``; empty for a
    figure that the gate does not compare."""
    help: str = ""
    """Describes the limited quantity in help texts; required with ``option``."""
    limit: float | None = None
    """Largest relative growth of the cost that passes by default; None for no limit."""
    floor: float = 0.0
    """Default noise floor, used if there are too few files to estimate it: the relative difference
    between two processes running the same code that counts as noise. Required with ``option``."""
    spread: float | None = None
    """Default relative standard deviation between processes running the same code, used if there
    are too few files to estimate it; None for twice the floor."""
    depends_on_clocks: bool = True
    """Whether thermal throttling of the GPU affects it."""

    def __post_init__(self) -> None:
        if self.option and not (self.name and self.header and self.help and self.floor > 0):
            raise ValueError(
                f"{self.field}: a figure with an option must have name, header and help, and a "
                f"floor above 0, got {self.name!r}, {self.header!r}, {self.help!r} and "
                f"{self.floor!r}"
            )

    @property
    def assumed_spread(self) -> float:
        """The relative standard deviation to assume between processes."""
        return 2 * self.floor if self.spread is None else self.spread

    @property
    def is_time_of_batch(self) -> bool:
        """Whether it is a time or rate that ``int8bench ab`` can measure."""
        return self.field in ("samples_per_s", "batch_time_s", "call_time_s")

    def of(self, result: Any) -> Any:
        """Return the figure's value in ``result``, or None if it was not measured."""
        is_of_kind = self.of_benchmarks == (getattr(result, "workload", None) == PLAIN)
        if not is_of_kind or (self.applies is not None and not self.applies(result)):
            return None
        if self.compute is not None:
            return self.compute(result)
        return getattr(result, self.field, None)

    def scaled(self, value: float) -> float:
        """Convert a value of the field to ``unit``."""
        return value * self.scale

    def growth(self, base: float, new: float) -> float:
        """Return the relative growth of the cost from ``base`` to ``new``: 0.05 means 5 % worse."""
        return (base / new if self.higher_is_better else new / base) - 1

    def validate(self, result: Any) -> None:
        """Check the figure's value in ``result``.

        Raises:
            ValueError: one line that names the field, the rule and the value.
        """
        if self.check is None or self.compute is not None:
            return
        from pytest_int8bench.results.numbers import CHECKS  # not needed when a session starts

        value = getattr(result, self.field, None)
        rule, is_valid = CHECKS[self.check]
        if value is not None and not is_valid(value):
            raise ValueError(f"{self.field} must be {rule}, got {reprlib.repr(value)}")
