"""Compile a model and run it under the same settings on every call, restored afterwards."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import torch._functorch.config
from torch import fx

from pytest_int8bench.attention import SHORT, FlashSDPA
from pytest_int8bench.clock import synchronized_perf_counter, untraced
from pytest_int8bench.compiler.attention_calls import Call, calls_in
from pytest_int8bench.compiler.backend import FusingInductor, load_inductor
from pytest_int8bench.compiler.cache import (
    CompileCache,
    check_temporary_folder,
    lookups,
    usable_default,
)
from pytest_int8bench.compiler.entries import (
    device_type_of,
    dynamo_settings,
    fresh_entry,
    graph_breaks,
    graphs_compiled,
    graphs_skipped,
)
from pytest_int8bench.compiler.failures import CompileError as CompileError
from pytest_int8bench.compiler.failures import is_of_model, root_of
from pytest_int8bench.compiler.fusion.int8_attention import AttentionCoverage, eager_attention
from pytest_int8bench.compiler.fusion.short_attention import NothingShortError, eager_short
from pytest_int8bench.compiler.graphs import Graph, forget
from pytest_int8bench.compiler.regions import Regions, reason_left_out, repeated_blocks
from pytest_int8bench.compiler.torch_workarounds.dynamo import (
    infrequent_garbage_collection,
    register_tensor_types_with_einops,
)
from pytest_int8bench.compiler.torch_workarounds.eager import float32_matmul_precision
from pytest_int8bench.compiler.torch_workarounds.inductor import reset_failed_cuda_graph_warm_up
from pytest_int8bench.compiler.torch_workarounds.messages import (
    hide_compiler_warnings,
    hide_metrics_error,
    hide_trace_records,
)
from pytest_int8bench.errors import first_line
from pytest_int8bench.out_of_memory import oom_of
from pytest_int8bench.tensors import map_tensors
from pytest_int8bench.words import plural

#: Modes in which Inductor records CUDA graphs.
CUDA_GRAPH_MODES = ("reduce-overhead", "max-autotune")

_REFUSED = object()


class CompiledModel(torch.nn.Module):
    """A model and the settings under which it runs. Call it like the model.

    Attributes:
        model: the original model.
        mode: the mode of ``torch.compile``, or ``off``.
        attention: the attention backend allowed on every call.
        choose_attention: returns the attention backend to compile a graph for, given the calls of
            attention in it; None once the backend is fixed (:meth:`fix_attention`).
        always_fuse: run the passes that do not need INT8 layers in all graphs
            (:func:`.fusion.passes.fuse`); set it before the first call.
        first_call_s: seconds of the first call, including compilation but not the import of
            Inductor; None before the call, and in mode ``off``.
        cuda_graphs_skipped: whether Inductor skipped CUDA graphs although the mode uses them.
        compile_cache: ``warm`` if the first call found all its graphs in a compile cache on disk,
            ``cold`` if not; None before the call, or if it looked up nothing.
        regions: number of repeated blocks that were compiled as regions (:mod:`.regions`).
        regions_refused: why some repeated blocks were not, or None.
        graphs: the graphs compiled so far.
        is_whole: whether the whole model is in one graph, or not compiled.
        int8_attention: counts of attention calls in INT8; None if INT8 attention is off.
        short_attention: counts of attention calls on our kernel with ``attention=short``.
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
        int8_attention: bool,
    ) -> None:
        super().__init__()
        self.model = model
        self.mode = mode
        self.fullgraph = fullgraph
        self.choose_attention: Callable[[Counter[Call]], str] | None = None
        self.always_fuse = False
        self._allow_tf32 = allow_tf32
        self._autocast_dtype = autocast_dtype
        self._dynamic = dynamic
        self._cache_dir = None if mode == "off" else cache_dir
        self.graphs: list[Graph] = []
        self.int8_attention = AttentionCoverage() if int8_attention else None
        self._entered = 0
        self._fixed_settings = contextlib.ExitStack()
        self._start(attention)
        if mode != "off":
            load_inductor(device_type_of(model))

    def use_attention(self, attention: str) -> None:
        """Switch to another attention backend. The next call compiles again."""
        reset_failed_cuda_graph_warm_up()
        self._start(attention)

    def fix_attention(self) -> None:
        """Allow only ``attention`` from now on, also outside graphs."""
        self.choose_attention = None
        self._fixed_settings.enter_context(self._for_attention())

    def _start(self, attention: str) -> None:
        self.attention = attention
        self._entry = self._new_entry(self.fullgraph, inline=False)
        self._regions = Regions([])
        self.is_whole = True
        self.first_call_s: float | None = None
        self.cuda_graphs_skipped = False
        self.compile_cache: str | None = None
        self.regions = 0
        self.regions_refused: str | None = None

    @property
    def _cache(self) -> CompileCache | None:
        return None if self._cache_dir is None else CompileCache(self._cache_dir, self.attention)

    def _new_entry(self, fullgraph: bool, inline: bool) -> Callable[..., Any]:
        """Return a function that calls the model, and that Inductor compiles at its first call."""
        entry = fresh_entry(self.model)
        self.short_attention = AttentionCoverage()
        if self.int8_attention is not None:
            self.int8_attention = AttentionCoverage()  # counts only what this entry compiles
        if self.mode == "off":
            return entry
        backend = FusingInductor(
            self.mode, self._dynamic, inline, self.int8_attention, self.always_fuse
        )
        # Dynamo keeps backends until the process ends, so they must not keep the model alive.
        compiling: Callable[[], Any] = weakref.WeakMethod(self._compiling)
        backend.compiling = lambda module: compiling()(module)
        self.graphs = backend.graphs
        weakref.finalize(self, forget, backend.graphs)
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
                output = self._first_call(*args, **kwargs)
        else:
            with self._regions:
                output = self._entry(*args, **kwargs)
        if self.attention == SHORT and not self.short_attention.replaced:
            raise NothingShortError(self.short_attention)
        return output

    @untraced()
    def _first_call(self, *args: Any, **kwargs: Any) -> Any:
        graphs, skips, (found, missed) = graphs_compiled(), graphs_skipped(), lookups()
        self._choosing_s, breaks = 0.0, graph_breaks()
        start = synchronized_perf_counter()
        register_tensor_types_with_einops()
        regions = Regions(repeated_blocks(self.model))
        self.regions_refused = reason_left_out(self.model)
        try:
            # Always require one graph: with graph breaks inside blocks, less of the model might be
            # compiled than without regions.
            output = self._compiled_call(regions, True, args, kwargs) if regions else _REFUSED
        except Exception as error:
            if oom_of(error) is not None:
                reset_failed_cuda_graph_warm_up()
                raise
            self.regions_refused = first_line(root_of(error))
            output = _REFUSED
        if output is _REFUSED:  # after the except clause, so that the error's frames can be freed
            if regions:
                gc.collect()  # the frames are a reference cycle, which holds tensors
                reset_failed_cuda_graph_warm_up()
            graphs, breaks, regions = graphs_compiled(), graph_breaks(), Regions([])
            output = self._compiled_call(regions, self.fullgraph, args, kwargs)
        seconds = synchronized_perf_counter() - start
        if graphs_compiled() == graphs:
            raise CompileError("torch.compile made no graph: the model ran eagerly")
        self.first_call_s = seconds - self._choosing_s
        self._regions, self.regions = regions, len(regions)
        self.is_whole = self.fullgraph or bool(regions) or graph_breaks() == breaks
        if self.is_whole:
            self.fix_attention()
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
        """Compile and call the model. If that fails, retry once with our cache emptied, because its
        contents may be damaged."""
        self._cache_was_empty = self._cache is None or self._cache.is_empty()
        # CUDA graphs have no launch overhead to save; without regions is the last resort.
        inline = bool(regions) and self.mode not in CUDA_GRAPH_MODES
        self._entry = self._new_entry(fullgraph, inline)
        try:
            with regions:
                return self._entry(*args, **kwargs)
        except Exception as error:
            if self._cache is None or self._cache_was_empty or is_of_model(error):
                raise
        self._entry = self._new_entry(fullgraph, inline)
        with self._cache.emptied(), regions:
            return self._entry(*args, **kwargs)

    @contextlib.contextmanager
    def _compiling(self, module: fx.GraphModule) -> Iterator[AttentionCoverage | None]:
        """Choose an attention backend for a graph and enter its settings. This is
        :attr:`.FusingInductor.compiling`."""
        if self.choose_attention is not None:
            start = synchronized_perf_counter()
            self.attention = self.choose_attention(calls_in(module))
            self._choosing_s += synchronized_perf_counter() - start
            if not self.graphs:
                self._cache_was_empty = self._cache is None or self._cache.is_empty()
        with self._for_attention():
            yield self.short_attention if self.attention == SHORT else None

    @contextlib.contextmanager
    def _for_attention(self) -> Iterator[None]:
        """Allow only the attention backend, and use its compile cache."""
        cache = contextlib.nullcontext() if self._cache is None else self._cache.entered()
        with FlashSDPA(self.attention), cache:
            yield

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Enter the settings once for many calls, which then have no overhead of their own. With
        CUDA graphs, each call inside overwrites the outputs of the previous one."""
        with self.settings():
            self._entered += 1
            try:
                yield
            finally:
                self._entered -= 1

    def eager_settings(self) -> contextlib.AbstractContextManager[None]:
        """Return :meth:`settings` for an eager call, whose masks may need another backend."""
        return self.settings(None if self.mode == "off" else "auto")

    @contextlib.contextmanager
    def settings(self, attention: str | None = None) -> Iterator[None]:
        """Enter the settings of every call, and restore the previous ones on exit."""
        device_type = device_type_of(self.model)
        with (
            hide_trace_records(),
            torch.inference_mode(),
            torch.autocast(
                device_type, dtype=self._autocast_dtype, enabled=self._autocast_dtype is not None
            ),
            float32_matmul_precision("high" if self._allow_tf32 else "highest"),
            FlashSDPA(attention or ("auto" if self.choose_attention else self.attention)),
            dynamo_settings(),
            # The key of AOTAutograd's cache lacks the attention backend, so that it can return a
            # graph compiled under another one (pytorch/pytorch#185449). Inductor's own cache, which
            # holds the kernels, stays on. Our cache has a folder per backend.
            torch._functorch.config.patch(enable_autograd_cache=False),
            self._compiled_code(device_type),
            # For functions that the model compiles itself.
            torch.compiler.set_stance("force_eager")
            if self.mode == "off"
            else contextlib.nullcontext(),
            eager_attention(self.int8_attention if self.mode == "off" else None),
            eager_short(
                self.short_attention if self.mode == "off" and self.attention == SHORT else None
            ),
            contextlib.ExitStack() as fixed,
        ):
            fixed.callback(setattr, self, "_fixed_settings", self._fixed_settings)
            self._fixed_settings = fixed
            yield

    def _compiled_code(self, device_type: str) -> contextlib.AbstractContextManager[None]:
        """Return a context in which torch keeps compiled code in the right folder."""
        if self.mode == "off":
            return contextlib.nullcontext()
        check_temporary_folder(device_type)
        if self._cache is None:
            return usable_default()
        return contextlib.nullcontext() if self.choose_attention else self._cache.entered()

    @contextlib.contextmanager
    def no_compilation(self) -> Iterator[None]:
        """Raise ``CompileError`` on exit if anything was compiled inside, because compilation time
        must not count as run time."""
        before = graphs_compiled()
        yield
        if new := graphs_compiled() - before:
            raise CompileError(
                f"torch.compile compiled {plural(new, 'graph')} during timing: inputs, global "
                "settings or a Python number that the model updates changed between calls"
            )

    def graphs_run(self, run: Callable[[], object]) -> list[Graph]:
        """Call ``run``, which calls this model, and return the graphs that ran.

        Raises:
            CompileError: if the model is compiled and none ran.
        """
        before = [graph.calls for graph in self.graphs]
        run()
        before += [0] * (len(self.graphs) - len(before))  # graphs compiled by this run
        ran = [g for g, calls in zip(self.graphs, before, strict=True) if g.calls != calls]
        if self.graphs and not ran:
            raise CompileError("none of the compiled graphs ran: the model ran eagerly")
        return ran

    def compiles_again(self, run: Callable[[], object]) -> bool:
        """Call ``run``, which calls this model, and return whether it was compiled again, such as
        after ``torch._dynamo.reset()``.

        Raises:
            CompileError: if it ran eagerly.
        """
        before = len(self.graphs)
        self.graphs_run(run)
        return len(self.graphs) != before
