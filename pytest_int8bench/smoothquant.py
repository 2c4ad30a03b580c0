"""SmoothQuant (arXiv:2211.10438): the outliers of activations moved into the weights.

A linear layer computes ``x @ W.T``. Dividing input feature ``j`` of ``x`` by ``s[j]`` and
multiplying column ``j`` of ``W`` by it changes nothing but what is easy to round to INT8. Where
``x`` comes from a norm and only from there, the division costs nothing: it is folded into the
norm's weight and bias. Elsewhere it is one multiplication at run time.

The scales are powers of two, so that neither weights nor norms nor activations are rounded by
scaling them: in BF16 and FP32 the smoothed model computes the same numbers as before. Against
unrounded scales that costs 0.2 dB of 43 dB in W8A8 and nothing in W8 (SQNR of two BF16 blocks
with outliers, against FP32; without SmoothQuant 27 dB and 41 dB).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from pytest_int8bench.errors import ClearError
from pytest_int8bench.tensors import map_tensors, tensors_of

#: Scales lie between 2 to the power of minus this and of this. They stay clear of where a scaled
#: weight would leave BF16's range.
MAX_EXPONENT = 16
#: What smaller weights count as, as in the paper's code.
MIN_WEIGHT = 1e-5
_FP32_EXPONENT_BIAS, _FP32_MANTISSA_BITS = 127, 23


class QuantizationError(ClearError, ValueError):
    """Nothing could be quantized, or a layer could not."""


@dataclass(frozen=True)
class Smoothing:
    """How to smooth a model. Nothing is changed before :meth:`apply`."""

    scales: Mapping[str, torch.Tensor]
    """Layer -> ``s`` (in_features,), FP32, on the layer's device. Layers that are fed by one norm
    have one scale."""
    folded: Mapping[str, tuple[str, ...]]
    """Norm -> the layers that it feeds, where the norm divides by ``s``."""

    @property
    def runtime(self) -> dict[str, torch.Tensor]:
        """Layer -> ``1 / s`` (in_features,), to multiply its input by at run time: every layer
        that is not folded."""
        folded = {layer for layers in self.folded.values() for layer in layers}
        return {name: 1 / scale for name, scale in self.scales.items() if name not in folded}

    def apply(self, model: nn.Module) -> None:
        """Scale the weights of the layers up and the parameters of the norms down.

        Parameters are replaced, not written to: what shares them with this model keeps its
        values. From now on the layers in :attr:`runtime` need their inputs scaled.
        """
        for name, scale in self.scales.items():
            multiply_parameter(model.get_submodule(name), "weight", scale)
        for name, layers in self.folded.items():
            for part in ("weight", "bias"):
                multiply_parameter(model.get_submodule(name), part, 1 / self.scales[layers[0]])


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
    rounded to a power of two, and 1 where the inputs are zero throughout. Of the inputs one
    maximum per feature is kept, whatever their number, length and layout.

    A norm is a module without submodules whose output is proportional to its ``weight`` and
    ``bias`` (if any), channel by channel in the last dimension: ``nn.LayerNorm`` and RMS norms
    are. A scale is folded into it if, in every batch, nothing is done with its output but to feed
    layers of ``chosen`` that get their inputs from nowhere else. They get one scale together, by
    the largest of their weights. Operators are watched where PyTorch dispatches them: a kernel
    that a model launches by itself, past PyTorch, is not seen to read.

    Args:
        model: a model in ``eval`` mode. It is not changed, and no hooks stay on it, also where
            calibration raises.
        chosen: names of ``nn.Linear`` modules.
        calibration: inputs of the model.
        call: ``call(model, inputs)`` runs the model on one of them.
        alpha: from 0 (only the weights are evened out) to 1 (only the activations are).

    Raises:
        QuantizationError: if a layer never ran, or had NaN or infinity in its input.
    """
    layers = {name: module for name, module in model.named_modules() if name in chosen}
    watch = _Watch()
    hooks = []
    try:
        for name, module in model.named_modules():
            if name in layers:
                hooks += watch.add_layer(name, module)
            elif _may_be_norm(module):
                hooks += watch.add_norm(name, module)
        # Eager, also what the model compiles by itself: compiled kernels are not seen to read.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), watch:
            for inputs in calibration:
                output = call(model, inputs)
                watch.end_of_batch()
                del output  # only now: what the model returns is still alive at the end of a batch
    finally:
        for hook in hooks:
            hook.remove()

    unseen = [name for name in layers if name not in watch.peaks]
    if unseen:
        raise QuantizationError(
            f"calibration never reached {len(unseen)} of {len(layers)} layers, "
            f"{unseen[0]} first: it must have at least one batch that runs every layer"
        )
    for name in layers:
        if not watch.peaks[name].isfinite().all():
            raise QuantizationError(f"calibration has NaN or infinity in the input of {name}")
    return _plan(layers, watch, alpha)


def multiply_parameter(module: nn.Module, name: str, factor: torch.Tensor) -> None:
    """Replace a parameter, if ``module`` has it, by its product with ``factor`` (its last
    dimension,), in its own dtype."""
    parameter = getattr(module, name, None)
    if parameter is not None:
        product = (parameter.detach() * factor.to(parameter.dtype)).contiguous()
        setattr(module, name, nn.Parameter(product, requires_grad=parameter.requires_grad))


class _Watch(TorchDispatchMode):
    """Records what goes into layers, and who reads what norms return.

    Tensors are told apart by their storages, so that a view counts as what it is a view of. The
    weak references do not keep them in memory, but keep their identities from being reused.
    """

    # Or operators such as flex_attention would raise.
    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peaks: dict[str, torch.Tensor] = {}
        """Layer -> largest absolute input (in_features,), FP32."""
        self.sources: dict[str, set[str | None]] = {}
        """Layer -> the norms that its inputs came from; None for any other source."""
        self.readers: dict[str, set[str]] = {}
        """Norm -> the layers that read its output."""
        self.unfoldable: set[str] = set()
        """Norms and layers whose output or parameters something else reads."""
        self._outputs: dict[StorageWeakRef, str] = {}
        self._parameters: dict[StorageWeakRef, str] = {}
        self._layers: set[str] = set()
        self._running: str | None = None

    def add_layer(self, name: str, layer: nn.Module) -> list[Any]:
        """Watch a linear layer; return the hooks."""
        self.sources[name] = set()
        hooks = [
            layer.register_forward_pre_hook(partial(self._before_layer, name), with_kwargs=True)
        ]
        # What a layer of another kind does with its input besides the product is not known.
        if getattr(layer.forward, "__func__", None) is nn.Linear.forward:
            self._layers.add(name)
            self._own(name, layer)
            hooks.append(self._at_end(layer, lambda *_: self._enter(None)))
        else:
            self.unfoldable.add(name)
        return hooks

    def add_norm(self, name: str, norm: nn.Module) -> list[Any]:
        """Watch what may be a norm; return the hooks."""
        self.readers[name] = set()
        self._own(name, norm)
        return [
            norm.register_forward_pre_hook(lambda *_: self._enter(name)),
            self._at_end(norm, partial(self._after_norm, name)),
        ]

    def end_of_batch(self) -> None:
        """Forget the outputs of this batch.

        What is still there is held by the model's output, or by the model for later: either may
        read it.
        """
        self.unfoldable |= self._alive()
        self._outputs.clear()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        # A view reads nothing; who reads the view is seen then.
        if not getattr(func, "is_view", False):
            for tensor in tensors_of((args, kwargs)):
                self._read(tensor)
        return func(*args, **kwargs)

    def _read(self, tensor: torch.Tensor) -> None:
        if type(tensor) not in (torch.Tensor, nn.Parameter):
            # Such as a nested tensor, which may hold any of them inside.
            self.unfoldable |= self._alive()
        elif tensor.layout is torch.strided:
            ref = StorageWeakRef(tensor.untyped_storage())
            if ref in self._outputs and self._running not in self._layers:
                self.unfoldable.add(self._outputs[ref])
            if ref in self._parameters and self._running != self._parameters[ref]:
                self.unfoldable.add(self._parameters[ref])

    def _alive(self) -> set[str]:
        return {name for ref, name in self._outputs.items() if not ref.expired()}

    def _own(self, name: str, module: nn.Module) -> None:
        for parameter in module.parameters():
            self._parameters[StorageWeakRef(parameter.untyped_storage())] = name

    def _at_end(self, module: nn.Module, hook: Callable[..., None]) -> Any:
        # First, so that other hooks are seen to read; always, also if a model catches an error.
        return module.register_forward_hook(hook, with_kwargs=True, prepend=True, always_call=True)

    def _enter(self, name: str | None) -> None:
        self._running = name

    def _before_layer(self, name: str, layer: Any, args: Any, kwargs: Any) -> None:
        if name in self._layers:
            self._enter(name)
        x = args[0] if args else kwargs["input"]
        if x.numel() == 0:
            return
        source = self._outputs.get(StorageWeakRef(x.untyped_storage()))
        if source is not None:
            self.readers[source].add(name)
        self.sources[name].add(source if _has_channels_last(x) else None)
        peak = _largest(x)
        known = self.peaks.get(name)
        self.peaks[name] = peak if known is None else torch.maximum(known, peak)

    def _after_norm(self, name: str, norm: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if type(output) is torch.Tensor and name not in self.unfoldable:
            if not _is_proportional(norm, args, kwargs, output):
                self.unfoldable.add(name)
            self._outputs[StorageWeakRef(output.untyped_storage())] = name
        self._enter(None)


def _may_be_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.dim() == 1 and not any(module.children())


def _is_proportional(norm: Any, args: Any, kwargs: Any, output: torch.Tensor) -> bool:
    """Say whether doubling every other weight and bias doubles every other channel, no more and
    no less. It does not in a norm that multiplies by ``1 + weight``, or adds its input."""
    if output.dim() == 0 or output.shape[-1] != len(norm.weight):
        return False
    factor = torch.ones_like(norm.weight)
    factor[::2] = 2
    twin = copy.copy(norm)
    twin._parameters = dict(norm._parameters)
    for name in ("weight", "bias"):
        if twin._parameters.get(name) is not None:
            twin._parameters[name] = twin._parameters[name] * factor
    # forward, not a call: no hooks. Copies, lest it writes to its input.
    args, kwargs = map_tensors(torch.clone, (args, kwargs))
    return torch.equal(twin.forward(*args, **kwargs), output * factor)


def _has_channels_last(x: torch.Tensor) -> bool:
    """Say whether the last dimension of ``x`` is that of the contiguous tensor it is a view of,
    not some other cut through it."""
    channels = x.shape[-1]
    steps = [step for size, step in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
    return (
        (x.stride(-1) == 1 or channels == 1)
        and x.storage_offset() % channels == 0
        and all(step % channels == 0 for step in steps)
    )


def _largest(x: torch.Tensor) -> torch.Tensor:
    """Return the largest absolute value (features,) over all dimensions but the last, in FP32,
    without a copy of ``x``; NaN where there is one."""
    rows = x.detach().unsqueeze(0)  # or amax over no dimensions would take all
    dimensions = tuple(range(rows.dim() - 1))
    return torch.maximum(rows.amax(dimensions), -rows.amin(dimensions)).float()


def _plan(layers: Mapping[str, Any], watch: _Watch, alpha: float) -> Smoothing:
    folded = {}
    for norm, readers in watch.readers.items():
        members = tuple(name for name in layers if name in readers)
        alone = all(watch.sources[name] == {norm} for name in members)
        if members and alone and not watch.unfoldable & {norm, *members}:
            folded[norm] = members
    groups = [*folded.values()]
    together = {name for group in groups for name in group}
    groups += [(name,) for name in layers if name not in together]
    scales = {}
    for group in groups:
        inputs = torch.stack([watch.peaks[name] for name in group]).amax(0)
        weights = torch.stack([_largest(layers[name].weight) for name in group]).amax(0)
        scales.update(dict.fromkeys(group, _scale(inputs, weights, alpha)))
    return Smoothing({name: scales[name] for name in layers}, folded)


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
