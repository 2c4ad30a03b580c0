"""Record the calls of ``scaled_dot_product_attention`` in a forward or in a traced graph."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pytest_int8bench.attention import allowed_backends
from pytest_int8bench.compiler.fusion.nodes import subgraphs
from pytest_int8bench.compiler.graphs import Graph, watched
from pytest_int8bench.compiler.torch_workarounds.names import SETTING_CALLS

_SDPA = torch.ops.aten.scaled_dot_product_attention
# Functions that call scaled_dot_product_attention and that Dynamo does not trace into.
_AROUND_SDPA = (F.multi_head_attention_forward,)


@dataclass(frozen=True)
class Layout:
    """Shape, strides, dtype and device of a tensor."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Layout:
        """Return the layout of ``tensor`` as attention receives it, after autocast.

        Raises:
            ValueError: if a size is unknown until the model runs.
        """
        device, dtype = tensor.device, tensor.dtype
        if dtype.is_floating_point and torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        return cls(
            tuple(map(_number, tensor.shape)), tuple(map(_number, tensor.stride())), dtype, device
        )

    def filled(self, fill: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Return a tensor with this layout, whose storage ``fill`` fills in place."""
        steps = (step * (size - 1) for size, step in zip(self.shape, self.stride, strict=True))
        storage = fill(torch.empty(1 + sum(steps), dtype=self.dtype, device=self.device))
        return storage.as_strided(self.shape, self.stride)


def _number(size: Any) -> int:
    """Return a size of a tensor as an integer: for a dynamic size, the value at tracing."""
    if isinstance(size, int):
        return size
    if size.node.hint is None:
        raise ValueError("a size depends on data")
    return int(size.node.hint)


@dataclass(frozen=True)
class Call:
    """The layouts and options of one call of ``scaled_dot_product_attention``."""

    query: Layout
    key: Layout
    value: Layout
    mask: Layout | None
    options: tuple[tuple[str, Any], ...]
    """``dropout_p``, ``is_causal`` and the like."""
    is_inside: bool = field(default=False, compare=False)
    """True if a function that Dynamo does not trace into makes the call, where no pass sees it."""

    @classmethod
    def of(
        cls,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **options: Any,
    ) -> Call:
        """Return the call, given the arguments of ``scaled_dot_product_attention``."""
        return cls(
            Layout.of(query),
            Layout.of(key),
            Layout.of(value),
            None if attn_mask is None else Layout.of(attn_mask),
            (("dropout_p", dropout_p), ("is_causal", is_causal), *sorted(options.items())),
        )

    def runner(self) -> Callable[[], torch.Tensor]:
        """Return a function that makes such a call on random inputs, with a mask that masks
        nothing."""
        query, key, value = (
            layout.filled(torch.Tensor.normal_) for layout in (self.query, self.key, self.value)
        )
        mask = None
        if self.mask is not None:
            passing = 1 if self.mask.dtype == torch.bool else 0
            mask = self.mask.filled(lambda storage: storage.fill_(passing))
        options = dict(self.options)
        return lambda: F.scaled_dot_product_attention(query, key, value, mask, **options)


class _Recorder(TorchDispatchMode):
    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.allowed = allowed_backends()
        self.calls: Counter[Call] = Counter()
        self.is_free = True
        """Whether the model left the choice of backends to the process in every call."""
        self.is_inside = False
        """Whether the current calls are inside a function that Dynamo does not trace into."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "overloadpacket", None) is _SDPA:
            self.note(*args, **kwargs)
        return func(*args, **kwargs)

    def note(self, *args: Any, **kwargs: Any) -> None:
        self.is_free &= allowed_backends() == self.allowed
        self.calls[replace(Call.of(*args, **kwargs), is_inside=self.is_inside)] += 1

    def found(self) -> Counter[Call]:
        return self.calls if self.is_free else Counter()


def recorded_calls(run: Callable[[], object], graphs: Sequence[Graph] = ()) -> Counter[Call]:
    """Run ``run`` and count its calls of attention. Return none if the model chooses a backend.

    Args:
        run: calls a model.
        graphs: the compiled graphs of the model.
    """
    recorder = _Recorder()
    # Outside inference mode, the recorder would see calls in decomposed form.
    with torch.inference_mode(), watched(recorder, graphs):
        run()
    return recorder.found()


def calls_in(module: fx.GraphModule) -> Counter[Call]:
    """Count the calls of attention in Dynamo's graph. Return none if the model chooses a backend.

    Call this under the settings that the graph is compiled under.
    """
    recorder = _Recorder()
    try:
        _visit(module, recorder)
    except Exception:  # for a graph that we do not understand, torch chooses the backend
        return Counter()
    return recorder.found()


def _visit(part: fx.GraphModule, recorder: _Recorder) -> None:
    settings: dict[fx.Node, Any] = {}
    for node in part.graph.nodes:
        if node.op != "call_function":
            continue
        for subgraph in subgraphs(part, node):
            _visit(subgraph, recorder)
        if node.target in SETTING_CALLS:
            # The graph also contains the calls that restore the process's settings.
            settings[node] = node.target(*fx.map_arg(node.args, settings.__getitem__))
        elif node.target is F.scaled_dot_product_attention:
            args, kwargs = _values((node.args, node.kwargs))
            with contextlib.suppress(ValueError):
                recorder.note(*args, **kwargs)
        elif node.target in _AROUND_SDPA:
            args, kwargs = _values((node.args, node.kwargs))
            recorder.is_inside = True
            with contextlib.suppress(Exception), torch.inference_mode(), recorder:
                node.target(*args, **kwargs)
            recorder.is_inside = False


def _values(arguments: Any) -> Any:
    """Return the arguments of a node as Dynamo traced them, with fake tensors."""
    return fx.map_arg(arguments, lambda node: node.meta.get("example_value"))
