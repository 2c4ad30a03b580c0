"""Check a model's outputs for NaN and for repeatability."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from pytest_int8bench.tensors import deep_copy, same_values, tensors_of

#: SQNR of two calls with the same inputs below which a remark is made. Rounding in another order
#: keeps BF16 outputs above it.
REPEATABLE_DB = 30.0
#: Number of elements to compare in each output.
COMPARED = 1 << 16
#: Buffers of these dtypes are quantized weights.
_WEIGHTS = (torch.int8, torch.uint8)
_NAMED = 3


class Buffers:
    """Finds buffers that every call changes, such as running statistics and decoder caches, and
    restores the values from before the first call.

    Buffers that only the first calls fill, such as tables, are not restored.

    Args:
        model: a model that has not been called, unless it has a baseline.
        baseline: buffers of the model that it shares weights with, whose first values are used.
    """

    def __init__(self, model: nn.Module, baseline: Buffers | None = None) -> None:
        self._model = model
        self._first: dict[str, torch.Tensor] = {
            **_values(model),
            **({} if baseline is None else baseline._first),
        }
        self._settled: list[dict[str, torch.Tensor]] = []
        self.compared = False
        """Whether :meth:`compare` has run."""
        self.changing: tuple[str, ...] = () if baseline is None else baseline.changing
        """Names of buffers that every call changes; until :meth:`compare`, the baseline's names."""

    def find(self, run: Callable[[], object]) -> None:
        """Find the buffers that every call changes by making two calls.

        Args:
            run: calls the model.
        """
        run()  # fills buffers that only a first call fills
        self.settle()
        run()
        self.compare()

    def settle(self) -> None:
        """Remember the values between two calls. Also call it after the first call: a ring buffer
        that all calls fill with the same rows only changes until it is full."""
        self._settled.append(_values(self._model))

    def compare(self) -> None:
        """Find buffers that have changed since any :meth:`settle`, and keep only their first
        values."""
        now = _values(self._model)
        self.changing = tuple(
            dict.fromkeys(name for values in self._settled for name in _changed(values, now))
        )
        self._first = {name: self._first[name] for name in self.changing if name in self._first}
        self._settled = []
        self.compared = True

    def restore(self) -> None:
        """Put the buffers that every call changes back to what they were before the first."""
        _put_back(
            self._model, {name: self._first[name] for name in self.changing if name in self._first}
        )

    def remark(self) -> str | None:
        """Return a remark for the result, or None."""
        if not self.changing:
            return None
        named = ", ".join(self.changing[:_NAMED]) + (" …" if len(self.changing) > _NAMED else "")
        return (
            f"each call changes buffers of the model ({named}); they are restored before outputs "
            "are compared or scored, but not between timed calls"
        )


@contextmanager
def kept_buffers(model: nn.Module, run: Callable[[], object] | None = None) -> Iterator[None]:
    """Restore buffers that calls of a model inside change, unless only a first call changes them.

    Args:
        model: the model.
        run: calls it, if it has not been called before.
    """
    before = _values(model)
    yield
    changed = _changed(before, now := _values(model))
    if changed and run is not None:
        run()
        again = _changed(now, _values(model))
        changed = [name for name in changed if name in again]
    _put_back(model, {name: before[name] for name in changed})


def _changed(before: Mapping[str, torch.Tensor], now: Mapping[str, torch.Tensor]) -> list[str]:
    return [
        name
        for name, value in now.items()
        if name in before and not same_values(value, before[name])
    ]


def _put_back(model: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    if not values:
        return
    buffers = dict(model.named_buffers())
    with torch.inference_mode():
        for name, value in values.items():
            if name in buffers and buffers[name].shape == value.shape:
                buffers[name].copy_(value)


def _values(model: nn.Module) -> dict[str, torch.Tensor]:
    host = torch.device("cpu")
    return {
        name: deep_copy(buffer.detach(), device_of=lambda tensor: host)
        for name, buffer in model.named_buffers()
        if type(buffer) is torch.Tensor
        and buffer.layout is torch.strided
        and not buffer.is_quantized
        and buffer.dtype not in _WEIGHTS
    }


def sample_of(output: Any) -> list[torch.Tensor]:
    """Return copies of the first elements of each floating output, in FP64 on the host."""
    return [
        tensor.detach().reshape(-1)[:COMPARED].to("cpu", torch.float64, copy=True)
        for tensor in tensors_of(output)
        if tensor.is_floating_point() and tensor.layout is torch.strided
    ]


def repeats(first: list[torch.Tensor], again: list[torch.Tensor]) -> str | None:
    """Return a remark if two calls with the same inputs gave different outputs, else None."""
    signal = noise = 0.0
    for a, b in zip(first, again, strict=True):
        both = a.isfinite() & b.isfinite()
        signal += float(a[both].square().sum())
        noise += float((a[both] - b[both]).square().sum())
    if noise == 0 or 10 * math.log10(max(signal, 1e-300) / noise) >= REPEATABLE_DB:
        return None
    return (
        "two calls with the same inputs gave different outputs: the model draws random numbers or "
        "keeps state, so baseline and candidate cannot be compared"
    )


def is_finite(outputs: Iterable[torch.Tensor]) -> bool:
    """Return whether no output holds NaN or infinity."""
    return all(bool(tensor.isfinite().all()) for tensor in _real(outputs))


def has_nan(outputs: Iterable[torch.Tensor]) -> bool:
    """Return whether an output holds NaN."""
    return any(bool(tensor.isnan().any()) for tensor in _real(outputs))


def _real(outputs: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    for tensor in outputs:
        if tensor.is_complex():
            yield torch.view_as_real(tensor.resolve_conj())
        elif tensor.is_floating_point():
            yield tensor.float() if tensor.itemsize == 1 else tensor  # FP8 has few operators


def joined(*remarks: str | None) -> str | None:
    """Join distinct remarks into one; return None if there are none."""
    said = dict.fromkeys(filter(None, remarks))
    return "; ".join(said) or None
