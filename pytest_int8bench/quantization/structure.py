"""Recognize repeated blocks, experts and adapters around the linear layers of a model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import nn

_NUMBERED = re.compile(r"\d+|(\w+_)?(block|layer|stage)s?_?\d+")
_ATTENTION = re.compile(r"\w*(attn|attention)\w*", re.IGNORECASE)
_NORM = re.compile(r"\w*norm\w*", re.IGNORECASE)
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
#: How many levels above a linear layer to look for the experts that it routes to, or for the layer
#: that it adapts.
_REACH = 3
#: The largest number of linear layers in a module that holds a layer with its adapters.
_MANY = 64


class Structure:
    """The modules of one model by their dotted names."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = dict(model.named_modules())
        self._blocks: dict[str, bool] = {}
        self._linears: Counter[str] = Counter()
        self._normed: set[str] = set()
        self._attending: set[str] = set()
        for name, module in self._modules.items():
            kind = type(module).__name__
            if isinstance(module, nn.Linear):
                self._linears.update(above(name))
            elif _NORM.fullmatch(kind):
                self._normed.update(above(name))
            if _ATTENTION.fullmatch(kind) or _ATTENTION.fullmatch(name.rpartition(".")[2]):
                self._attending.update((name, *above(name)))
        self._stages: set[str] = set()
        for name in self._normed:
            if self._linears[name] and is_numbered(name.rpartition(".")[2]):
                self._stages.update(above(name))

    def attends(self, name: str) -> bool:
        """Return whether a module is or contains an attention module."""
        return name in self._attending

    def is_normed_mlp(self, name: str) -> bool:
        """Return whether a module contains a norm and several linear layers."""
        return name in self._normed and self._linears[name] > 1

    def is_batch_normed(self, name: str) -> bool:
        """Return whether a module pairs a layer with a batch norm of its outputs."""
        parts = self._modules[name].children()
        return any(isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d) for part in parts)

    def is_stage(self, name: str) -> bool:
        """Return whether a module contains repeated blocks, such as a stage of a pyramid."""
        return name in self._stages

    def is_block(self, name: str) -> bool:
        """Return whether a module is a repeated block: it contains linear layers, and is numbered
        or has siblings of the same class."""
        if name not in self._blocks:
            self._blocks[name] = self._is_block(name)
        return self._blocks[name]

    def _is_block(self, name: str) -> bool:
        parent, _, part = name.rpartition(".")
        if not self._linears[name]:
            return False
        if is_numbered(part) and self.is_normed_mlp(name):
            return True
        if self._linears[name] < 2 or not (is_numbered(part) or self.is_normed_mlp(name)):
            return False
        kind = type(self._modules[name])
        if not is_numbered(part) and (name in self._stages or kind in _CONTAINERS):
            return False
        return sum(type(sibling) is kind for sibling in self._modules[parent].children()) > 1

    def is_router(self, layer: nn.Linear, name: str) -> bool:
        """Return whether a linear layer has one output per expert near it."""
        count = layer.out_features
        if any(part.in_features == count for part in self._sibling_linears(layer, name)):
            return False  # the first layer of an MLP
        below: nn.Module = layer
        for holder_name in above(name)[:_REACH]:
            holder = self._modules[holder_name]
            if not isinstance(holder, nn.ModuleList):  # its items do not route to each other
                held = [child for child in holder.children() if child is not below]
                counts = [_expert_counts(child, layer.in_features) for child in held]
                counts.append(_stacked_counts(holder, layer.in_features))
                if any(count in found for found in counts):
                    return True
            if self._linears[holder_name] > 1:  # not just a wrapper of the router
                return False
            below = holder
        return False

    def is_adapter(self, layer: nn.Linear, name: str) -> bool:
        """Return whether a linear layer is half of a low-rank pair next to a full-size layer."""
        for holder_name in above(name)[:_REACH]:
            if not 3 <= self._linears[holder_name] <= _MANY:
                continue
            holder = self._modules[holder_name]
            own = [part for part in holder.children() if isinstance(part, nn.Linear)]
            others = [part for part in holder.modules() if isinstance(part, nn.Linear)]
            if len(own) > 3:  # projections side by side
                continue
            if any(base is not layer and _is_adapted(base, others) for base in own):
                return True
        return False

    def is_gated_unit(self, layer: nn.Linear, holder: str) -> bool:
        """Return whether a linear layer is the gate of the MLP that holds it: the MLP has another
        layer of its size, and one that projects back."""
        size = (layer.in_features, layer.out_features)
        sizes = [
            (part.in_features, part.out_features)
            for part in self._modules[holder].modules()
            if isinstance(part, nn.Linear) and part is not layer
        ]
        return size[0] != size[1] and size in sizes and size[::-1] in sizes

    def _sibling_linears(self, layer: nn.Linear, name: str) -> list[nn.Linear]:
        parts = self._modules[name.rpartition(".")[0]].children()
        return [part for part in parts if isinstance(part, nn.Linear) and part is not layer]


def above(name: str) -> list[str]:
    """Return the names of all ancestors of a module, the closest first."""
    names = []
    while name:
        name = name.rpartition(".")[0]
        names.append(name)
    return names


def is_numbered(part: str) -> bool:
    """Return whether a part of a dotted name is numbered: ``3``, ``block3``, ``layer_3``."""
    return _NUMBERED.fullmatch(part) is not None


_current: ContextVar[Structure | None] = ContextVar("structure", default=None)


@contextmanager
def within(model: nn.Module) -> Iterator[Structure]:
    """Let filters that are called in this context see the structure of ``model``."""
    structure = Structure(model)
    token = _current.set(structure)
    try:
        yield structure
    finally:
        _current.reset(token)


def current() -> Structure | None:
    """Return the structure of the current model, or None outside :func:`within`."""
    return _current.get()


def _expert_counts(module: nn.Module, width: int) -> set[int]:
    """Return the numbers of experts with ``width`` inputs in a module, stacked or as a list."""
    counts = _stacked_counts(module, width)
    for held in (module, *module.children()):
        if isinstance(held, nn.ModuleList | nn.ModuleDict) and len(held) > 1:
            experts = list(held.children())
            takes = [
                isinstance(part, nn.Linear) and part.in_features == width
                for part in experts[0].modules()
            ]
            if any(takes) and len({type(expert) for expert in experts}) == 1:
                counts.add(len(experts))
    return counts


def _stacked_counts(module: nn.Module, width: int) -> set[int]:
    """Return the first dimensions of a module's own 3-D weights, one entry per expert."""
    own = [p.shape for p in module.parameters(recurse=False) if p.dim() == 3]
    return {shape[0] for shape in own if width in shape[1:] and 1 not in shape}


def _is_adapted(base: nn.Linear, parts: list[nn.Linear]) -> bool:
    """Return whether all other layers are low-rank pairs with the same inputs and outputs as
    ``base``."""
    limit = min(base.in_features, base.out_features) // 2
    into = out = 0
    for part in parts:
        if part is base:
            continue
        if part.in_features == base.in_features and part.out_features <= limit:
            into += 1
        elif part.out_features == base.out_features and part.in_features <= limit:
            out += 1
        else:
            return False
    return into > 0 and into == out
