"""Test compile_for_a100: every call runs under the same settings and restores them."""

from __future__ import annotations

import itertools
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
import torch._functorch.config
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from pytest_int8bench.compiler.api import compile_for_a100
from pytest_int8bench.compiler.backend import FusingInductor
from pytest_int8bench.compiler.compiled_model import CompiledModel, CompileError, graphs_compiled
from pytest_int8bench.measure.evidence import profile_forward
from toys.models import BareAttention

CPU = torch.device("cpu")
X = torch.ones(2, 4)


def settings() -> dict[str, Any]:
    return {
        "tf32": torch.get_float32_matmul_precision(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "autocast dtype": torch.get_autocast_dtype("cpu"),
        "inference": torch.is_inference_mode_enabled(),
        "flash": torch.backends.cuda.flash_sdp_enabled(),
        "math": torch.backends.cuda.math_sdp_enabled(),
        "recompile limit": torch._dynamo.config.recompile_limit,
        "all recompiles": torch._dynamo.config.accumulated_recompile_limit,
        "ignored": set(torch._dynamo.config.ignore_logging_functions),
        "AOTAutograd cache": torch._functorch.config.enable_autograd_cache,
    }


class Recorder(nn.Module):
    """Record the settings of each call, which may fail."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.error = error
        self.seen: dict[str, Any] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = settings()
        if self.error is not None:
            raise self.error
        return self.linear(x)


# -- settings -----------------------------------------------------------------------------------


def test_settings_apply_only_during_each_call() -> None:
    model = Recorder()
    compiled = compile_for_a100(model, mode="off", attention="math")
    before = settings()
    for _ in range(2):
        compiled(X)
        assert settings() == before
        assert model.seen["tf32"] == "high"
        assert model.seen["autocast"] is False
        assert model.seen["inference"] is True
        assert (model.seen["flash"], model.seen["math"]) == (False, True)
        assert model.seen["recompile limit"] > 10_000
        assert model.seen["all recompiles"] > 10_000
        assert logging.Logger.info in model.seen["ignored"]
        assert model.seen["AOTAutograd cache"] is False


def test_settings_are_restored_after_an_exception() -> None:
    before = settings()
    with pytest.raises(KeyError, match="inside"):
        compile_for_a100(Recorder(KeyError("inside")), mode="off")(X)
    assert settings() == before


def test_restores_settings_of_the_process() -> None:
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch._dynamo.config.patch(recompile_limit=3):
            compile_for_a100(Recorder(), mode="off")(X)
            assert torch._dynamo.config.recompile_limit == 3
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(precision)


def test_can_disable_tf32() -> None:
    model = Recorder()
    compile_for_a100(model, mode="off", allow_tf32=False)(X)
    assert model.seen["tf32"] == "highest"


def test_ignores_autocast_around_the_call() -> None:
    model = Recorder()
    compiled = compile_for_a100(model, mode="off")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert compiled(X).dtype == torch.float32
        assert torch.is_autocast_enabled("cpu")
    assert model.seen["autocast"] is False


def test_can_enable_autocast() -> None:
    compiled = compile_for_a100(Recorder(), mode="off", autocast_dtype=torch.bfloat16)
    assert compiled(X).dtype == torch.bfloat16
    assert not torch.is_autocast_enabled("cpu")


def test_outputs_do_not_require_grad() -> None:
    assert not compile_for_a100(nn.Linear(4, 4), mode="off")(X).requires_grad


# -- modes --------------------------------------------------------------------------------------


def test_mode_off_is_eager() -> None:
    model = nn.Linear(4, 4).eval()
    before = graphs_compiled()
    compiled = compile_for_a100(model, mode="off")
    assert torch.equal(compiled(X), model(X))
    assert graphs_compiled() == before
    assert (compiled.model, compiled.mode, compiled.attention) == (model, "off", "flash")


def test_max_autotune_is_the_default() -> None:
    assert compile_for_a100(nn.Linear(4, 4)).mode == "max-autotune"


def test_only_the_first_call_compiles() -> None:
    model = nn.Linear(4, 4).eval()
    compiled = compile_for_a100(model, mode="default")
    before = graphs_compiled()
    torch.testing.assert_close(compiled(X), model(X))
    assert graphs_compiled() == before + 1
    with compiled.no_compilation():
        compiled(X)
        # Ambient settings differ, but the call's settings do not.
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
            compiled(X)
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("medium")
        compiled(X)
        torch.set_float32_matmul_precision(precision)
    assert graphs_compiled() == before + 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"mode": "fast"},
            (
                "mode must be one of default, reduce-overhead, max-autotune, "
                "max-autotune-no-cudagraphs, off, got 'fast'"
            ),
        ),
        (
            {"attention": "sage"},
            "attention must be one of flash, cudnn, efficient, math, short, auto, got 'sage'",
        ),
    ],
    ids=["mode", "attention"],
)
def test_rejects_unknown_names(arguments: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        compile_for_a100(nn.Linear(4, 4), **arguments)


# -- errors -------------------------------------------------------------------------------------


def test_compiling_during_timing_is_an_error() -> None:
    compiled = compile_for_a100(nn.Linear(4, 4).eval(), mode="default")
    compiled(X)
    message = (
        "torch.compile compiled 1 graph during timing: inputs, global settings or a Python number "
        "that the model updates changed between calls"
    )
    with pytest.raises(CompileError, match=f"^{re.escape(message)}$"), compiled.no_compilation():
        compiled(torch.ones(3, 4))


def test_does_not_wrap_errors_during_timing() -> None:
    compiled = compile_for_a100(nn.Linear(4, 4).eval(), mode="off")
    with pytest.raises(KeyError, match="mine"), compiled.no_compilation():
        raise KeyError("mine")


def test_rejects_model_that_runs_eagerly() -> None:
    class Disabled(nn.Module):
        @torch.compiler.disable
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    compiled = compile_for_a100(Disabled(), mode="default", fullgraph=False)
    for _ in range(2):
        with pytest.raises(
            CompileError, match=r"^torch\.compile made no graph: the model ran eagerly$"
        ):
            compiled(X)


def test_graph_break_is_an_error_only_with_fullgraph() -> None:
    class Breaks(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + 1
            torch._dynamo.graph_break()
            return x * 2

    with pytest.raises(torch._dynamo.exc.Unsupported, match="graph_break"):
        compile_for_a100(Breaks(), mode="default")(X)
    compiled = compile_for_a100(Breaks(), mode="default", fullgraph=False)
    assert torch.equal(compiled(X), (X + 1) * 2)


class Breaks(nn.Module):
    """Two layers with a graph break between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        torch._dynamo.graph_break()
        return self.second(x)


@pytest.mark.parametrize("broken", [1, 2], ids=["first-graph", "second-graph"])
def test_failed_graph_is_an_error_despite_suppress_errors(
    broken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With ``suppress_errors``, torch only logs the error and runs the graph eagerly."""
    calls = itertools.count(1)

    def compile_graph(self: FusingInductor, model_: Any, inputs_: Any, **kwargs: Any) -> Any:
        if next(calls) == broken:
            raise NotImplementedError("no lowering")
        return model_.forward

    monkeypatch.setattr(FusingInductor, "__call__", compile_graph)
    compiled = compile_for_a100(Breaks().eval(), mode="default", fullgraph=False)
    with (
        torch._dynamo.config.patch(suppress_errors=True),
        pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="no lowering"),
    ):
        compiled(X)


def test_reports_graphs_that_ran() -> None:
    model = Breaks().eval()
    compiled = compile_for_a100(model, mode="default", fullgraph=False)
    assert compiled.graphs == []
    first, second = compiled.graphs_run(lambda: compiled(X))
    assert (first.computes_with(model.first.weight), first.computes_with(model.second.weight)) == (
        True,
        False,
    )
    assert second.computes_with(model.second.weight)
    assert compiled.graphs_run(lambda: compiled(X)) == [first, second]
    assert not compiled.compiles_again(lambda: compiled(X))
    torch._dynamo.reset()
    assert compiled.compiles_again(lambda: compiled(X))
    assert not compiled.compiles_again(lambda: compiled(X))
    with (
        torch.compiler.set_stance("force_eager"),
        pytest.raises(
            CompileError, match=r"^none of the compiled graphs ran: the model ran eagerly$"
        ),
    ):
        compiled.compiles_again(lambda: compiled(X))


def test_models_of_one_class_have_separate_graphs() -> None:
    """Dynamo stores graphs by code object, which models share if their forward breaks the graph."""
    for _ in range(2):
        model = Breaks().eval()
        compiled = compile_for_a100(model, mode="default", fullgraph=False)
        torch.testing.assert_close(compiled(X), model(X))
        assert len(compiled.graphs) == 2


def test_eager_models_have_no_graphs() -> None:
    compiled = compile_for_a100(Breaks().eval(), mode="off")
    assert compiled.graphs_run(lambda: compiled(X)) == []
    assert not compiled.compiles_again(lambda: compiled(X))


def test_model_that_logs_compiles_to_one_graph() -> None:
    logger = logging.getLogger("model")

    class Logs(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logger.debug("one")
            logger.info("two %s", x.shape)
            logger.warning("three")
            logger.error("four")
            return x + 1

    before = graphs_compiled()
    compiled = compile_for_a100(Logs(), mode="default")
    assert torch.equal(compiled(X), X + 1)
    assert graphs_compiled() == before + 1


def test_sweep_does_not_hit_the_recompile_limit() -> None:
    before = graphs_compiled()
    with torch._dynamo.config.patch(recompile_limit=2, accumulated_recompile_limit=2):
        for size in range(1, 11):
            model = nn.Linear(4, size).eval()
            torch.testing.assert_close(compile_for_a100(model, mode="default")(X), model(X))
    assert graphs_compiled() == before + 10


def test_many_shapes_do_not_hit_the_recompile_limit() -> None:
    compiled = compile_for_a100(nn.Linear(4, 4).eval(), mode="default")
    before = graphs_compiled()
    with torch._dynamo.config.patch(recompile_limit=2):
        for rows in range(2, 6):
            assert compiled(torch.ones(rows, 4)).shape == (rows, 4)
    assert graphs_compiled() == before + 4


def test_backends_differ_in_a_warm_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model = BareAttention()
    x = torch.randn(1, 2, 16, 16)

    def runs_flash(attention: str) -> bool:
        compiled = compile_for_a100(model, mode="default", attention=attention)
        torch.testing.assert_close(
            compiled(x), scaled_dot_product_attention(x, x, x), rtol=1e-3, atol=1e-3
        )
        evidence = profile_forward(lambda: compiled(x), CPU)
        flash = "aten::_scaled_dot_product_flash_attention_for_cpu"
        return flash in [kernel.name for kernel in evidence.kernels]

    assert runs_flash("flash") is True
    assert runs_flash("math") is False
    torch._dynamo.reset()  # nothing in memory, but the caches on disk are warm
    assert runs_flash("math") is False
    assert runs_flash("flash") is True


def test_first_call_reports_cache_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    found = []
    for _ in range(2):
        compiled = compile_for_a100(BareAttention(), mode="default")
        assert compiled.compile_cache is None
        for _ in range(2):
            compiled(torch.ones(1, 2, 16, 16))
        found.append(compiled.compile_cache)
    assert found == ["cold", "warm"]


def test_outputs_of_cuda_graph_modes_are_copies() -> None:
    model = nn.Linear(4, 4).eval()
    x = torch.randn(2, 4)
    outputs = compile_for_a100(model, mode="reduce-overhead")(x)
    assert not outputs.is_inference()  # copied outside of inference mode
    torch.testing.assert_close(outputs, model(x))


def test_settings_are_entered_once_for_many_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = compile_for_a100(nn.Linear(4, 4).eval(), mode="off")
    entered = []
    settings = CompiledModel.settings
    monkeypatch.setattr(CompiledModel, "settings", lambda self: entered.append(1) or settings(self))
    with compiled.entered():
        assert torch.is_inference_mode_enabled()
        for _ in range(3):
            compiled(torch.randn(2, 4))
    assert len(entered) == 1
    assert not torch.is_inference_mode_enabled()
    compiled(torch.randn(2, 4))
    assert len(entered) == 2
