"""INT8 quantization of linear layers through torchao, what it covered, and what runs it."""

from __future__ import annotations

import copy
import dataclasses
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torchao.core.config import AOBaseConfig
from torchao.quantization import (
    FqnToConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    quantize_,
)
from torchao.utils import TorchAOBaseTensor, should_reduce_range

from pytest_int8bench.choices import INT8_BACKENDS, INT8_MODES
from pytest_int8bench.errors import QuantizationError as QuantizationError
from pytest_int8bench.kernels.dispatch import fused_problem, product_kernel
from pytest_int8bench.kernels.linear import Int8Linear
from pytest_int8bench.quantization.coverage import Coverage, Layer
from pytest_int8bench.quantization.filters import is_transformer_linear
from pytest_int8bench.quantization.lowering import (
    dequantize,
    is_converted_on_cuda,
    lower,
    reason_to_keep,
)
from pytest_int8bench.quantization.smoothquant import Smoothing, multiply_weight, plan_smoothing
from pytest_int8bench.tensors import call

if TYPE_CHECKING:
    from pytest_int8bench.quantization.filters import FilterFn


#: CUDA's INT8 product (``torch._int_mm``) takes K and N that are multiples of this.
CUDA_MULTIPLE = 8

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

    Weights get one symmetric scale per output channel, activations (``w8a8``) one per row,
    computed at run time. Settings of Inductor are left alone. The model is for inference then:
    weights get no gradients, nor do biases of layers that hold plain tensors.

    Args:
        model: a model in ``eval`` mode, on its device, with real BF16 (or FP32) weights.
        mode: ``w8a8`` (weights and dynamic activations) or ``w8`` (weights only).
        filter_fn: ``filter_fn(module, name)`` says which layers to quantize;
            :func:`is_transformer_linear` by default.
        smoothquant: first move outliers of the activations into the weights (SmoothQuant,
            arXiv:2211.10438), with one factor per input channel and layer, measured on
            ``calibration`` and applied at run time. See
            :func:`~pytest_int8bench.quantization.smoothquant.plan_smoothing`.
        calibration: inputs of the model, each a tensor, a tuple of positional arguments or a
            mapping of keyword arguments. Needed with ``smoothquant``.
        alpha: SmoothQuant's migration strength, from 0 (weights keep) to 1 (all to the weights).
        quant_config: any torchao ``AOBaseConfig`` or ``FqnToConfig`` instead of the mode's own.
            With ``FqnToConfig`` the configuration itself says which layers, not ``filter_fn``.
        backend: what runs W8A8 layers: ``torchao``, ``fused`` (our kernels, layer by layer where
            they fit, with torchao's weights and scales), or ``auto``: ``fused`` where
            :func:`fused_problem` knows nothing against it.

    Returns:
        ``model``. :func:`coverage` tells what was converted.

    Raises:
        ValueError: for an unknown mode or backend, or ``smoothquant`` without ``calibration``.
        QuantizationError: if no layer was converted, one has a shape that the kernels cannot
            take, ``backend="fused"`` fits no layer or does not run here, or SmoothQuant cannot be
            calibrated or does not go with ``quant_config``. The latter three leave the model as it
            was.
    """
    if backend not in INT8_BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(INT8_BACKENDS)}, got {backend!r}")
    if mode not in INT8_MODES:
        raise ValueError(f"mode must be one of {', '.join(INT8_MODES)}, got {mode!r}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be from 0 to 1, got {alpha!r}")
    if smoothquant and calibration is None:
        raise ValueError("smoothquant=True needs calibration, an iterable of inputs; got None")
    if quant_config is not None and not isinstance(quant_config, AOBaseConfig | FqnToConfig):
        raise ValueError(
            f"quant_config must be a torchao AOBaseConfig or FqnToConfig, got {quant_config!r}"
        )
    if smoothquant and getattr(quant_config, "act_quant_scale", None) is not None:
        raise ValueError(
            f"smoothquant=True does not go with {type(quant_config).__name__}: "
            "its act_quant_scale is that of inputs before smoothing"
        )
    if already := [name for name, module in model.named_modules() if is_quantized(module)]:
        raise QuantizationError(f"the model is quantized already ({already[0]} is)")

    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    problem = fused_problem(mode if quant_config is None else "w8a8", device)
    if backend == "fused" and problem:
        raise QuantizationError(f"int8_backend=fused: {problem}")
    if fusing := backend != "torchao" and not problem:
        product_kernel(device)  # raises if the environment asks for one there is not
    total = sum(parameter.numel() for parameter in model.parameters())
    smoothing = Smoothing({})
    smoothed: tuple[str, ...] = ()
    if isinstance(quant_config, FqnToConfig):
        if smoothquant:
            raise ValueError("smoothquant=True does not go with FqnToConfig")
        layers = _select(model, lambda module, name: True, check_shapes=False)
        quantize_(model, quant_config, filter_fn=None)
        layers = _recheck(model, layers, "not named by FqnToConfig")
    else:
        layers = _select(
            model,
            filter_fn or is_transformer_linear,
            check_shapes=mode == "w8a8" and quant_config is None,
            fusing=fusing,
        )
        chosen = {layer.name for layer in layers if layer.reason is None}
        if not chosen:
            raise QuantizationError(_nothing_converted(layers))
        config = quant_config if quant_config is not None else _config(model, mode)
        if smoothquant:
            assert calibration is not None
            smoothing = plan_smoothing(model, chosen, calibration, call=call, alpha=alpha)
            _check_takes_scale(model, smoothing, config)
            smoothing.apply(model)
        quantize_(model, config, filter_fn=lambda module, name: name in chosen)
        smoothed = _scale_inputs(model, smoothing)
        layers = _recheck(model, layers, "left as it is by the configuration")
    if all(layer.reason is not None for layer in layers):
        raise QuantizationError(_nothing_converted(layers))
    if mode == "w8" and quant_config is None:
        dequantize(model, [layer for layer in layers if is_converted_on_cuda(model, layer)])
    if fusing:
        layers = lower(model, layers)
        if backend == "fused" and not any(layer.fused for layer in layers):
            reasons = sorted({str(layer.fallback) for layer in layers if layer.fallback})
            raise QuantizationError(f"int8_backend=fused fits no layer: {'; '.join(reasons)}")
    _coverages[model] = Coverage(
        "custom" if quant_config is not None else mode,
        tuple(layers),
        total,
        smoothed,
    )
    return model


def coverage(model: nn.Module) -> Coverage:
    """Return which linear layers of ``model`` are INT8, and why the others are not.

    Works on the return value of :func:`apply_int8_quant` or ``compile_for_a100``, and on models
    that torchao quantized elsewhere.
    """
    for known in (model, getattr(model, "model", None)):
        if isinstance(known, nn.Module) and known in _coverages:
            return _coverages[known]
    layers = _recheck(model, _select(model, lambda *_: True, check_shapes=False), "not quantized")
    total = sum(parameter.numel() for parameter in model.parameters())
    return Coverage("custom", tuple(layers), total)


def int8_storage(model: nn.Module) -> tuple[int, int]:
    """Return how many quantized linear layers store INT8 weights, and how many there are."""
    layers: list[Any] = [module for module in model.modules() if is_quantized(module)]
    stored = [
        getattr(layer.weight, "qdata", None)
        if not isinstance(layer, Int8Linear)
        else layer.int8_weight
        for layer in layers
    ]
    return sum(getattr(held, "dtype", None) == torch.int8 for held in stored), len(layers)


def is_quantized(module: nn.Module) -> bool:
    """Say whether ``module`` is a linear layer that torchao quantized."""
    if isinstance(module, Int8Linear):
        return True
    return isinstance(module, nn.Linear) and isinstance(module.weight, TorchAOBaseTensor)


def _select(
    model: nn.Module, filter_fn: FilterFn, *, check_shapes: bool, fusing: bool = False
) -> list[Layer]:
    """Return every linear layer of ``model``, those that are not to be converted with reason.

    With ``fusing``, shapes are checked of layers that stay torchao's: the fused kernels take any.
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
        elif check_shapes and not (fusing and reason_to_keep(modules, name) is None):
            reason = _shape_reason(module)
        count = module.out_features * (module.in_features + (module.bias is not None))
        layers.append(Layer(name, count, reason))
    return layers


def _shape_reason(module: nn.Linear) -> str | None:
    if module.weight.device.type != "cuda":
        return None
    rows, columns = module.weight.shape
    if rows % CUDA_MULTIPLE or columns % CUDA_MULTIPLE:
        return f"shape: {columns}x{rows} is not a multiple of {CUDA_MULTIPLE} (CUDA INT8 product)"
    return None


def _recheck(model: nn.Module, layers: list[Layer], reason: str) -> list[Layer]:
    """Believe the model, not the plan: a layer counts as converted if its weight is."""
    modules = dict(model.named_modules())
    told = []
    for layer in layers:
        if layer.reason is None:
            module = modules[layer.name]
            if is_quantized(module):
                layer = dataclasses.replace(layer, fused=type(module) is Int8Linear)
            else:
                layer = dataclasses.replace(layer, reason=reason)
        told.append(layer)
    return told


def _nothing_converted(layers: list[Layer]) -> str:
    if not layers:
        return "no layer was converted to INT8: the model has no linear layers"
    reasons = sorted({str(layer.reason) for layer in layers})
    names = ", ".join(layer.name for layer in layers[:3])
    hint = "; choose layers with filter_fn or --int8-filter" if "filtered" in reasons else ""
    return (
        f"no layer was converted to INT8: {len(layers)} linear layers ({names} …), "
        f"left out because: {'; '.join(reasons)}{hint}"
    )


def _config(model: nn.Module, mode: str) -> Any:
    # set_inductor_config=True would change Inductor for the whole process, baseline included.
    if mode == "w8":
        return Int8WeightOnlyConfig(set_inductor_config=False)
    devices = {parameter.device for parameter in model.parameters()}
    return Int8DynamicActivationInt8WeightConfig(
        set_inductor_config=False,
        # Without VNNI the CPU's INT8 product saturates in 16 bits.
        reduce_range=any(should_reduce_range(device) for device in devices),
    )


def _check_takes_scale(model: nn.Module, smoothing: Smoothing, config: Any) -> None:
    """Raise before anything is changed if the configuration's tensor has no place for a factor.
    This shows only on a layer that it quantized."""
    for name in smoothing.scales:
        sample = nn.Sequential(copy.deepcopy(model.get_submodule(name)))
        quantize_(sample, config)
        if is_quantized(sample[0]):
            if not hasattr(sample[0].weight, "act_pre_scale"):
                raise QuantizationError(
                    f"smoothquant=True does not go with {type(config).__name__}: "
                    f"its {type(sample[0].weight).__name__} cannot scale the input of {name} at "
                    "run time"
                )
            return


def _scale_inputs(model: nn.Module, smoothing: Smoothing) -> tuple[str, ...]:
    """Have the quantized weights scale the inputs of their layers; return the layers' names.

    A layer that the configuration left as it is gets its old weight back.
    """
    scaled = []
    factors = smoothing.factors
    cast: dict[tuple[int, torch.dtype], torch.Tensor] = {}
    for name, factor in factors.items():
        layer: Any = model.get_submodule(name)
        if is_quantized(layer):
            # In the weight's dtype: an FP32 factor would turn a BF16 input into FP32. Layers with a
            # joint scale keep sharing one tensor, by which the fused backend knows them.
            dtype = layer.weight.dtype
            layer.weight.act_pre_scale = cast.setdefault((id(factor), dtype), factor.to(dtype))
            scaled.append(name)
        else:
            multiply_weight(layer, factor)
    return tuple(scaled)
