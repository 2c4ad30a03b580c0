"""The shapes of objects inside records and of the file around them, for :mod:`~.checks`.

Only fields that readers need are required, as files of older versions may lack the others. Objects
may have more fields than listed here, as newer versions add some.
"""

from __future__ import annotations

from typing import Annotated, Any, NotRequired, TypedDict

from pytest_int8bench.results.checks import (
    Bound,
    Count,
    Needs,
    NotNegative,
    Positive,
    Scalar,
    Share,
)

# Callers get plain dictionaries, so these are annotated as such; the TypedDicts serve only for
# checks.


class _Params(TypedDict, total=False):
    model_size: str
    use_s1: bool
    use_s2: bool
    use_landsat: bool
    image_size: Count
    patch_size: Count
    num_timesteps: Count
    batch_size: Count
    gpu_type: str
    bf16: bool
    int8_enabled: bool
    int8_mode: str
    int8_smoothquant: bool
    int8_attention: bool
    compile_mode: str
    compile_fullgraph: bool
    model_version: str
    attention: str
    int8_backend: str
    feed: str
    extra: dict[str, Scalar | None]
    benchmark_interval_s: Positive
    min_batches_per_interval: Count
    profiler_enabled: bool
    wandb_enabled: bool


Params = Annotated[dict[str, Any], _Params]


class _Kernel(TypedDict, total=False):
    name: str
    seconds: NotNegative
    calls: Count


Kernel = Annotated[dict[str, Any], _Kernel]


#: Kind of kernel -> seconds.
Breakdown = dict[str, NotNegative]


class _WholeBreakdown(TypedDict):
    int8_products: NotNegative
    other_products: NotNegative
    attention: NotNegative
    rest: NotNegative


class _AttentionPart(TypedDict):
    share: Share
    ratio: Positive
    ops_per_s: Positive


class _Ceiling(TypedDict, total=False):
    problem: str | None
    baseline: Annotated[Breakdown, _WholeBreakdown] | None
    products_speedup: Positive
    product_ratio: Positive
    quantized_share: Share
    float_ops_per_s: Positive | None
    int8_ops_per_s: Positive | None
    bytes_per_s: Positive | None
    attention: Annotated[dict[str, Any], _AttentionPart]


Ceiling = Annotated[
    dict[str, Any],
    _Ceiling,
    Needs("baseline", ("products_speedup", "product_ratio", "quantized_share")),
]


class _AttentionCalls(TypedDict):
    int8: Count
    left_out: dict[str, Count]


class _Coverage(TypedDict, total=False):
    mode: str
    converted_layers: Count
    linear_layers: Count
    converted_parameters: Count
    total_parameters: Count
    left_out: dict[str, str | None]
    fused_layers: Count
    fallbacks: dict[str, str | None]
    smoothed_runtime: list[str]
    smoothed_folded: dict[str, list[str]]
    attention: Annotated[dict[str, Any], _AttentionCalls]


Coverage = Annotated[dict[str, Any], _Coverage]


class _GpuState(TypedDict, total=False):
    sm_clock_mhz: NotNegative | None
    temperature_c: float | None
    power_w: NotNegative | None
    throttle_reasons: list[str]


GpuState = Annotated[dict[str, Any], _GpuState]


class _Worker(TypedDict, total=False):
    id: str
    host: str
    gpu: str | None


Worker = Annotated[dict[str, Any], _Worker]


class _Distance(TypedDict, total=False):
    samples: Count
    finite: bool
    cosine: float
    sqnr_db: float | None
    top1_agreement: Share | None
    knn_agreement: Share | None


Distance = Annotated[dict[str, Any], _Distance]


class _Remedy(TypedDict):
    rung: str
    setting: str | None
    configuration: NotRequired[str]
    selection_drop: float | None
    selection_samples: NotRequired[Count | None]
    problem: str | None
    outcome: str | None
    drop: NotRequired[float]
    drop_low: NotRequired[Bound | None]
    drop_high: NotRequired[Bound | None]
    samples: NotRequired[Count]
    needed: NotRequired[Count | None]
    speedup: NotRequired[Positive | None]
    speedup_low: NotRequired[Positive | None]
    speedup_high: NotRequired[Positive | None]
    speed_problem: NotRequired[str | None]


Remedy = Annotated[
    dict[str, Any],
    _Remedy,
    Needs("outcome", ("drop", "samples", "configuration")),
    Needs("selection_drop", ("selection_samples",)),
    Needs("speedup", ("speedup_low", "speedup_high")),
]


class _Layer(TypedDict):
    name: str
    layers: NotRequired[list[str]]
    sqnr_db: float | None
    drop: NotRequired[float]
    lost: NotRequired[Count]
    gained: NotRequired[Count]


Layer = Annotated[dict[str, Any], _Layer]


class _Gpu(TypedDict, total=False):
    name: str | None
    compute_capability: Scalar | None
    sm_count: Scalar | None
    memory_bytes: Scalar | None
    driver: Scalar | None
    power_limit_w: Scalar | None
    mig: Scalar | None


class _Environment(TypedDict, total=False):
    gpu: _Gpu | None
    gpu_count: Scalar | None
    cuda: Scalar | None
    cudnn: Scalar | None
    allocator: Scalar | None
    packages: dict[str, Scalar | None] | None
    python: Scalar | None
    system: Scalar | None
    cpu: str | None
    cpu_threads: Count | None
    commit: str | None
    dirty: bool | None
    only: list[str]


class Block(TypedDict):
    """The ``int8bench`` object of a JSON file."""

    environment: _Environment
    results: list[Any]
    accuracy: list[Any]
    sensitivity: NotRequired[list[Any]]
    benchmarks: NotRequired[list[Any]]


class Header(TypedDict):
    """The ``int8bench`` object in the first line of a journal."""

    environment: _Environment


class _Stats(TypedDict):
    median: NotNegative
    min: NotNegative
    rounds: Count
    mean: NotRequired[NotNegative | None]
    stddev: NotRequired[NotNegative | None]
    iqr: NotRequired[NotNegative | None]
    iterations: NotRequired[Count | None]


class _TimingOptions(TypedDict, total=False):
    timer: str | None


class Timing(TypedDict):
    """pytest-benchmark's entry for one test."""

    fullname: str
    stats: _Stats
    options: NotRequired[_TimingOptions | None]


class _Cpu(TypedDict, total=False):
    brand_raw: str | None
    brand: str | None


class _MachineInfo(TypedDict, total=False):
    python_version: str | None
    system: str | None
    machine: str | None
    cpu: _Cpu | None


class _CommitInfo(TypedDict, total=False):
    id: str | None
    dirty: bool | None


class BenchmarkFile(TypedDict):
    """pytest-benchmark's JSON file."""

    benchmarks: list[Any]
    machine_info: NotRequired[_MachineInfo | None]
    commit_info: NotRequired[_CommitInfo | None]
