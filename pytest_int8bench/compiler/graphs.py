"""The graphs that a model was compiled to: what weights they compute with, how often they ran."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch.multiprocessing.reductions import StorageWeakRef

from pytest_int8bench.quantization.stored import plain_tensors

_REGION = torch.ops.higher_order.invoke_subgraph


class Graph:
    """A compiled graph. Call it in the place of what it was compiled to.

    Args:
        module: what Dynamo traced.
        inputs: the tensors that it was traced with, weights included.
    """

    def __init__(self, module: fx.GraphModule, inputs: Sequence[Any]) -> None:
        self.calls = 0
        """How often it ran."""
        self._computed, self._dropped = _storages(module, inputs)

    def computes_with(self, tensor: torch.Tensor) -> bool:
        """Return whether an output of the graph depends on the memory that holds ``tensor``."""
        return StorageWeakRef(tensor.untyped_storage()) in self._computed

    def drops(self, tensor: torch.Tensor) -> bool:
        """Return whether the memory that holds ``tensor`` only leads to results that nobody uses,
        which compilers leave out."""
        return StorageWeakRef(tensor.untyped_storage()) in self._dropped

    def counted(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``compiled``, counting its calls."""

        def run(*args: Any) -> Any:
            self.calls += 1
            return compiled(*args)

        return run


def _storages(
    module: fx.GraphModule, inputs: Sequence[Any]
) -> tuple[set[StorageWeakRef], set[StorageWeakRef]]:
    """Return the memory of the inputs that outputs depend on, and that of the others."""
    live = set(_needed(module.graph))
    computed: set[StorageWeakRef] = set()
    dropped: set[StorageWeakRef] = set()
    placeholders = module.graph.find_nodes(op="placeholder")
    held = [*zip(placeholders, inputs, strict=False)]
    held += [
        (node, getattr(module, str(node.target), None))
        for node in module.graph.find_nodes(op="get_attr")
    ]
    for node, value in held:
        if not isinstance(value, torch.Tensor):
            continue
        for tensor in plain_tensors(value):
            if type(tensor) in (torch.Tensor, torch.nn.Parameter):
                storage = StorageWeakRef(tensor.untyped_storage())
                (computed if node in live else dropped).add(storage)
    return computed, dropped - computed


def _needed(graph: fx.Graph) -> Iterator[fx.Node]:
    """Yield the nodes that outputs and side effects depend on."""
    waiting = [node for node in graph.nodes if node.op == "output" or _has_effect(node)]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        yield node
        for operand in _operands(node):
            if operand not in seen:
                seen.add(operand)
                waiting.append(operand)


def _operands(node: fx.Node) -> list[fx.Node]:
    """Return what a node computes with: of the operands of a region, those that it uses."""
    if node.target is not _REGION:
        return node.all_input_nodes
    region = getattr(node.graph.owning_module, str(node.args[0].target), None)  # type: ignore[union-attr]
    if not isinstance(region, fx.GraphModule):
        return node.all_input_nodes
    needed = set(_needed(region.graph))
    inputs = region.graph.find_nodes(op="placeholder")
    pairs = zip(node.args[2:], inputs, strict=False)
    return [given for given, inner in pairs if inner in needed and isinstance(given, fx.Node)]


def _has_effect(node: fx.Node) -> bool:
    """Return whether a node may write to what it is given; placeholders do not count."""
    if node.op not in ("call_function", "call_method", "call_module"):
        return False
    name = str(getattr(node.target, "__name__", node.target)).partition(".")[0]
    writes = name.endswith("_") and not name.endswith("__")
    return writes or name.strip("_") == "setitem" or "out" in node.kwargs or node.is_impure()
