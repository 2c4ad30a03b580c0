"""Traverse, copy and compare the inputs and outputs of models.

Traversal finds tensors in sequences, mappings and dataclasses. Copies and comparisons also cover
NumPy arrays and the attributes of other objects.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from torch.overrides import TorchFunctionMode


def tensors_of(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in a tensor, list, tuple, mapping or dataclass, in order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif _is_dataclass(value):
        for spec in dataclasses.fields(value):
            yield from tensors_of(getattr(value, spec.name))
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_of(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_of(item)


def map_tensors(change: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """Return ``value`` with ``change`` applied to each tensor that :func:`tensors_of` finds.

    Containers keep their type, including Hugging Face's ``ModelOutput`` (a dataclass).
    """
    if isinstance(value, torch.Tensor):
        return change(value)
    if _is_dataclass(value):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
        return dataclasses.replace(
            value, **{name: map_tensors(change, item) for name, item in fields.items()}
        )
    if isinstance(value, Mapping):
        changed = {key: map_tensors(change, item) for key, item in value.items()}
        if type(value) is dict or not isinstance(value, dict):
            return changed
        same = copy.copy(value)
        same.update(changed)
        return same
    if isinstance(value, list | tuple):
        items = [map_tensors(change, item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def _is_dataclass(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def call(model: Callable[..., Any], inputs: Any) -> Any:
    """Call ``model`` with a workload's inputs: a mapping, a tuple, a list or a single value."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, tuple | list):
        return model(*inputs)
    return model(inputs)


# -- copies -------------------------------------------------------------------------------------


def deep_copy(
    value: Any,
    *,
    device_of: Callable[[torch.Tensor], torch.device] = lambda tensor: tensor.device,
    made: Callable[[torch.Tensor, torch.Tensor], None] = lambda tensor, copied: None,
) -> Any:
    """Copy model inputs so that writing to the copy leaves ``value`` unchanged.

    Tensors keep their strides, and a tensor that occurs twice is one tensor in the copy. Objects
    that Python cannot copy, such as locks, are shared.

    Args:
        value: tensors, arrays, and containers and objects that hold them.
        device_of: returns the device for the copy of a tensor.
        made: called with each tensor and its copy.
    """
    # Avoid inference tensors: Dynamo distinguishes them and would recompile for the copy.
    with torch.inference_mode(False), torch.no_grad(), _CopyTensors(device_of, made):
        return _copied(value)


def refilled(value: Any, tensors: Iterable[torch.Tensor]) -> Any:
    """Return a copy of ``value`` with ``tensors`` in place of its own, in the order of
    :func:`tensors_of`."""
    empty, rest = torch.empty(0), iter(tensors)
    hollow = deep_copy(map_tensors(lambda _: empty, value))
    return map_tensors(lambda _: next(rest), hollow)


class _CopyTensors(TorchFunctionMode):
    """Makes ``copy.deepcopy`` copy only the elements that a tensor spans, not its whole storage."""

    def __init__(
        self,
        device_of: Callable[[torch.Tensor], torch.device],
        made: Callable[[torch.Tensor, torch.Tensor], None],
    ) -> None:
        super().__init__()
        self._device_of = device_of
        self._made = made

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is not torch.Tensor.__deepcopy__ or not _is_plain(args[0]):
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        span = 0  # elements of the storage from the tensor's first to its last
        if tensor.numel():
            steps = zip(tensor.shape, tensor.stride(), strict=True)
            span = 1 + sum((size - 1) * stride for size, stride in steps)
        held = tensor.detach().as_strided((span,), (1,))
        memory = torch.empty(span, dtype=tensor.dtype, device=self._device_of(tensor)).copy_(held)
        copied = memory.as_strided(tensor.shape, tensor.stride())
        memo[id(tensor)] = copied.requires_grad_(tensor.requires_grad)
        self._made(tensor, copied)
        return copied


def _is_plain(tensor: torch.Tensor) -> bool:
    return (
        type(tensor) is torch.Tensor
        and tensor.layout is torch.strided
        and not (tensor.is_nested or tensor.is_quantized or tensor.is_conj() or tensor.is_neg())
    )


def _copied(value: Any) -> Any:
    try:
        return copy.deepcopy(value)
    except Exception:  # copy the parts that can be copied
        pass
    if isinstance(value, torch.Tensor):  # not a leaf of autograd, which deepcopy refuses
        return value.detach().clone().requires_grad_(value.requires_grad)
    if type(value) is dict:
        return {key: _copied(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_copied, value))
    if not hasattr(value, "__dict__"):
        return value
    try:
        same = copy.copy(value)
        vars(same).update({name: _copied(item) for name, item in vars(value).items()})
    except Exception:
        return value
    return same


def same_values(a: Any, b: Any) -> bool:
    """Return whether two values are equal bit by bit in everything that :func:`deep_copy` copies.

    Devices and unused memory between elements are ignored.
    """
    return _same(a, b, {})


# Ids of the pairs compared so far -> the objects, which are kept alive so that no id is reused.
_Seen: TypeAlias = dict[tuple[int, int], tuple[Any, Any]]


def _same(a: Any, b: Any, seen: _Seen) -> bool:
    if a is b or (id(a), id(b)) in seen:
        return True
    if type(a) is not type(b):
        return False
    seen[id(a), id(b)] = (a, b)
    if isinstance(a, torch.Tensor):
        return _same_tensor(a, b)
    if isinstance(a, np.ndarray):
        if a.dtype != b.dtype or a.shape != b.shape:
            return False
        return _same(a.tolist(), b.tolist(), seen) if a.dtype.hasobject else _bits(a) == _bits(b)
    if isinstance(a, float):
        return a == b or (math.isnan(a) and math.isnan(b))
    if isinstance(a, str | bytes | int | complex | set | frozenset | None):
        return bool(a == b)
    if isinstance(a, dict) and not _same([*a.items()], [*b.items()], seen):
        return False
    if isinstance(a, list | tuple | deque) and not (
        len(a) == len(b) and _all_same(zip(a, b, strict=True), seen)
    ):
        return False
    if hasattr(a, "__dict__") and not _same(vars(a), vars(b), seen):
        return False
    if isinstance(a, dict | list | tuple | deque):
        return True
    try:  # compare the pickled state, e.g. of a random number generator
        return _same(a.__reduce_ex__(2), b.__reduce_ex__(2), seen)
    except Exception:
        return True


def _all_same(pairs: Iterable[tuple[Any, Any]], seen: _Seen) -> bool:
    return all(_same(a, b, seen) for a, b in pairs)


def _same_tensor(a: torch.Tensor, b: torch.Tensor) -> bool:
    if (a.dtype, a.layout, a.is_nested) != (b.dtype, b.layout, b.is_nested):
        return False
    if a.is_nested:
        return _all_same(zip(a.unbind(), b.unbind(), strict=True), {})
    if a.shape != b.shape:
        return False
    with torch.inference_mode(False), torch.no_grad():
        if a.layout is not torch.strided:
            a, b = a.to_dense(), b.to_dense()
        elif any(
            first != second
            for size, first, second in zip(a.shape, a.stride(), b.stride(), strict=True)
            if size > 1
        ):
            return False
        return torch.equal(_bytes(a), _bytes(b))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_quantized:
        tensor = tensor.int_repr()
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.view(torch.uint8).cpu()


def _bits(array: np.ndarray[Any, Any]) -> bytes:
    return array.tobytes()


# -- dtypes -------------------------------------------------------------------------------------


def cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Cast a floating-point tensor to ``dtype``, keeping finite values finite.

    Masks contain the lowest number of their dtype. FP32's lowest number rounds to minus infinity in
    BF16, which would turn a fully masked row into NaN.
    """
    made = tensor.to(dtype)
    if made.layout is not torch.strided:
        return made  # sparse weights and adjacency matrices; masks are dense
    if made is tensor or torch.finfo(dtype).max >= torch.finfo(tensor.dtype).max:
        return made
    limits = torch.finfo(dtype)
    overflowed = made.isinf() & tensor.isfinite()
    return torch.where(overflowed, made.clamp(limits.min, limits.max), made)


def cloned(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a parameter or buffer, keeping its kind and never creating an inference tensor."""
    with torch.inference_mode(False), torch.no_grad():
        clone = tensor.detach().clone()
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(clone, requires_grad=tensor.requires_grad)
    return clone
