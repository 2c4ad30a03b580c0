"""Test that each workaround for torch works, and that torch is restored afterwards."""

from __future__ import annotations

import gc
import logging
import warnings
from contextlib import nullcontext
from typing import Any

import einops
import einops._backends
import pytest
import torch
from torch import nn

from pytest_int8bench.compiler.api import compile_for_a100
from pytest_int8bench.compiler.regions import Regions
from pytest_int8bench.compiler.torch_workarounds import dynamo, inductor

X = torch.ones(2, 4)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(4, 4), nn.GELU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.fc(x)


@pytest.mark.parametrize(
    ("before", "inside"),
    [((700, 10, 9), (20_000, 10, 9)), ((0, 10, 10), (0, 10, 10)), ((30_000, 5, 5), (30_000, 5, 5))],
    ids=["often", "off", "rarely"],
)
@pytest.mark.parametrize("error", [None, KeyError("inside")], ids=["compiled", "failed"])
def test_collects_garbage_rarely_while_compiling(
    before: tuple[int, ...],
    inside: tuple[int, ...],
    error: Exception | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[int, ...]] = []

    def backend(self: Any, model_: torch.fx.GraphModule, inputs_: Any) -> Any:
        seen.append(gc.get_threshold())
        if error is not None:
            raise error
        return model_.forward

    monkeypatch.setattr(torch._TorchCompileInductorWrapper, "__call__", backend)
    compiled = compile_for_a100(nn.Linear(4, 4).eval(), mode="default")
    process = gc.get_threshold()
    gc.set_threshold(*before)
    try:
        with nullcontext() if error is None else pytest.raises(Exception, match="inside"):
            compiled(X)
        assert gc.get_threshold() == before
    finally:
        gc.set_threshold(*process)
    [found] = seen
    # Torch 2.15 raises the threshold of full collections itself.
    assert found[:2] == inside[:2]
    assert found[2] in (inside[2], max(inside[2], 1000))


MINE = "torch._dynamo.mine"


class Kept(logging.Handler):
    """A user's handler."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


def test_hides_only_the_metrics_error(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Kept()
    logger = logging.getLogger("torch._dynamo.metrics_context")

    def backend(self: Any, model_: torch.fx.GraphModule, inputs_: Any) -> Any:
        for values in ({print, len}, {lambda: 0, lambda: 1}):
            try:
                sorted(values)
            except TypeError:
                logger.exception("of %s", len(values))
        logger.error("another")
        return model_.forward

    monkeypatch.setattr(torch._TorchCompileInductorWrapper, "__call__", backend)
    logger.addHandler(kept)
    try:
        compile_for_a100(nn.Linear(4, 4).eval(), mode="default")(X)
    finally:
        logger.removeHandler(kept)
    # Dynamo's setting holds Python functions, so errors about builtins stay.
    assert [record.getMessage() for record in kept.records] == ["of 2", "another"]
    assert logger.filters == []


@pytest.mark.skipif(
    pytest.version_tuple < (9, 1), reason="before pytest 9.1, torch's loggers pass nothing on"
)
def test_hides_the_trace_from_pytest_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def backend(self: Any, model_: torch.fx.GraphModule, inputs_: Any) -> Any:
        logging.getLogger(MINE).warning("of the model")
        return model_.forward

    monkeypatch.setattr(torch._TorchCompileInductorWrapper, "__call__", backend)
    monkeypatch.setattr(logging.getLogger("torch"), "propagate", True)
    trace, kept = logging.getLogger("torch.__trace"), Kept()
    # Like pytest 9.1 if torch is imported before the test starts.
    handlers = [caplog.handler, kept]
    for handler in handlers:
        trace.addHandler(handler)
    before = set(trace.handlers)
    compiled = compile_for_a100(nn.Linear(4, 4).eval(), mode="default", dynamic=False)
    try:
        compiled(X)
        compiled(torch.cat([X, X]))  # compiles again
        # Torch's own handler removes itself at the first record, unless a user requests the trace.
        assert {type(handler).__name__ for handler in before - set(trace.handlers)} <= {
            "LazyTraceHandler"
        }
    finally:
        for handler in handlers:
            trace.removeHandler(handler)
    assert kept.records
    names = [record.name for record in caplog.records if record.name in (trace.name, MINE)]
    assert names == [MINE] * 2


class Held(torch.Tensor):
    """A tensor subclass from another library."""


def test_hides_warnings_that_are_not_about_the_model(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    sdpa = "Triggered internally at /pytorch/aten/src/ATen/native/transformers"
    hidden = [
        "Dynamo does not know how to trace the builtin `_thread.get_ident.` This function",
        "Held does not implement _stable_hash_for_caching. For PT2-compatible",
        f"Flash attention kernel not used because: ({sdpa}/cuda/sdp_utils.cpp:9.)",
        f"Expected\nall to be contiguous ({sdpa}/sdp_utils_cpp.h:9.)",
    ]
    shown = [
        "Dynamo does not know how to trace the builtin `numpy.random.rand`.",
        "Mine does not implement _stable_hash_for_caching.",
        "Sparse tensors are in beta (Triggered internally at /aten/src/ATen/SparseTensor.cpp:9.)",
    ]

    def backend(self: Any, model_: torch.fx.GraphModule, inputs_: Any) -> Any:
        for text in (*hidden, *shown):
            warnings.warn(text, UserWarning, stacklevel=1)
        return model_.forward

    monkeypatch.setattr(torch._TorchCompileInductorWrapper, "__call__", backend)
    monkeypatch.setattr(Held, "__module__", "torchao.quantization.quantize_.held")
    model = nn.Linear(4, 4).eval()
    model.register_buffer("held", torch.ones(1).as_subclass(Held))
    compile_for_a100(model, mode="default")(X)
    assert [str(warning.message) for warning in recwarn.list] == shown


class Rearranged(nn.Module):
    """Call einops on a tensor and on a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.added = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return einops.rearrange(x, "a b -> b a") + einops.repeat(self.added, "b -> b a", a=2)


def test_einops_does_not_recompile_the_second_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(einops._backends, "_type2backend", {})
    compiled = compile_for_a100(Rearranged().eval(), mode="default")
    assert torch.equal(compiled(X), X.T + 1)
    with compiled.no_compilation():
        assert torch.equal(compiled(X), X.T + 1)


@pytest.mark.parametrize(
    "as_before", [False, True], ids=["this torch", "torch that caches nothing"]
)
def test_finds_schema_of_region_once(as_before: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if as_before:
        monkeypatch.setattr(inductor, "torch_caches_region_schemas", lambda: False)
        name = "get_functionalize_schema_entry"
        cache = torch._guards.InvokeSubgraphCache
        monkeypatch.setattr(cache, name, lambda self, key: None, raising=False)
    region = torch.ops.higher_order.invoke_subgraph
    traced: list[str] = []
    make = type(region).gen_schema

    def gen_schema(self: Any, subgraph: Any, identifier: str, *operands: Any) -> Any:
        traced.append(identifier)
        return make(self, subgraph, identifier, *operands)

    monkeypatch.setattr(type(region), "gen_schema", gen_schema)
    model = nn.Sequential(*(Block() for _ in range(4))).eval().requires_grad_(False)
    compiled = compile_for_a100(model, mode="default")
    torch.testing.assert_close(compiled(X), model(X))
    assert compiled.regions == 4
    assert len(traced) == 1
    assert "gen_schema" not in vars(region)


def test_keeps_schemas_of_two_graphs_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inductor, "torch_caches_region_schemas", lambda: False)
    region = torch.ops.higher_order.invoke_subgraph

    def kept(*operands: torch.Tensor) -> str:
        return str(region.gen_schema(graph, "same", *operands))

    graph = torch.fx.symbolic_trace(lambda x: (x + 1,))
    with inductor.cached_region_schemas():
        one = kept(X)
        graph = torch.fx.symbolic_trace(lambda x: (x.add_(1),))
        assert kept(X) != one
        with pytest.raises(KeyError), inductor.cached_region_schemas():
            raise KeyError
        assert kept(X) != one
    assert "gen_schema" not in vars(region)


def reuse_functions() -> dict[str, Any]:
    try:
        from torch._dynamo.variables import invoke_subgraph
    except ImportError:
        return {}
    return {
        name: vars(invoke_subgraph)[name] for name in ("has_reuse_entries", "is_reuse_eligible")
    }


@pytest.mark.skipif(not reuse_functions(), reason="this torch traces every region call")
def test_refuses_reuse_inside_regions_only() -> None:
    before = reuse_functions()

    def fail() -> None:
        with Regions([Block(), Block()]):
            for name, refuses in reuse_functions().items():
                assert refuses is not before[name]
                assert refuses() is False
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        fail()
    assert reuse_functions() == before


@pytest.mark.skipif(not reuse_functions(), reason="this torch traces every region call")
def test_keeps_reuse_requested_by_users(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.variables import invoke_subgraph

    asked: list[Any] = []

    def eligible(*args: Any, has_reuse_hash_fn: bool = False) -> bool:
        asked.append((args, has_reuse_hash_fn))
        return True

    monkeypatch.setattr(invoke_subgraph, "is_reuse_eligible", eligible)
    dynamo._reuse_functions.cache_clear()
    try:
        with Regions([Block(), Block()]):
            refuses = invoke_subgraph.is_reuse_eligible
            assert refuses(1) is False
            assert refuses(1, has_reuse_hash_fn=True) is True
        assert asked == [((1,), True)]
    finally:
        dynamo._reuse_functions.cache_clear()
