"""The figures of a result, one row each.

Whatever handles figures follows from the rows: the checks of :class:`~.records.Result`, the table
of a session, the report, the comparison of saved files, the gate with its options and their help,
and what is logged to Weights & Biases. A new figure is a field of ``Result`` and a row here. One
that is computed from other fields needs the row only, and may come from outside::

    register(
        Figure(
            field="batches_per_s",
            compute=lambda result: result.batch_time_s and 1 / result.batch_time_s,
            header="batches/s",
        )
    )

Before the plugin is loaded, that is, where the figure is to have an option of pytest.

pytest imports this module when it starts: nothing heavy is imported here. Nor is
:mod:`~.records`, which imports this module; results are ``Any`` for that reason.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from pytest_int8bench.choices import precision
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


#: Field -> figure, in the order of columns.
FIGURES: dict[str, Figure] = {}
#: Name -> figure, those that the gate compares.
METRICS: dict[str, Figure] = {}


def register(figure: Figure) -> None:
    """Add a figure behind those that are known.

    Raises:
        ValueError: if its field, name, header or option is taken.
    """
    for what in ("field", "name", "header", "option"):
        value = getattr(figure, what)
        if value and any(getattr(known, what) == value for known in FIGURES.values()):
            raise ValueError(f"{what} of a figure must be unique, got {value!r} again")
    FIGURES[figure.field] = figure
    if figure.option:
        METRICS[figure.name] = figure


def unregister(figure: Figure) -> None:
    """Take a registered figure out again."""
    del FIGURES[figure.field]
    METRICS.pop(figure.name, None)


# -- the rows -----------------------------------------------------------------------------------


def _tokens_per_batch(result: Any) -> float | None:
    tokens_per_s: float | None = result.tokens_per_s
    batch_time_s: float | None = result.batch_time_s
    if tokens_per_s is None or batch_time_s is None:
        return None
    return round(tokens_per_s * batch_time_s, 6)  # a count, but for rounding


def _mean_token_rate(result: Any) -> float | None:
    tokens = _tokens_per_batch(result)
    mean_s: float | None = result.batch_time_mean_s
    return tokens / mean_s if tokens and mean_s else None


_RATES = (
    Figure(
        field="samples_per_s",
        check="positive",
        header="samples/s",
        title="Throughput",
        unit="samples/s",
        leads=True,
        shows_status=True,
        standard_error="batch_time_standard_error",
        higher_is_better=True,
        name="throughput",
        option="max-slowdown",
        help="growth of the median time of a sample",
        limit=0.05,
        floor=0.02,
    ),
    Figure(
        field="tokens_per_s",
        check="positive",
        header="tokens/s",
        unit="tokens/s",
        shown="where measured",
        higher_is_better=True,
    ),
    Figure(
        field="pixels_per_s",
        check="positive",
        wandb_alias="pixels_per_second",
        higher_is_better=True,
    ),
    Figure(
        field="square_km_per_s",
        check="positive",
        wandb_alias="square_km_per_second",
        header="km²/s",
        unit="km²/s",
        shown="where measured",
        higher_is_better=True,
    ),
    Figure(field="num_tokens_per_batch", compute=_tokens_per_batch),
    Figure(field="mean_batch_token_rate", compute=_mean_token_rate, higher_is_better=True),
)

_TIMES = (
    Figure(
        field="batch_time_s",
        check="positive",
        header="ms/batch",
        unit="ms",
        scale=1e3,
        standard_error="batch_time_standard_error",
        name="batch-time",
        option="max-batch-time-growth",
        help="growth of the median time of a batch; the slowdown, if batches keep their samples",
        floor=0.02,
    ),
    Figure(field="batch_time_mean_s", check="positive", wandb_alias="mean_batch_time"),
    Figure(
        field="batch_time_p95_s",
        check="positive",
        header="p95 ms/batch",
        unit="ms",
        scale=1e3,
        shown="where judged",
        name="p95",
        option="max-p95-growth",
        help="growth of the 95th percentile of the batch time",
        floor=0.05,
    ),
    Figure(
        field="batch_time_min_s",
        check="positive",
        header="ms/batch, fastest",
        unit="ms",
        scale=1e3,
        shown="where judged",
    ),
)

_COSTS = (
    Figure(
        field="peak_memory_bytes",
        check="positive",
        header="peak MiB",
        title="Peak memory",
        unit="MiB",
        scale=2**-20,
        name="memory",
        option="max-memory-growth",
        help="growth of the model's peak memory (CUDA only)",
        limit=0.05,
        floor=0.01,
        spread=0.01,
        depends_on_clocks=False,
    ),
    Figure(field="requested_bytes", unit="MiB", scale=2**-20),
    Figure(
        field="compile_s",
        check="positive",
        header="compile s",
        title="First call",
        unit="s",
        mark=lambda result: " (warm)" if result.compile_cache == "warm" else "",
        name="compile",
        option="max-compile-growth",
        help="growth of the first call's time; it depends on whether the compile cache was warm",
        floor=0.3,
        spread=0.2,
    ),
    Figure(field="compile_cache", kind="text"),
)

_ENERGY = (
    Figure(
        field="joules_per_sample",
        check="positive",
        header="J/sample",
        title="Energy",
        unit="J/sample",
        shown="where measured",
        name="energy",
        option="max-energy-growth",
        help="growth of the GPU's energy per sample (CUDA only)",
        floor=0.03,
    ),
    Figure(field="samples_per_joule", check="positive", higher_is_better=True),
    Figure(field="energy_ratio", check="positive", kind="ratio", higher_is_better=True),
)

_FEEDING = (
    Figure(field="feed_copy_s", check="positive"),
    Figure(
        field="feed_exposed_s",
        check="number",
        interval=("feed_exposed_low_s", "feed_exposed_high_s"),
    ),
    Figure(field="feed_exposed_low_s", check="number"),
    Figure(field="feed_exposed_high_s", check="number"),
    Figure(field="feed_wait_s", check="number"),
)


_INT8 = (
    Figure(
        field="int8_time_share",
        check="number",
        applies=lambda result: precision(result.params) == "INT8",
        header="INT8 time",
        kind="share",
        mark=lambda result: " fused" if result.int8_backend == "fused" else "",
    ),
    Figure(field="int8_backend", kind="text"),
    Figure(field="attention_kernel", header="attention", kind="text"),
    Figure(field="attention_backend", kind="text"),
    Figure(
        field="speedup",
        check="positive",
        header="speedup [95 %]",
        title="Speedup over the baseline",
        unit="× baseline",
        kind="ratio",
        interval=("speedup_low", "speedup_high"),
        no_interval="(apart)",
        leads=True,
        higher_is_better=True,
    ),
    Figure(field="speedup_low", check="positive", kind="ratio", higher_is_better=True),
    Figure(field="speedup_high", check="positive", kind="ratio", higher_is_better=True),
    Figure(field="speedup_method", kind="text"),
    Figure(field="device_time_s", check="number"),
    Figure(field="ceiling_speedup", check="positive", kind="ratio", higher_is_better=True),
    Figure(field="ceiling_reached", kind="share", higher_is_better=True),
)

_BENCHMARKS = (
    Figure(
        field="call_time_s",
        of_benchmarks=True,
        standard_error="call_time_standard_error",
        check="positive",
        header="time/call",
        title="Time per call of plain benchmarks",
        kind="time",
        shows_status=True,
        name="call-time",
        option="max-call-time-growth",
        help="growth of the median time per call of a plain benchmark",
        limit=0.05,
        floor=0.02,
    ),
    Figure(
        field="call_time_min_s",
        of_benchmarks=True,
        check="positive",
        header="time/call, fastest",
        kind="time",
        shown="where judged",
    ),
)

_TEXTS = (
    Figure(field="status", kind="text"),
    Figure(field="reason", check="text", kind="text"),
    Figure(field="trace", check="text", kind="text"),
)

for _figure in (*_RATES, *_TIMES, *_COSTS, *_ENERGY, *_FEEDING, *_INT8, *_BENCHMARKS, *_TEXTS):
    register(_figure)
