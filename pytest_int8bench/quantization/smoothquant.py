"""SmoothQuant (arXiv:2211.10438): move the outliers of activations into the weights.

A linear layer computes ``x @ W.T``. Dividing input feature ``j`` of ``x`` by ``s[j]`` and
multiplying column ``j`` of ``W`` by ``s[j]`` leaves the output unchanged, but makes ``x`` easier to
round to INT8. The division runs with the model, as part of the kernel that rounds ``x``.

The scales are powers of two, so that scaling rounds neither weights nor activations: in BF16 and
FP32 the smoothed model computes the same numbers as before. Compared with unrounded scales this
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

#: Scales lie between 2 to the power of minus this and of this. They stay clear of where a scaled
#: weight would leave BF16's range.
MAX_EXPONENT = 16
#: What smaller weights count as, as in the paper's code.
MIN_WEIGHT = 1e-5
_FP32_EXPONENT_BIAS, _FP32_MANTISSA_BITS = 127, 23


@dataclass(frozen=True)
class Smoothing:
    """A plan to smooth a model, which is not changed before :meth:`apply`."""

    scales: Mapping[str, torch.Tensor]
    """Layer -> ``s`` (in_features,), FP32, on the layer's device. Layers with a joint scale have
    the same tensor."""

    @property
    def factors(self) -> dict[str, torch.Tensor]:
        """Layer -> ``1 / s`` (in_features,), to multiply its input by at run time. Layers with a
        joint scale have the same tensor."""
        inverses = {id(scale): 1 / scale for scale in self.scales.values()}
        return {name: inverses[id(scale)] for name, scale in self.scales.items()}

    def apply(self, model: nn.Module) -> None:
        """Scale the weights up. From then on the layers need their inputs scaled.

        Parameters are replaced, not written to: what shares them with this model keeps its
        values.
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
    rounded to a power of two, and 1 where the inputs are zero throughout. Only one maximum per
    feature is kept of the inputs, whatever their number, length and layout.

    Layers of one parent module that always read the same tensors, such as q, k and v, get a joint
    scale, by the largest of their weights: with one factor, their input is quantized once, and the
    fused kernels multiply it with all their weights at once.

    Args:
        model: a model in ``eval`` mode. It is not changed, and no hooks stay on it, even if
            calibration raises.
        chosen: names of ``nn.Linear`` modules.
        calibration: inputs of the model.
        call: ``call(model, inputs)`` runs the model on one of them.
        alpha: from 0 (only the weights are evened out) to 1 (only the activations are).

    Raises:
        QuantizationError: if a layer never ran, or had NaN or infinity in its input.
    """
    layers = {name: module for name, module in model.named_modules() if name in chosen}
    return _plan(layers, _watched(model, layers, calibration, call), alpha)


def multiply_weight(layer: nn.Module, factor: torch.Tensor) -> None:
    """Replace the weight of ``layer`` by its product with ``factor`` (in_features,), in its own
    dtype."""
    weight: Any = layer.weight
    product = (weight.detach() * factor.to(weight.dtype)).contiguous()
    layer.weight = nn.Parameter(product, requires_grad=weight.requires_grad)


class _Inputs:
    """Statistics of layer inputs."""

    def __init__(self, numbers: Callable[[torch.Tensor], int]) -> None:
        self.peaks: dict[str, torch.Tensor] = {}
        """Layer -> largest absolute input (in_features,), FP32."""
        self.tensors: dict[str, list[int]] = {}
        """Layer -> the numbers of the tensors it read, in order."""
        self._number = numbers

    def add(self, name: str, x: torch.Tensor) -> None:
        """Record an input of a layer."""
        if x.numel() == 0:
            return
        self.tensors.setdefault(name, []).append(self._number(x))
        peak = _largest(x)
        known = self.peaks.get(name)
        self.peaks[name] = peak if known is None else torch.maximum(known, peak)


class _Watch(TorchFunctionMode):
    """Records what layers' weights are multiplied by, by the layer or by other code, and what a
    layer is called with that multiplies in another way."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        # Not by id(), which Python reuses, and without keeping the tensors alive.
        numbers, count = WeakTensorKeyDictionary(), itertools.count()

        def number(x: torch.Tensor) -> int:
            known: int = numbers.setdefault(x, next(count))
            return known

        self._matmuls, self._calls = _Inputs(number), _Inputs(number)
        weights = [id(layer.weight) for layer in layers.values()]
        # Which layer multiplies by a weight that two share, only a call of it tells.
        self._own: dict[str, Any] = {
            name: layer
            for (name, layer), weight in zip(layers.items(), weights, strict=True)
            if weights.count(weight) == 1 and type(layer.weight) is nn.Parameter
        }

    @contextmanager
    def observed_weights(self) -> Iterator[None]:
        """Replace the weights of the layers by ones that record what they are multiplied by."""
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
        """Record the call of a layer; a forward pre-hook."""
        self._calls.add(name, args[0] if args else kwargs["input"])

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.linear:
            given = {**dict(zip(("input", "weight", "bias"), args, strict=False)), **kwargs}
            weight: Any = given["weight"]
            if isinstance(weight, ObservedWeight):
                # Here and not in the weight, where autocast has made another tensor of the input.
                weight.observe(given["input"])
                return func(**{**given, "weight": weight.held})
        return func(*args, **kwargs)

    def peak(self, name: str) -> torch.Tensor | None:
        """Return the largest absolute input (in_features,) of a layer; None if it never ran."""
        return self._seen(name).peaks.get(name)

    def tensors(self, name: str) -> tuple[int, ...]:
        """Return the numbers of the tensors that a layer read, in order."""
        return tuple(self._seen(name).tensors[name])

    def _seen(self, name: str) -> _Inputs:
        return self._matmuls if name in self._matmuls.peaks else self._calls


def _watched(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    calibration: Iterable[Any],
    call: Callable[[nn.Module, Any], Any],
) -> _Watch:
    """Run ``model`` on ``calibration`` and return what went into ``layers``."""
    watch = _Watch(layers)
    hooks = [
        module.register_forward_pre_hook(partial(watch.before_layer, name), with_kwargs=True)
        for name, module in layers.items()
    ]
    try:
        # Eager, even where the model compiles itself: compiled code may run without the hooks.
        with (
            torch.no_grad(),
            torch.compiler.set_stance("force_eager"),
            watch.observed_weights(),
        ):
            for inputs in calibration:
                with watch:
                    call(model, deep_copy(inputs))  # batches may share tensors, and models write
    finally:
        for hook in hooks:
            hook.remove()

    peaks = {name: watch.peak(name) for name in layers}
    unseen = [name for name, peak in peaks.items() if peak is None]
    if unseen:
        uncalled = ""
        if len(unseen) < len(layers):  # the calibration has data
            uncalled = (
                "; layers that no forward calls are to be left out with filter_fn or "
                f"--int8-filter: {', '.join(unseen)}"
            )
        raise QuantizationError(
            f"calibration never reached {len(unseen)} of {len(layers)} layers, "
            f"{unseen[0]} first: it must have at least one batch that runs every layer{uncalled}"
        )
    for name, peak in peaks.items():
        if peak is not None and not peak.isfinite().all():
            raise QuantizationError(f"calibration has NaN or infinity in the input of {name}")
    return watch


def _largest(x: torch.Tensor) -> torch.Tensor:
    """Return the largest absolute value (features,) over all dimensions but the last, in FP32,
    without a copy of ``x``; NaN where there is one."""
    rows = x.detach().unsqueeze(0)  # or amax over no dimensions would take all
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
    # A feature whose weights are all zero may have the largest outlier: it is scaled away.
    exponent = alpha * inputs.log2() - (1 - alpha) * weights.clamp(min=MIN_WEIGHT).log2()
    exponent = (
        exponent.where((inputs > 0) & weights.isfinite(), 0)
        .round()
        .clamp(-MAX_EXPONENT, MAX_EXPONENT)
    )
    # Written as bits: exp2 need not be exact.
    bits = (exponent.to(torch.int32) + _FP32_EXPONENT_BIAS) << _FP32_MANTISSA_BITS
    return bits.view(torch.float32)
