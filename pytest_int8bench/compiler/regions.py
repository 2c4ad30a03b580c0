"""Repeated blocks of a model, such as the layers of a transformer, which compile once."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Hashable, Iterator
from types import TracebackType
from typing import Any

import torch
from torch import nn

from pytest_int8bench.compiler.torch_workarounds import set_region_reuse

_CONTAINERS = (nn.ModuleList, nn.Sequential)
# What transformers puts around the forward of its layers: the type it asks for matters in training.
_CHECKPOINTING = "GradientCheckpointingLayer.__init_subclass__.<locals>.forward_with_checkpointing"
_MARK = "__marked_compile_region_fn__"  # of torch.compiler.nested_compile_region


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of ``model`` that repeat, in order.

    A block is a child of an ``nn.ModuleList`` or ``nn.Sequential`` which has another child of the
    same class and structure: the same modules inside, with parameters and buffers of the same
    names, shapes and dtypes. Of blocks inside blocks, the outer ones count. No blocks are

    - linear layers and modules without modules inside: they would be cut off from the operators
      that they fuse with;
    - modules that hold a tensor subclass, such as a weight of torchao, which no region takes;
    - modules whose ``forward`` is set on the instance, or a region already, or asks for a type,
      which is another one inside a region.
    """
    found: dict[nn.Module, None] = {}
    for module in _outside(model, found):
        if not isinstance(module, _CONTAINERS):
            continue
        groups: dict[Hashable, list[nn.Module]] = defaultdict(list)
        for child in module.children():
            if _may_be_block(child):
                groups[_structure(child)].append(child)
        found |= {child: None for group in groups.values() if len(group) > 1 for child in group}
    return list(found)


class Regions:
    """Context in which Dynamo traces blocks as regions, each kind of them compiled once.

    Inside, a block's class is one made for it: the same but for ``forward``, which is marked by
    ``torch.compiler.nested_compile_region``; ``type(block)`` is not the user's class then. So the
    block itself, its state and its hooks are the user's own, a copy of the model made later knows
    nothing of it, and eager calls outside are what they were. Dynamo's guards look at the class, so
    every call of the compiled graph has to be inside. May be entered again.
    """

    def __init__(self, blocks: list[nn.Module]) -> None:
        made: dict[type, type | None] = {}
        self._changes: list[tuple[nn.Module, type, type]] = []
        for block in blocks:
            own = type(block)
            if own not in made:
                made[own] = _region_class(block)
            if (region := made[own]) is not None:
                self._changes.append((block, own, region))

    def __len__(self) -> int:
        """Return the number of blocks."""
        return len(self._changes)

    def __enter__(self) -> Regions:
        if self._changes:
            set_region_reuse(False)
        # Past nn.Module's own __setattr__: this is in the clock.
        for block, _, region in self._changes:
            object.__setattr__(block, "__class__", region)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        for block, own, _ in self._changes:
            object.__setattr__(block, "__class__", own)
        if self._changes:
            set_region_reuse(True)


def _outside(module: nn.Module, blocks: dict[nn.Module, None]) -> Iterator[nn.Module]:
    """Yield ``module`` and those in it, but for what is in ``blocks`` by then."""
    if module in blocks:
        return
    yield module
    for child in module.children():
        yield from _outside(child, blocks)


def _may_be_block(module: nn.Module) -> bool:
    tensors = [*module.parameters(), *module.buffers()]
    return (
        not isinstance(module, nn.Linear)
        and next(module.children(), None) is not None
        and bool(tensors)
        and all(type(tensor) in (torch.Tensor, nn.Parameter) for tensor in tensors)
        and "forward" not in vars(module)
        and not hasattr(type(module).forward, _MARK)
        and not _asks_for_type(type(module).forward)
    )


def _asks_for_type(forward: Any) -> bool:
    code = getattr(forward, "__code__", None)
    if code is not None and code.co_qualname == _CHECKPOINTING:
        return _asks_for_type(forward.__wrapped__)
    return code is not None and not {"type", "__class__"}.isdisjoint(code.co_names)


def _structure(block: nn.Module) -> Hashable:
    tensors = [*block.named_parameters(), *block.named_buffers()]
    return (
        tuple((name, type(module)) for name, module in block.named_modules()),
        tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors),
    )


@contextlib.contextmanager
def _unannounced(own: type) -> Iterator[None]:
    """Keep a subclass that is made inside from the ``__init_subclass__`` of ``own``, which may keep
    what it is given."""
    before = vars(own).get("__init_subclass__")
    own.__init_subclass__ = classmethod(lambda cls: None)  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        if before is None:
            del own.__init_subclass__
        else:
            own.__init_subclass__ = before  # type: ignore[method-assign]


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


def _region_class(block: nn.Module) -> type | None:
    """Return the class for a block inside regions, or None if its class allows no such thing."""
    own: Any = type(block)
    original = own.forward

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return original(self, *args, **kwargs)

    # Not on the original: the mark leaves attributes on the function it is given.
    compiled_once = torch.compiler.nested_compile_region(forward)

    def entry(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # Inductor of torch 2.11 checks that what enters a region is laid out as it was traced, and
        # lays out what is transposed in another way.
        named = {name: _in_order(value) for name, value in kwargs.items()}
        return compiled_once(self, *map(_in_order, args), **named)

    names = {"forward": entry, "__module__": own.__module__}
    try:
        with _unannounced(own):
            region: type = type(own)(
                own.__name__, (own,), {**names, "__qualname__": own.__qualname__}
            )
        with_region = object.__new__(own)
        object.__setattr__(with_region, "__class__", region)
    except TypeError:  # of a metaclass, or another layout
        return None
    return region
