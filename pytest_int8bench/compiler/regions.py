"""Repeated blocks of a model, such as the layers of a transformer, which compile once."""

from __future__ import annotations

import itertools
import types
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator
from types import TracebackType
from typing import Any

import torch
from torch import nn

from pytest_int8bench.compiler.torch_workarounds.dynamo import set_region_reuse

_CONTAINERS = (nn.ModuleList, nn.Sequential)
_MARK = "__marked_compile_region_fn__"  # of torch.compiler.nested_compile_region


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of ``model`` that repeat and can be regions, in order.

    A block is a child of an ``nn.ModuleList`` or ``nn.Sequential`` which has another child of the
    same class and structure: the same modules inside, with parameters and buffers of the same
    names, shapes and dtypes. Of blocks inside blocks, the outer ones count. Linear layers and
    modules without modules inside are no blocks: they would be cut off from the operators that they
    fuse with.
    """
    return _search(model)[0]


def reason_left_out(model: nn.Module) -> str | None:
    """Return why blocks of ``model`` that repeat cannot be regions, None if all can: they hold
    tensor subclasses, such as weights of torchao, or have a ``forward`` set on the instance.

    Blocks that the user marked as regions are not left out.
    """
    return next(iter(_search(model)[1]), None)


def _search(model: nn.Module) -> tuple[list[nn.Module], dict[str, None]]:
    """Return blocks that repeat, and the reasons why others that repeat cannot be regions."""
    found: dict[nn.Module, None] = {}
    reasons: dict[str, None] = {}
    for module in _outside(model, found):
        if not isinstance(module, _CONTAINERS):
            continue
        groups: dict[Hashable, dict[nn.Module, str | None]] = defaultdict(dict)
        for child in module.children():
            if _is_block(child):
                groups[_structure(child)][child] = _refused(child)
        for group in groups.values():
            able = [child for child, reason in group.items() if reason is None]
            if len(able) > 1:
                found |= dict.fromkeys(able)
            if len(group) > 1:
                reasons |= {reason: None for reason in group.values() if reason is not None}
    return list(found), reasons


class Regions:
    """Context in which Dynamo traces blocks as regions, each kind of them compiled once.

    Inside, a block has a ``forward`` of its own, which calls its class's as a function that
    ``torch.compiler.nested_compile_region`` marked. Its type, its state and its hooks are the
    user's, and eager calls outside are what they were. Dynamo's guards look for that ``forward``,
    so every call of the compiled graph has to be inside. May be entered again.
    """

    def __init__(self, blocks: list[nn.Module]) -> None:
        kinds = {kind: _region_forward(kind) for kind in map(type, blocks)}
        # In the modules' dictionaries, past nn.Module's own __setattr__: this is in the clock.
        self._changes = [
            (vars(block), types.MethodType(kinds[type(block)], block)) for block in blocks
        ]

    def __len__(self) -> int:
        """Return the number of blocks."""
        return len(self._changes)

    def __enter__(self) -> Regions:
        if self._changes:
            set_region_reuse(False)
        for attributes, forward in self._changes:
            attributes["forward"] = forward
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        for attributes, _ in self._changes:
            attributes.pop("forward", None)
        if self._changes:
            set_region_reuse(True)


def _outside(module: nn.Module, blocks: dict[nn.Module, None]) -> Iterator[nn.Module]:
    """Yield ``module`` and those in it, but for what is in ``blocks`` by then."""
    if module in blocks:
        return
    yield module
    for child in module.children():
        yield from _outside(child, blocks)


def _is_block(module: nn.Module) -> bool:
    return (
        not isinstance(module, nn.Linear)
        and next(module.children(), None) is not None
        and next(_tensors(module), None) is not None
        and not hasattr(type(module).forward, _MARK)
    )


def _refused(block: nn.Module) -> str | None:
    """Return why ``block`` cannot be a region, if it cannot."""
    if "forward" in vars(block):
        return "a block has a forward set on the instance"
    kinds = {type(tensor) for tensor in _tensors(block)} - {torch.Tensor, nn.Parameter}
    if kinds:
        names = " and ".join(sorted(kind.__name__ for kind in kinds))
        return f"a block holds tensors of type {names}, which no region takes"
    return None


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    return itertools.chain(module.parameters(), module.buffers())


def _structure(block: nn.Module) -> Hashable:
    tensors = [*block.named_parameters(), *block.named_buffers()]
    return (
        tuple((name, type(module)) for name, module in block.named_modules()),
        tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors),
    )


def _in_order(value: Any) -> Any:
    """Return a tensor whose elements are transposed as a contiguous one, and anything else as it
    is: a mask that was expanded would grow."""
    if not isinstance(value, torch.Tensor) or value.is_contiguous():
        return value
    elements = 1
    for stride, size in sorted(zip(value.stride(), value.shape, strict=True)):
        if stride != elements and size != 1:
            return value
        elements *= size
    return value.contiguous()


def _region_forward(kind: type[nn.Module]) -> Callable[..., Any]:
    """Return the ``forward`` of blocks of class ``kind`` inside regions."""
    original: Any = kind.forward

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return original(self, *args, **kwargs)

    # Not on the original: the mark leaves attributes on the function it is given.
    compiled_once = torch.compiler.nested_compile_region(forward)

    def entry(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # Inductor of torch 2.11 checks that what enters a region is laid out as it was traced, and
        # lays out what is transposed in another way.
        named = {name: _in_order(value) for name, value in kwargs.items()}
        return compiled_once(self, *map(_in_order, args), **named)

    return entry
