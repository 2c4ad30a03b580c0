"""Find the context of a linear layer in its model: repeated blocks, experts, adapters."""

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
#: How many modules above a linear layer may hold the experts that it routes to, or the layer that
#: it adapts.
_REACH = 3
#: More linear layers than a layer with its adapters has.
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
        """Return whether a module is an attention, or holds one."""
        return name in self._attending

    def is_normed_mlp(self, name: str) -> bool:
        """Return whether a module holds a norm and several linear layers."""
        return name in self._normed and self._linears[name] > 1

    def is_batch_normed(self, name: str) -> bool:
        """Return whether a module is a layer with the batch norm of its outputs."""
        parts = self._modules[name].children()
        return any(isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d) for part in parts)

    def is_stage(self, name: str) -> bool:
        """Return whether a module holds repeated blocks itself, as the stages of a pyramid do."""
        return name in self._stages

    def is_block(self, name: str) -> bool:
        """Return whether a module is one of several alike, or numbered, and holds linear layers."""
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
        """Return whether a linear layer has one output for each of the experts beside it."""
        count = layer.out_features
        if any(part.in_features == count for part in self._beside(layer, name)):
            return False  # the first layer of an MLP
        below: nn.Module = layer
        for holder_name in above(name)[:_REACH]:
            holder = self._modules[holder_name]
            if not isinstance(holder, nn.ModuleList):  # whose items are not experts of each other
                held = [child for child in holder.children() if child is not below]
                counts = [_expert_counts(child, layer.in_features) for child in held]
                counts.append(_stacked_counts(holder, layer.in_features))
                if any(count in found for found in counts):
                    return True
            if self._linears[holder_name] > 1:  # then it is a part of its own beside the experts
                return False
            below = holder
        return False

    def is_adapter(self, layer: nn.Linear, name: str) -> bool:
        """Return whether a linear layer is half of a low-rank pair beside a layer of full size."""
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
        """Return whether a linear layer is the gate of the MLP that holds it: the MLP has a twin of
        its size, and a layer that goes back."""
        size = (layer.in_features, layer.out_features)
        sizes = [
            (part.in_features, part.out_features)
            for part in self._modules[holder].modules()
            if isinstance(part, nn.Linear) and part is not layer
        ]
        return size[0] != size[1] and size in sizes and size[::-1] in sizes

    def _beside(self, layer: nn.Linear, name: str) -> list[nn.Linear]:
        parts = self._modules[name.rpartition(".")[0]].children()
        return [part for part in parts if isinstance(part, nn.Linear) and part is not layer]


def above(name: str) -> list[str]:
    """Return the names of the modules that hold a module, the closest first."""
    names = []
    while name:
        name = name.rpartition(".")[0]
        names.append(name)
    return names


def is_numbered(part: str) -> bool:
    """Return whether a part of a dotted name counts: ``3``, ``block3`` or ``encoder_layer_3``."""
    return _NUMBERED.fullmatch(part) is not None


_current: ContextVar[Structure | None] = ContextVar("structure", default=None)


@contextmanager
def within(model: nn.Module) -> Iterator[Structure]:
    """Let filters that are asked in here know the model that the modules belong to."""
    structure = Structure(model)
    token = _current.set(structure)
    try:
        yield structure
    finally:
        _current.reset(token)


def current() -> Structure | None:
    """Return the structure of the model that a filter is asked about, None if it is not known."""
    return _current.get()


def _expert_counts(module: nn.Module, width: int) -> set[int]:
    """Return how many experts of ``width`` inputs a module holds, by each way of holding them."""
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
    """Return the first dimensions of a module's own 3-D weights, one expert an entry."""
    own = [p.shape for p in module.parameters(recurse=False) if p.dim() == 3]
    return {shape[0] for shape in own if width in shape[1:] and 1 not in shape}


def _is_adapted(base: nn.Linear, parts: list[nn.Linear]) -> bool:
    """Return whether all other layers are low-rank pairs with the inputs and outputs of
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
