"""The tensors in what models take and return: tensors, sequences, mappings and dataclasses."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from pytest_int8bench.errors import QuantizationError as QuantizationError


def tensors_of(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in a tensor, sequence, mapping or dataclass, in order."""
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

    Containers keep their type, Hugging Face's ``ModelOutput`` (a dataclass) included.
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
    """Call ``model`` with inputs as a workload or a calibration gives them."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, tuple | list):
        return model(*inputs)
    return model(inputs)
