"""torch.compile backends that replace Inductor: wrong ones, and ones that round differently."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from pytest_int8bench.compiler.graphs import Graph

Compile = Callable[[fx.GraphModule], Callable[..., Any]]


def use(monkeypatch: pytest.MonkeyPatch, compile_graph: Compile) -> None:
    """Compile models by ``compile_graph`` instead of Inductor."""

    class Backend:
        def __init__(self, *options: Any) -> None:
            self.graphs: list[Graph] = []

        def __call__(self, module: fx.GraphModule, inputs: Any, **kwargs: Any) -> Any:
            graph = Graph(module, inputs)
            self.graphs.append(graph)
            return graph.counted(compile_graph(module))

    monkeypatch.setattr("pytest_int8bench.compiler.compiled_model.FusingInductor", Backend)


class Rotary(nn.Module):
    """Rotate inputs by position, in two slice assignments; return two outputs, the second of which
    is small."""

    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        h, half = self.fc1(x), x.shape[-1] // 2
        angles = torch.arange(x.shape[1], device=x.device)[:, None] / torch.arange(1, half + 1)
        first, second = h[..., :half], h[..., half:]
        turned = torch.zeros_like(h)
        turned[..., :half] = first * angles.cos() - second * angles.sin()
        turned[..., half:] = first * angles.sin() + second * angles.cos()
        mixed = F.scaled_dot_product_attention(turned[:, None], turned[:, None], h[:, None])[:, 0]
        return {"tokens": self.fc2(mixed), "pooled": 1e-3 * mixed.mean(1)}


# -- wrong --------------------------------------------------------------------------------------


def drops_a_slice(module: fx.GraphModule) -> Callable[..., Any]:
    """pytorch/pytorch#193183."""
    module.graph.erase_node(module.graph.find_nodes(op="call_function", target=operator.setitem)[1])
    module.recompile()
    return module.forward


def _changing(change: Callable[[torch.Tensor], torch.Tensor], which: int = 0) -> Compile:
    def compile_graph(module: fx.GraphModule) -> Callable[..., Any]:
        def run(*inputs: Any) -> list[Any]:
            outputs = list(module.forward(*inputs))
            outputs[which] = change(outputs[which].clone())
            return outputs

        return run

    return compile_graph


def _negate(part: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[part] *= -1
        return tensor

    return change


def _nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor.view(-1)[-1] = torch.nan
    return tensor


WRONG: dict[str, Compile] = {
    "slice": drops_a_slice,
    "half": _changing(_negate((..., slice(8)))),
    "one output": _changing(lambda t: t * 1.1, which=1),
    "one row": _changing(_negate(-2)),
    "one channel": _changing(lambda t: t.index_fill(-1, torch.tensor([3]), 0)),
    "one element": _changing(_negate((-1, 2, 5))),
    "large values": _changing(lambda t: t.clamp(max=float(t.float().quantile(0.99)))),
    "nan": _changing(_nan),
}


# -- right --------------------------------------------------------------------------------------


class _Linear(TorchFunctionMode):
    """Compute linear layers in another way."""

    def __init__(self, linear: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self._linear = linear

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (self._linear if func is F.linear else func)(*args, **(kwargs or {}))


def _linear_as(linear: Callable[..., torch.Tensor]) -> Compile:
    def compile_graph(module: fx.GraphModule) -> Callable[..., Any]:
        def run(*inputs: Any) -> Any:
            with _Linear(linear):
                return module.forward(*inputs)

        return run

    return compile_graph


def _split(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Add rounded partial sums, like kernels with split K."""
    parts = zip(x.chunk(4, -1), weight.chunk(4, -1), strict=True)
    return sum((F.linear(a, b) for a, b in parts), bias)


def _reversed(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.linear(x.flip(-1), weight.flip(-1), bias)


def unrounded(module: fx.GraphModule) -> Callable[..., Any]:
    """Keep FP32 after each linear layer, as fused kernels do."""

    def linear(*operands: torch.Tensor) -> torch.Tensor:
        return F.linear(*(operand.float() for operand in operands))

    def run(*inputs: Any) -> list[torch.Tensor]:
        with _Linear(linear):
            return [output.to(torch.bfloat16) for output in module.forward(*inputs)]

    return run


def unsteady(module: fx.GraphModule) -> Callable[..., Any]:
    """Round differently at each call, like kernels with atomic additions."""

    def run(*inputs: Any) -> list[Any]:
        outputs = module.forward(*inputs)
        return [t + (t * torch.rand(t.shape) * 2**-8).to(t.dtype) for t in outputs]

    return run


RIGHT: dict[str, Compile] = {
    "same": lambda module: module.forward,
    "split": _linear_as(_split),
    "reversed": _linear_as(_reversed),
    "unsteady": unsteady,
}
