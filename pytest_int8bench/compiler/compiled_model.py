"""torch.compile under settings that are the same on every call and gone after it."""

from __future__ import annotations

import contextlib
import gc
import itertools
import logging
import os
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import torch._functorch.config

from pytest_int8bench.attention import FlashSDPA, sdpa_backends
from pytest_int8bench.choices import COMPILE_MODES
from pytest_int8bench.clock import synchronized_perf_counter, untraced
from pytest_int8bench.compiler.backend import FusingInductor, load_inductor
from pytest_int8bench.compiler.cache import (
    CompileCache,
    check_temporary_folder,
    lookups,
    usable_default,
)
from pytest_int8bench.compiler.graphs import Graph
from pytest_int8bench.compiler.regions import Regions, reason_left_out, repeated_blocks
from pytest_int8bench.compiler.torch_workarounds import (
    float32_matmul_precision,
    hide_compiler_warnings,
    hide_metrics_error,
    hide_trace_records,
    infrequent_garbage_collection,
    register_tensor_types_with_einops,
    reset_failed_cuda_graph_warm_up,
)
from pytest_int8bench.errors import ClearError, first_line
from pytest_int8bench.out_of_memory import oom_of
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
_REFUSED = object()


class CompileError(ClearError, RuntimeError):
    """The model did not compile, ran eagerly, or compiled again when it must not."""


class CompiledModel(torch.nn.Module):
    """A model and the settings it runs under. Call it like the model.

    Attributes:
        model: the model that was given.
        mode: the torch.compile mode, or ``off``.
        attention: the attention backend allowed on every call.
        first_call_s: seconds of the first call, compiling included, but not the loading of
            Inductor; None before it, and in mode ``off``.
        cuda_graphs_skipped: Inductor could not use CUDA graphs, though the mode asks for them.
        compile_cache: ``warm`` if the first call found all its graphs in a compile cache on disk,
            ``cold`` if not; None before it, and where nothing was looked up.
        regions: repeated blocks that were compiled as one (:mod:`.regions`).
        regions_refused: why blocks that repeat were not, or None.
        graphs: what the model was compiled to so far, if anything.
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
        cache_dir: Path | None,
    ) -> None:
        super().__init__()
        self.model = model
        self.mode = mode
        self.fullgraph = fullgraph
        self.attention = attention
        self._allow_tf32 = allow_tf32
        self._autocast_dtype = autocast_dtype
        self._dynamic = dynamic
        self._cache = (
            None if cache_dir is None or mode == "off" else CompileCache(cache_dir, attention)
        )
        self.graphs: list[Graph] = []
        self._entry = self._new_entry(fullgraph, inline=False)
        self._regions = Regions([])
        self._entered = 0
        self.first_call_s: float | None = None
        self.cuda_graphs_skipped = False
        self.compile_cache: str | None = None
        self.regions = 0
        self.regions_refused: str | None = None
        if mode != "off":
            load_inductor(_device_type(model))

    def _new_entry(self, fullgraph: bool, inline: bool) -> Callable[..., Any]:
        """Return what calls the model, compiled at its first call by Inductor, with what stands
        around layers of the fused backend joined first."""
        entry = _fresh_entry(self.model)
        if self.mode == "off":
            return entry
        backend = FusingInductor(self.mode, self._dynamic, inline)
        self.graphs = backend.graphs
        compiled: Callable[..., Any] = torch.compile(
            entry, fullgraph=fullgraph, backend=backend, dynamic=self._dynamic
        )
        return compiled

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._entered:
            return self._call(*args, **kwargs)
        with self.settings():
            output = self._call(*args, **kwargs)
        if self.mode in CUDA_GRAPH_MODES:
            output = map_tensors(torch.Tensor.clone, output)
        return output

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        if self.first_call_s is None and self.mode != "off":
            with (
                infrequent_garbage_collection(),
                hide_metrics_error(),
                hide_compiler_warnings(self.model),
            ):
                return self._first_call(*args, **kwargs)
        with self._regions:
            return self._entry(*args, **kwargs)

    @untraced()
    def _first_call(self, *args: Any, **kwargs: Any) -> Any:
        graphs, skips, (found, missed) = graphs_compiled(), graphs_skipped(), lookups()
        start = synchronized_perf_counter()
        register_tensor_types_with_einops()
        regions = Regions(repeated_blocks(self.model))
        self.regions_refused = reason_left_out(self.model)
        try:
            # One graph in any case: with breaks in blocks, less of them might be compiled than
            # without regions.
            output = self._compiled_call(regions, True, args, kwargs) if regions else _REFUSED
        except Exception as error:
            if oom_of(error) is not None:
                reset_failed_cuda_graph_warm_up()
                raise
            self.regions_refused = first_line(_root(error))
            output = _REFUSED
        if output is _REFUSED:  # outside, so that the frames of the error let go of its tensors
            if regions:
                gc.collect()  # the frames are a cycle
                reset_failed_cuda_graph_warm_up()
            graphs, regions = graphs_compiled(), Regions([])
            output = self._compiled_call(regions, self.fullgraph, args, kwargs)
        seconds = synchronized_perf_counter() - start
        if graphs_compiled() == graphs:
            raise CompileError("torch.compile made no graph: the model ran eagerly")
        self.first_call_s = seconds
        self._regions, self.regions = regions, len(regions)
        self.cuda_graphs_skipped = graphs_skipped() > skips
        now_found, now_missed = lookups()
        if now_missed > missed:
            self.compile_cache = "cold"
        elif now_found > found:
            self.compile_cache = "warm"
        return output

    def _compiled_call(
        self, regions: Regions, fullgraph: bool, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Compile and call the model; once more with an empty cache of ours, if it may be that
        what was in it is damaged."""
        was_empty = self._cache is None or self._cache.is_empty()
        # Where CUDA graphs launch, the host does not. Without regions is what runs where all else
        # failed.
        inline = bool(regions) and self.mode not in CUDA_GRAPH_MODES
        self._entry = self._new_entry(fullgraph, inline)
        try:
            with regions:
                return self._entry(*args, **kwargs)
        except Exception as error:
            if self._cache is None or was_empty or _is_not_of_caches(error):
                raise
        self._entry = self._new_entry(fullgraph, inline)
        with self._cache.emptied(), regions:
            return self._entry(*args, **kwargs)

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
        device_type = _device_type(self.model)
        with (
            hide_trace_records(),
            torch.inference_mode(),
            torch.autocast(
                device_type, dtype=self._autocast_dtype, enabled=self._autocast_dtype is not None
            ),
            float32_matmul_precision("high" if self._allow_tf32 else "highest"),
            FlashSDPA(self.attention),
            torch._dynamo.config.patch(
                recompile_limit=_RECOMPILE_LIMIT,
                accumulated_recompile_limit=_RECOMPILE_LIMIT,
                ignore_logging_functions=torch._dynamo.config.ignore_logging_functions | _LOGGING,
                # What does not compile is an error: it would run eagerly under a compiled label.
                suppress_errors=False,
            ),
            # The key of AOTAutograd's cache leaves out the attention backend, so that a graph
            # compiled under another one comes back (pytorch/pytorch#185449). Inductor's own
            # cache, which holds the kernels, stays on. A cache of ours has a folder for each.
            torch._functorch.config.patch(enable_autograd_cache=False),
            self._compiled_code(device_type),
            # For functions that the model compiles itself.
            torch.compiler.set_stance("force_eager")
            if self.mode == "off"
            else contextlib.nullcontext(),
        ):
            yield

    def _compiled_code(self, device_type: str) -> contextlib.AbstractContextManager[None]:
        """Return what lets torch keep compiled code, where it is meant to be."""
        if self.mode == "off":
            return contextlib.nullcontext()
        check_temporary_folder(device_type)
        return usable_default() if self._cache is None else self._cache.entered()

    @contextlib.contextmanager
    def no_compilation(self) -> Iterator[None]:
        """Raise ``CompileError`` on leaving if anything was compiled inside: time spent
        compiling must not be taken for time spent running."""
        before = graphs_compiled()
        yield
        if graphs_compiled() != before:
            raise CompileError(
                f"{graphs_compiled() - before} graph(s) were compiled while the clock ran: inputs, "
                "global settings or a number that the model counts in Python changed between calls"
            )

    def graphs_run(self, run: Callable[[], object]) -> list[Graph]:
        """Call ``run``, which calls this model, and return the graphs that ran.

        Raises:
            CompileError: if none did, though the model is compiled.
        """
        before = [graph.calls for graph in self.graphs]
        run()
        before += [0] * (len(self.graphs) - len(before))  # compiled meanwhile
        ran = [g for g, calls in zip(self.graphs, before, strict=True) if g.calls != calls]
        if self.graphs and not ran:
            raise CompileError("none of the compiled graphs ran: the model ran eagerly")
        return ran

    def compiles_again(self, run: Callable[[], object]) -> bool:
        """Call ``run``, which calls this model, and return whether it had to be compiled anew,
        after ``torch._dynamo.reset()`` for example.

        Raises:
            CompileError: if it ran eagerly.
        """
        before = len(self.graphs)
        self.graphs_run(run)
        return len(self.graphs) != before


def compile_for_a100(
    model: torch.nn.Module,
    *,
    fullgraph: bool = True,
    mode: str = "max-autotune",
    allow_tf32: bool = True,
    attention: str = "flash",
    autocast_dtype: torch.dtype | None = None,
    dynamic: bool | None = False,
    cache_dir: str | os.PathLike[str] | None = None,
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
            or ``auto``, with which torch decides for each call (nothing is timed here).
        autocast_dtype: run under autocast to this dtype. Off by default, also where autocast is
            on around the call: INT8 linears do not see it, so real BF16 weights are the fair
            comparison.
        dynamic: as in ``torch.compile``; static shapes by default.
        cache_dir: folder to keep compiled code in from process to process. It may be copied to
            another machine, and is used where hardware, driver, versions and attention backend
            are the same. By default, torch's own for this machine.

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
        cache_dir=None if cache_dir is None else Path(cache_dir).absolute(),
    )


def graphs_skipped() -> int:
    """Return how often Inductor did without CUDA graphs that were asked for."""
    return int(torch._dynamo.utils.counters["inductor"]["cudagraph_skips"])


def graphs_compiled() -> int:
    """Return how many graphs this process has compiled so far."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def _device_type(model: torch.nn.Module) -> str:
    tensor = next(itertools.chain(model.parameters(), model.buffers()), None)
    return "cpu" if tensor is None else tensor.device.type


def _root(error: BaseException) -> BaseException:
    """Return the root cause of ``error``; Dynamo wraps errors in uninformative ones."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return error


def _is_not_of_caches(error: Exception) -> bool:
    """Return whether a damaged cache cannot have caused ``error``, because it comes from Dynamo's
    tracing of the model or from a lack of memory."""
    of_backend = isinstance(error, torch._dynamo.exc.BackendCompilerFailed)
    of_dynamo = isinstance(error, torch._dynamo.exc.TorchDynamoException)
    return oom_of(error) is not None or (of_dynamo and not of_backend)


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
