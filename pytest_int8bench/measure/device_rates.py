"""Measure the rates of a device, matmuls and memory, instead of looking them up."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import torch

from pytest_int8bench.errors import ClearError, first_line
from pytest_int8bench.kernels import ops
from pytest_int8bench.kernels.dispatch import fused_problem
from pytest_int8bench.measure.linear_calls import Size
from pytest_int8bench.measure.memory import oom_of, release
from pytest_int8bench.measure.timing import Run, Timer, time_block, time_once

#: Rows of a measured matmul if they fit: enough to give every SM several tiles.
ROWS = 1 << 16
#: Largest operand of a measured matmul, and size of the copied buffer.
OPERAND_BYTES, COPY_BYTES = 1 << 30, 1 << 29
#: Tokens of the measured attention. Its rate grows with them; by the kernel's time at 1,024 to
#: 9,216 tokens, no length is more than 1 % faster.
TOKENS = 1 << 14
#: A rate is the best of several blocks of this many seconds.
BLOCKS, BLOCK_S = 5, 0.01
#: Calls captured in one CUDA graph.
RECORDED = 10

#: Takes INT8 operands, rows x inputs and outputs x inputs, and returns a call of their matmul.
Int8Matmul: TypeAlias = Callable[[torch.Tensor, torch.Tensor], Run]


class Head(NamedTuple):
    """A kind of attention head."""

    width: int
    """Columns."""
    dtype: torch.dtype
    """Dtype of the values."""


class RateError(ClearError, RuntimeError):
    """A rate that could not be measured."""


@dataclass(frozen=True)
class Rates:
    """Highest measured rates of one device."""

    float_ops_per_s: Mapping[Size, float]
    """Matmuls in the baseline's dtype; a multiplication and an addition are two operations."""
    int8_ops_per_s: Mapping[Size, float]
    """Matmuls on INT8 operands; empty if they were not requested."""
    bytes_per_s: float
    """Memory traffic of a copy, reading and writing."""
    attention_ops_per_s: Mapping[Head, float] = field(default_factory=dict)
    """INT8 attention on a long sequence. The time includes exponentials and the quantization of
    queries and keys; the operations are only those of the two matmuls."""


def _int_mm(x: torch.Tensor, weight: torch.Tensor) -> Run:
    columns = weight.t()
    return lambda: torch._int_mm(x, columns)


def _fused(x: torch.Tensor, weight: torch.Tensor) -> Run:
    row_scale = torch.ones(x.shape[0], device=x.device)
    scale = torch.ones(weight.shape[0], device=x.device)
    return lambda: ops.linear(x, row_scale, weight, scale, None, None, None, torch.bfloat16)


def int8_matmuls(device: torch.device) -> tuple[Int8Matmul, ...]:
    """Return the INT8 matmuls available on a device, whose rate at a size is the fastest one's."""
    return (_int_mm,) if fused_problem(device) else (_int_mm, _fused)


_measured: dict[Hashable, float] = {}


def measure_rates(
    sizes: Iterable[Size],
    device: torch.device,
    dtype: torch.dtype,
    timer: Timer,
    *,
    with_int8: bool = True,
    heads: Iterable[Head] = (),
) -> Rates:
    """Measure a device's rates at the given layer sizes and heads, each once per process.

    Matmuls have enough rows to make launch overhead negligible. Operands are random, because a GPU
    draws less power on zeros and is faster.

    Args:
        sizes: sizes of linear layers.
        device: the device.
        dtype: dtype of matmuls that are not INT8.
        timer: a timer that waits for the device.
        with_int8: measure INT8 matmuls too.
        heads: heads for which to measure INT8 attention.

    Raises:
        RateError: if no INT8 matmul supports a size, or INT8 attention does not support a head.
        torch.OutOfMemoryError: or any other error that ``memory.oom_of`` recognizes.
    """
    where = (device.type, torch.cuda.current_device() if device.type == "cuda" else 0)
    sizes = sorted(set(sizes))
    known = len(_measured)

    def once(measure: Callable[..., float], *what: Hashable) -> float:
        key = (where, measure, *what)
        if key not in _measured:
            _measured[key] = measure(*what, device, timer)
        return _measured[key]

    with torch.inference_mode():
        rates = Rates(
            {size: once(_float_rate, size, dtype) for size in sizes},
            {size: once(_int8_rate, size) for size in sizes if with_int8},
            once(_copy_rate),
            {head: once(_attention_rate, head) for head in heads},
        )
    if len(_measured) > known and device.type == "cuda":
        torch.cuda.empty_cache()
    return rates


def rows_for(size: Size) -> int:
    """Return the rows of a measured matmul, fewer if an operand would not fit."""
    fitting = OPERAND_BYTES // (4 * max(size))  # INT8 matmuls may return INT32
    return min(ROWS, max(fitting // 256 * 256, 256))


def _float_rate(size: Size, dtype: torch.dtype, device: torch.device, timer: Timer) -> float:
    rows, random = rows_for(size), _generator(device)
    x = torch.randn(rows, size.inputs, device=device, dtype=dtype, generator=random)
    weight = torch.randn(size.outputs, size.inputs, device=device, dtype=dtype, generator=random)
    columns = weight.t()
    return 2 * rows * math.prod(size) / _best_s(lambda: torch.mm(x, columns), timer, device)


def _int8_rate(size: Size, device: torch.device, timer: Timer) -> float:
    rows, random = rows_for(size), _generator(device)
    x, weight = (
        torch.randint(
            -127, 128, (n, size.inputs), dtype=torch.int8, device=device, generator=random
        )
        for n in (rows, size.outputs)
    )
    seconds, problem = math.inf, "there is none"
    for matmul in int8_matmuls(device):
        try:
            seconds = min(seconds, _best_s(matmul(x, weight), timer, device))
        except Exception as error:  # kernel compilers raise errors of many kinds
            if oom_of(error) is not None:
                raise
            problem = first_line(error)
            release(error)
    if math.isinf(seconds):
        raise RateError(
            f"no INT8 matmul supports {size.inputs} inputs and {size.outputs} outputs at {rows} "
            f"rows on {device.type}: {problem}"
        )
    return 2 * rows * math.prod(size) / seconds


def _attention_rate(head: Head, device: torch.device, timer: Timer) -> float:
    # One head per multiprocessor, so that all of them finish together.
    count, random = 1, _generator(device)
    if device.type == "cuda":
        count = torch.cuda.get_device_properties(device).multi_processor_count
    shape = (1, count, TOKENS, head.width)

    try:
        q, k, v = (
            torch.randn(shape, device=device, dtype=head.dtype, generator=random) for _ in range(3)
        )
        q *= 0.25  # small scores spare the kernel its running maximum

        def run() -> None:
            ops.int8_attention(*ops.quantize_heads(q, k), v, head.width**-0.5)

        seconds = _best_s(run, timer, device, recorded=1)  # runs much longer than its launch
    except Exception as error:
        if oom_of(error) is not None:
            raise
        problem = first_line(error)
        release(error)
        raise RateError(
            f"INT8 attention does not run on {device.type} with heads of {head.width} columns: "
            f"{problem}"
        ) from None
    return 4 * count * TOKENS**2 * head.width / seconds


def _copy_rate(device: torch.device, timer: Timer) -> float:
    shape, random = (COPY_BYTES,), _generator(device)
    source = torch.randint(-128, 128, shape, dtype=torch.int8, device=device, generator=random)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / _best_s(lambda: target.copy_(source), timer, device)


def _generator(device: torch.device) -> torch.Generator:
    # The global generator belongs to the user and must not advance here.
    return torch.Generator(device).manual_seed(0)


def _best_s(run: Run, timer: Timer, device: torch.device, recorded: int = RECORDED) -> float:
    """Return the seconds per call of the fastest block."""
    run()  # selects or compiles the kernel
    calls = 1
    if device.type == "cuda":
        run, calls = _recorded(run, recorded), recorded
    iterations = max(1, math.ceil(BLOCK_S / max(time_once(run, timer), 1e-6)))
    return min(time_block(run, timer, iterations) for _ in range(BLOCKS)) / calls


def _recorded(run: Run, calls: int) -> Run:
    """Capture ``calls`` of ``run`` in one CUDA graph; launching a small matmul takes longer than
    computing it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    return graph.replay
