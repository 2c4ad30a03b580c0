"""Test attention=auto, which records attention calls and times the backends on them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from pytest_int8bench.compiler.attention_calls import Layout
from pytest_int8bench.errors import WorkloadError
from pytest_int8bench.measure import attention_auto
from pytest_int8bench.measure.attention_auto import (
    AutoAttention,
    Call,
    fastest_backend,
    recorded_calls,
)

X = torch.randn(2, 4, 8, 16)


class FakeTimer:
    """Advance at each reading by the cost of the allowed backend, in seconds."""

    def __init__(self, **seconds: float) -> None:
        self.seconds = seconds
        self.now = 0.0

    def __call__(self) -> float:
        allowed = "flash" if torch.backends.cuda.flash_sdp_enabled() else "math"
        self.now += self.seconds[allowed]
        return self.now


def calls_of(*args: torch.Tensor, **kwargs: object) -> dict[Call, int]:
    return recorded_calls(lambda: scaled_dot_product_attention(*args, **kwargs))  # type: ignore[arg-type]


# -- recording ----------------------------------------------------------------------------------


def test_records_calls_with_their_counts() -> None:
    def run() -> None:
        for _ in range(3):
            scaled_dot_product_attention(X, X, X)
        scaled_dot_product_attention(X, key=X[:, :, :5], value=X[:, :, :5], scale=0.5)
        scaled_dot_product_attention(X, X, X, X.new_zeros(8, 8), is_causal=False)

    calls = recorded_calls(run)
    assert list(calls.values()) == [3, 1, 1]
    plain, short, masked = calls
    assert plain.query == Layout((2, 4, 8, 16), (512, 128, 16, 1), torch.float32, X.device)
    assert (plain.mask, plain.options) == (None, (("dropout_p", 0.0), ("is_causal", False)))
    assert short.key.shape == (2, 4, 5, 16)
    assert short.key.stride == (512, 128, 16, 1)
    assert dict(short.options)["scale"] == 0.5
    assert masked.mask == Layout((8, 8), (8, 1), torch.float32, X.device)


def test_repeats_calls_with_the_same_layouts() -> None:
    # The layout of queries from one matmul for q, k and v.
    query = torch.randn(2, 8, 3, 4, 16).permute(2, 0, 3, 1, 4)[0]
    mask = torch.ones(1, 1, 8, dtype=torch.bool).expand(2, 4, 8, 8)
    [call] = calls_of(query, query, query, mask)
    run = call.runner()
    [again] = recorded_calls(run)
    assert again == call
    assert run().isfinite().all()
    assert run().std() > 0


# -- choosing -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("flash", "math_", "chosen"), [(1, 2, "flash"), (2, 1, "math")])
def test_chooses_the_fastest_backend(flash: float, math_: float, chosen: str) -> None:
    calls = calls_of(X, X, X)
    assert fastest_backend(calls, FakeTimer(flash=flash, math=math_)) == chosen


def test_excludes_backend_that_fails_on_one_call() -> None:
    calls = calls_of(X, X, X)
    # On the CPU, flash attention does not support dropout.
    calls |= calls_of(X, X, X, dropout_p=0.5)
    assert fastest_backend(calls, FakeTimer(flash=1, math=1000)) == "math"


@pytest.mark.parametrize(("shorts", "longs", "chosen"), [(3, 1, "flash"), (1, 3, "math")])
def test_weights_calls_by_their_counts(
    shorts: int, longs: int, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    [short], [long] = calls_of(X[:, :, :2], X, X), calls_of(X, X, X)
    seconds = {("flash", 2): 1.0, ("flash", 8): 3.0, ("math", 2): 2.0, ("math", 8): 2.0}

    def median_s(run: Callable[[], torch.Tensor], timer: object) -> float:
        flash = torch.backends.cuda.flash_sdp_enabled()
        return seconds["flash" if flash else "math", run().shape[2]]

    monkeypatch.setattr(attention_auto, "_median_s", median_s)
    assert fastest_backend({short: shorts, long: longs}) == chosen


def test_times_our_kernel_on_the_calls_it_supports(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def median_s(run: Callable[[], torch.Tensor], timer: object) -> float:
        with torch.profiler.profile() as profiler:
            run()
        names = {event.key for event in profiler.key_averages()}
        ran.append("short" if "int8bench::short_attention" in names else "torch")
        return 1.0

    monkeypatch.setattr(attention_auto, "_median_s", median_s)
    monkeypatch.setattr(attention_auto, "backends_of", lambda kind: ["short"])
    x = X.bfloat16()
    [long] = calls_of(x.expand(33, 2, 4, 8, 16).permute(1, 2, 0, 3, 4).flatten(2, 3), x, x)
    [fits] = calls_of(x, x, x)
    assert fastest_backend({long: 1, fits: 1}) == "short"
    assert ran == ["torch", "short"]
    assert fastest_backend({long: 1}) is None  # our kernel replaces none of it


def test_no_calls_give_no_backend() -> None:
    assert fastest_backend({}, FakeTimer()) is None
    assert recorded_calls(lambda: nn.Linear(16, 4)(X)) == {}


def test_returns_none_if_no_backend_runs() -> None:
    key = X[..., :7]  # no backend supports a head size other than the query's
    layout = Layout.of(key)
    call = Call(Layout.of(X), layout, layout, None, ())
    assert fastest_backend({call: 1}, FakeTimer(flash=1, math=1)) is None


def test_tries_backends_in_order_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"flash": 1.0, "cudnn": 4.0, "efficient": 2.0, "math": 3.0}
    monkeypatch.setattr(attention_auto, "backends_of", lambda kind: list(times))
    monkeypatch.setattr(attention_auto, "seconds_of", lambda name, call, timer: times[name])
    layout = Layout((1, 1, 2, 8), (16, 16, 8, 1), torch.bfloat16, torch.device("cuda"))
    auto = AutoAttention()
    assert auto.choose({Call(layout, layout, layout, None, ()): 12}) == "flash"
    refused = RuntimeError("No available kernel. Aborting execution.")
    for name in ("efficient", "math"):  # equal errors of some backends do not mean that all fail
        assert auto.replace(refused)
        assert auto.chosen == name
    assert not auto.replace(torch.OutOfMemoryError("out of memory"))
    assert not auto.replace(WorkloadError("units must give samples"))
    assert auto.replace(ValueError("a head is too wide\nfor this kernel"))
    assert auto.chosen == "cudnn"
    assert auto.remark() == (
        "attention=auto chose cudnn because flash failed (RuntimeError: No available kernel. "
        "Aborting execution.) and efficient failed (RuntimeError: No available kernel. Aborting "
        "execution.) and math failed (ValueError: a head is too wide)"
    )
    assert not auto.replace(ValueError("a head is too wide"))
    assert not auto.replace(refused)


def test_restores_settings() -> None:
    before = (torch.backends.cuda.flash_sdp_enabled(), torch.is_inference_mode_enabled())
    fastest_backend(calls_of(X, X, X))
    assert (torch.backends.cuda.flash_sdp_enabled(), torch.is_inference_mode_enabled()) == before
