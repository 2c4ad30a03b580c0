"""Cast a model to the dtype of a point, as its library would."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from pytest_int8bench.compiler.torch_workarounds.eager import made_in_inference_mode
from pytest_int8bench.tensors import cast, cloned


def kept_by_library(model: nn.Module) -> frozenset[str]:
    """Return the parameters and buffers of ``model`` that its library keeps in FP32 when it loads a
    model in BF16; none if the library casts everything, as ``nn.Module.to`` does."""
    kinds = {
        f"{kind.__module__}.{kind.__qualname__}"
        for module in model.modules()
        for kind in type(module).__mro__
    }
    if "transformers.modeling_utils.PreTrainedModel" not in kinds:
        return frozenset()
    from pytest_int8bench.workloads.huggingface import kept_in_fp32

    return kept_in_fp32(model)


def cast_module(
    module: nn.Module, dtype: torch.dtype, path: str = "", kept: Collection[str] = ()
) -> None:
    """Cast the floating parameters and buffers of one module, without its children.

    Args:
        module: the module.
        dtype: target dtype.
        path: the module's name in its model.
        kept: names in the model of tensors that stay in FP32.
    """

    def wanted(name: str) -> torch.dtype:
        return torch.float32 if f"{path}.{name}".removeprefix(".") in kept else dtype

    for name, parameter in module.named_parameters(recurse=False):
        if parameter.is_floating_point():
            parameter.data = cast(parameter.data, wanted(name))
    for name, buffer in list(module.named_buffers(recurse=False)):
        if buffer.is_floating_point():
            module._buffers[name] = cast(buffer, wanted(name))


def replace_inference_tensors(model: nn.Module) -> None:
    """Replace parameters and buffers that were made in inference mode by copies that were not:
    casting the former in place leaves tensors that no layer can read. Tied ones stay tied."""
    copies: dict[int, torch.Tensor] = {}
    replaced = []  # keeps them alive, and so their ids
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is None or is_lazy(tensor) or not made_in_inference_mode(tensor):
                    continue
                replaced.append(tensor)
                if id(tensor) not in copies:
                    copies[id(tensor)] = cloned(tensor)
                held[name] = copies[id(tensor)]  # type: ignore[assignment]
