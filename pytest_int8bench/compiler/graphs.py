"""The compiled graphs of a model: which weights they use, and how often they ran."""

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
    """Record of a compiled graph. Install it with :meth:`counted`.

    Args:
        module: the graph that Dynamo traced.
        inputs: the tensors with which it was traced, including weights.
    """

    def __init__(self, module: fx.GraphModule, inputs: Sequence[Any]) -> None:
        self.calls = 0
        """Number of runs."""
        self.watch: AbstractContextManager[Any] | None = None
        """If set, a call enters this context and runs the traced graph instead of the compiled
        one."""
        self._used, self._inputs = _memory(module, inputs)
        self._snapshot: _Snapshot | None = _snapshot(module)

    @functools.cached_property
    def _traced(self) -> fx.GraphModule:
        assert self._snapshot is not None
        return _rebuilt(self._snapshot)

    def forget(self) -> None:
        """Drop the traced graph and its tensors."""
        self._snapshot = None
        vars(self).pop("_traced", None)

    def computes_with(self, tensor: torch.Tensor) -> bool:
        """Return whether an output of the graph depends on the memory that holds ``tensor``."""
        return any(map(_Memory.of(tensor).overlaps, self._used))

    def drops(self, tensor: torch.Tensor) -> bool:
        """Return whether ``tensor`` is an input of the graph on which no output depends, so that
        compilers drop the operators that read it."""
        is_input = any(map(_Memory.of(tensor).overlaps, self._inputs))
        return is_input and not self.computes_with(tensor)

    def counted(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that runs ``compiled`` and counts its calls."""

        def run(*args: Any) -> Any:
            self.calls += 1
            if self.watch is not None:
                with self.watch:
                    return self._traced(*args)
            return compiled(*args)

        return run


def forget(graphs: list[Graph]) -> None:
    """Drop traced graphs and their tensors, because Dynamo keeps compiled graphs after their model
    is gone."""
    for graph in graphs:
        graph.forget()


@contextlib.contextmanager
def watched(watch: AbstractContextManager[Any], graphs: Sequence[Graph]) -> Iterator[None]:
    """Let ``watch`` see each operator that the model runs: for compiled graphs, the operators that
    Dynamo traced.

    Args:
        watch: a torch function or dispatch mode. It is entered only around the traced graphs,
            because Dynamo must not look up a compiled graph while a mode is active.
        graphs: the model's compiled graphs; none if it is not compiled.

    Raises:
        RuntimeError: if there are graphs but none of them ran.
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
    """A copy of the traced graph, made before passes change it."""

    graph: fx.Graph
    attributes: dict[str, Any]


def _snapshot(module: fx.GraphModule) -> _Snapshot:
    graph = copy.deepcopy(module.graph)
    attributes: dict[str, Any] = {}
    for node in graph.nodes:
        node.meta = {}  # the metadata would keep traced tensors alive
        name = str(node.target)
        if node.op in ("get_attr", "call_module") and name not in attributes:
            value = operator.attrgetter(name)(module)
            attributes[name] = _snapshot(value) if isinstance(value, fx.GraphModule) else value
    return _Snapshot(graph, attributes)


def _rebuilt(snapshot: _Snapshot) -> fx.GraphModule:
    """Return the traced graph as a module that calls regions as submodules: torch runs a region as
    a single operator, which hides the operators inside from a mode."""
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
    """The bytes of a tensor in its storage. Several layers may share a storage."""

    storage: StorageWeakRef
    start: int
    """Offset of the first byte in the storage."""
    end: int
    """Offset after the last byte."""

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
    """Return the memory on which outputs depend, and the memory of all inputs."""
    live = set(_needed(module.graph))
    used: set[_Memory] = set()
    all_inputs: set[_Memory] = set()
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
                all_inputs.add(_Memory.of(tensor))
                if node in live:
                    used.update(map(_Memory.of, _used_parts(node, tensor, live)))
    return used, all_inputs


def _used_parts(node: fx.Node, tensor: torch.Tensor, live: set[fx.Node]) -> list[torch.Tensor]:
    """Return the parts of an input on which outputs depend: slices of its rows if the graph only
    slices it, else all of it."""
    users = [user for user in node.users if user in live]
    rows: list[Any] = [user.args[1] for user in users if user.target is operator.getitem]
    if not users or len(rows) < len(users) or not all(isinstance(r, slice) for r in rows):
        return [tensor]
    if not all(isinstance(end, int | None) for r in rows for end in (r.start, r.stop, r.step)):
        return [tensor]
    return [tensor[r] for r in rows]


def _needed(graph: fx.Graph) -> Iterator[fx.Node]:
    """Yield the nodes on which outputs and side effects depend."""
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
    """Return the operands that a node uses. A region may ignore some of its operands."""
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
    """Return whether a node may write to its arguments or has another side effect. Placeholders
    have none."""
    if node.op not in ("call_function", "call_method", "call_module"):
        return False
    name = str(getattr(node.target, "__name__", node.target)).partition(".")[0]
    writes = name.endswith("_") and not name.endswith("__")
    return writes or name.strip("_") == "setitem" or "out" in node.kwargs or node.is_impure()
