"""Compile repeated blocks of a model, such as the layers of a transformer, only once."""

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
    """Return the repeated blocks of ``model`` that can be regions, in order.

    A repeated block is a child of an ``nn.ModuleList`` or ``nn.Sequential`` with another child of
    the same class and structure: the same submodules, with parameters and buffers of the same
    names, shapes and dtypes. Of nested blocks, only the outermost are returned. Linear layers and
    modules without submodules do not count as blocks: as regions, they could not fuse with the
    operators around them.
    """
    return _search(model)[0]


def reason_left_out(model: nn.Module) -> str | None:
    """Return why some repeated blocks of ``model`` cannot be regions, or None if all can: they hold
    tensor subclasses, such as torchao's weights, or have a ``forward`` set on the instance.

    Blocks that the user already marked as regions do not count.
    """
    return next(iter(_search(model)[1]), None)


def _search(model: nn.Module) -> tuple[list[nn.Module], dict[str, None]]:
    """Return the repeated blocks that can be regions, and the reasons why the others cannot."""
    found: dict[nn.Module, None] = {}
    reasons: dict[str, None] = {}
    for module in _modules_outside(found, model):
        if not isinstance(module, _CONTAINERS):
            continue
        groups: dict[Hashable, dict[nn.Module, str | None]] = defaultdict(dict)
        for child in module.children():
            if _is_block(child):
                groups[_structure(child)][child] = _block_problem(child)
        for group in groups.values():
            able = [child for child, reason in group.items() if reason is None]
            if len(able) > 1:
                found |= dict.fromkeys(able)
            if len(group) > 1:
                reasons |= {reason: None for reason in group.values() if reason is not None}
    return list(found), reasons


class Regions:
    """Context in which Dynamo traces blocks as regions and compiles each kind of block once.

    Inside the context, each block instance has a ``forward`` that calls its class's ``forward``,
    marked with ``torch.compiler.nested_compile_region``. The block's type, state and hooks do not
    change, and neither do eager calls outside the context. Dynamo guards on the instance's
    ``forward``, so every call of the compiled graph must be inside. The context can be entered
    repeatedly.
    """

    def __init__(self, blocks: list[nn.Module]) -> None:
        kinds = {kind: _region_forward(kind) for kind in map(type, blocks)}
        # Write to the modules' dictionaries, because nn.Module.__setattr__ is slow and this runs
        # during timing.
        self._changes = [
            (vars(block), types.MethodType(kinds[type(block)], block)) for block in blocks
        ]

    def __len__(self) -> int:
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


def _modules_outside(blocks: dict[nn.Module, None], module: nn.Module) -> Iterator[nn.Module]:
    """Yield ``module`` and its descendants, except ``blocks`` and their descendants. The caller may
    add to ``blocks`` while it iterates."""
    if module in blocks:
        return
    yield module
    for child in module.children():
        yield from _modules_outside(blocks, child)


def _is_block(module: nn.Module) -> bool:
    return (
        not isinstance(module, nn.Linear)
        and next(module.children(), None) is not None
        and next(_tensors(module), None) is not None
        and not hasattr(type(module).forward, _MARK)
    )


def _block_problem(block: nn.Module) -> str | None:
    """Return why ``block`` cannot be a region, or None if it can."""
    if "forward" in vars(block):
        return "a block has a forward set on the instance"
    kinds = {type(tensor) for tensor in _tensors(block)} - {torch.Tensor, nn.Parameter}
    if kinds:
        names = " and ".join(sorted(kind.__name__ for kind in kinds))
        return f"a block holds tensors of type {names}, which regions do not support"
    return None


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    return itertools.chain(module.parameters(), module.buffers())


def _structure(block: nn.Module) -> Hashable:
    tensors = [*block.named_parameters(), *block.named_buffers()]
    return (
        tuple((name, type(module)) for name, module in block.named_modules()),
        tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors),
    )


def _contiguous_if_transposed(value: Any) -> Any:
    """Return a contiguous copy of a transposed tensor, and any other value unchanged. In
    particular, do not copy an expanded mask, which would grow."""
    if not isinstance(value, torch.Tensor) or value.is_contiguous():
        return value
    elements = 1
    for stride, size in sorted(zip(value.stride(), value.shape, strict=True)):
        if stride != elements and size != 1:
            return value
        elements *= size
    return value.contiguous()


def _region_forward(kind: type[nn.Module]) -> Callable[..., Any]:
    """Return the ``forward`` of blocks of class ``kind`` inside :class:`Regions`."""
    original: Any = kind.forward

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return original(self, *args, **kwargs)

    # Mark a wrapper, because marking sets attributes on the function.
    compiled_once = torch.compiler.nested_compile_region(forward)

    def entry(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # In torch 2.11, Inductor asserts that the inputs of a region have the traced layout, but
        # gives transposed inputs another one.
        named = {name: _contiguous_if_transposed(value) for name, value in kwargs.items()}
        return compiled_once(self, *map(_contiguous_if_transposed, args), **named)

    return entry
