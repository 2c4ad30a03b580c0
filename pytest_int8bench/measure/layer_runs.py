"""Record how one forward uses each linear layer's weight, operator by operator."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pytest_int8bench.compiler.graphs import Graph, watched
from pytest_int8bench.measure.linear_calls import Size
from pytest_int8bench.quantization.api import is_quantized
from pytest_int8bench.quantization.stored import stored_weight

# Composite operators such as linear are dispatched whole in inference mode, else in parts.
_MATMULS = {
    "linear", "matmul", "mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "einsum", "tensordot",
    "inner", "_addmm_activation", "_int_mm", "_scaled_mm", "_weight_int8pack_mm",
    "dequantized_linear", "_native_multi_head_attention", "_transformer_encoder_layer_fwd",
}  # fmt: skip


@dataclass
class LayerRun:
    """Use of a layer's weight in one forward."""

    size: Size
    storage: int
    """Identifies the storage that holds the weight. Layers that share one may share a matmul."""
    quantized: bool
    quantized_work: float = 0.0
    """Multiplications in matmuls whose operands are both quantized."""
    other_work: float = 0.0
    """Multiplications in other matmuls, e.g. with a dequantized weight."""
    readers: set[str] = field(default_factory=set)
    """Other operators that read the weight."""
    hidden: bool = False
    """Whether a higher-order operator took the weight; its inner operators were not seen."""

    @property
    def work(self) -> float:
        """Multiplications in all matmuls."""
        return self.quantized_work + self.other_work

    @property
    def rows(self) -> float:
        """Rows multiplied with the weight, over all calls."""
        return self.work / max(self.size.inputs * self.size.outputs, 1)

    @property
    def was_used(self) -> bool:
        """Whether the forward read the weight."""
        return bool(self.work or self.readers or self.hidden)


#: Dotted name of a layer -> how a forward used its weight.
LayerRuns = Mapping[str, LayerRun]


class _Watch(TorchDispatchMode):
    """Records every operator that reads a weight, or a copy of it in another dtype or layout.

    It watches operators instead of modules, because a forward need not call the module to use its
    weight.
    """

    supports_higher_order_operators = True

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.runs: dict[str, LayerRun] = {}
        # Weak references keep the storages' identifiers from being reused after they are freed.
        self._held: dict[StorageWeakRef, list[tuple[int, int, str]]] = defaultdict(list)
        self._copies: dict[StorageWeakRef, frozenset[str]] = {}
        for name, layer in layers.items():
            weight = stored_weight(layer)
            storage = StorageWeakRef(weight.untyped_storage())
            self._held[storage].append((*_extent(weight), name))
            outputs, inputs = weight.shape
            self.runs[name] = LayerRun(Size(inputs, outputs), storage.cdata, is_quantized(layer))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(kind not in (torch.Tensor, nn.Parameter) for kind in types):
            return NotImplemented  # the subclass runs operators on the tensors that it wraps
        output = func(*args, **kwargs)
        operands = [leaf for leaf in tree_leaves((args, kwargs)) if _is_strided(leaf)]
        for operand in operands:
            if names := self._layers_of(operand):
                self._note(func, operand, names, operands, output)
        return output

    def _layers_of(self, tensor: torch.Tensor) -> Collection[str]:
        storage = StorageWeakRef(tensor.untyped_storage())
        if storage in self._held:
            start, stop = _extent(tensor)
            return [n for first, last, n in self._held[storage] if first < stop and start < last]
        return self._copies.get(storage, ())

    def _note(
        self,
        func: Any,
        weight: torch.Tensor,
        names: Collection[str],
        operands: list[torch.Tensor],
        output: Any,
    ) -> None:
        outputs = [leaf for leaf in tree_leaves(output) if _is_strided(leaf)]
        kept = weight.untyped_storage().data_ptr()
        new = [tensor for tensor in outputs if tensor.untyped_storage().data_ptr() != kept]
        if not new:  # a view
            return
        runs = [self.runs[name] for name in names]
        others = [other for other in operands if other is not weight]
        if weight.dim() > 1 and (kind := _matmul_kind(func, weight, others, runs[0].size.inputs)):
            for run in runs:  # several if layers share a weight
                work = new[0].numel() * run.size.inputs / len(runs)
                setattr(run, kind, getattr(run, kind) + work)
            return
        if isinstance(func, torch._ops.HigherOrderOperator):
            for run in runs:
                run.hidden = True
            return
        for run in runs:
            run.readers.add(str(func))
        for tensor in new:
            if tensor.numel() == weight.numel():
                self._copies[StorageWeakRef(tensor.untyped_storage())] = frozenset(names)


def _matmul_kind(
    func: Any, weight: torch.Tensor, others: list[torch.Tensor], inputs: int
) -> str | None:
    """Return the field of :class:`LayerRun` that counts an operator, or None for a non-matmul."""
    # An operator of any name on one-byte weights and one-byte rows (by shape, not zero points).
    if weight.itemsize == 1 and any(o.itemsize == 1 and o.shape[-1:] == (inputs,) for o in others):
        return "quantized_work"
    if getattr(func, "__name__", "").partition(".")[0] not in _MATMULS:
        return None
    # Devices without INT8 matmuls compute them exactly in wider integers.
    exact = not weight.is_floating_point() and all(not o.is_floating_point() for o in others)
    return "quantized_work" if exact else "other_work"


def _is_strided(value: Any) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.layout is torch.strided
        and type(value) in (torch.Tensor, nn.Parameter)
    )


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """Return the range of bytes that a tensor spans in its storage; the end is exclusive."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    elements = sum((size - 1) * int(stride) for size, stride in steps) + 1 if tensor.numel() else 0
    start = int(tensor.storage_offset())
    return start * tensor.itemsize, (start + elements) * tensor.itemsize


def layer_runs(
    model: nn.Module, run: Callable[[], object], graphs: Sequence[Graph] = ()
) -> LayerRuns:
    """Run a forward of ``model`` and return how it used each linear layer's weight.

    Args:
        model: the model, quantized or not.
        run: runs one forward of the model.
        graphs: the model's compiled graphs.
    """
    watch = _Watch(dict(_linear_layers(model)))
    # Parts that an eager model compiles itself would not dispatch their operators one by one.
    stance = contextlib.nullcontext() if graphs else torch.compiler.set_stance("force_eager")
    with stance, watched(watch, graphs):
        run()
    return watch.runs


def _linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and stored_weight(module).dim() == 2:
            yield name, module
