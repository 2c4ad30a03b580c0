"""The graphs that a model was compiled to: what weights they compute with, how often they ran."""

from __future__ import annotations

import contextlib
import copy
import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

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
        """Number of runs."""
        self.watch: AbstractContextManager[Any] | None = None
        """Entered around what was traced, which then runs in the place of what was compiled."""
        self._computed, self._dropped = _memory(module, inputs)
        self._snapshot: _Snapshot | None = _snapshot(module)

    @functools.cached_property
    def _traced(self) -> fx.GraphModule:
        assert self._snapshot is not None
        return _rebuilt(self._snapshot)

    def forget(self) -> None:
        """Let go of what was traced: its model is gone."""
        self._snapshot = None
        vars(self).pop("_traced", None)

    def computes_with(self, tensor: torch.Tensor) -> bool:
        """Return whether an output of the graph depends on the memory that holds ``tensor``."""
        return any(map(_Memory.of(tensor).overlaps, self._computed))

    def drops(self, tensor: torch.Tensor) -> bool:
        """Return whether the memory that holds ``tensor`` only leads to results that nobody uses,
        which compilers leave out."""
        is_there = any(map(_Memory.of(tensor).overlaps, self._dropped))
        return is_there and not self.computes_with(tensor)

    def counted(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``compiled``, counting its calls."""

        def run(*args: Any) -> Any:
            self.calls += 1
            if self.watch is not None:
                with self.watch:
                    return self._traced(*args)
            return compiled(*args)

        return run


def forget(graphs: list[Graph]) -> None:
    """Let go of what was traced: Dynamo keeps compiled graphs longer than their model lives."""
    for graph in graphs:
        graph.forget()


@contextlib.contextmanager
def watched(watch: AbstractContextManager[Any], graphs: Sequence[Graph]) -> Iterator[None]:
    """Let ``watch`` see each operator of what runs inside: of graphs those that were traced, and of
    a model that is not compiled all.

    Args:
        watch: a mode of torch. It may not be active where Dynamo looks for a compiled graph.
        graphs: of the model; none if it is not compiled.

    Raises:
        RuntimeError: if there are graphs, and none of them ran.
    """
    if not graphs:
        with watch:
            yield
        return
    switched = [(graph, graph.calls) for graph in graphs]
    for graph, _ in switched:
        graph.watch = watch
    try:
        yield
    finally:
        for graph, _ in switched:
            graph.watch = None
    if all(graph.calls == calls for graph, calls in switched):
        raise RuntimeError("none of the compiled graphs ran")


class _Snapshot(NamedTuple):
    """The traced graph, before passes change it."""

    graph: fx.Graph
    attributes: dict[str, Any]


def _snapshot(module: fx.GraphModule) -> _Snapshot:
    graph = copy.deepcopy(module.graph)
    attributes: dict[str, Any] = {}
    for node in graph.nodes:
        node.meta = {}  # which would keep what was traced alive
        name = str(node.target)
        if node.op in ("get_attr", "call_module") and name not in attributes:
            value = operator.attrgetter(name)(module)
            attributes[name] = _snapshot(value) if isinstance(value, fx.GraphModule) else value
    return _Snapshot(graph, attributes)


def _rebuilt(snapshot: _Snapshot) -> fx.GraphModule:
    """Return what was traced. A region is a call of a module in it: torch runs a region as one
    operator, and nobody sees those inside."""
    graph = snapshot.graph
    for node in graph.find_nodes(op="call_function", target=_REGION):
        body, _, *operands = node.args
        with graph.inserting_before(node):
            called = graph.call_module(str(body.target), tuple(operands))
        node.replace_all_uses_with(called)
        graph.erase_node(node)
    attributes = {
        name: _rebuilt(value) if isinstance(value, _Snapshot) else value
        for name, value in snapshot.attributes.items()
    }
    return fx.GraphModule(attributes, graph)


class _Memory(NamedTuple):
    """Where the numbers of a tensor are. Layers may share a storage and have some of its rows."""

    storage: StorageWeakRef
    start: int
    end: int
    """Behind the last byte, counted from the start of the storage."""

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _Memory:
        last = sum(
            (n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)
        )
        start = int(tensor.storage_offset()) * tensor.itemsize
        end = start + int(last + 1) * tensor.itemsize if tensor.numel() else start
        return cls(StorageWeakRef(tensor.untyped_storage()), start, end)

    def overlaps(self, other: _Memory) -> bool:
        apart = self.end <= other.start or other.end <= self.start
        return self.storage == other.storage and not apart


def _memory(module: fx.GraphModule, inputs: Sequence[Any]) -> tuple[set[_Memory], set[_Memory]]:
    """Return the memory of the inputs that outputs depend on, and that of all inputs which some
    outputs do not."""
    live = set(_needed(module.graph))
    computed: set[_Memory] = set()
    dropped: set[_Memory] = set()
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
                dropped.add(_Memory.of(tensor))
                if node in live:
                    computed.update(map(_Memory.of, _used(node, tensor, live)))
    return computed, dropped


def _used(node: fx.Node, tensor: torch.Tensor, live: set[fx.Node]) -> list[torch.Tensor]:
    """Return the parts of an input that outputs depend on: the rows that are taken from it, where
    nothing else is done with it."""
    users = [user for user in node.users if user in live]
    rows: list[Any] = [user.args[1] for user in users if user.target is operator.getitem]
    if not users or len(rows) < len(users) or not all(isinstance(r, slice) for r in rows):
        return [tensor]
    if not all(isinstance(end, int | None) for r in rows for end in (r.start, r.stop, r.step)):
        return [tensor]
    return [tensor[r] for r in rows]


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
