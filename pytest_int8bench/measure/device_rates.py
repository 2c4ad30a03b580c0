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

#: Rows of a product that is measured, where they fit: enough that every SM has several tiles.
ROWS = 1 << 16
#: The largest operand of a product that is measured, and the buffer that is copied.
OPERAND_BYTES, COPY_BYTES = 1 << 30, 1 << 29
#: Tokens of the attention that is measured. Its rate grows with them; by the kernel's time at 1,024
#: to 9,216 tokens, no length is more than 1 % faster.
TOKENS = 1 << 14
#: A figure is the best of some blocks, each of so many seconds.
BLOCKS, BLOCK_S = 5, 0.01
#: Calls that are launched as one on CUDA.
RECORDED = 10

#: From INT8 operands, rows x inputs and outputs x inputs, to what runs their product once.
Int8Product: TypeAlias = Callable[[torch.Tensor, torch.Tensor], Run]


class Head(NamedTuple):
    """A kind of attention head."""

    width: int
    """Columns."""
    dtype: torch.dtype
    """Of the values."""


class RateError(ClearError, RuntimeError):
    """A rate that could not be measured."""


@dataclass(frozen=True)
class Rates:
    """Highest measured rates of one device."""

    float_ops_per_s: Mapping[Size, float]
    """Products in the baseline's dtype; a multiplication and an addition are two operations."""
    int8_ops_per_s: Mapping[Size, float]
    """Products on INT8 operands; empty where none are wanted."""
    bytes_per_s: float
    """Memory traffic of a copy, reading and writing."""
    attention_ops_per_s: Mapping[Head, float] = field(default_factory=dict)
    """INT8 attention on a long sequence, its exponentials and the quantizing of queries and keys
    included; the operations are those of its two matmuls."""


def _int_mm(x: torch.Tensor, weight: torch.Tensor) -> Run:
    columns = weight.t()
    return lambda: torch._int_mm(x, columns)


def _fused(x: torch.Tensor, weight: torch.Tensor) -> Run:
    row_scale = torch.ones(x.shape[0], device=x.device)
    scale = torch.ones(weight.shape[0], device=x.device)
    return lambda: ops.linear(x, row_scale, weight, scale, None, None, None, torch.bfloat16)


def int8_products(device: torch.device) -> tuple[Int8Product, ...]:
    """Return the INT8 products there are; the fastest one at a size stands for the device."""
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
    """Measure what a device does at the sizes of linear layers and heads, each once a process.

    Products get so many rows that launches do not count. Operands are random: a GPU draws less
    power on zeros, and is faster.

    Args:
        sizes: the sizes of linear layers.
        device: the device.
        dtype: the dtype of products that are not INT8.
        timer: a timer that waits for the device.
        with_int8: measure INT8 products too.
        heads: the heads to measure INT8 attention of.

    Raises:
        RateError: if no INT8 product takes a size, or INT8 attention does not take a head.
        torch.OutOfMemoryError: or another error that ``memory.oom_of`` knows.
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
    """Return the rows of a product that is measured: fewer where an operand would not fit."""
    fitting = OPERAND_BYTES // (4 * max(size))  # INT8 products may return INT32
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
    for product in int8_products(device):
        try:
            seconds = min(seconds, _best_s(product(x, weight), timer, device))
        except Exception as error:  # also what a compiler of kernels raises
            if oom_of(error) is not None:
                raise
            problem = first_line(error)
            release(error)
    if math.isinf(seconds):
        raise RateError(
            f"no INT8 product of {rows} rows takes {size.inputs}x{size.outputs} on {device.type}: "
            f"{problem}"
        )
    return 2 * rows * math.prod(size) / seconds


def _attention_rate(head: Head, device: torch.device, timer: Timer) -> float:
    # As many heads as multiprocessors: all of them finish together.
    count, random = 1, _generator(device)
    if device.type == "cuda":
        count = torch.cuda.get_device_properties(device).multi_processor_count
    shape = (1, count, TOKENS, head.width)

    try:
        q, k, v = (
            torch.randn(shape, device=device, dtype=head.dtype, generator=random) for _ in range(3)
        )
        q *= 0.25  # small scores, for which the kernel needs no running maximum

        def run() -> None:
            ops.int8_attention(*ops.quantize_heads(q, k), v, head.width**-0.5)

        seconds = _best_s(run, timer, device, recorded=1)  # it takes longer than its launches
    except Exception as error:
        if oom_of(error) is not None:
            raise
        problem = first_line(error)
        release(error)
        raise RateError(
            f"INT8 attention of heads with {head.width} columns does not run on {device.type}: "
            f"{problem}"
        ) from None
    return 4 * count * TOKENS**2 * head.width / seconds


def _copy_rate(device: torch.device, timer: Timer) -> float:
    shape, random = (COPY_BYTES,), _generator(device)
    source = torch.randint(-128, 128, shape, dtype=torch.int8, device=device, generator=random)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / _best_s(lambda: target.copy_(source), timer, device)


def _generator(device: torch.device) -> torch.Generator:
    """Return a generator of its own: that of the process is not ours to advance."""
    return torch.Generator(device).manual_seed(0)


def _best_s(run: Run, timer: Timer, device: torch.device, recorded: int = RECORDED) -> float:
    """Return the seconds of one call in the fastest block."""
    run()  # chooses or compiles its kernel
    calls = 1
    if device.type == "cuda":
        run, calls = _recorded(run, recorded), recorded
    iterations = max(1, math.ceil(BLOCK_S / max(time_once(run, timer), 1e-6)))
    return min(time_block(run, timer, iterations) for _ in range(BLOCKS)) / calls


def _recorded(run: Run, calls: int) -> Run:
    """Return ``calls`` of ``run`` as one CUDA graph: to launch a small product takes longer than
    to compute it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    return graph.replay
