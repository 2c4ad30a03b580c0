"""torch.compile under settings that are the same on every call and gone after it."""

from __future__ import annotations

import contextlib
import itertools
import logging
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._dynamo
import torch._functorch.config

from pytest_int8bench.attention import FlashSDPA, sdpa_backends
from pytest_int8bench.clock import synchronized_perf_counter
from pytest_int8bench.errors import ClearError
from pytest_int8bench.fused.graph import inductor_with_fusion
from pytest_int8bench.fused.modules import Int8Linear
from pytest_int8bench.params import COMPILE_MODES
from pytest_int8bench.tensors import map_tensors

# A sweep makes a fresh graph for each point; none of them may run into Dynamo's limit of 8,
# after which calls silently run eagerly.
_RECOMPILE_LIMIT = 1 << 16

# OlmoEarth's forward logs, which breaks the graph unless Dynamo leaves these calls out.
_LOGGING = {
    logging.Logger.debug,
    logging.Logger.info,
    logging.Logger.warning,
    logging.Logger.error,
}

#: Modes in which Inductor records CUDA graphs.
CUDA_GRAPH_MODES = ("reduce-overhead", "max-autotune")

_serial = itertools.count()


class CompileError(ClearError, RuntimeError):
    """The model did not compile, ran eagerly, or compiled again when it must not."""


class CompiledModel(torch.nn.Module):
    """A model and the settings it runs under. Call it like the model.

    Attributes:
        model: the model that was given.
        mode: the torch.compile mode, or ``off``.
        attention: the attention backend allowed on every call.
        first_call_s: seconds of the first call, compiling included; None before it, and in mode
            ``off``.
        cuda_graphs_skipped: Inductor could not use CUDA graphs, though the mode asks for them.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        fullgraph: bool,
        mode: str,
        allow_tf32: bool,
        attention: str,
        autocast_dtype: torch.dtype | None,
        dynamic: bool | None,
    ) -> None:
        super().__init__()
        self.model = model
        self.mode = mode
        self.fullgraph = fullgraph
        self.attention = attention
        self._allow_tf32 = allow_tf32
        self._autocast_dtype = autocast_dtype
        entry = _fresh_entry(model)
        self._entry: Callable[..., Any] = (
            entry
            if mode == "off"
            else _compile(entry, model, fullgraph=fullgraph, mode=mode, dynamic=dynamic)
        )
        self._entered = 0
        self.first_call_s: float | None = None
        self.cuda_graphs_skipped = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._entered:
            return self._call(*args, **kwargs)
        with self.settings():
            output = self._call(*args, **kwargs)
        if self.mode in CUDA_GRAPH_MODES:
            output = map_tensors(torch.Tensor.clone, output)
        return output

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        if self.first_call_s is not None or self.mode == "off":
            return self._entry(*args, **kwargs)
        graphs, skips = graphs_compiled(), graphs_skipped()
        start = synchronized_perf_counter()
        output = self._entry(*args, **kwargs)
        seconds = synchronized_perf_counter() - start
        if graphs_compiled() == graphs:
            raise CompileError("torch.compile made no graph: the model ran eagerly")
        self.first_call_s = seconds
        self.cuda_graphs_skipped = graphs_skipped() > skips
        return output

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Enter the settings once for many calls, which then cost what the graph costs. With
        CUDA graphs, each call inside overwrites the outputs of the last one."""
        with self.settings():
            self._entered += 1
            try:
                yield
            finally:
                self._entered -= 1

    @contextlib.contextmanager
    def settings(self) -> Iterator[None]:
        """Enter what every call runs under: inference mode, autocast, TF32, the attention
        backend, and compiler settings. All are restored on leaving."""
        parameter = next(self.model.parameters(), None)
        device_type = "cpu" if parameter is None else parameter.device.type
        with (
            torch.inference_mode(),
            torch.autocast(
                device_type, dtype=self._autocast_dtype, enabled=self._autocast_dtype is not None
            ),
            _tf32(self._allow_tf32),
            FlashSDPA(self.attention),
            torch._dynamo.config.patch(
                recompile_limit=_RECOMPILE_LIMIT,
                accumulated_recompile_limit=_RECOMPILE_LIMIT,
                ignore_logging_functions=torch._dynamo.config.ignore_logging_functions | _LOGGING,
            ),
            # The key of AOTAutograd's cache leaves out the attention backend, so that a graph
            # compiled under another one comes back (pytorch/pytorch#185449). Inductor's own
            # cache, which holds the kernels, stays on.
            torch._functorch.config.patch(enable_autograd_cache=False),
        ):
            yield

    @contextlib.contextmanager
    def no_compilation(self) -> Iterator[None]:
        """Raise ``CompileError`` on leaving if anything was compiled inside: time spent
        compiling must not be taken for time spent running."""
        before = graphs_compiled()
        yield
        if graphs_compiled() != before:
            raise CompileError(
                f"{graphs_compiled() - before} graph(s) were compiled while the clock ran: inputs "
                "or global settings changed between calls"
            )


def compile_for_a100(
    model: torch.nn.Module,
    *,
    fullgraph: bool = True,
    mode: str = "max-autotune",
    allow_tf32: bool = True,
    attention: str = "flash",
    autocast_dtype: torch.dtype | None = None,
    dynamic: bool | None = False,
) -> CompiledModel:
    """Compile ``model`` with Inductor for inference; despite its name not for A100 only.

    Compiling happens at the first call. The process's own settings are untouched between calls.

    Args:
        model: the model, in ``eval`` mode and on its device.
        fullgraph: require one graph; a graph break is then an error.
        mode: ``default``, ``reduce-overhead``, ``max-autotune``, ``max-autotune-no-cudagraphs``
            or ``off`` (eager under the same settings).
        allow_tf32: let FP32 products use TF32.
        attention: the attention backend allowed: ``flash``, ``cudnn``, ``efficient``, ``math``
            or ``auto``.
        autocast_dtype: run under autocast to this dtype. Off by default, also where autocast is
            on around the call: INT8 linears do not see it, so real BF16 weights are the fair
            comparison.
        dynamic: as in ``torch.compile``; static shapes by default.

    Returns:
        A module to call like ``model``. With CUDA graphs (``reduce-overhead``,
        ``max-autotune``) outputs are copied out of the graph, so that the next call does not
        overwrite them.

    Raises:
        ValueError: for an unknown mode or attention backend.
    """
    if mode not in COMPILE_MODES:
        raise ValueError(f"mode must be one of {', '.join(COMPILE_MODES)}, got {mode!r}")
    sdpa_backends(attention)
    return CompiledModel(
        model,
        fullgraph=fullgraph,
        mode=mode,
        allow_tf32=allow_tf32,
        attention=attention,
        autocast_dtype=autocast_dtype,
        dynamic=dynamic,
    )


def graphs_skipped() -> int:
    """Return how often Inductor did without CUDA graphs that were asked for."""
    return int(torch._dynamo.utils.counters["inductor"]["cudagraph_skips"])


def graphs_compiled() -> int:
    """Return how many graphs this process has compiled so far."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def _compile(
    entry: Callable[..., Any],
    model: torch.nn.Module,
    *,
    fullgraph: bool,
    mode: str,
    dynamic: bool | None,
) -> Callable[..., Any]:
    """Compile ``entry`` with Inductor; where ``model`` has layers of the fused backend, with what
    stands around them joined first."""
    if any(isinstance(module, Int8Linear) for module in model.modules()):
        backend = inductor_with_fusion(mode, dynamic)
        return torch.compile(entry, fullgraph=fullgraph, backend=backend, dynamic=dynamic)
    return torch.compile(entry, fullgraph=fullgraph, mode=mode, dynamic=dynamic)


def _fresh_entry(model: torch.nn.Module) -> Callable[..., Any]:
    """Return a function that calls ``model`` and has a code object of its own.

    Dynamo keeps compiled graphs by code object. Were they kept on ``model.forward``, a second
    compilation of the same class would find the graph of the first, whatever the attention
    backend, and a sweep would fill one list of graphs.
    """

    def entry(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    code = entry.__code__.replace(co_name=f"int8bench_entry_{next(_serial)}")
    return types.FunctionType(
        code, entry.__globals__, code.co_name, entry.__defaults__, entry.__closure__
    )


@contextlib.contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
