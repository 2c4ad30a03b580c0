"""What is measured: a model, its inputs, and what one batch of them counts for.

A workload of your own is a fixture in a conftest; all callables are called with positional
arguments::

    @pytest.fixture(scope="session")
    def int8_workload():
        return Workload(
            name="mlp",
            build=lambda p: MyModel(),
            inputs=lambda p, device: (torch.randn(p.batch_size, 64, device=device),),
        )
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from pytest_int8bench.errors import WorkloadError
from pytest_int8bench.printing import one_line

if TYPE_CHECKING:
    import torch

    from pytest_int8bench.param_values import Scalar
    from pytest_int8bench.params import RunParams
    from pytest_int8bench.quantization.filters import FilterFn

    Inputs: TypeAlias = tuple[Any, ...] | list[Any] | Mapping[str, Any]


#: Units that :attr:`Workload.units` may count, each per batch.
UNITS = ("samples", "tokens", "pixels", "square_km")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How good a model is, sample by sample. Higher scores are better.

    The ``forward`` that its callables get takes what the model takes, with any number of samples:
    it moves tensors to the device, casts floating inputs to the model's dtype, cuts them into
    batches of the compiled shape, and returns floating outputs as FP32 copies.
    """

    metric: str
    """Name of the metric, e.g. ``top1``."""
    scores: Callable[..., Any]
    """``scores(forward)`` returns one score per sample, or ``(ids, scores)`` so that the order of
    the samples can be checked; with ``fit``, ``scores(forward, fitted)``. It is called once with
    the baseline's forward and once with the candidate's."""
    fit: Callable[..., Any] | None = None
    """``fit(forward)`` is called once, with the baseline's forward; what it returns, such as a
    classifier fitted on embeddings, is the second argument of ``scores`` and ``selection``."""
    selection: Callable[..., Any] | None = None
    """As ``scores``, on other samples: what remedies are chosen on, before ``scores`` certifies
    them. Without it, the samples of ``scores`` are split in half for that."""
    aggregate: Callable[[Any], float] | None = None
    """For a metric that is no mean over samples, such as mIoU or F1: ``aggregate(rows)`` computes
    it from the rows that ``scores`` returns, one per image (samples x anything), such as confusion
    counts. The image is the sampling unit. A limit of 1 % takes at least 730 images, and about
    1,000 if they differ in size, even if nothing drops; half as many for twice the limit."""
    worst: float = 0.0
    """The lowest score that a sample can get, a finite number; not used with ``aggregate``. Clip
    scores that have no lowest one, such as log likelihoods."""
    groups: Any = field(default=None, hash=False)
    """One label per sample of ``scores``, in their order, or a callable that returns them. Samples
    with the same label belong together: frames of a video, crops of a scene, questions on one
    text. The groups are then the sampling units. Without it, samples must be independent."""

    def __post_init__(self) -> None:
        _check_name("the metric of an evaluation", self.metric)


def _check_name(what: str, name: Any) -> None:
    """Refuse what does not come back from a file as it was saved, and so is another identity."""
    if not isinstance(name, str) or not name.strip() or one_line(name) != name:
        raise WorkloadError(f"{what} must be one line of printable text, got {name!r}")


def _samples(params: RunParams) -> dict[str, float]:
    return {"samples": params.batch_size}


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A model and the inputs it is measured on."""

    name: str
    """Part of the identity of every result."""
    build: Callable[[RunParams], torch.nn.Module]
    """Return a new model for a point, on the CPU or any device; it is cast and moved. It is called
    for the baseline and again for the candidate, both times with the baseline's point. The
    generators of torch, numpy and Python are seeded before the call, so that random weights
    repeat."""
    inputs: Callable[[RunParams, torch.device], Inputs]
    """Return the inputs of one batch on the device: a tuple for positional arguments, or a
    mapping for keyword arguments. Floating inputs are cast to the model's dtype."""
    load: Callable[[RunParams, str], torch.nn.Module] | None = None
    """``load(params, weights)`` returns the model with the weights that ``--int8-weights`` names:
    ``hub``, or the path of a file or folder. By default a file is loaded into what ``build``
    returns."""
    units: Callable[[RunParams], Mapping[str, float]] = _samples
    """Return what one batch counts for: any of ``samples``, ``tokens``, ``pixels`` and
    ``square_km``; by default ``samples``, the batch size."""
    tokens: Callable[[Any], int] | None = None
    """Count the tokens of one batch from the model's output, instead of in ``units``."""
    evaluation: Evaluation | Sequence[Evaluation] | Callable[[RunParams], Any] | None = None
    """How to judge accuracy: an evaluation, several of them (each must pass), or a callable that
    returns either for a point. Without one, outputs are compared with the baseline's, which can
    fail a model but not pass it."""
    filter_fn: FilterFn | None = None
    """``filter_fn(module, name)`` says which linear layers to quantize."""
    quant_config: Any = None
    """Any torchao ``AOBaseConfig`` or ``FqnToConfig``, instead of the mode's own."""
    prequantized: bool = False
    """``build`` returns a model that torchao quantized already where ``p.int8_enabled``, such as
    one from a checkpoint, in ``p.int8_mode``: nothing is quantized here. Its baseline is what
    ``build`` returns elsewhere, with weights of its own."""
    calibration: Callable[[RunParams, torch.device], Any] | None = None
    """Return an iterable of inputs for SmoothQuant, cast and moved like those of ``inputs``; the
    measured batch by default."""
    smoothquant_alpha: float = 0.5
    """SmoothQuant's migration strength, from 0 (weights keep) to 1 (all to the weights)."""
    keep_fp32: FilterFn | None = None
    """``keep_fp32(module, name)`` says which modules stay in FP32 with ``bf16=True``."""
    channels_last: bool = False
    """Keep weights and inputs of four dimensions in ``torch.channels_last``."""
    impossible_reason: Callable[[RunParams], str | None] | None = None
    """Say why this workload cannot run at a point (the point is skipped), or return None."""
    axes: Mapping[str, Scalar] = field(default_factory=dict)
    """Axes of this workload and their defaults, set as ``--int8-set extra.NAME=VALUE`` and read
    as ``p.extra[NAME]``."""

    def __post_init__(self) -> None:
        _check_name("the name of a workload", self.name)

    @property
    def brings_quantization(self) -> bool:
        """The workload itself says how its layers are quantized, not the mode of the point."""
        return self.prequantized or self.quant_config is not None

    def with_axes(self, params: RunParams) -> RunParams:
        """Return ``params`` as the workload's callables see it: with the defaults of its axes.

        Raises:
            ValueError: if ``params`` sets an axis that the workload does not declare.
        """
        for name in params.extra:
            if name not in self.axes:
                declared = ", ".join(self.axes) or "none"
                raise ValueError(
                    f"extra.{name} is not an axis of workload {self.name!r}; its axes: {declared}"
                )
        return params.replace(extra={**self.axes, **params.extra})
