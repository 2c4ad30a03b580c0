"""Backend of ``torch.compile`` that runs our passes and checks, then Inductor."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import fx
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from pytest_int8bench.compiler.fusion import passes
from pytest_int8bench.compiler.fusion.int8_attention import AttentionCoverage, replace_attention
from pytest_int8bench.compiler.fusion.nodes import begins_aligned, subgraphs, value_of
from pytest_int8bench.compiler.fusion.short_attention import replace_short
from pytest_int8bench.compiler.graphs import Graph
from pytest_int8bench.compiler.torch_workarounds.inductor import (
    cached_region_schemas,
    start_compile_workers,
)
from pytest_int8bench.compiler.torch_workarounds.names import (
    SET_GRAD_ENABLED,
    FakeTensor,
    HigherOrderOperator,
    InductorBackend,
)

_REGION = torch.ops.higher_order.invoke_subgraph


class FusingInductor(InductorBackend):
    """Backend of ``torch.compile`` that runs the passes of :mod:`.fusion.passes`, then Inductor.

    Args:
        mode: the mode of ``torch.compile``.
        dynamic: as in ``torch.compile``.
        inline: let Inductor launch our kernels where it can
            (:mod:`~pytest_int8bench.compiler.fusion.inline_triton`).
        attention: counts the calls that INT8 attention replaces; None to replace none.
        always: run the passes that do not need INT8 layers in all graphs (:func:`.passes.fuse`).
    """

    def __init__(
        self,
        mode: str,
        dynamic: bool | None,
        inline: bool = False,
        attention: AttentionCoverage | None = None,
        always: bool = False,
    ) -> None:
        super().__init__(mode, None, dynamic)
        self._inline = inline
        self._attention = attention
        self._always = always
        self.graphs: list[Graph] = []
        """Graphs compiled so far."""
        self.compiling: Callable[
            [fx.GraphModule], AbstractContextManager[AttentionCoverage | None]
        ] = lambda module: nullcontext()
        """Context in which each graph is compiled. It yields where to count the calls that our
        kernel for short sequences replaces, or None to replace none."""

    # After a graph break, Dynamo caches graphs by the code of the user's functions. If backends
    # compared equal, as torch's do, it would run one model's graph for another of the same class,
    # although it was compiled under another attention backend.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __call__(self, model_: Any, inputs_: Any, **kwargs: Any) -> Any:
        with self.compiling(model_) as short:
            return self._compile(model_, inputs_, short, **kwargs)

    def _compile(
        self, model_: Any, inputs_: Any, short: AttentionCoverage | None, **kwargs: Any
    ) -> Any:
        graph = Graph(model_, inputs_)  # before the passes change the operators
        _check_settings(model_)
        if short is not None:
            replace_short(model_, short)
        if self._attention is not None:
            replace_attention(model_, self._attention)
        passes.fuse(model_, inline=self._inline, always=self._always)
        _check_regions(model_)
        _check_alignment(model_)
        with cached_region_schemas():
            compiled = super().__call__(model_, inputs_, **kwargs)
        self.graphs.append(graph)
        return graph.counted(compiled)


def load_inductor(device_type: str) -> None:
    """Import Inductor, which ``torch.compile`` imports late, and on a GPU start its compile
    workers."""
    import torch._inductor.compile_fx  # noqa: F401

    if device_type == "cuda":
        start_compile_workers()


def _check_regions(module: fx.GraphModule) -> None:
    """Raise if a region returns a view from the middle of a tensor: Inductor adds its offset twice
    and reads past the view (``InvokeSubgraph.create`` of torch 2.13)."""
    for part in module.modules():
        if part is module or not isinstance(part, fx.GraphModule):
            continue
        inputs = [value_of(node) for node in part.graph.find_nodes(op="placeholder")]
        mode = next((value.fake_mode for value in inputs if isinstance(value, FakeTensor)), None)
        if mode is None:
            continue
        FakeTensorProp(part, mode).propagate_dont_convert_inputs(*inputs)
        for node in part.graph.output_node().all_input_nodes:
            value = node.meta.get("val")
            if isinstance(value, torch.Tensor) and value.storage_offset() != 0:
                raise RuntimeError("a block returns a view from the middle of a tensor")


def _check_settings(module: fx.GraphModule) -> None:
    """Raise if a region is called under different settings, such as autocast in one call only.

    Dynamo compares the code of two calls of a region, but not the settings around them
    (``are_same_graph_modules`` in torch/_dynamo/variables/higher_order_ops.py). It would compile
    the region under the settings of one call and reuse it for the other.
    """
    first: dict[str, list[Any]] = {}

    def visit(part: fx.GraphModule, settings: dict[Any, Any]) -> None:
        for node in part.graph.nodes:
            _follow_setting(node, settings)
            for subgraph in subgraphs(part, node):
                active = list(settings.values())
                if node.target is not _REGION:
                    visit(subgraph, dict(settings))
                elif node.args[1] not in first:
                    first[node.args[1]] = active
                    visit(subgraph, dict(settings))
                elif first[node.args[1]] != active:
                    raise RuntimeError("blocks run under different settings, such as autocast")

    # Dynamo has restored the process's settings before it calls the backend.
    enabled: tuple[Any, ...] = SET_GRAD_ENABLED, (torch.is_grad_enabled(),), {}
    visit(module, {SET_GRAD_ENABLED: enabled})


def _follow_setting(node: fx.Node, settings: dict[Any, Any]) -> None:
    """Update the active settings if ``node`` changes one.

    Dynamo records no example value for a call that changes a setting. Some calls come in pairs,
    such as ``_enter_autocast`` and ``_exit_autocast(node)``. For others, such as
    ``_set_grad_enabled`` and ``_sdpa_kernel``, the latest call applies, and Dynamo restores the
    setting with another call.
    """
    if node.op != "call_function" or isinstance(node.target, HigherOrderOperator):
        return
    if _has_value(node) or any(map(_has_value, node.all_input_nodes)):
        return
    entered = _exited_by(node)
    if entered is not None:
        settings.pop(entered, None)
    elif any(_exited_by(user) is node for user in node.users):
        settings[node] = _call(node)
    elif not node.users:
        settings[node.target] = _call(node)


def _exited_by(node: fx.Node) -> fx.Node | None:
    """Return the call that entered the setting that ``node`` exits; None if it exits none."""
    if node.users or len(node.args) != 1 or node.kwargs:
        return None
    [entered] = node.args
    return entered if isinstance(entered, fx.Node) and not _has_value(entered) else None


def _has_value(node: fx.Node) -> bool:
    return "example_value" in node.meta


def _call(node: fx.Node) -> tuple[Any, ...]:
    """Return the target and arguments of a call for comparison, with nested calls expanded."""
    return node.target, *fx.map_arg((node.args, node.kwargs), _call)


def _check_alignment(module: fx.GraphModule) -> None:
    """Raise if a region's inputs are aligned in its first call but not in a later one: the region
    is compiled for the first call, including the alignment of its inputs."""
    first: dict[Any, list[bool]] = {}
    for part in module.modules():
        if not isinstance(part, fx.GraphModule):
            continue
        for node in part.graph.find_nodes(op="call_function", target=_REGION):
            aligned = [begins_aligned(operand) for operand in node.args[2:]]
            before = first.setdefault(node.args[1], aligned)
            if any(was and not now for was, now in zip(before, aligned, strict=False)):
                raise RuntimeError("blocks are called with inputs of different memory alignment")
