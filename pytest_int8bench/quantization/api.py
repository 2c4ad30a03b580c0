"""Quantize the linear layers of a model through torchao, and report its coverage."""

from __future__ import annotations

import copy
import dataclasses
import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torchao.quantization import FqnToConfig, quantize_
from torchao.utils import TorchAOBaseTensor

from pytest_int8bench.errors import QuantizationError as QuantizationError
from pytest_int8bench.kernels.linear import Int8Linear
from pytest_int8bench.quantization.arguments import Arguments
from pytest_int8bench.quantization.coverage import Coverage, Layer
from pytest_int8bench.quantization.filters import is_transformer_linear
from pytest_int8bench.quantization.left_out import expected, hidden_matmuls
from pytest_int8bench.quantization.lowering import lower, reason_to_keep
from pytest_int8bench.quantization.rollback import unchanged_on_error
from pytest_int8bench.quantization.smoothquant import Smoothing, multiply_weight, plan_smoothing
from pytest_int8bench.quantization.structure import within
from pytest_int8bench.quantization.weights import make_readable, weight_of, weight_problem
from pytest_int8bench.tensors import call

if TYPE_CHECKING:
    from pytest_int8bench.quantization.filters import FilterFn


_coverages: weakref.WeakKeyDictionary[nn.Module, Coverage] = weakref.WeakKeyDictionary()


def apply_int8_quant(
    model: nn.Module,
    *,
    mode: str = "w8a8",
    filter_fn: FilterFn | None = None,
    smoothquant: bool = False,
    calibration: Iterable[Any] | None = None,
    alpha: float = 0.5,
    quant_config: Any = None,
    backend: str = "auto",
) -> nn.Module:
    """Quantize the linear layers of ``model`` to INT8, in place.

    Weights get one symmetric scale per output channel. In ``w8a8``, activations get one scale per
    row, computed at run time. Inductor's settings do not change. The model is then for inference
    only: weights get no gradients, and neither do biases of layers that hold plain tensors.

    Args:
        model: a model in ``eval`` mode, on its device, with BF16 or FP32 weights.
        mode: ``w8a8`` (weights and dynamic activations), ``w8`` (weights only), ``fp8``, or a
            registered mode.
        filter_fn: ``filter_fn(module, name)`` returns whether to quantize a layer;
            :func:`is_transformer_linear` by default.
        smoothquant: first move outliers of the activations into the weights (SmoothQuant,
            arXiv:2211.10438), with one factor per input channel and layer, measured on
            ``calibration`` and applied at run time. See
            :func:`~pytest_int8bench.quantization.smoothquant.plan_smoothing`.
        calibration: inputs of the model, each a tensor, a tuple of positional arguments or a
            mapping of keyword arguments. Required with ``smoothquant``.
        alpha: SmoothQuant's migration strength, from 0 (only evens out weights) to 1 (only
            activations).
        quant_config: a torchao ``AOBaseConfig`` or ``FqnToConfig`` to use instead of the mode's.
            An ``FqnToConfig`` also selects the layers, in place of ``filter_fn``.
        backend: the kernels of W8A8 layers: ``torchao``, ``fused`` (ours, for each layer that they
            fit, with torchao's weights and scales), or ``auto`` (``fused`` where it runs).

    Returns:
        ``model``. :func:`coverage` returns which layers were converted.

    Raises:
        ValueError: for an unknown mode or backend, or ``smoothquant`` without ``calibration``.
        QuantizationError: if no layer was converted, the kernels do not support the shape of a
            layer, ``backend="fused"`` fits no layer, the mode or the backend does not run on this
            device, or SmoothQuant cannot be calibrated or does not support the mode or
            ``quant_config``.

    After an error, the model is unchanged.
    """
    arguments = Arguments(
        mode=mode,
        filter_fn=filter_fn or is_transformer_linear,
        smoothquant=smoothquant,
        calibration=calibration,
        alpha=alpha,
        quant_config=quant_config,
        backend=backend,
    )
    _coverages[model] = _quantize_whole(model, arguments)
    return model


def _quantize_whole(model: nn.Module, arguments: Arguments) -> Coverage:
    """Quantize ``model``, and add the layers that it misses to the coverage."""
    should_convert = expected(model)
    with unchanged_on_error(model):
        covered = _quantize(model, arguments)
    missed = should_convert.missed(layer.name for layer in covered.left_out)
    return dataclasses.replace(covered, missed=missed, elsewhere=should_convert.elsewhere)


def _quantize(model: nn.Module, arguments: Arguments) -> Coverage:
    if already := [name for name, module in model.named_modules() if is_quantized(module)]:
        raise QuantizationError(f"the model is already quantized ({already[0]} is)")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    fusing = arguments.check_device(device)
    total = sum(parameter.numel() for parameter in model.parameters())
    smoothed: tuple[str, ...] = ()
    if isinstance(arguments.quant_config, FqnToConfig):
        layers = _quantize_named(model, arguments.quant_config)
    else:
        layers, smoothed = _quantize_filtered(model, arguments, fusing=fusing)
    if not _converted(layers):
        raise QuantizationError(_nothing_converted(model, layers, arguments.precision))
    make_readable(model)
    if not arguments.is_custom:
        arguments.quantizer.lower(model, layers)
    if fusing:
        layers = _fuse(model, layers, required=arguments.backend == "fused")
    name = "custom" if arguments.is_custom else arguments.mode
    return Coverage(name, tuple(layers), total, smoothed, arguments.precision)


def _quantize_named(model: nn.Module, quant_config: Any) -> list[Layer]:
    """Quantize the layers that an ``FqnToConfig`` names. Return all linear layers."""
    layers = _select(model, lambda module, name: True)
    quantize_(model, quant_config, filter_fn=None)
    return _recheck(model, layers, "not named by FqnToConfig")


def _quantize_filtered(
    model: nn.Module, arguments: Arguments, *, fusing: bool
) -> tuple[list[Layer], tuple[str, ...]]:
    """Quantize the layers that the filter selects. Return all linear layers, and the names of the
    layers whose inputs SmoothQuant scales at run time."""
    with within(model):
        layers = _select(
            model, arguments.filter_fn, layer_problem=arguments.layer_problem, fusing=fusing
        )
    chosen = _converted(layers)
    if not chosen:
        raise QuantizationError(_nothing_converted(model, layers, arguments.precision))
    config = arguments.config(model)
    smoothing = Smoothing({})
    if arguments.smoothquant:
        assert arguments.calibration is not None
        smoothing = plan_smoothing(
            model, chosen, arguments.calibration, call=call, alpha=arguments.alpha
        )
        _check_takes_scale(model, smoothing, config)
        smoothing.apply(model)
    quantize_(model, config, filter_fn=lambda module, name: name in chosen)
    smoothed = _scale_inputs(model, smoothing)
    return _recheck(model, layers, "not quantized by the configuration"), smoothed


def _fuse(model: nn.Module, layers: list[Layer], *, required: bool) -> list[Layer]:
    """Move layers to the fused kernels where they fit.

    Raises:
        QuantizationError: if ``required`` and they fit no layer.
    """
    layers = lower(model, layers)
    if required and not any(layer.fused for layer in layers):
        reasons = sorted({str(layer.fallback) for layer in layers if layer.fallback})
        raise QuantizationError(f"int8_backend=fused supports no layer: {'; '.join(reasons)}")
    return layers


def _converted(layers: Iterable[Layer]) -> set[str]:
    return {layer.name for layer in layers if layer.reason is None}


def coverage(model: nn.Module) -> Coverage:
    """Return which linear layers of ``model`` are INT8, and why the others are not.

    Accepts what :func:`apply_int8_quant` or ``compile_for_a100`` returned, and models that were
    quantized with torchao directly.
    """
    for known in (model, getattr(model, "model", None)):
        if isinstance(known, nn.Module) and known in _coverages:
            return _coverages[known]
    layers = _recheck(model, _select(model, lambda *_: True), "not quantized")
    total = sum(parameter.numel() for parameter in model.parameters())
    return Coverage("custom", tuple(layers), total)


def weight_storage(model: nn.Module, dtype: torch.dtype | None = torch.int8) -> tuple[int, int]:
    """Return how many quantized linear layers store their weight in ``dtype`` (None for any
    dtype), and how many quantized linear layers there are."""
    layers: list[Any] = [module for module in model.modules() if is_quantized(module)]
    stored = [
        layer.int8_weight
        if isinstance(layer, Int8Linear)
        else getattr(weight_of(layer), "qdata", None)
        for layer in layers
    ]
    return sum(dtype in (None, getattr(held, "dtype", None)) for held in stored), len(layers)


def is_quantized(module: nn.Module) -> bool:
    """Return whether ``module`` is a linear layer that torchao quantized."""
    if isinstance(module, Int8Linear):
        return True
    return isinstance(module, nn.Linear) and isinstance(weight_of(module), TorchAOBaseTensor)


def _select(
    model: nn.Module,
    filter_fn: FilterFn,
    *,
    layer_problem: Callable[[nn.Linear], str | None] | None = None,
    fusing: bool = False,
) -> list[Layer]:
    """Return every linear layer of ``model``, with the reason if it must not be converted.

    With ``fusing``, check ``layer_problem`` only for layers that stay on torchao's kernels: the
    fused kernels support every layer.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    attention_parts = {
        id(part)
        for module in model.modules()
        if isinstance(module, nn.MultiheadAttention)
        for part in module.modules()
    }
    layers = []
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            weights = [module.in_proj_weight, module.q_proj_weight, module.k_proj_weight]
            weights += [module.v_proj_weight, module.in_proj_bias]
            count = sum(weight.numel() for weight in weights if weight is not None)
            layers.append(Layer(f"{name}.in_proj", count, "type: inside nn.MultiheadAttention"))
        if not isinstance(module, nn.Linear):
            continue
        reason = None
        if id(module) in attention_parts or isinstance(module, NonDynamicallyQuantizableLinear):
            reason = "type: inside nn.MultiheadAttention"
        elif not filter_fn(module, name):
            reason = "filtered"
        elif not is_quantized(module) and (problem := weight_problem(module)):
            reason = problem
        elif layer_problem and not (fusing and reason_to_keep(modules, name) is None):
            reason = layer_problem(module)
        count = module.out_features * (module.in_features + (module.bias is not None))
        layers.append(Layer(name, count, reason))
    return layers


def _recheck(model: nn.Module, layers: list[Layer], reason: str) -> list[Layer]:
    """Return ``layers`` as they are in the model: the ones that were selected but whose weights are
    not quantized get ``reason``."""
    modules = dict(model.named_modules())
    checked = []
    for layer in layers:
        if layer.reason is None:
            module = modules[layer.name]
            if is_quantized(module):
                layer = dataclasses.replace(layer, fused=type(module) is Int8Linear)
            else:
                layer = dataclasses.replace(layer, reason=reason)
        checked.append(layer)
    return checked


def _nothing_converted(model: nn.Module, layers: list[Layer], precision: str) -> str:
    hidden = hidden_matmuls(model)
    where = f"; it has weights outside nn.Linear, in {hidden}" if hidden else ""
    if not layers:
        return f"no layer was converted to {precision}: the model has no linear layers{where}"
    reasons = sorted({str(layer.reason) for layer in layers})
    more = " …" if len(layers) > 3 else ""
    names = ", ".join(layer.name for layer in layers[:3]) + more
    hint = ""
    if "filtered" in reasons:
        reasons[reasons.index("filtered")] = "not selected by the filter"
        hint = "; select layers with filter_fn or --int8-filter"
    return (
        f"no layer was converted to {precision}: {len(layers)} linear layers ({names}), "
        f"left out because: {'; '.join(reasons)}{hint}{where}"
    )


def _check_takes_scale(model: nn.Module, smoothing: Smoothing, config: Any) -> None:
    """Raise if the configuration's weights cannot hold SmoothQuant's factors, before the model
    changes. Only a quantized layer shows this, so quantize a copy of one."""
    for name in smoothing.scales:
        sample = nn.Sequential(copy.deepcopy(model.get_submodule(name)))
        quantize_(sample, config)
        if is_quantized(sample[0]):
            if not hasattr(sample[0].weight, "act_pre_scale"):
                raise QuantizationError(
                    f"smoothquant=True does not support {type(config).__name__}: its "
                    f"{type(sample[0].weight).__name__} cannot scale the input of {name} at run "
                    "time"
                )
            return


def _scale_inputs(model: nn.Module, smoothing: Smoothing) -> tuple[str, ...]:
    """Make quantized weights scale the inputs of their layers, and return the layers' names.

    Restore the weights of layers that the configuration did not quantize.
    """
    scaled = []
    factors = smoothing.factors
    cast: dict[tuple[int, torch.dtype], torch.Tensor] = {}
    for name, factor in factors.items():
        layer: Any = model.get_submodule(name)
        if is_quantized(layer):
            # In the weight's dtype, because an FP32 factor would turn a BF16 input into FP32.
            # Layers with a joint scale must share one tensor: the fused backend compares identity.
            dtype = layer.weight.dtype
            layer.weight.act_pre_scale = cast.setdefault((id(factor), dtype), factor.to(dtype))
            scaled.append(name)
        else:
            multiply_weight(layer, factor)
    return tuple(scaled)
