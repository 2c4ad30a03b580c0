"""Workloads: a model, its inputs, and the number of units in one batch.

Define your own workload as a fixture in a conftest. All callables receive positional arguments::

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


#: Units that :attr:`Workload.units` may count per batch.
UNITS = ("samples", "tokens", "pixels", "square_km")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Score a model sample by sample. Higher scores are better.

    The callables receive a ``forward`` that takes the model's inputs with any number of samples.
    ``forward`` moves tensors to the device, casts floating-point inputs to the model's dtype,
    splits them into batches of the compiled shape, and returns floating-point outputs as FP32
    copies.
    """

    metric: str
    """Name of the metric, e.g. ``top1``."""
    scores: Callable[..., Any]
    """``scores(forward)``, or ``scores(forward, fitted)`` if ``fit`` is set, returns one score per
    sample, or ``(ids, scores)`` to let the order of the samples be checked. It is called once with
    the baseline's forward and once with the candidate's."""
    fit: Callable[..., Any] | None = None
    """``fit(forward)`` is called once, with the baseline's forward. Its result, such as a
    classifier fitted on embeddings, is the second argument of ``scores`` and ``selection``."""
    selection: Callable[..., Any] | None = None
    """Like ``scores``, but on other samples. Remedies are chosen on these samples and then
    certified by ``scores``. Without it, the samples of ``scores`` are split in half."""
    aggregate: Callable[[Any], float] | None = None
    """For a metric that is not a mean over samples, such as mIoU or F1: ``aggregate(rows)``
    computes it from the rows that ``scores`` returns, one per image and of any length, such as
    confusion counts. The image is the sampling unit. Certifying a limit of 1 % takes at least 730
    images, or about 1,000 if they differ in size, even if the metric does not drop; twice the limit
    takes half as many."""
    worst: float = 0.0
    """The lowest possible score of a sample, a finite number; not used with ``aggregate``. Clip
    scores that have no lower bound, such as log likelihoods."""
    groups: Any = field(default=None, hash=False)
    """One label per sample of ``scores``, in the same order, or a callable that returns them.
    Samples with the same label belong together, such as frames of a video, crops of a scene or
    questions on one text; each group is then a sampling unit. Without groups, samples must be
    independent."""

    def __post_init__(self) -> None:
        _check_name("the metric of an evaluation", self.metric)


def _check_name(what: str, name: Any) -> None:
    """Reject names that saving and loading would change, as names identify results."""
    if not isinstance(name, str) or not name.strip() or one_line(name) != name:
        raise WorkloadError(f"{what} must be one line of printable text, got {name!r}")


def _samples(params: RunParams) -> dict[str, float]:
    return {"samples": params.batch_size}


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A model and the inputs it is measured on."""

    name: str
    """Name of the workload, which is part of every result's identity."""
    build: Callable[[RunParams], torch.nn.Module]
    """Return a new model for a point, on any device; the plugin casts and moves it. It is called
    once for the baseline and once for the candidate, both times with the baseline's point. The
    random generators of torch, numpy and Python are seeded before each call, so that random weights
    are reproducible."""
    inputs: Callable[[RunParams, torch.device], Inputs]
    """Return the inputs of one batch on the device, as a tuple of positional arguments or a mapping
    of keyword arguments. Floating-point inputs are cast to the model's dtype."""
    load: Callable[[RunParams, str], torch.nn.Module] | None = None
    """``load(params, weights)`` returns the model with the weights that ``--int8-weights`` names:
    ``hub``, or the path of a file or folder. By default, a file is loaded into the model that
    ``build`` returns."""
    units: Callable[[RunParams], Mapping[str, float]] = _samples
    """Return the number of ``samples``, ``tokens``, ``pixels`` and ``square_km`` in one batch, or
    any of these. By default, only ``samples``, the batch size."""
    tokens: Callable[[Any], int] | None = None
    """Count the tokens of one batch in the model's output, as an alternative to ``units``."""
    evaluation: Evaluation | Sequence[Evaluation] | Callable[[RunParams], Any] | None = None
    """One evaluation of accuracy, several (each must pass), or a callable that returns either for a
    point. Without one, outputs are compared with the baseline's; such a comparison can fail a model
    but cannot pass it."""
    filter_fn: FilterFn | None = None
    """``filter_fn(module, name)`` returns whether to quantize a linear layer."""
    quant_config: Any = None
    """Any torchao ``AOBaseConfig`` or ``FqnToConfig``, used instead of the mode's config."""
    prequantized: bool = False
    """Whether ``build`` returns a model that torchao has already quantized in ``p.int8_mode`` when
    ``p.int8_enabled`` is set, e.g. from a checkpoint. The plugin then quantizes nothing. The
    baseline is the model that ``build`` returns without ``p.int8_enabled``, with its own weights.
    """
    calibration: Callable[[RunParams, torch.device], Any] | None = None
    """Return an iterable of inputs for SmoothQuant, which are cast and moved like ``inputs``. The
    default is the measured batch."""
    smoothquant_alpha: float = 0.5
    """SmoothQuant's migration strength, from 0 (weights unchanged) to 1 (all difficulty moved to
    the weights)."""
    keep_fp32: FilterFn | None = None
    """``keep_fp32(module, name)`` returns whether a module stays in FP32 with ``bf16=True``."""
    channels_last: bool = False
    """Keep 4-D weights and inputs in ``torch.channels_last``."""
    impossible_reason: Callable[[RunParams], str | None] | None = None
    """Return why this workload cannot run at a point (the point is then skipped), or None if it
    can."""
    axes: Mapping[str, Scalar] = field(default_factory=dict)
    """The workload's own axes and their defaults. Users set them with
    ``--int8-set extra.NAME=VALUE``; callables read them as ``p.extra[NAME]``."""

    def __post_init__(self) -> None:
        _check_name("the name of a workload", self.name)

    @property
    def brings_quantization(self) -> bool:
        """Whether the workload, not the point's mode, decides how its layers are quantized."""
        return self.prequantized or self.quant_config is not None

    def with_axes(self, params: RunParams) -> RunParams:
        """Return ``params`` with the defaults of the workload's axes filled in.

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
