"""Equal blocks that Dynamo reads once.

A region (:mod:`pytest_int8bench.regions`) is compiled once, but Dynamo of torch 2.11 runs through
the Python of each of its calls all the same, only to find that it came to the same graph: for the
twelve blocks of a base encoder, half of a first call from a full cache. Here a call that can come
to nothing else becomes one of the graph that is there.

What Python may do in a block is without end, and a wrong guess would give wrong numbers in silence.
So this is for blocks whose code is all of libraries that are known, and whose tensors and modules
nobody else in the model holds; the others are read one by one. As in torch 2.13, which does the
like, nobody notices when one of the blocks but the first is changed after the first call.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import operator
import threading
import types
import weakref
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

#: Names of the parameters of what Dynamo is asked to compile, those of the model in them.
ENTRY_PARAMETERS = ("args", "kwargs")

#: Libraries whose blocks do nothing but compute: not by which block they are, nor with what others
#: write meanwhile.
LIBRARIES = {
    "olmoearth_pretrain_minimal",
    "pytest_int8bench",
    "timm",
    "torch",
    "torchao",
    "torchvision",
    "transformers",
}
_OF_PYTHON = {"_collections", "_functools", "builtins", "collections", "functools", "types"}
# One at a time: what is replaced is torch's, of all threads.
_LOCK = threading.RLock()

_REGION = torch.ops.higher_order.invoke_subgraph
# Values that can be compared. Of others, only the same object is equal.
_PLAIN = (bool, int, float, complex, str, bytes, slice, torch.dtype, torch.device, type(None))
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_always_called",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


def stampable(model: nn.Module, blocks: Sequence[nn.Module]) -> set[nn.Module]:
    """Return those of the blocks of ``model`` whose reading can be left out: whose code is known,
    and what they hold nobody else does."""
    everywhere = _held(model)
    return {
        block
        for block in blocks
        if all(map(_is_plain, block.modules()))
        and all(count == everywhere[key] for key, count in _held(block).items())
    }


def _held(root: nn.Module) -> Counter[Any]:
    """Return how many hold each module, and use each memory, in ``root`` and what is in it."""
    held: Counter[Any] = Counter()
    for module in root.modules():
        held.update(module.children())
        held.update(map(_storage, _tensors(module)))
    return held


def _is_plain(module: nn.Module) -> bool:
    return (
        _is_known(type(module))
        and all(_is_known(value) for name, value in vars(module).items() if name != "_modules")
        and not any(vars(module).get(hooks) for hooks in _HOOKS)
    )


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    held = (*module._parameters.values(), *module._buffers.values(), *vars(module).values())
    return [value for value in held if isinstance(value, torch.Tensor)]


def _storage(tensor: torch.Tensor) -> int:
    """Return a number for the memory of a tensor."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # such as a sparse one, which shares none
        return id(tensor)


def _is_known(value: Any) -> bool:
    """Say whether an attribute is a value, a tensor, or of code that is known. A module that is no
    child may be the block itself, which then knows which one it is."""
    if isinstance(value, torch.Tensor) or type(value) in _PLAIN:
        return True
    if isinstance(value, nn.Module):
        return False
    if type(value) in (dict, OrderedDict):
        return all(map(_is_known, (*value.keys(), *value.values())))
    if type(value) in (tuple, list, set, frozenset):
        return all(map(_is_known, value))
    if type(value) is functools.partial:
        return all(map(_is_known, (value.func, value.args, value.keywords)))
    where = getattr(value, "__module__", None) or type(value).__module__
    return str(where).partition(".")[0] in LIBRARIES | _OF_PYTHON


@contextlib.contextmanager
def stamped(blocks: set[nn.Module]) -> Iterator[None]:
    """Let Dynamo read equal blocks inside regions once.

    Args:
        blocks: those that may be left out.

    Raises:
        RuntimeError: at blocks that run under other settings of the process, such as autocast, than
            those before. Torch compares the code of regions, and takes them for the same.
    """
    from torch._dynamo.variables import higher_order_ops

    region: Any = vars(higher_order_ops)["InvokeSubgraphHigherOrderVariable"]
    seen: list[_Traced] = []
    states: list[tuple[Any, Any]] = []
    writes = _Writes()

    def call(self: Any, tx: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        state = next((state for output, state in states if output is tx.output), None)
        if state is None:
            states.append((tx.output, _global_state()))
        elif not state.check():
            raise RuntimeError("blocks run under different settings, such as autocast")
        given = _given(tx, args, kwargs, writes.count)
        if given is None or given.block not in blocks:
            return trace(self, tx, args, kwargs)
        for traced in seen:
            if traced.fits(tx, given) and (operands := traced.operands_of(tx, given)):
                return traced.again(tx, operands)
        result = trace(self, tx, args, kwargs)
        traced_now = _traced(tx, given, result)
        if traced_now is not None and writes.count == given.writes:
            seen.append(traced_now)
        return result

    with _LOCK, writes.counted():
        trace = region._call_function
        with _set(region, "_call_function", call):
            yield


@contextlib.contextmanager
def _set(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


class _Writes:
    """Counts what the code that is traced writes to what was there before, or, in a region, outside
    of it."""

    def __init__(self) -> None:
        self.count = 0

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Count inside."""
        from torch._dynamo.side_effects import SideEffects

        with contextlib.ExitStack() as stack:
            for name in ("store_attr", "mutation", "register_hook"):
                stack.enter_context(_set(SideEffects, name, self._counts(vars(SideEffects)[name])))
            yield

    def _counts(self, write: Any) -> Any:
        from torch._dynamo.current_scope_id import current_scope_id
        from torch._dynamo.variables.base import AttributeMutationNew, ValueMutationNew

        new = AttributeMutationNew, ValueMutationNew

        def counting(effects: Any, item: Any, *args: Any, **kwargs: Any) -> Any:
            kind = item.mutation_type
            if not isinstance(kind, new) or kind.scope != current_scope_id():
                self.count += 1
            return write(effects, item, *args, **kwargs)

        return counting


@dataclass(frozen=True)
class _Given:
    """What a region is called with."""

    function: Any
    block: nn.Module
    source: Any
    """Dynamo's name of the block."""
    tensors: tuple[fx.Proxy, ...]
    kinds: tuple[Any, ...]
    """What a trace depends on of the arguments: for tensors, which are the same, what Dynamo
    guards, and the node of one that the block may read without being given it. Both would be one
    operand of the call that is traced."""
    writes: int
    """How much the code before it has written."""


def _given(tx: Any, args: Sequence[Any], kwargs: Mapping[str, Any], writes: int) -> _Given | None:
    """Return what a region is called with: a block, then tensors, constants, and tuples of such;
    None if it is something else."""
    from torch._dynamo.variables import ConstantVariable, TensorVariable, TupleVariable
    from torch._dynamo.variables.functions import UserFunctionVariable
    from torch._dynamo.variables.nn_module import UnspecializedNNModuleVariable

    function, block, *others = map(_unwrapped, args)
    if (
        tx.output.current_tracer is not tx.output.root_tracer
        or not isinstance(function, UserFunctionVariable)
        or not isinstance(block, UnspecializedNNModuleVariable)
        or block.source is None
    ):
        return None
    module: Any = vars(block)["value"]  # to mypy, any object
    tensors: list[fx.Proxy] = []
    kinds: list[Any] = []
    named: list[tuple[Any, Any]] = [*enumerate(others), *kwargs.items()]
    for name, variable in named:  # which grows
        argument = _unwrapped(variable)
        if isinstance(argument, ConstantVariable):
            if type(argument.value) not in _PLAIN:
                return None
            kinds.append((name, type(argument.value), repr(argument.value)))
        elif type(argument) is TupleVariable:
            kinds.append((name, tuple, len(argument.items)))
            named += [((name, index), item) for index, item in enumerate(argument.items)]
        elif type(argument) is TensorVariable:
            proxy = argument.as_proxy()
            nodes = [known.node for known in tensors]
            if proxy.node not in nodes:
                tensors.append(proxy)
                nodes.append(proxy.node)
            kind = _kind(proxy.node.meta["example_value"])
            held = proxy.node.meta.get("grapharg")
            if kind is None or (held is not None and _holds(module, held.example)):
                return None
            is_anywhere = held is not None and not _is_given(held.source)
            index = nodes.index(proxy.node)
            kinds.append((name, index, kind, proxy.node if is_anywhere else None))
        else:
            return None
    return _Given(
        function.get_function(), module, block.source, tuple(tensors), tuple(kinds), writes
    )


@dataclass(frozen=True)
class _Traced:
    """A call of a region that was traced."""

    output: Any
    """The graph that Dynamo builds: it may throw one away and begin again."""
    given: _Given
    subgraph: str
    operands: tuple[Any, ...]
    """For each operand of the call, which tensor of those given it is, the name that Dynamo has
    for one of the block's, or the proxy of any other."""
    outputs: tuple[torch.Tensor, ...]
    returned: int | tuple[int, ...]
    """Which outputs are returned."""
    read: str
    """Dynamo's names of what of the block the trace depends on."""

    def fits(self, tx: Any, given: _Given) -> bool:
        """Say whether tracing another call would come to the same graph."""
        return (
            self.output is tx.output
            and self.given.function is given.function
            and self.given.kinds == given.kinds
            and self.given.writes == given.writes
            and _equal_blocks(self.given.block, given.block, self.read)
        )

    def operands_of(self, tx: Any, given: _Given) -> list[fx.Proxy] | None:
        """Return the operands of another call, None if some have memory in common, at which torch
        raises."""
        from torch._dynamo.variables.builder import VariableBuilder

        scope = {"L": tx.output.root_tx.f_locals, "G": tx.output.root_tx.f_globals}
        known: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
        operands: list[fx.Proxy] = []
        for operand in self.operands:
            if isinstance(operand, int):
                operands.append(given.tensors[operand])
            elif isinstance(operand, fx.Proxy):
                operands.append(operand)
            else:
                source = _moved(operand, self.given.source, given.source)
                value = source.get_value(scope, {}, known)
                operands.append(VariableBuilder(tx, source)(value).as_proxy())
        memory = {_storage(proxy.node.meta["example_value"]) for proxy in operands}
        return operands if len(memory) == len(operands) else None

    def again(self, tx: Any, operands: list[fx.Proxy]) -> Any:
        """Note a call in the graph, and return Dynamo's variable for what it returns."""
        from torch._dynamo.variables import TupleVariable
        from torch._dynamo.variables.higher_order_ops import add_call_function, make_attr

        with tx.fake_mode:
            example = tuple(
                torch.empty_strided(
                    out.shape,
                    out.stride(),
                    dtype=out.dtype,
                    device=out.device,
                    requires_grad=out.requires_grad,
                )
                for out in self.outputs
            )
        called = (make_attr(tx, self.subgraph), self.subgraph, *operands)
        items = add_call_function(tx, _REGION, called, {}, example).items  # type: ignore[attr-defined]
        if isinstance(self.returned, int):
            return items[self.returned]
        return TupleVariable([items[index] for index in self.returned])


def _traced(tx: Any, given: _Given, result: Any) -> _Traced | None:
    """Return what was traced last, or None if it cannot be repeated."""
    from torch._dynamo.variables import TensorVariable, TupleVariable

    call = next(node for node in reversed(tx.output.graph.nodes) if node.target is _REGION)
    nodes = [proxy.node for proxy in given.tensors]
    operands: list[Any] = []
    for node in call.args[2:]:
        source = getattr(node.meta.get("grapharg"), "source", None)
        if node in nodes:
            operands.append(nodes.index(node))
        elif source is None or _kind(node.meta["example_value"]) is None:
            return None
        elif _is_of(source, given.source):
            operands.append(source)
        else:
            operands.append(fx.Proxy(node, tx.output.root_tracer))
    outputs = call.meta["example_value"]
    if not all(map(_kind, outputs)):
        return None
    guards = [g for g in tx.output.guards if _is_of(g.originating_source, given.source)]
    single = isinstance(result, TensorVariable)
    if not single and type(result) is not TupleVariable:
        return None
    returned: list[Any] = []
    for item in [result] if single else result.items:
        node = item.as_proxy().node if isinstance(item, TensorVariable) else None
        if node is None or node.target is not operator.getitem or node.args[0] is not call:
            return None
        returned.append(node.args[1])
    return _Traced(
        tx.output,
        given,
        call.args[1],
        tuple(operands),
        tuple(outputs),
        returned[0] if single else tuple(returned),
        "\n".join(guard.originating_source.name for guard in guards),
    )


def _global_state() -> Any:
    from torch._C._dynamo.guards import GlobalStateGuard

    return GlobalStateGuard()


def _unwrapped(variable: Any) -> Any:
    """Return what Dynamo may have put off to look at."""
    from torch._dynamo.variables.lazy import LazyVariableTracker

    return variable.realize() if isinstance(variable, LazyVariableTracker) else variable


def _holds(block: nn.Module, tensor: Any) -> bool:
    return any(held is tensor for module in block.modules() for held in _tensors(module))


def _is_given(source: Any) -> bool:
    """Say whether Dynamo's name is of an argument of the model, not of what that holds, nor of a
    global."""
    while hasattr(source, "base"):
        source = source.base
    return getattr(source, "local_name", None) in ENTRY_PARAMETERS


def _is_of(source: Any, block: Any) -> bool:
    while source != block:
        if not hasattr(source, "base"):
            return False
        source = source.base
    return True


def _moved(source: Any, block: Any, other: Any) -> Any:
    """Return the name of what in another block is where ``source`` is in ``block``."""
    if source == block:
        return other
    return dataclasses.replace(source, base=_moved(source.base, block, other))


def _equal_blocks(one: nn.Module, other: nn.Module, read: str) -> bool:
    """Say whether blocks differ at most in the values of their tensors, and in plain attributes
    whose names are not in ``read``, such as the number of the block."""
    twins = dict(zip(one.modules(), other.modules(), strict=False))
    tensors: dict[int, int] = {}

    def equal(mine: Any, its: Any) -> bool:
        if isinstance(mine, torch.Tensor) and tensors.setdefault(id(mine), id(its)) != id(its):
            return False  # it is there twice, and what is there in the other block is not the same
        if mine is its:
            return True
        if type(mine) is not type(its):
            return False
        if isinstance(mine, torch.Tensor):
            return _kind(mine) == _kind(its) and equal(vars(mine), vars(its))
        if isinstance(mine, nn.Module):
            return twins.get(mine) is its
        if type(mine) in (tuple, list):
            return len(mine) == len(its) and all(map(equal, mine, its))
        if type(mine) in (dict, OrderedDict):
            return equal(list(mine), list(its)) and equal(list(mine.values()), list(its.values()))
        if type(mine) in (set, frozenset):
            return not mine and not its
        if type(mine) is functools.partial:
            return equal(mine.__reduce__()[2], its.__reduce__()[2])
        if isinstance(mine, types.MethodType):
            return equal(mine.__func__, its.__func__) and equal(mine.__self__, its.__self__)
        return type(mine) in _PLAIN and repr(mine) == repr(its)

    def unread(name: str, *values: Any) -> bool:
        return name not in read and all(type(value) in _PLAIN for value in values)

    def equal_modules(mine: nn.Module, its: nn.Module) -> bool:
        ours, theirs = vars(mine), vars(its)
        return (
            type(mine) is type(its)
            and list(ours) == list(theirs)
            and all(
                equal(value, theirs[name]) or unread(name, value, theirs[name])
                for name, value in ours.items()
            )
        )

    return (
        len(twins) == sum(1 for _ in other.modules())
        and all(equal_modules(module, twin) for module, twin in twins.items())
        and len(set(tensors.values())) == len(tensors)
    )


def _kind(tensor: Any) -> tuple[Any, ...] | None:
    """Return what a trace depends on of a tensor, None if its shape is not known."""
    if not isinstance(tensor, torch.Tensor):
        return None
    sizes = (*tensor.shape, *tensor.stride(), tensor.storage_offset())
    if not all(type(size) is int for size in sizes):
        return None
    keys = torch._C._dispatch_keys(tensor)
    return type(tensor), tensor.ndim, sizes, tensor.dtype, tensor.device, tensor.requires_grad, keys
