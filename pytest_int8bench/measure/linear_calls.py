"""Record the linear layers that a forward calls, with their sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from pytest_int8bench.compiler.graphs import Graph, watched


@dataclass(frozen=True)
class LinearCall:
    """One call of a linear layer in a forward."""

    name: str
    """The layer's dotted name in the model."""
    rows: int
    """M of the matmul: the product of all input dimensions but the last."""
    size: Size
    """K and N."""
    first: bool = True
    """Whether no earlier call took the same input, which is quantized only once."""

    @property
    def ops(self) -> int:
        """Number of operations; a multiply-add counts as two."""
        return 2 * self.rows * self.size.inputs * self.size.outputs

    @property
    def activations(self) -> int:
        """Elements of input and output."""
        return self.rows * sum(self.size)

    def traffic(self, input_bytes: int, weight_bytes: float, output_bytes: int) -> float:
        """Return the fewest bytes read and written, given the bytes per element of each tensor."""
        inputs, outputs = self.size
        read = inputs * (self.rows * input_bytes + outputs * weight_bytes)
        return read + self.rows * outputs * output_bytes


class _Watch(TorchDispatchMode):
    """Records calls of linear layers without module hooks, which could make compiled graphs
    recompile."""

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._names = {
            id(module.weight): name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear)
        }
        self._seen = WeakIdKeyDictionary()
        self.calls: list[LinearCall] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.linear.default:
            self._note(*args[:2])
        return func(*args, **(kwargs or {}))

    def _note(self, x: torch.Tensor, weight: torch.Tensor) -> None:
        name = self._names.get(id(weight))
        if name is None:
            return
        size = Size(weight.shape[1], weight.shape[0])
        rows = x.numel() // max(size.inputs, 1)
        self.calls.append(LinearCall(name, rows, size, first=x not in self._seen))
        self._seen[x] = True


def linear_calls(
    model: nn.Module, run: Callable[[], object], graphs: Sequence[Graph] = ()
) -> tuple[LinearCall, ...]:
    """Run a forward of ``model`` and return the calls of its linear layers, in order.

    Args:
        model: the model.
        run: one forward of it.
        graphs: the model's compiled graphs.
    """
    watch = _Watch(model)
    # Outside inference mode, linear is decomposed.
    with torch.inference_mode(), watched(watch, graphs):
        run()
    return tuple(watch.calls)


class Size(NamedTuple):
    """Return the input and output widths of a linear layer."""

    inputs: int
    outputs: int
