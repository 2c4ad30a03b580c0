"""SmoothQuant (arXiv:2211.10438): move the outliers of activations into the weights.

A linear layer computes ``x @ W.T``. Dividing input feature ``j`` of ``x`` by ``s[j]`` and
multiplying column ``j`` of ``W`` by ``s[j]`` leaves the output unchanged, but makes ``x`` easier to
round to INT8. The division happens at run time, in the kernel that quantizes ``x``.

The scales are powers of two, so that scaling rounds neither weights nor activations: in BF16 and
FP32 the smoothed model computes the same numbers as before. Compared with unrounded scales, this
costs 0.2 dB of 43 dB in W8A8 and nothing in W8 (SQNR of two BF16 blocks with outliers, against
FP32; without SmoothQuant 27 dB and 41 dB).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from pytest_int8bench.errors import QuantizationError
from pytest_int8bench.quantization.observed_weight import ObservedWeight
from pytest_int8bench.tensors import deep_copy

#: Scales are between 2**-MAX_EXPONENT and 2**MAX_EXPONENT, so that scaled weights stay in BF16's
#: range.
MAX_EXPONENT = 16
#: Lower limit for the largest weight of a feature, as in the paper's code.
MIN_WEIGHT = 1e-5
_FP32_EXPONENT_BIAS, _FP32_MANTISSA_BITS = 127, 23


@dataclass(frozen=True)
class Smoothing:
    """A plan to smooth a model. The model does not change until :meth:`apply`."""

    scales: Mapping[str, torch.Tensor]
    """Layer -> ``s`` (in_features,), FP32, on the layer's device. Layers with a joint scale share
    one tensor."""

    @property
    def factors(self) -> dict[str, torch.Tensor]:
        """Layer -> ``1 / s`` (in_features,), by which to multiply the layer's input at run time.
        Layers with a joint scale share one tensor."""
        inverses = {id(scale): 1 / scale for scale in self.scales.values()}
        return {name: inverses[id(scale)] for name, scale in self.scales.items()}

    def apply(self, model: nn.Module) -> None:
        """Multiply the weights by the scales. The layers then require scaled inputs.

        This replaces parameters and does not write to them, so other modules that share them keep
        their values.
        """
        for name, scale in self.scales.items():
            multiply_weight(model.get_submodule(name), scale)


def plan_smoothing(
    model: nn.Module,
    chosen: Collection[str],
    calibration: Iterable[Any],
    *,
    call: Callable[[nn.Module, Any], Any],
    alpha: float = 0.5,
) -> Smoothing:
    """Run ``model`` on ``calibration`` and return how to smooth the linear layers ``chosen``.

    Per input feature ``s = max|X| ** alpha / max|W| ** (1 - alpha)`` (equation 4 of the paper),
    rounded to a power of two, and 1 if the feature is always zero. Memory does not grow with the
    calibration data: only the maximum of each feature is kept.

    Layers of one parent module that always read the same tensors, such as q, k and v, get a joint
    scale, computed from the largest of their weights. Their input is then quantized only once, and
    the fused kernels multiply it with all their weights in one matmul.

    Args:
        model: a model in ``eval`` mode. It does not change, and its hooks are removed even if
            calibration raises.
        chosen: names of ``nn.Linear`` modules.
        calibration: inputs of the model.
        call: ``call(model, inputs)`` runs the model on one of them.
        alpha: from 0 (even out only the weights) to 1 (even out only the activations).

    Raises:
        QuantizationError: if a layer never ran, or its input contained NaN or infinity.
    """
    layers = {name: module for name, module in model.named_modules() if name in chosen}
    return _plan(layers, _watched(model, layers, calibration, call), alpha)


def multiply_weight(layer: nn.Module, factor: torch.Tensor) -> None:
    """Multiply the columns of the weight of ``layer`` by ``factor`` (in_features,), in the weight's
    dtype. The weight is replaced, not written to."""
    weight: Any = layer.weight
    scaled = (weight.detach() * factor.to(weight.dtype)).contiguous()
    layer.weight = nn.Parameter(scaled, requires_grad=weight.requires_grad)


class _Inputs:
    """Statistics of layer inputs."""

    def __init__(self, number: Callable[[torch.Tensor], int]) -> None:
        self.peaks: dict[str, torch.Tensor] = {}
        """Layer -> largest absolute input (in_features,), FP32."""
        self.tensors: dict[str, list[int]] = {}
        """Layer -> numbers that identify the tensors it read, in order."""
        self._number = number

    def add(self, name: str, x: torch.Tensor) -> None:
        if x.numel() == 0:
            return
        self.tensors.setdefault(name, []).append(self._number(x))
        peak = _largest(x)
        known = self.peaks.get(name)
        self.peaks[name] = peak if known is None else torch.maximum(known, peak)


class _Watch(TorchFunctionMode):
    """Record the inputs of all matmuls with the layers' weights, also outside the layers, and the
    inputs of calls of layers whose matmuls it cannot observe."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        # Identify tensors without id(), which Python reuses, and without keeping them alive.
        numbers, count = WeakTensorKeyDictionary(), itertools.count()

        def number(x: torch.Tensor) -> int:
            known: int = numbers.setdefault(x, next(count))
            return known

        self._matmuls, self._calls = _Inputs(number), _Inputs(number)
        weights = [id(layer.weight) for layer in layers.values()]
        # Exclude shared weights: only a call shows which of the layers multiplies by the weight.
        self._own: dict[str, Any] = {
            name: layer
            for (name, layer), weight in zip(layers.items(), weights, strict=True)
            if weights.count(weight) == 1 and type(layer.weight) is nn.Parameter
        }

    @contextmanager
    def observed_weights(self) -> Iterator[None]:
        """Replace the layers' weights by weights that record the inputs of their matmuls."""
        weights = {name: layer.weight for name, layer in self._own.items()}
        try:
            for name, weight in weights.items():
                observed: Any = ObservedWeight(weight.detach(), partial(self._matmuls.add, name))
                self._own[name].weight = nn.Parameter(observed, requires_grad=False)
            yield
        finally:
            for name, weight in weights.items():
                self._own[name].weight = weight

    def before_layer(self, name: str, layer: Any, args: Any, kwargs: Any) -> None:
        """Record the input of a layer. This is a forward pre-hook."""
        self._calls.add(name, args[0] if args else kwargs["input"])

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.linear:
            given = {**dict(zip(("input", "weight", "bias"), args, strict=False)), **kwargs}
            weight: Any = given["weight"]
            if isinstance(weight, ObservedWeight):
                # Observe here: when autocast reaches the weight, it has cast the input to a new
                # tensor.
                weight.observe(given["input"])
                return func(**{**given, "weight": weight.held})
        return func(*args, **kwargs)

    def peak(self, name: str) -> torch.Tensor | None:
        """Return the largest absolute input (in_features,) of a layer; None if it never ran."""
        return self._inputs_of(name).peaks.get(name)

    def tensors(self, name: str) -> tuple[int, ...]:
        """Return numbers that identify the tensors that a layer read, in order."""
        return tuple(self._inputs_of(name).tensors[name])

    def _inputs_of(self, name: str) -> _Inputs:
        return self._matmuls if name in self._matmuls.peaks else self._calls


def _watched(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    calibration: Iterable[Any],
    call: Callable[[nn.Module, Any], Any],
) -> _Watch:
    """Run ``model`` on ``calibration`` and return the inputs of ``layers``."""
    watch = _Watch(layers)
    hooks = [
        module.register_forward_pre_hook(partial(watch.before_layer, name), with_kwargs=True)
        for name, module in layers.items()
    ]
    try:
        # Run eagerly even if the model compiles itself: compiled code may not call the hooks.
        with (
            torch.no_grad(),
            torch.compiler.set_stance("force_eager"),
            watch.observed_weights(),
        ):
            for inputs in calibration:
                with watch:
                    call(model, deep_copy(inputs))  # models may write to tensors that batches share
    finally:
        for hook in hooks:
            hook.remove()

    peaks = {name: watch.peak(name) for name in layers}
    unseen = [name for name, peak in peaks.items() if peak is None]
    if unseen:
        hint = ""
        if len(unseen) < len(layers):  # the calibration has data
            hint = (
                "; if the model never calls them, exclude them with filter_fn or --int8-filter: "
                f"{', '.join(unseen)}"
            )
        raise QuantizationError(
            f"calibration did not run {len(unseen)} of {len(layers)} layers (first: "
            f"{unseen[0]}): it must have at least one batch that runs every layer{hint}"
        )
    for name, peak in peaks.items():
        if peak is not None and not peak.isfinite().all():
            raise QuantizationError(
                f"during calibration, the input of {name} contains NaN or infinity"
            )
    return watch


def _largest(x: torch.Tensor) -> torch.Tensor:
    """Return the largest absolute value (features,) over all dimensions but the last, in FP32,
    without copying ``x``. NaN propagates."""
    rows = x.detach().unsqueeze(0)  # because amax over no dimensions reduces all
    dimensions = tuple(range(rows.dim() - 1))
    return torch.maximum(rows.amax(dimensions), -rows.amin(dimensions)).float()


def _plan(layers: Mapping[str, Any], watch: _Watch, alpha: float) -> Smoothing:
    groups: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for name in layers:
        parent = name.rpartition(".")[0]
        groups.setdefault((parent, watch.tensors(name)), []).append(name)
    scales = {}
    for group in groups.values():
        peaks: list[Any] = [watch.peak(name) for name in group]
        inputs = torch.stack(peaks).amax(0)
        weights = torch.stack([_largest(layers[name].weight) for name in group]).amax(0)
        scales.update(dict.fromkeys(group, _scale(inputs, weights, alpha)))
    return Smoothing({name: scales[name] for name in layers})


def _scale(inputs: torch.Tensor, weights: torch.Tensor, alpha: float) -> torch.Tensor:
    # The clamp also scales away outliers of features whose weights are all zero.
    exponent = alpha * inputs.log2() - (1 - alpha) * weights.clamp(min=MIN_WEIGHT).log2()
    exponent = (
        exponent.where((inputs > 0) & weights.isfinite(), 0)
        .round()
        .clamp(-MAX_EXPONENT, MAX_EXPONENT)
    )
    # Build the bits of a power of two: exp2 may not be exact.
    bits = (exponent.to(torch.int32) + _FP32_EXPONENT_BIAS) << _FP32_MANTISSA_BITS
    return bits.view(torch.float32)
