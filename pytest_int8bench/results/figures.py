"""The figures of a result, one row each.

These rows drive everything that handles figures: validation of :class:`~.result.Result`, the
session's table, the report, the comparison of saved files, the gate with its options and their
help, and logging to Weights & Biases. A new figure needs a field of ``Result`` and a row here. A
figure computed from other fields needs only a row, which another package may register::

    register(
        Figure(
            field="batches_per_s",
            compute=lambda result: result.batch_time_s and 1 / result.batch_time_s,
            header="batches/s",
        )
    )

A figure with a pytest option must be registered before the plugin is loaded.

pytest imports this module at every start, so it imports nothing heavy. Results are ``Any``, as
:mod:`~.result` imports this module.
"""

from __future__ import annotations

from typing import Any

from pytest_int8bench.choices import precision
from pytest_int8bench.results.figure import Figure as Figure

#: Field -> figure, in the order of columns.
FIGURES: dict[str, Figure] = {}
#: ``Figure.name`` -> figure, for the figures that the gate compares.
METRICS: dict[str, Figure] = {}


def register(figure: Figure) -> None:
    """Add a figure after the existing ones.

    Raises:
        ValueError: if its field, name, header or option is already in use.
    """
    for what in ("field", "name", "header", "option"):
        value = getattr(figure, what)
        if value and any(getattr(known, what) == value for known in FIGURES.values()):
            raise ValueError(f"{what} of a figure must be unique, but {value!r} is already in use")
    FIGURES[figure.field] = figure
    if figure.option:
        METRICS[figure.name] = figure


def unregister(figure: Figure) -> None:
    """Remove a registered figure."""
    del FIGURES[figure.field]
    METRICS.pop(figure.name, None)


# -- the rows -----------------------------------------------------------------------------------


def _tokens_per_batch(result: Any) -> float | None:
    tokens_per_s: float | None = result.tokens_per_s
    batch_time_s: float | None = result.batch_time_s
    if tokens_per_s is None or batch_time_s is None:
        return None
    return round(tokens_per_s * batch_time_s, 6)  # a whole number, apart from rounding errors


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
        help="growth of the median time per sample",
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
        help="growth of the median batch time, which is the slowdown if batch sizes stay the same",
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
        help="growth of the first call's time, which depends on whether the compile cache was warm",
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
        no_interval="(separate)",
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
