"""Compile, warm up and profile one model of a point."""

from __future__ import annotations

import functools
import operator
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from pytest_int8bench.clock import synchronized_perf_counter
from pytest_int8bench.compiler.api import compile_for_a100
from pytest_int8bench.compiler.compiled_model import CUDA_GRAPH_MODES, CompiledModel
from pytest_int8bench.compiler.entries import graphs_skipped
from pytest_int8bench.compiler.fusion.short_attention import NothingShortError
from pytest_int8bench.compiler.graphs import Graph
from pytest_int8bench.compiler.torch_workarounds.inductor import free_matmul_workspaces
from pytest_int8bench.errors import QuantizationError, WorkloadError
from pytest_int8bench.measure.attention_auto import (
    AnotherBackend,
    AttentionError,
    AutoAttention,
    Call,
    no_kernel,
    recorded_calls,
)
from pytest_int8bench.measure.batches import WRITES, Batch, BatchRun, to_device
from pytest_int8bench.measure.building import check_dense
from pytest_int8bench.measure.evidence import Evidence, Keep, check_labels, profile_forward
from pytest_int8bench.measure.host_feed import HostFeed
from pytest_int8bench.measure.layer_checks import check_same_work
from pytest_int8bench.measure.layers import (
    Forward,
    Layers,
    check_every_layer,
    look_at_forward,
)
from pytest_int8bench.measure.linear_calls import LinearCall, linear_calls
from pytest_int8bench.measure.memory import (
    allocated_bytes,
    collect_garbage,
    free_memory,
    peak_memory,
    release,
)
from pytest_int8bench.measure.ready import Ready, describe, listed
from pytest_int8bench.measure.repeats import Buffers, has_nan, is_finite, joined, repeats, sample_of
from pytest_int8bench.measure.timing import Timer, warm_up
from pytest_int8bench.params import RunParams
from pytest_int8bench.quantization.api import coverage, weight_storage
from pytest_int8bench.quantization.modes import MODES
from pytest_int8bench.tensors import call, tensors_of

if TYPE_CHECKING:
    from pytest_int8bench.workloads.workload import Workload


Seen = TypeVar("Seen")


class Model:
    """A workload's model at one point: eager, and compiled."""

    def __init__(
        self,
        workload: Workload,
        params: RunParams,
        eager: nn.Module,
        batch: Batch,
        *,
        device: torch.device,
        weight_bytes: int,
        auto: AutoAttention | None,
        cache_dir: Path | None,
        feed: HostFeed | None = None,
        baseline: Model | None = None,
    ) -> None:
        self.workload = workload
        self.params = params
        self.eager = eager
        self.batch = batch
        self.device = device
        self.feed = feed
        """Source of the batches with ``feed=host``."""
        self._weight_bytes = weight_bytes
        self.compiled: CompiledModel = compile_for_a100(
            eager,
            fullgraph=params.compile_fullgraph,
            mode=params.compile_mode,
            attention=params.attention if auto is None else auto.chosen,
            cache_dir=cache_dir,
            int8_attention=params.int8_enabled and params.int8_attention,
        )
        self._auto = auto
        if auto is not None:
            self.compiled.choose_attention = auto.chooser
        self.run = BatchRun(self.compiled, batch, device, feed)
        """Submits one batch and returns the output. With ``feed=host`` the batch comes from the
        host, and the next one is copied meanwhile."""
        self.run_again = BatchRun(self.compiled, batch, device, feed, again=True)
        """Resubmits the last batch of :attr:`run`, which is already on the device."""
        # The candidate may have run already, to be compared with the baseline.
        self._buffers: Buffers = Buffers(eager, None if baseline is None else baseline._buffers)
        self._ready: Ready | None = None
        self._evidence: Evidence | None = None
        self._linear_calls: tuple[LinearCall, ...] | None = None
        self._forward: Forward | None = None
        self.is_checked = False
        """Whether :func:`.baseline_check.check` has checked it; its findings follow."""
        self.wrong: str | None = None
        self.unchecked: str | None = None
        self.layers = Layers()
        """Findings of :meth:`evidence` about the linear layers in one forward."""

    @property
    def is_ready(self) -> bool:
        """Whether :meth:`ready` has compiled and warmed up."""
        return self._ready is not None

    @property
    def inputs(self) -> Any:
        """One batch, for inspection only: a call with it may write to it."""
        return self.batch.inputs

    def fresh_inputs(self) -> Any:
        """Return a copy of the original batch on the device."""
        return to_device(self.batch.fresh(), self.device)

    def evidence(self, keep: Keep | None = None) -> Evidence:
        """Profile one forward, once, and compare the labels of the point with the kernels.

        Args:
            keep: saves the profile, which is repeated if no earlier call saved one.

        Raises:
            EvidenceError: if the kernels contradict the labels.
        """
        if self._evidence is None or (keep is not None and self._evidence.trace is None):
            profiled: list[Evidence] = []
            with self.compiled.entered():
                self._compile_again()
                self.run.prepare(1)
                may_break = self.compiled.mode != "off" and not self.compiled.fullgraph
                graphs = self.compiled.graphs_run(
                    lambda: profiled.append(
                        profile_forward(self.run, self.device, keep, find_eager=may_break)
                    )
                )
            [evidence] = profiled
            fused = self.params.int8_enabled and coverage(self.eager).backend == "fused"
            check_labels(
                evidence,
                self.params,
                weight_storage(self.eager, MODES[self.params.int8_mode].proof.storage),
                self.compiled.attention,
                fused=fused,
            )
            self.layers = check_every_layer(
                self.eager,
                self.forward(),
                evidence,
                None if self.compiled.mode == "off" else graphs,
                self.params,
            )
            self._evidence = evidence
        return self._evidence

    def forward(self) -> Forward:
        """Run one forward operator by operator, once, and return how it used each linear layer's
        weight."""
        if self._forward is None:
            look = functools.partial(look_at_forward, self.eager)
            first, *eager = self._seen_by(look)
            self._forward = first.joined(*eager) if eager else first
        return self._forward

    def _seen_by(self, look: Callable[[Callable[[], object], Sequence[Graph]], Seen]) -> list[Seen]:
        """Return what ``look`` sees in a forward of the graphs, if there are any, because an eager
        forward may take other branches; then in an eager forward, if some of it is in no graph."""
        graphs = self.compiled.graphs
        seen = [look(lambda: call(self.compiled, self.fresh_inputs()), graphs)] if graphs else []
        if not self.compiled.is_whole or not graphs:
            seen.append(look(self.run_eager, ()))
        return seen

    def check_against(self, baseline: Model) -> None:
        """Compare the work of this candidate's forward and its baseline's.

        Raises:
            EvidenceError: if the candidate does less work.
        """
        ours, theirs = self.forward().runs, baseline.forward().runs
        if ours is not None and theirs is not None:
            check_same_work(theirs, ours, self.params)

    def run_eager(self) -> Any:
        """Run the model eagerly, on a copy of the batch."""
        inputs = self.fresh_inputs()
        with self.compiled.eager_settings():
            return call(self.eager, inputs)

    def linear_calls(self) -> tuple[LinearCall, ...]:
        """Run one forward operator by operator, once, and return the calls of its linear layers."""
        if self._linear_calls is None:
            first, *eager = self._seen_by(functools.partial(linear_calls, self.eager))
            names = {call.name for call in first}
            outside = (call for calls in eager for call in calls if call.name not in names)
            self._linear_calls = (*first, *outside)
        return self._linear_calls

    def attention_calls(self) -> Counter[Call]:
        """Run one forward operator by operator and return the attention calls in its graphs, or in
        the whole model if there are none."""
        with self.compiled.entered():
            return self._seen_by(recorded_calls)[0]

    def ready(self, timer: Timer = synchronized_perf_counter) -> Ready:
        """Compile and warm up once, and again if recompilation is needed, as after
        ``torch._dynamo.reset()``. Call it before each timing.

        Raises:
            CompileError: if compiled code now runs eagerly.
            QuantizationError: if the INT8 matmul does not support the shapes.
            AttentionError: if the attention backend does not support the model's attention.
            torch.OutOfMemoryError: or another error that ``memory.oom_of`` knows.
        """
        if self._auto is not None and self._auto.chosen != self.compiled.attention:
            self._use_attention()  # the other side of the comparison changed it
        if self._ready is not None:
            with self.compiled.entered():
                self._compile_again(timer)
            return self._ready
        while self._ready is None:
            try:
                with self.compiled.entered():
                    self._ready = self._get_ready(timer)
            except AnotherBackend:
                pass
            except Exception as error:
                if not self._may_try_again(error):
                    raise
                release(error)
            if self._ready is None:
                self._use_attention()
        return self._ready

    def _may_try_again(self, error: Exception) -> bool:
        """Return whether to try another attention backend after ``error``.

        Raises:
            QuantizationError, AttentionError: if they explain ``error``.
        """
        tried = self.compiled.attention
        if explained := MODES[self.params.int8_mode].explain(str(error)):
            raise QuantizationError(explained) from error
        if self._auto is not None and self._auto.replace(error):
            return True
        if isinstance(error, NothingShortError):
            raise AttentionError(f"workload {self.workload.name!r}: {error}") from None
        if no_kernel(error):
            raise AttentionError.of(tried, self.params, self.workload.name) from None
        return False

    def _use_attention(self) -> None:
        """Compile for the backend that ``attention=auto`` currently selects."""
        assert self._auto is not None
        free_memory()
        self.compiled.use_attention(self._auto.chosen)
        self.compiled.choose_attention = self._auto.chooser
        self._ready = self._evidence = self._forward = self._linear_calls = None

    def _compile_again(self, timer: Timer = synchronized_perf_counter) -> None:
        """Run one batch, and warm up if it had to compile: compiled code may be gone."""
        if self.compiled.compiles_again(self.run):
            warm_up(self.run, timer, max_s=self.params.benchmark_interval_s)

    def _get_ready(self, timer: Timer) -> Ready:
        kind = self.device.type
        on_device = sum(t.nbytes for t in tensors_of(self.inputs) if t.device.type == kind)
        if self.feed is not None:
            self.feed.open()
            on_device = self.feed.nbytes
        collect_garbage(self.device)
        if self.compiled.mode in CUDA_GRAPH_MODES:
            free_matmul_workspaces()  # eager workspaces, which recording would free
        other_bytes = allocated_bytes(self.device) - self._weight_bytes - on_device
        output = self._first_call()
        self._look_outside_graphs()
        check_dense(self.workload, "outputs", output)
        tokens = int(self.workload.tokens(output)) if self.workload.tokens else None
        if not list(tensors_of(output)):
            raise WorkloadError(f"workload {self.workload.name!r}: the model returned no tensor")
        self._buffers.settle()
        outputs, first = describe(output), sample_of(output)
        finite, nan = is_finite(tensors_of(output)), has_nan(tensors_of(output))
        del output
        # The first call's peak includes autotuning. With CUDA graphs, the second call records the
        # graph and allocates the memory that each replay uses.
        skips = graphs_skipped()
        with peak_memory(self.device) as peak:
            warm = warm_up(self.run, timer, max_s=self.params.benchmark_interval_s)
            peak_bytes = peak()
        if self.batch.is_written and self.feed is None:
            other_bytes += on_device  # calls get copies, so this memory is extra
        self._buffers.settle()
        output = self._call_once()
        self._buffers.compare()
        again = describe(output)
        if again != outputs:
            raise WorkloadError(
                f"workload {self.workload.name!r}: the same inputs gave {listed(outputs)} at the "
                f"first call and {listed(again)} at a later one"
            )
        self.batch.check()
        changing = self._buffers.remark() or repeats(first, sample_of(output))
        self.restore()
        return Ready(
            compile_s=self.compiled.first_call_s,
            warm_up=warm,
            peak_memory_bytes=None if peak_bytes is None else peak_bytes - other_bytes,
            tokens=tokens,
            outputs=outputs,
            finite=finite and is_finite(tensors_of(output)),
            has_nan=nan or has_nan(tensors_of(output)),
            compile_cache=self.compiled.compile_cache,
            cuda_graphs_skipped=self.compiled.cuda_graphs_skipped or graphs_skipped() > skips,
            regions=self.compiled.regions,
            regions_refused=self.compiled.regions_refused,
            remark=joined(
                WRITES if self.batch.is_written else None,
                changing,
                None if self._auto is None else self._auto.remark(),
            ),
        )

    def _first_call(self) -> Any:
        """Call the model and check whether it writes to its inputs, even if it fails."""
        given = self.batch.inputs if self.feed is None else self.fresh_inputs()
        try:
            return call(self.compiled, given)
        finally:
            self.batch.check(given)

    def _look_outside_graphs(self) -> None:
        """Choose the attention backend again if calls may have run outside the graphs.

        Raises:
            AnotherBackend: if the choice changes.
        """
        auto = self._auto
        if auto is None or auto.is_final or self.compiled.is_whole:
            return
        try:
            first, *eager = self._seen_by(recorded_calls)
        except Exception as error:  # for lack of memory, where compiled it fits
            release(error)
            return
        auto.settle(functools.reduce(operator.or_, eager, first))
        self.compiled.fix_attention()

    def _call_once(self) -> Any:
        return self.run() if self.feed is None else call(self.compiled, self.fresh_inputs())

    def find_changing_buffers(self) -> None:
        """Find the buffers that every call changes by eager forwards, unless :meth:`ready` has."""
        if self._buffers.compared:
            return
        self._buffers.find(self.run_eager)
        self.restore()

    def restore(self) -> None:
        """Put back the buffers that every call changes, before a call whose output counts."""
        self._buffers.restore()
