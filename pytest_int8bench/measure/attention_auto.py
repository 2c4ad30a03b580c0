"""``attention=auto``: measure which backend runs a model's attention fastest."""

from __future__ import annotations

import math
import statistics
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Mapping

import torch

from pytest_int8bench.attention import SHORT, FlashSDPA, backends_of, general_backends
from pytest_int8bench.clock import synchronized_perf_counter, untraced
from pytest_int8bench.compiler.attention_calls import Call as Call
from pytest_int8bench.compiler.attention_calls import recorded_calls as recorded_calls
from pytest_int8bench.compiler.failures import is_of_model, root_of
from pytest_int8bench.compiler.fusion.int8_attention import AttentionCoverage
from pytest_int8bench.compiler.fusion.short_attention import eager_short, short_refusal
from pytest_int8bench.errors import ClearError, first_line
from pytest_int8bench.measure.generators import kept_generators
from pytest_int8bench.params import RunParams

_ROUNDS = 5
_ROUND_S = 0.002
_MOST_CALLS = 20

#: Backend and call -> seconds, or infinity if the backend does not support the call.
Timings = dict[tuple[str, Call], float]


class AttentionError(ClearError, RuntimeError):
    """The requested attention backend does not support the model's attention."""

    @classmethod
    def of(cls, tried: str, params: RunParams, workload: str) -> AttentionError:
        """Return the error of a point whose model was compiled for the backend ``tried``."""
        usable = " or ".join(general_backends())
        if params.attention != "auto":
            usable = f"auto, {usable}"
        return cls(
            f"attention={tried} cannot run the attention of workload {workload!r} on "
            f"{params.gpu_type} (masks, head sizes and dtypes differ by backend): "
            f"use attention={usable}"
        )


def no_kernel(error: BaseException) -> bool:
    """Return whether ``error`` is torch's error for a call that a backend does not support."""
    return "No available kernel" in str(error)


class AnotherBackend(Exception):
    """Another attention backend is the fastest now that all attention calls are known."""


class AutoAttention:
    """Chooses the backend of ``attention=auto`` for a baseline and its candidates.

    Args:
        timings: earlier timings, including other models'; new timings are added.
    """

    def __init__(self, timings: Timings | None = None) -> None:
        self.chosen = "auto"
        """The backend, or ``auto`` until one is chosen; torch then decides for each call."""
        self.is_final = False
        """Whether calls outside graphs are known too, or there are no graphs."""
        self._timings: Timings = {} if timings is None else timings
        self._calls: Counter[Call] = Counter()
        self._failed: dict[str, str] = {}

    @property
    def chooser(self) -> Callable[[Mapping[Call, int]], str] | None:
        """Return the function that chooses a backend for each graph; None once final."""
        return None if self.is_final else self.choose

    def choose(self, calls: Mapping[Call, int]) -> str:
        """Return the backend to compile a graph for.

        Args:
            calls: attention calls in the graph.
        """
        self._calls.update(calls)
        if self.chosen == "auto":
            self.chosen = self._fastest()
        return self.chosen

    def settle(self, calls: Mapping[Call, int]) -> None:
        """Make the final choice.

        Args:
            calls: attention calls in a whole forward.

        Raises:
            AnotherBackend: if the choice changes.
        """
        before, self._calls = self.chosen, Counter(calls)
        self.chosen, self.is_final = self._fastest(), True
        if self.chosen != before:
            raise AnotherBackend

    def replace(self, error: Exception) -> bool:
        """Choose the next fastest backend and return whether there is one to try.

        Args:
            error: error of the chosen backend, or of the model using it.
        """
        if self.chosen == "auto" or isinstance(error, ClearError):
            return False
        root = root_of(error)
        problem = f"{type(root).__name__}: {first_line(root)}"
        fails_anyway = is_of_model(error) or problem in self._failed.values()
        if fails_anyway and not no_kernel(error):
            return False
        self._failed[self.chosen] = problem
        following = self._fastest()
        if following != "auto":
            self.chosen = following
        return following != "auto"

    def remark(self) -> str | None:
        """Return a remark on which backend replaced which and why, or None."""
        if not self._failed:
            return None
        failed = " and ".join(
            f"{name} failed ({problem})" for name, problem in self._failed.items()
        )
        return f"attention=auto chose {self.chosen} because {failed}"

    def _fastest(self) -> str:
        return fastest_backend(self._calls, timings=self._timings, but=self._failed) or "auto"


def fastest_backend(
    calls: Mapping[Call, int],
    timer: Callable[[], float] = synchronized_perf_counter,
    *,
    timings: Timings | None = None,
    but: Collection[str] = (),
) -> str | None:
    """Return the backend that runs all ``calls`` fastest, or None if there is none or no calls.

    A backend that raises for any call, even for lack of memory, is excluded. ``short`` is excluded
    if our kernel supports none of the calls; otherwise torch runs those that it does not support.

    Args:
        calls: calls and how often each occurs.
        timer: a timer that waits for the device.
        timings: known timings, to which new ones are added.
        but: excluded backends.
    """
    if not calls:
        return None
    known: Timings = {} if timings is None else timings
    totals: dict[str, float] = {}
    for name in backends_of(next(iter(calls)).query.device.type):
        if name in but or (name == SHORT and not any(map(is_short, calls))):
            continue
        totals[name] = 0.0
        for call, count in calls.items():
            if totals[name] < math.inf:
                if (name, call) not in known:
                    known[name, call] = seconds_of(name, call, timer)
                totals[name] += count * known[name, call]
    return min((name for name in totals if totals[name] < math.inf), key=totals.get, default=None)  # type: ignore[arg-type]


def is_short(call: Call) -> bool:
    """Return whether our kernel for short sequences would replace a call."""
    q, k, v = (
        torch.empty_strided(layout.shape, layout.stride, dtype=layout.dtype, device="meta")
        for layout in (call.query, call.key, call.value)
    )
    given = {"attn_mask": call.mask, **dict(call.options)}
    refused = short_refusal(q, k, v, given, q.dtype, call.query.device)
    return refused is None and not call.is_inside


def seconds_of(attention: str, call: Call, timer: Callable[[], float]) -> float:
    """Return the seconds of a call under one backend, or infinity if the call fails."""
    with (
        kept_generators(),
        warnings.catch_warnings(),
        torch.inference_mode(),
        FlashSDPA(attention),
        eager_short(AttentionCoverage() if attention == SHORT else None),
    ):
        warnings.simplefilter("ignore")  # each backend warns why it rejects the inputs
        try:
            return _median_s(call.runner(), timer)
        except Exception:  # includes running out of memory
            return math.inf


@untraced()
def _median_s(run: Callable[[], object], timer: Callable[[], float]) -> float:
    run()  # the first call loads and plans
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
