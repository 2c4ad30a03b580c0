"""Test which backend attention=auto chooses, based on the calls that run."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pytest_int8bench.compiler.attention_calls import Call
from pytest_int8bench.compiler.backend import FusingInductor
from pytest_int8bench.compiler.cache import CompileCache
from pytest_int8bench.compiler.torch_workarounds.names import InductorBackend
from pytest_int8bench.measure import attention_auto, pool
from pytest_int8bench.measure.attention_auto import AttentionError
from pytest_int8bench.measure.model import Model
from pytest_int8bench.measure.point import Throughput
from pytest_int8bench.measure.pool import ModelPool
from pytest_int8bench.params import RunParams
from toys import attending
from toys.attending import workload_of
from toys.models import time_rounds

AUTO = RunParams(
    gpu_type="cpu",
    compile_mode="default",
    attention="auto",
    batch_size=2,
    benchmark_interval_s=0.001,
)
BREAKS = AUTO.replace(compile_fullgraph=False)
OFF = AUTO.replace(compile_mode="off")
NO_KERNEL = "No available kernel. Aborting execution."


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace Inductor and the clock: graphs run as traced, and flash is the fastest backend but
    supports no mask, as on CUDA. Return the backends that graphs were compiled for."""
    backends: list[str] = []

    def compile_graph(self: FusingInductor, module: Any, inputs: Any) -> Callable[..., Any]:
        backends.append(allowed())
        return FAILS.around(module.forward)

    monkeypatch.setattr(InductorBackend, "__call__", compile_graph)
    monkeypatch.setattr(attention_auto, "seconds_of", seconds)
    return backends


def seconds(backend: str, call: Call, timer: object) -> float:
    return math.inf if (backend, call.mask is None) == ("flash", False) else COSTS[backend]


COSTS = {"flash": 1.0, "math": 2.0}


def allowed() -> str:
    flash, math_ = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()
    return "auto" if flash and math_ else "flash" if flash else "math"


class Failing:
    """Make graphs compiled for a backend fail at a given call."""

    def __init__(self) -> None:
        self.errors: dict[tuple[str, int], Exception] = {}

    def around(self, run: Callable[..., Any]) -> Callable[..., Any]:
        backend, calls = allowed(), itertools.count()
        self.fail(backend, next(calls))

        def call(*args: Any) -> Any:
            self.fail(backend, next(calls))
            return run(*args)

        return call

    def fail(self, backend: str, call: int) -> None:
        if (backend, call) in self.errors:
            raise self.errors[backend, call]


FAILS = Failing()


@pytest.fixture
def errors(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, int], Exception]:
    """Return the errors to raise, by backend and call; call 0 is compilation."""
    monkeypatch.setattr(FAILS, "errors", {})
    return FAILS.errors


def ready(kind: type[nn.Module], params: RunParams = AUTO) -> Model:
    model = ModelPool().get(workload_of(kind), params)
    model.ready()
    return model


@pytest.mark.parametrize(
    ("kind", "params", "chosen"),
    [
        (attending.NoAttention, AUTO, "auto"),
        (attending.Attends, AUTO, "flash"),
        (attending.MaskedIfCompiled, AUTO, "math"),
        (attending.MaskedIfCompiled, OFF, "flash"),
        (attending.MaskedIfEager, AUTO, "flash"),
        (attending.MaskedIfEager, OFF, "math"),
        (attending.Twice, AUTO, "math"),
        (attending.MultiHead, AUTO, "math"),
        (attending.MultiHead, OFF, "math"),
        (attending.ChoosesMath, AUTO, "auto"),
        (attending.Blocks, AUTO, "math"),
        (attending.Broken, BREAKS, "math"),
        (attending.Outside, BREAKS, "math"),
    ],
)
def test_chooses_backend_by_the_calls_that_run(
    kind: type[nn.Module], params: RunParams, chosen: str, compiled: list[str]
) -> None:
    model = ready(kind, params)
    assert model.compiled.attention == chosen
    assert model.ready().remark is None
    used = compiled[-len(model.compiled.graphs) :] if model.compiled.graphs else []
    assert len(used) == len(model.compiled.graphs)
    assert set(used) <= {chosen}
    with model.compiled.entered():
        assert allowed() == chosen


def test_compiles_each_graph_once(compiled: list[str]) -> None:
    pool = ModelPool()
    for point in (AUTO, AUTO.replace(int8_enabled=True), AUTO):
        pool.get(workload_of(attending.Masked), point).ready()
    assert compiled == ["math"] * 2


def test_caches_compiled_code_for_the_chosen_backend(tmp_path: Path, compiled: list[str]) -> None:
    model = ModelPool(cache_dir=tmp_path).get(workload_of(attending.Masked), AUTO)
    assert model.ready().remark is None
    kept = CompileCache(tmp_path, "math").folder
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == [kept]
    with model.compiled.entered():
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(kept)


# -- our kernel for short sequences ---------------------------------------------------------------


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offer our kernel on the CPU too, as the fastest one."""
    monkeypatch.setattr(attention_auto, "backends_of", lambda kind: ["flash", "math", "short"])
    monkeypatch.setitem(COSTS, "short", 0.5)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(
    ("kind", "params", "chosen"),
    [
        (attending.Causal, AUTO, "short"),
        (attending.Grouped, OFF, "short"),
        (attending.Twice, AUTO, "short"),  # torch runs the call with a mask
        (attending.Masked, AUTO, "math"),
        (attending.Plain, AUTO, "flash"),  # no compiler pass sees the call
        (attending.ChoosesMath, AUTO, "auto"),
        (attending.Attends, AUTO.replace(bf16=False), "flash"),
    ],
)
def test_uses_our_kernel_for_short_sequences(
    kind: type[nn.Module], params: RunParams, chosen: str
) -> None:
    model = ready(kind, params)
    assert (model.compiled.attention, model.ready().remark) == (chosen, None)
    assert (model.compiled.short_attention.replaced > 0) == (chosen == "short")


@pytest.mark.usefixtures("short")
def test_uses_another_backend_if_our_kernel_replaces_no_call() -> None:
    class CallsOperator(attending.Attends):
        def attention(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.aten.scaled_dot_product_attention(x, x, x)

    model = ready(CallsOperator, OFF)
    assert model.compiled.attention == "flash"
    assert "because short failed (NothingShortError: " in (model.ready().remark or "")


@pytest.mark.parametrize(
    ("kind", "params", "left"),
    [
        (attending.Masked, AUTO, "1 with a mask"),
        (attending.Masked, OFF, "1 with a mask"),
        (attending.Plain, OFF, "1 inside nn.MultiheadAttention"),
        (attending.ChoosesMath, AUTO, "1 under a backend that the model chooses"),
        (attending.ChoosesMath, OFF, "1 under a backend that the model chooses"),
        (attending.NoAttention, AUTO, "it never calls scaled_dot_product_attention"),
    ],
)
def test_rejects_short_attention_that_replaces_no_call(
    kind: type[nn.Module], params: RunParams, left: str
) -> None:
    with pytest.raises(AttentionError) as caught:
        ready(kind, params.replace(attention="short"))
    assert str(caught.value) == (
        "workload 'attends': attention=short replaces no attention call of this model (it supports "
        f"16-bit sequences of up to 128 tokens): {left}"
    )


def test_rejects_short_attention_on_unsupported_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = "the fused kernels need sm80 or later, this is sm75"
    monkeypatch.setattr(pool, "attention_problem", lambda device: problem)
    with pytest.raises(AttentionError, match=f"^attention=short: {problem}$"):
        ready(attending.Attends, AUTO.replace(attention="short"))


# -- backends that fail -------------------------------------------------------------------------

TOLD = "attention=auto chose math because flash failed (RuntimeError: {})"


@pytest.mark.parametrize("call", [0, 3], ids=["compiling", "later-call"])
def test_falls_back_to_the_next_backend_with_a_remark(
    call: int, errors: dict[tuple[str, int], Exception]
) -> None:
    errors["flash", call] = RuntimeError("cuDNN error: NOT_SUPPORTED\nand more")
    model = ready(attending.Attends)
    assert model.compiled.attention == "math"
    assert model.ready().remark == TOLD.format("cuDNN error: NOT_SUPPORTED")


def test_eager_model_falls_back_to_the_next_backend() -> None:
    class Refuses(attending.Attends):
        def attention(self, x: torch.Tensor) -> torch.Tensor:
            if allowed() == "flash":
                raise RuntimeError(NO_KERNEL)
            return super().attention(x)

    model = ready(Refuses, OFF)
    assert model.compiled.attention == "math"
    assert model.ready().remark == TOLD.format(NO_KERNEL)


def test_baseline_and_candidate_change_together(
    errors: dict[tuple[str, int], Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    workload, params = workload_of(attending.Attends), AUTO.replace(int8_enabled=True)
    pool = ModelPool()
    baseline = pool.get(workload, AUTO)
    baseline.ready()
    assert baseline.compiled.attention == "flash"
    errors["flash", 0] = RuntimeError(NO_KERNEL)  # only with the candidate's weights
    throughput = Throughput(pool, with_evidence=False)
    result = throughput.measure(workload, params, time_rounds, nodeid="test_it")
    assert (result.status, result.attention_backend) == ("ok", "math")
    assert TOLD.format(NO_KERNEL) in result.reason
    assert baseline.compiled.attention == "math"
    assert "math" in (baseline.ready().remark or "")


@pytest.mark.parametrize(
    ("flash", "math_", "raised", "compilations"),
    [
        # The same under all backends, so attention is not the cause.
        (RuntimeError("no compiler"), RuntimeError("no compiler"), "no compiler", 2),
        (RuntimeError(NO_KERNEL), RuntimeError(NO_KERNEL), "use attention=efficient or math", 2),
        (torch.OutOfMemoryError("out of memory"), None, "out of memory", 1),
    ],
    ids=["compiler", "attention", "memory"],
)
def test_raises_errors_common_to_all_backends(
    flash: Exception,
    math_: Exception | None,
    raised: str,
    compilations: int,
    errors: dict[tuple[str, int], Exception],
    compiled: list[str],
) -> None:
    errors["flash", 1] = flash
    if math_ is not None:
        errors["math", 1] = math_
    with pytest.raises(RuntimeError, match=raised):
        ready(attending.Attends)
    assert len(compiled) == compilations


def test_does_not_replace_a_requested_backend(
    errors: dict[tuple[str, int], Exception],
) -> None:
    errors["flash", 0] = RuntimeError(NO_KERNEL)
    with pytest.raises(AttentionError, match="attention=flash cannot run the attention"):
        ready(attending.Masked, AUTO.replace(attention="flash"))
