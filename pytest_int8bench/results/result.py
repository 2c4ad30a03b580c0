"""The result of one finished point."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Self

from pytest_int8bench.params import RunParams
from pytest_int8bench.results import parts
from pytest_int8bench.results.base import Measured
from pytest_int8bench.results.checks import Count, Share, one_of
from pytest_int8bench.results.shapes import (
    Breakdown,
    Ceiling,
    Coverage,
    GpuState,
    Kernel,
    Worker,
)

#: States of the compile cache at a first call.
COMPILE_CACHES = ("cold", "warm")
_RATES = ("samples_per_s", "tokens_per_s", "pixels_per_s", "square_km_per_s")
_MOST_IN_BATCH = 1e15


@dataclass(frozen=True, kw_only=True)
class Result(Measured):
    """One finished point. A quantity that was not measured is None."""

    KIND = "a result"

    timer: ClassVar[None] = None  # the same for all points
    requested_bytes: Count | None = None
    """Size of the allocation that failed, with status ``oom``."""

    samples_per_s: float | None = None
    """Samples per batch divided by the median batch time."""
    tokens_per_s: float | None = None
    """Tokens per batch divided by the median batch time, if the workload counts tokens."""
    pixels_per_s: float | None = None
    """10 m pixels per batch divided by the median batch time; all timesteps of a location count as
    one."""
    square_km_per_s: float | None = None
    """Area of those pixels in km² divided by the median batch time."""
    batch_time_s: float | None = None
    """Median over the rounds."""
    batch_time_mean_s: float | None = None
    """Mean over the rounds; all have the same number of batches, so it is also the mean over
    batches."""
    batch_time_p95_s: float | None = None
    """95th percentile over the rounds."""
    batch_time_min_s: float | None = None
    """Batch time of the fastest round, the one least disturbed by other load on a CPU."""
    batch_time_standard_error: float | None = None
    """Estimated standard error of the median, relative to it."""
    rounds: Count | None = None
    """Number of timed rounds."""
    iterations: Count | None = None
    """Batches per round."""
    synchronization_share: float | None = None
    """Estimated share of ``batch_time_s`` that the device waits for the host at the start of a
    round. Above 0.005, ``benchmark_interval_s`` was too short."""
    peak_memory_bytes: Count | None = None
    """Peak memory of this model alone: weights, inputs and activations. None on a CPU."""
    compile_s: float | None = None
    """Duration of the first call, including compilation but not the import of Inductor; None in
    compile mode ``off``."""
    compile_cache: Annotated[str, one_of(COMPILE_CACHES)] | None = None
    """``warm`` if the first call found all its graphs in a compile cache on disk, else ``cold``;
    None if no graph was looked up."""
    warm_up_s: float | None = None
    """Seconds from the first call to steady batch times."""
    steady: bool | None = None
    """False if batch times had not settled by the end of the time allowed for warm-up."""
    cuda_graphs_skipped: bool | None = None
    """Whether Inductor skipped the CUDA graphs that the compile mode requests."""
    regions: Count | None = None
    """Number of repeated blocks that share one compilation; 0 if no blocks repeat or none can
    share."""
    regions_refused: str | None = None
    """Why repeated blocks were compiled one by one rather than once; None if they were not."""

    feed_workers: Count | None = None
    """Number of worker processes that load batches with ``feed=host``; 0 if the main process loads
    them. None with ``feed=device``, like the next five fields."""
    feed_copy_s: float | None = None
    """Time to copy one batch from pinned memory to the device, with nothing else running."""
    feed_exposed_s: float | None = None
    """Time that feeding adds to a batch, measured in alternation with inputs already on the device:
    the part of feeding that is not hidden behind compute. Negative values are noise."""
    feed_exposed_low_s: float | None = None
    """Lower end of its 95 % interval."""
    feed_exposed_high_s: float | None = None
    """Upper end of its 95 % interval."""
    feed_wait_s: float | None = None
    """Time per batch that the host waited for the loader or, without workers, spent loading."""

    speedup: float | None = None
    """The baseline's time divided by the candidate's."""
    speedup_low: float | None = None
    """Lower end of the 95 % interval."""
    speedup_high: float | None = None
    """Upper end of the 95 % interval."""
    speedup_method: str | None = None
    """``interleaved`` (alternating blocks) or ``separate`` (the two models did not fit in memory
    together)."""

    int8_backend: str | None = None
    """The INT8 backend that ran: ``fused`` if a layer uses the fused kernels, else ``torchao``."""
    device_time_s: float | None = None
    """Total time of all kernels in one forward pass; None on a CPU. If it is well below
    ``batch_time_s``, the GPU waits for the host."""
    int8_time_share: Share | None = None
    """Share of device time in INT8 matmuls, 0 to 1."""
    attention_backend: str | None = None
    """The attention backend that the model was compiled for: the requested one, or the choice of
    ``auto``; ``auto`` itself if it had no basis for a choice."""
    attention_kernel: str | None = None
    """The attention backend that ran."""
    kernels: list[Kernel] = field(default_factory=list)
    """The longest kernels of one forward pass: ``name``, ``seconds``, ``calls``."""
    trace: str | None = None
    """Path of the Perfetto trace of that forward pass, relative to the folder in which the session
    was started. A table of all kernels is next to it."""
    device_breakdown: Breakdown | None = None
    """Seconds of ``device_time_s`` by kind of kernel: ``int8_products`` and ``other_products``
    (matmuls), ``attention``, ``rest``; None on a CPU."""
    ceiling_speedup: float | None = None
    """Upper bound of the speedup that INT8 can reach here; None on a CPU, or if unknown."""
    ceiling_reached: float | None = None
    """Share of the gain up to ``ceiling_speedup`` that ``speedup`` achieved: 0 for none, negative
    if INT8 is slower; None if no gain is possible."""
    ceiling: Ceiling | None = None
    """Sources of ``ceiling_speedup``: ``baseline`` (its ``device_breakdown``), ``products_speedup``
    (the upper bound if only matmuls got faster), ``product_ratio`` (how many times faster the
    matmuls of quantized layers could be), ``quantized_share`` (of matmul time), and the measured
    rates ``float_ops_per_s``, ``int8_ops_per_s`` (None with W8) and ``bytes_per_s``. With INT8
    attention, also ``attention``: ``share`` (the share of the baseline's attention time in calls
    that run in INT8), ``ratio`` (how many times faster these calls could be) and ``ops_per_s``. If
    the bound is unknown, only ``problem``: why."""
    coverage: Coverage | None = None
    """The quantized layers: ``mode``, ``converted_layers``, ``linear_layers``,
    ``converted_parameters``, ``total_parameters``, ``left_out`` (layer -> reason),
    ``fused_layers``, ``fallbacks`` (layer -> why it does not run the fused kernels), ``unused``
    (converted layers that the forward pass does not use), ``smoothed_runtime`` (the layers that
    SmoothQuant scales) and ``smoothed_folded`` (always empty; norm -> layers in older files)."""
    gpu_before: GpuState | None = None
    """State of the GPU before the rounds: ``sm_clock_mhz``, ``temperature_c``, ``power_w`` and
    ``throttle_reasons``."""
    gpu_after: GpuState | None = None
    """State of the GPU after the rounds, with the same keys."""
    joules_per_sample: float | None = None
    """Energy of the whole GPU per sample during the rounds, from NVML's counter; None on a CPU,
    without NVML, or if the rounds were too short for the counter."""
    samples_per_joule: float | None = None
    """Inverse of ``joules_per_sample``."""
    energy_ratio: float | None = None
    """The baseline's energy per sample divided by the candidate's, from one long block of each, run
    after the speedup was measured. Above 1, INT8 saves energy."""
    throttled: list[str] = field(default_factory=list)
    """Reasons why the GPU was throttled."""
    worker: Worker | None = None
    """Under pytest-xdist, the worker that ran the point: ``id``, ``host``, and ``gpu``, its own GPU
    as in ``CUDA_VISIBLE_DEVICES`` (UUID or index); None for the only worker of a host."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in _RATES:
            rate, batch_s = getattr(self, name), self.batch_time_s
            if rate and batch_s and not 1 / _MOST_IN_BATCH < rate * batch_s < _MOST_IN_BATCH:
                raise ValueError(
                    f"{name} must be a batch's count divided by batch_time_s ({batch_s!r}), "
                    f"got {rate!r}"
                )

    @classmethod
    def from_parts(
        cls,
        *,
        nodeid: str,
        workload: str,
        params: RunParams,
        setup: parts.Setup,
        units: parts.Units,
        rounds: parts.Rounds,
        feeding: parts.Feeding | None = None,
        comparison: parts.Comparison | None = None,
        coverage: parts.Coverage | None = None,
        kernels: parts.Kernels | None = None,
        bound: parts.UpperBound | None = None,
        remark: str | None = None,
    ) -> Self:
        """Create a result from the parts of a measurement; the part of a stage that did not run is
        None."""
        timing = rounds.timing
        joules = rounds.joules_per_batch
        joules = None if joules is None else joules / units.samples

        def per_s(count: float | None) -> float | None:
            return None if count is None else count / timing.median_s

        result = cls(
            nodeid=nodeid,
            workload=workload,
            run_name=params.run_name,
            params=params.to_dict(),
            reason=remark,
            coverage=None if coverage is None else dict(coverage.to_dict()),
            int8_backend=None if coverage is None else coverage.backend,
            samples_per_s=per_s(units.samples),
            tokens_per_s=per_s(units.tokens),
            pixels_per_s=per_s(units.pixels),
            square_km_per_s=per_s(units.square_km),
            batch_time_s=timing.median_s,
            batch_time_mean_s=timing.mean_s,
            batch_time_p95_s=timing.p95_s,
            batch_time_min_s=timing.min_s,
            batch_time_standard_error=timing.standard_error,
            rounds=rounds.count,
            iterations=rounds.iterations,
            synchronization_share=rounds.synchronization_share,
            gpu_before=None if rounds.gpu_before is None else dict(rounds.gpu_before),
            gpu_after=None if rounds.gpu_after is None else dict(rounds.gpu_after),
            throttled=list(rounds.throttled),
            joules_per_sample=joules,
            samples_per_joule=None if joules is None else 1 / joules,
        )
        result = result._with_setup(setup)._with_feeding(feeding)._with_comparison(comparison)
        return result._with_kernels(kernels)._with_upper_bound(bound)

    def _with_setup(self, setup: parts.Setup) -> Self:
        return replace(
            self,
            peak_memory_bytes=setup.peak_memory_bytes,
            compile_s=setup.compile_s,
            compile_cache=setup.compile_cache,
            warm_up_s=setup.warm_up_s,
            steady=setup.steady,
            cuda_graphs_skipped=setup.cuda_graphs_skipped,
            regions=setup.regions,
            regions_refused=setup.regions_refused,
            attention_backend=setup.attention_backend,
        )

    def _with_feeding(self, feeding: parts.Feeding | None) -> Self:
        if feeding is None:
            return self
        fed = replace(self, feed_workers=feeding.workers, feed_wait_s=feeding.wait_s)
        if (cost := feeding.cost) is None:
            return fed
        return replace(
            fed,
            feed_copy_s=cost.copy_s,
            feed_exposed_s=cost.exposed_s,
            feed_exposed_low_s=cost.exposed_low_s,
            feed_exposed_high_s=cost.exposed_high_s,
        )

    def _with_comparison(self, comparison: parts.Comparison | None) -> Self:
        if comparison is None:
            return self
        return replace(
            self,
            speedup=comparison.speedup,
            speedup_low=comparison.low,
            speedup_high=comparison.high,
            speedup_method=comparison.method,
            energy_ratio=comparison.energy_ratio,
        )

    def _with_kernels(self, kernels: parts.Kernels | None) -> Self:
        if kernels is None:
            return self
        breakdown = kernels.breakdown
        return replace(
            self,
            device_time_s=kernels.device_time_s,
            int8_time_share=kernels.int8_time_share,
            attention_kernel=kernels.attention_kernel,
            kernels=[
                {"name": kernel.name, "seconds": kernel.seconds, "calls": kernel.calls}
                for kernel in kernels.longest
            ],
            trace=kernels.trace,
            device_breakdown=None if breakdown is None else dict(breakdown.to_dict()),
        )

    def _with_upper_bound(self, bound: parts.UpperBound | None) -> Self:
        if bound is None:
            return self
        return replace(
            self,
            ceiling_speedup=bound.speedup,
            ceiling_reached=bound.reached,
            ceiling=dict(bound.sources.to_dict()),
        )

    @property
    def median_s(self) -> float | None:
        """Batch time of the median round, which represents the process in comparisons."""
        return self.batch_time_s

    @property
    def fastest_s(self) -> float | None:
        """Batch time of the fastest round."""
        return self.batch_time_min_s

    @property
    def wall_s(self) -> float:
        """Approximate wall time of the measurement."""
        timed_s = (self.rounds or 0) * (self.iterations or 0) * (self.batch_time_s or 0.0)
        return (self.compile_s or 0.0) + (self.warm_up_s or 0.0) + timed_s

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as plain values, and ``oom``."""
        return {**super().to_dict(), "oom": self.oom}
