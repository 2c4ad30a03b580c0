"""Profile one forward and verify a result's labels by its kernels."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from pytest_int8bench.attention import (
    SHORT,
    attention_kernel,
    is_int8_attention_kernel,
    own_names,
)
from pytest_int8bench.errors import ClearError
from pytest_int8bench.kernels import table
from pytest_int8bench.kernels.tile_types import SHORT_ROWS
from pytest_int8bench.params import RunParams
from pytest_int8bench.quantization.modes import MODES

# Names of INT8 matmuls in libraries: cuBLASLt and CUTLASS kernels, Inductor's Triton templates and
# CPU operators. Names of our own kernels are in table.KERNELS.
_INT8_MATMUL = re.compile(
    r"i\d+gemm_s8|_s8_s8|s8s8|i8i8|imma|igemm|int8_?(gemm|product)|gemm_?int8|_int_mm|int_scaled_matmul"
    r"|triton_(tem|mm)\w*int_mm|qlinear",
    re.IGNORECASE,
)

# Copies between host and device, e.g. of the next batch while this one computes. They are not part
# of the model's work.
_TRANSFER = re.compile(r"Memcpy (HtoD|DtoH)")

# Event that encloses a graph's kernels (CompiledFxGraph.__call__, torch/_inductor/output_code.py).
_GRAPH = "## Call CompiledFxGraph"

# Host time around a compiled graph, which a CPU profile lists among the operators.
_HOST = re.compile(r"Torch-Compiled Region|TorchDynamo|Pregraph bytecode|AOTDispatcher")


def is_fused_matmul(kernel: str) -> bool:
    """Return whether a kernel is an INT8 matmul of the fused backend."""
    return any(row.function in kernel for row in table.kernels_of("linear"))


class EvidenceError(ClearError, AssertionError):
    """The kernels that ran contradict the label of the result."""


@dataclass(frozen=True)
class Kernel:
    """A kernel (CUDA) or operator (CPU) and its time in one forward."""

    name: str
    seconds: float
    calls: int


@dataclass(frozen=True)
class Evidence:
    """The kernels of one profiled forward."""

    kernels: tuple[Kernel, ...]
    """Kernels, longest first. On a CPU, Inductor's fused kernels are listed as their graph."""
    trace: str | None = None
    """Location of the trace that ``keep`` saved."""
    eager_s: float = 0.0
    """Seconds of kernels outside compiled graphs, if requested."""

    @property
    def total_s(self) -> float:
        """Seconds of all kernels."""
        return sum(kernel.seconds for kernel in self.kernels)

    @property
    def int8_products(self) -> tuple[Kernel, ...]:
        """The matmuls on INT8 operands."""
        names = {
            name
            for name in own_names(kernel.name for kernel in self.kernels)
            if _INT8_MATMUL.search(name) or is_fused_matmul(name)
        }
        return tuple(kernel for kernel in self.kernels if kernel.name in names)

    @property
    def int8_time_share(self) -> float:
        """Share of device time in matmuls on INT8 operands, 0 to 1."""
        return sum(kernel.seconds for kernel in self.int8_products) / self.total_s

    @property
    def attention_kernel(self) -> str | None:
        """The attention backend that ran, or None if no known kernel ran."""
        return attention_kernel(kernel.name for kernel in self.kernels)

    def top(self, count: int = 8) -> str:
        """Return the longest kernels as one line."""
        return ", ".join(f"{k.name[:80]} {k.seconds * 1e6:.0f} us" for k in self.kernels[:count])


#: Saves a profile and its kernels and returns the location of the trace, or None on failure.
Keep = Callable[[profile, tuple[Kernel, ...]], str | None]


def profile_forward(
    run: Callable[[], object],
    device: torch.device,
    keep: Keep | None = None,
    *,
    find_eager: bool = False,
) -> Evidence:
    """Profile one call of ``run`` and return its kernels without host-device copies.

    Args:
        run: runs one forward.
        device: the device on which it runs.
        keep: saves the profile and the kernels.
        find_eager: also measure the time outside compiled graphs.

    Raises:
        EvidenceError: if the profiler saw no kernels.
    """
    on_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with profile(activities=activities) as profiler:
            run()
            if on_cuda:
                torch.cuda.synchronize(device)
        rows: Sequence[Any] = profiler.key_averages()
    kernels = []
    for row in rows:
        is_device = row.device_type.name == "CUDA"
        if is_device != on_cuda or row.is_user_annotation or _HOST.match(row.key):
            continue
        if _TRANSFER.match(row.key):
            continue
        micros = row.self_device_time_total if on_cuda else row.self_cpu_time_total
        kernels.append(Kernel(row.key, micros / 1e6, row.count))
    kernels = [kernel for kernel in kernels if kernel.seconds > 0]
    if not kernels:
        raise EvidenceError(f"the profiler saw no kernel on {device}, so the label is unproven")
    longest_first = tuple(sorted(kernels, key=lambda kernel: -kernel.seconds))
    trace = keep(profiler, longest_first) if keep is not None else None
    return Evidence(longest_first, trace, _eager_s(profiler, on_cuda) if find_eager else 0.0)


def _eager_s(profiler: profile, on_cuda: bool) -> float:
    """Return the seconds of operators (CPU) or their kernels (CUDA) outside compiled graphs."""
    micros = 0.0
    for event in profiler.events() or ():
        if event.device_type.name != "CPU" or _HOST.match(event.name):
            continue
        around: Any = event
        while around is not None and not around.name.startswith(_GRAPH):
            around = around.cpu_parent
        if around is None:
            micros += event.self_device_time_total if on_cuda else event.self_cpu_time_total
    return micros / 1e6


def check_labels(
    evidence: Evidence,
    params: RunParams,
    stored: tuple[int, int],
    attention: str | None = None,
    *,
    fused: bool = False,
) -> None:
    """Compare the labels of ``params`` with the kernels that ran.

    Args:
        evidence: one profiled forward of the model.
        params: the point that the model was built for.
        stored: number of quantized layers that store weights as the mode's proof requires, and
            number of all quantized layers.
        attention: the backend for which the model was compiled, if ``params`` do not name it.
        fused: whether any layer of the model uses the fused backend.

    Raises:
        EvidenceError: if a mode's kernels or stored weights are missing, or INT8 matmuls ran that
            the mode must not run; if a baseline has either; if the fused backend is labelled but
            its kernels did not run, or the reverse; or if another attention backend ran than the
            requested one.
    """
    if params.int8_enabled:
        _check_mode(evidence, params, stored)
    else:
        _check_baseline(evidence, params, quantized=stored[1])
    label = params.run_name
    ours = [k for k in evidence.int8_products if is_fused_matmul(k.name)]
    if fused != bool(ours):
        backend, ran_there = (
            ("fused", "none of its kernels") if fused else ("torchao", ours[0].name)
        )
        raise EvidenceError(
            f"{label} is labelled int8_backend={backend}, but {ran_there} ran; "
            f"kernels: {evidence.top()}"
        )
    _check_attention(evidence, params, attention or params.attention)


def _check_attention(evidence: Evidence, params: RunParams, asked: str) -> None:
    label = params.run_name
    int8 = [kernel for kernel in evidence.kernels if is_int8_attention_kernel(kernel.name)]
    if bool(int8) != params.int8_attention:
        what = int8[0].name if int8 else "none of its kernels"
        why = ""
        if asked == SHORT and not int8:
            why = f" (attention={SHORT} computes sequences of up to {SHORT_ROWS} tokens instead)"
        raise EvidenceError(
            f"{label} is labelled int8_attention={params.int8_attention}, but {what} ran{why}; "
            f"kernels: {evidence.top()}"
        )
    ran = attention_kernel(kernel.name for kernel in evidence.kernels if kernel not in int8)
    # Math attention cannot be recognized by its kernels' names, but our own kernels can.
    unknown = None if asked != SHORT else asked
    if asked != "auto" and ran not in (unknown, asked):
        raise EvidenceError(
            f"{label} asked for {asked} attention, but {ran or 'no known backend'} ran; "
            f"kernels: {evidence.top()}"
        )


def _check_mode(evidence: Evidence, params: RunParams, stored: tuple[int, int]) -> None:
    mode, label = MODES[params.int8_mode], params.run_name
    precision = mode.choice.precision
    if stored[0] < stored[1] or stored[1] == 0:
        raise EvidenceError(
            f"{label}: {stored[0]} of {stored[1]} quantized layers store {precision} weights"
        )
    products = evidence.int8_products
    if products and not mode.proof.int8_matmuls:
        raise EvidenceError(f"{label} is labelled {mode.label}, but {products[0].name} ran")
    needed = mode.proof.kernels
    missing = mode.proof.int8_matmuls and not products
    if missing or (needed is not None and not _matching(evidence, needed)):
        hint = mode.proof.hint if params.gpu_type == "cuda" else ""
        raise EvidenceError(
            f"{label} is labelled {mode.label}, but no {precision} matmul ran{hint}; "
            f"kernels: {evidence.top()}"
        )


def _check_baseline(evidence: Evidence, params: RunParams, *, quantized: int) -> None:
    """Check that a baseline ran no kernel and stores no layer that would prove a mode."""
    ran = list(evidence.int8_products)
    for name in MODES:
        try:
            pattern = MODES[name].proof.kernels
        except Exception:  # a mode whose package does not load cannot have run
            continue
        if pattern is not None:
            ran += _matching(evidence, pattern)
    if ran:
        raise EvidenceError(f"{params.run_name} is a baseline, but {ran[0].name} ran")
    if quantized:
        raise EvidenceError(
            f"{params.run_name} is a baseline, but {quantized} layers are quantized"
        )


def _matching(evidence: Evidence, pattern: re.Pattern[str]) -> list[Kernel]:
    """Return the matching kernels, ignoring fused kernels named after their operators."""
    names = set(filter(pattern.search, own_names(k.name for k in evidence.kernels)))
    return [kernel for kernel in evidence.kernels if kernel.name in names]
