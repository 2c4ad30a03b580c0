"""The parts of a result, each returned by one stage of a measurement.

``Result.from_parts`` joins them. Types defined in higher layers are protocols here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pytest_int8bench.nvml import GpuState


class Serializable(Protocol):
    """Anything that can be saved as plain values."""

    def to_dict(self) -> Mapping[str, Any]:
        """Return plain values, for JSON."""
        ...


class KernelTime(Protocol):
    """A kernel with its time in one forward pass."""

    @property
    def name(self) -> str: ...

    @property
    def seconds(self) -> float: ...

    @property
    def calls(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The preparation of a model: memory, compilation and warm-up."""

    peak_memory_bytes: int | None
    compile_s: float | None
    compile_cache: str | None
    warm_up_s: float
    steady: bool
    cuda_graphs_skipped: bool
    regions: int
    regions_refused: str | None
    attention_backend: str


@dataclass(frozen=True, kw_only=True)
class Units:
    """Number of each kind of unit in one batch."""

    samples: float
    tokens: float | None = None
    pixels: float | None = None
    square_km: float | None = None


@dataclass(frozen=True)
class Timing:
    """Statistics of the seconds per batch over the rounds of a measurement."""

    median_s: float
    mean_s: float
    p95_s: float
    """95th percentile of the rounds; the time of a round is the mean of its iterations."""
    min_s: float
    """Time per batch in the fastest round."""
    standard_error: float
    """Estimated standard error of the median, relative to it."""


@dataclass(frozen=True, kw_only=True)
class Rounds:
    """The timed rounds, and the state of the GPU before and after them."""

    timing: Timing
    count: int
    iterations: int
    """Batches per round."""
    synchronization_share: float | None
    gpu_before: GpuState | None
    gpu_after: GpuState | None
    throttled: Sequence[str]
    joules_per_batch: float | None = None


@dataclass(frozen=True)
class FeedingCost:
    """The cost of feeding a model from the host, compared with inputs that are already on the
    device."""

    copy_s: float
    """Time to copy one batch, with nothing else running."""
    exposed_s: float
    """Time that feeding adds to a batch."""
    exposed_low_s: float
    """Lower end of the 95 % interval."""
    exposed_high_s: float
    """Upper end of the 95 % interval."""


@dataclass(frozen=True)
class Feeding:
    """How the model was fed from the host during the rounds."""

    workers: int | None
    wait_s: float
    """Time per batch that the host waited for the loader."""
    cost: FeedingCost | None = None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A candidate compared with its baseline."""

    speedup: float
    low: float | None = None
    """Lower end of the 95 % interval."""
    high: float | None = None
    """Upper end of the 95 % interval."""
    method: str
    """``interleaved`` or ``separate``."""
    energy_ratio: float | None = None
    """The baseline's energy per batch divided by the candidate's."""

    @property
    def is_interleaved(self) -> bool:
        """Whether baseline and candidate alternated in one process."""
        return self.method == "interleaved"


class Coverage(Serializable, Protocol):
    """The layers that were quantized."""

    @property
    def backend(self) -> str: ...


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """The kernels of one profiled forward pass."""

    device_time_s: float | None
    int8_time_share: float
    attention_kernel: str | None
    longest: Sequence[KernelTime]
    trace: str | None
    breakdown: Serializable | None


@dataclass(frozen=True, kw_only=True)
class UpperBound:
    """The highest speedup that INT8 could reach, or why it is unknown."""

    speedup: float | None = None
    reached: float | None = None
    """Share of the possible gain that was achieved."""
    sources: Serializable
    """The quantities from which it was computed, or why it is unknown."""
