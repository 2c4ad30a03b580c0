"""Replace TorchAO's quantized layers with layers of plain tensors for our kernels."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torchao.quantization import Int8Tensor, MappingType, PerRow

from pytest_int8bench.kernels.linear import Quantized, WeightOnlyLinear, replace_linears
from pytest_int8bench.quantization.coverage import Layer
from pytest_int8bench.quantization.weights import DequantizedInt8Weight, Int8Weight, set_weight

# Types of weights whose layers can be lowered: TorchAO's, and our subclass of it.
_INT8 = (Int8Tensor, Int8Weight)


def lower(model: nn.Module, layers: Iterable[Layer]) -> list[Layer]:
    """Move converted layers to the fused kernels where torchao quantized them in a supported way.

    Args:
        model: a quantized model, changed in place.
        layers: its linear layers.

    Returns:
        The layers, with ``fused`` or ``fallback`` set for each converted one.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    plain: dict[str, Quantized] = {}
    updated = []
    for layer in layers:
        if layer.reason is None:
            module: Any = modules[layer.name]
            reason = reason_to_keep(modules, layer.name) or _activation_problem(module.weight)
            tensors = reason or _plain(module)
            if isinstance(tensors, str):
                layer = dataclasses.replace(layer, fallback=tensors)
            else:
                plain[layer.name] = tensors
                layer = dataclasses.replace(layer, fused=True)
        updated.append(layer)
    replace_linears(model, plain)
    return updated


def dequantize(model: nn.Module, layers: Iterable[Layer]) -> None:
    """Make the converted layers of a W8 model dequantize their whole weight before the matmul.

    They become :class:`WeightOnlyLinear`. With tensor subclasses such as torchao's weights,
    repeated blocks cannot be compiled once, and each call of a compiled model costs the host about
    20 us per layer. Layers that cannot be replaced get a :class:`DequantizedInt8Weight`.

    Args:
        model: a quantized model, changed in place.
        layers: its linear layers.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    plain: dict[str, Quantized] = {}
    for layer in layers:
        if layer.reason is not None:
            continue
        module: Any = modules[layer.name]
        tensors = reason_to_keep(modules, layer.name) or _plain(module)
        if isinstance(tensors, Quantized):
            plain[layer.name] = tensors
        elif type(module.weight) in _INT8:
            set_weight(module, DequantizedInt8Weight, module.weight)
    replace_linears(model, plain, WeightOnlyLinear)


def is_converted_on_cuda(model: nn.Module, layer: Layer) -> bool:
    if layer.reason is not None:  # in_proj of nn.MultiheadAttention is not a module
        return False
    module: Any = model.get_submodule(layer.name)
    return bool(module.weight.device.type == "cuda")


def reason_to_keep(modules: Mapping[str, nn.Module], name: str) -> str | None:
    """Return why a linear layer cannot be replaced by another module, or None if it can."""
    module = modules[name]
    if not name:
        return "type: the model itself, which cannot be replaced in place"
    if "forward" in vars(module) or type(module).forward is not nn.Linear.forward:
        return f"type: {type(module).__name__} has its own forward"
    if isinstance(modules[name.rpartition(".")[0]], nn.TransformerEncoderLayer):
        return "type: inside nn.TransformerEncoderLayer"
    if "bias" not in module._parameters:
        return "bias: computed when the layer is called"
    if module._forward_hooks or module._forward_pre_hooks:
        return "type: has forward hooks"
    if module._backward_hooks or module._backward_pre_hooks:
        return "type: has backward hooks"
    return None


def _activation_problem(weight: Any) -> str | None:
    """Return why the fused kernels cannot quantize the input of a layer, or None if they can."""
    if type(weight) not in _INT8:
        return f"weight: {type(weight).__name__}"
    dynamic = weight.act_quant_kwargs
    if dynamic is None:
        return "activations: not quantized"
    if weight.act_quant_scale is not None or not isinstance(dynamic.granularity, PerRow):
        return "activations: scale not per row"
    if dynamic.mapping_type != MappingType.SYMMETRIC or dynamic.granularity.dim != -1:
        return "activations: not symmetric per row"
    return None


def _plain(module: Any) -> Quantized | str:
    """Return the plain tensors of a layer, or why they cannot represent its weight."""
    weight = module.weight
    if weight.scale.numel() != weight.shape[0]:
        return "weight: scale not per output channel"
    if weight.zero_point is not None and bool(weight.zero_point.any()):
        return "weight: not symmetric"
    return Quantized(
        weight.qdata.contiguous(),
        weight.scale.reshape(-1).float(),
        module.bias,
        weight.act_pre_scale,
        weight.dtype,
    )
