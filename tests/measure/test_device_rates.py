"""Test measuring the rates of a device, with fake clocks and on the CPU."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from pytest_int8bench.kernels.dispatch import KernelError
from pytest_int8bench.measure import device_rates
from pytest_int8bench.measure.device_rates import Head, RateError, Rates, measure_rates, rows_for
from pytest_int8bench.measure.linear_calls import Size
from pytest_int8bench.measure.timing import Run

CPU = torch.device("cpu")
SMALL, WIDE = Size(16, 32), Size(32, 16)


class Clock:
    """A clock that only matmuls and copies advance, by their seconds per call."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now

    def taking(self, name: str, seconds: float) -> Callable[..., Run]:
        def product(x: torch.Tensor, weight: torch.Tensor) -> Run:
            assert (x.dtype, weight.dtype) == (torch.int8, torch.int8)
            assert x.shape[1] == weight.shape[1]

            def run() -> None:
                self.calls.append(f"{name} {len(x)}x{x.shape[1]}x{len(weight)}")
                self.now += seconds

            return run

        return product


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Clear measured rates; baseline matmuls take 2 ms and copies take 1 ms."""
    clock = Clock()
    monkeypatch.setattr(device_rates, "_measured", {})
    monkeypatch.setattr(device_rates, "ROWS", 512)
    monkeypatch.setattr(device_rates, "COPY_BYTES", 1000)

    def mm(x: torch.Tensor, columns: torch.Tensor) -> None:
        clock.calls.append(f"{x.dtype} {len(x)}x{x.shape[1]}x{columns.shape[1]}")
        clock.now += 2e-3

    def copy(target: torch.Tensor, source: torch.Tensor) -> None:
        clock.calls.append("copy")
        clock.now += 1e-3

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(torch.Tensor, "copy_", copy)
    return clock


def use(monkeypatch: pytest.MonkeyPatch, *products: Callable[..., Run]) -> None:
    monkeypatch.setattr(device_rates, "int8_matmuls", lambda device: products)


def test_rates_are_operations_per_second(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, clock.taking("ours", 0.5e-3))
    found = measure_rates([SMALL, WIDE, SMALL], CPU, torch.bfloat16, clock)
    ops = 2 * 512 * 16 * 32
    assert found == Rates(
        {SMALL: pytest.approx(ops / 2e-3), WIDE: pytest.approx(ops / 2e-3)},
        {SMALL: pytest.approx(ops / 0.5e-3), WIDE: pytest.approx(ops / 0.5e-3)},
        pytest.approx(2 * 1000 / 1e-3),
    )
    assert set(clock.calls) == {
        "torch.bfloat16 512x16x32",
        "torch.bfloat16 512x32x16",
        "ours 512x16x32",
        "ours 512x32x16",
        "copy",
    }


def test_uses_fastest_int8_matmul(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    use(
        monkeypatch, clock.taking("slow", 4e-3), clock.taking("fast", 1e-3), clock.taking("b", 2e-3)
    )
    found = measure_rates([SMALL], CPU, torch.bfloat16, clock)
    assert found.int8_ops_per_s[SMALL] == pytest.approx(2 * 512 * 16 * 32 / 1e-3)


def test_uses_the_fastest_block(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([90e-3, 60e-3, 30e-3, 20e-3, 10e-3, 40e-3, 50e-3])

    def product(x: torch.Tensor, weight: torch.Tensor) -> Run:
        def run() -> None:
            clock.now += next(seconds)

        return run

    use(monkeypatch, product)
    found = measure_rates([SMALL], CPU, torch.bfloat16, clock)
    assert found.int8_ops_per_s[SMALL] == pytest.approx(2 * 512 * 16 * 32 / 10e-3)
    assert next(seconds, None) is None


def test_measures_each_rate_once_per_process(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, clock.taking("ours", 1e-3))
    first = measure_rates([SMALL], CPU, torch.bfloat16, clock)
    clock.calls.clear()
    assert measure_rates([SMALL], CPU, torch.bfloat16, clock) == first
    assert clock.calls == []
    measure_rates([SMALL, WIDE], CPU, torch.bfloat16, clock)
    assert {call.split(" ")[1] for call in clock.calls} == {"512x32x16"}
    clock.calls.clear()
    measure_rates([SMALL], CPU, torch.float32, clock)
    assert set(clock.calls) == {"torch.float32 512x16x32"}


def test_skips_unwanted_int8_matmuls(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, clock.taking("ours", 1e-3))
    assert measure_rates([SMALL], CPU, torch.bfloat16, clock, with_int8=False).int8_ops_per_s == {}
    assert not [call for call in clock.calls if call.startswith("ours")]


def fails(error: Exception) -> Callable[..., Run]:
    def product(x: torch.Tensor, weight: torch.Tensor) -> Run:
        raise error

    return product


def test_skips_unsupported_matmul(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, fails(RuntimeError("no such shape\nadvice")), clock.taking("ours", 1e-3))
    assert len(measure_rates([SMALL], CPU, torch.bfloat16, clock).int8_ops_per_s) == 1
    use(monkeypatch, fails(RuntimeError("no such shape\nadvice")))
    message = "no INT8 matmul supports 32 inputs and 16 outputs at 512 rows on cpu: no such shape"
    with pytest.raises(RateError, match=f"^{re.escape(message)}$"):
        measure_rates([WIDE], CPU, torch.bfloat16, clock)


def test_out_of_memory_propagates(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, fails(torch.OutOfMemoryError("CUDA out of memory.")), clock.taking("b", 1e-3))
    with pytest.raises(torch.OutOfMemoryError):
        measure_rates([SMALL], CPU, torch.bfloat16, clock)


@pytest.mark.parametrize(
    ("size", "rows"),
    [
        (Size(768, 3072), 65536),
        (Size(4096, 4096), 65536),
        (Size(4096, 14336), 18688),
        (Size(1024, 1 << 30), 256),
    ],
)
def test_large_layers_get_fewer_rows(size: Size, rows: int) -> None:
    assert rows_for(size) == rows
    assert rows == 256 or rows * max(size) * 4 <= 1 << 30


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(device_rates, "_measured", {})
    monkeypatch.setattr(device_rates, "ROWS", 64)
    monkeypatch.setattr(device_rates, "COPY_BYTES", 1 << 16)
    monkeypatch.setattr(device_rates, "BLOCK_S", 1e-4)
    return


@pytest.mark.usefixtures("unmeasured")
def test_measures_cpu_without_changing_the_generator() -> None:
    from pytest_int8bench.clock import synchronized_perf_counter

    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    found = measure_rates([SMALL], CPU, torch.bfloat16, synchronized_perf_counter)
    assert torch.equal(torch.rand(2), expected)
    assert found.float_ops_per_s[SMALL] > 0
    assert found.int8_ops_per_s[SMALL] > 0
    assert found.bytes_per_s > 0


def test_int8_attention_rate_includes_quantization(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_rates, "TOKENS", 8)

    def taking(name: str, seconds: float) -> Callable[..., Any]:
        plain = getattr(device_rates.ops, name)

        def run(*args: Any) -> Any:
            clock.calls.append(name)
            clock.now += seconds
            return plain(*args)

        return run

    for name, seconds in (("quantize_heads", 0.25), ("int8_attention", 0.75)):
        monkeypatch.setattr(device_rates.ops, name, taking(name, seconds))
    heads = [Head(16, torch.bfloat16), Head(16, torch.float32), Head(16, torch.bfloat16)]
    found = measure_rates([], CPU, torch.bfloat16, clock, with_int8=False, heads=heads)
    ops = 4 * 8 * 8 * 16
    assert found.attention_ops_per_s == dict.fromkeys(heads, pytest.approx(ops / 1.0))
    measured = len(clock.calls)
    assert measure_rates([], CPU, torch.bfloat16, clock, with_int8=False, heads=heads) == found
    assert len(clock.calls) == measured


def test_reports_attention_that_does_not_run(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise KernelError("no kernel computes attention of it\nmore")

    monkeypatch.setattr(device_rates, "TOKENS", 8)
    monkeypatch.setattr(device_rates.ops, "int8_attention", refuse)
    message = (
        "^INT8 attention does not run on cpu with heads of 16 columns: no kernel computes "
        "attention of it$"
    )
    with pytest.raises(RateError, match=message):
        measure_rates([], CPU, torch.bfloat16, clock, heads=[Head(16, torch.bfloat16)])
