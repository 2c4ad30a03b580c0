"""``attention=auto``: measure which backend runs a model's attention in the least time."""

from __future__ import annotations

import math
import statistics
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from pytest_int8bench.attention import FlashSDPA, backends_of
from pytest_int8bench.clock import synchronized_perf_counter, untraced

_ROUNDS = 5
_ROUND_S = 0.002
_MOST_CALLS = 20


@dataclass(frozen=True)
class Layout:
    """All of a tensor but its values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Layout:
        """Return the layout of ``tensor``."""
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)

    def filled(self, fill: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Return a tensor of this layout, its storage filled by ``fill``, which works in place."""
        steps = (step * (size - 1) for size, step in zip(self.shape, self.stride, strict=True))
        storage = fill(torch.empty(1 + sum(steps), dtype=self.dtype, device=self.device))
        return storage.as_strided(self.shape, self.stride)


@dataclass(frozen=True)
class Call:
    """One call of ``scaled_dot_product_attention``, without its values."""

    query: Layout
    key: Layout
    value: Layout
    mask: Layout | None
    options: tuple[tuple[str, Any], ...]
    """``dropout_p``, ``is_causal`` and the like."""

    @classmethod
    def of(
        cls,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **options: Any,
    ) -> Call:
        """Return the call with the arguments of ``scaled_dot_product_attention``."""
        return cls(
            Layout.of(query),
            Layout.of(key),
            Layout.of(value),
            None if attn_mask is None else Layout.of(attn_mask),
            (("dropout_p", dropout_p), ("is_causal", is_causal), *sorted(options.items())),
        )

    def runner(self) -> Callable[[], torch.Tensor]:
        """Return a function that does such a call, on values of its own; a mask lets all pass."""
        query, key, value = (
            layout.filled(torch.Tensor.normal_) for layout in (self.query, self.key, self.value)
        )
        mask = None
        if self.mask is not None:
            passing = 1 if self.mask.dtype == torch.bool else 0
            mask = self.mask.filled(lambda storage: storage.fill_(passing))
        options = dict(self.options)
        return lambda: scaled_dot_product_attention(query, key, value, mask, **options)


def recorded_calls(run: Callable[[], object]) -> Counter[Call]:
    """Run ``run`` and return the calls of attention it does, with their number."""
    recorder = _Recorder()
    with recorder:
        run()
    return recorder.calls


class _Recorder(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[Call] = Counter()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention:
            self.calls[Call.of(*args, **kwargs)] += 1
        return func(*args, **kwargs)


def fastest_backend(
    calls: Mapping[Call, int], timer: Callable[[], float] = synchronized_perf_counter
) -> str | None:
    """Return the backend that does all ``calls`` in the least time, or None without one, or calls.

    A backend that raises in one of them, also for lack of memory, is out.
    """
    if not calls:
        return None
    kind = next(iter(calls)).query.device.type
    totals = {name: _total_s(name, calls, timer) for name in backends_of(kind)}
    return min((name for name in totals if totals[name] < math.inf), key=totals.get, default=None)  # type: ignore[arg-type]


def _total_s(attention: str, calls: Mapping[Call, int], timer: Callable[[], float]) -> float:
    """Return the seconds of all ``calls`` under one backend, infinity where it does not fit."""
    with warnings.catch_warnings(), torch.inference_mode(), FlashSDPA(attention):
        warnings.simplefilter("ignore")  # each backend says why it does not take the inputs
        try:
            return sum(
                count * _median_s(call.runner(), timer)
                for call, count in sorted(calls.items(), key=lambda item: repr(item[0]))
            )
        except (RuntimeError, ValueError):  # out of memory is a RuntimeError
            return math.inf


@untraced()
def _median_s(run: Callable[[], object], timer: Callable[[], float]) -> float:
    run()  # what is loaded and planned at the first call
    start = timer()
    run()
    once = max(timer() - start, 1e-9)
    count = min(math.ceil(_ROUND_S / once), _MOST_CALLS)
    times = []
    for _ in range(_ROUNDS):
        start = timer()
        for _ in range(count):
            run()
        times.append((timer() - start) / count)
    return statistics.median(times)
