"""Models of a point, quantized and compiled once, few of them kept on the device."""

from __future__ import annotations

import copy
import dataclasses
import gc
import re
import types
import weakref
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import nn

from pytest_int8bench.attention_choice import fastest_backend, recorded_calls
from pytest_int8bench.building import build_eager, calibration_inputs, find_device, make_inputs
from pytest_int8bench.ceiling import LinearCall, linear_calls
from pytest_int8bench.clock import synchronized_perf_counter
from pytest_int8bench.compilation import CompiledModel, compile_for_a100, graphs_skipped
from pytest_int8bench.errors import ClearError, WorkloadError
from pytest_int8bench.evidence import Evidence, Keep, check_labels, profile_forward
from pytest_int8bench.feed import HostFeed
from pytest_int8bench.measure import (
    Timer,
    WarmUp,
    allocated_bytes,
    oom_of,
    peak_memory,
    warm_up,
)
from pytest_int8bench.params import RunParams
from pytest_int8bench.quantize import (
    QuantizationError,
    apply_int8_quant,
    call,
    coverage,
    int8_storage,
    is_quantized,
)
from pytest_int8bench.tensors import map_tensors, tensors_of
from pytest_int8bench.weights import RANDOM

if TYPE_CHECKING:
    from pytest_int8bench.workloads import Workload

_NO_KERNEL = "No available kernel"
_TOO_FEW_ROWS = re.compile(r"self\.size\(0\) needs to be greater than 16, but got (\d+)")


class AttentionError(ClearError, RuntimeError):
    """The attention backend asked for does not take what the model asks of it."""


Outputs: TypeAlias = tuple[tuple[tuple[int, ...], torch.dtype], ...]


@dataclass(frozen=True)
class Ready:
    """What getting a model ready took, and what its output looks like."""

    compile_s: float | None
    warm_up: WarmUp
    peak_memory_bytes: int | None
    tokens: int | None
    outputs: Outputs
    """Shape and dtype of each output tensor."""
    finite: bool
    """No output holds NaN or infinity."""
    compile_cache: str | None = None
    """``warm`` or ``cold``, as the first call found the compile cache; None where unknown."""
    cuda_graphs_skipped: bool = False
    """The compile mode asks for CUDA graphs, and Inductor did without."""
    regions: int = 0
    """Repeated blocks that were compiled once for all."""
    regions_refused: str | None = None
    """Why blocks that repeat were compiled one by one; None if they were not."""


class Model:
    """A workload's model at one point: eager, and compiled."""

    def __init__(
        self,
        workload: Workload,
        params: RunParams,
        eager: nn.Module,
        inputs: Any,
        *,
        device: torch.device,
        weight_bytes: int,
        attention: str,
        cache_dir: Path | None,
        feed: HostFeed | None = None,
    ) -> None:
        self.workload = workload
        self.params = params
        self.eager = eager
        self.inputs = inputs
        self.device = device
        self.feed = feed
        """Where the batches come from with ``feed=host``."""
        self._weight_bytes = weight_bytes
        self.compiled: CompiledModel = compile_for_a100(
            eager,
            fullgraph=params.compile_fullgraph,
            mode=params.compile_mode,
            attention=attention,
            cache_dir=cache_dir,
        )
        self._ready: Ready | None = None
        self._evidence: Evidence | None = None
        self._linear_calls: tuple[LinearCall, ...] | None = None

    @property
    def is_ready(self) -> bool:
        """Whether :meth:`ready` has compiled and warmed up."""
        return self._ready is not None

    def run(self) -> Any:
        """Submit one batch and return the output. With ``feed=host`` it comes from the host, and
        the next one is on its way meanwhile."""
        return call(self.compiled, self.inputs if self.feed is None else next(self.feed))

    def run_again(self) -> Any:
        """Submit the batch of the last :meth:`run` once more, which is on the device."""
        return call(self.compiled, self.inputs if self.feed is None else self.feed.current)

    def evidence(self, keep: Keep | None = None) -> Evidence:
        """Profile one forward, once, and compare the labels of the point with the kernels.

        Args:
            keep: writes the profile down; it is made again where that of an earlier call was not.

        Raises:
            EvidenceError: if they contradict.
        """
        if self._evidence is None or (keep is not None and self._evidence.trace is None):
            with self.compiled.entered():
                evidence = profile_forward(self.run, self.device, keep)
            fused = self.params.int8_enabled and coverage(self.eager).backend == "fused"
            check_labels(
                evidence,
                self.params,
                int8_storage(self.eager),
                self.compiled.attention,
                fused=fused,
            )
            self._evidence = evidence
        return self._evidence

    def linear_calls(self) -> tuple[LinearCall, ...]:
        """Run one eager forward, once, and return what its linear layers were called with."""
        if self._linear_calls is None:
            inputs = _on_device(self.inputs, self.device)
            with self.compiled.settings():
                self._linear_calls = linear_calls(self.eager, lambda: call(self.eager, inputs))
        return self._linear_calls

    def ready(self, timer: Timer = synchronized_perf_counter) -> Ready:
        """Compile and warm up, once.

        Raises:
            QuantizationError: if the INT8 product cannot take the shapes.
            AttentionError: if the attention backend cannot take the model's attention.
            torch.OutOfMemoryError: or another error that ``measure.oom_of`` knows.
        """
        if self._ready is None:
            try:
                with self.compiled.entered():
                    self._ready = self._get_ready(timer)
            except Exception as error:
                if match := _TOO_FEW_ROWS.search(str(error)):
                    raise QuantizationError(
                        f"W8A8 on CUDA takes more than 16 rows in a product, got {match[1]}: "
                        "use a larger batch, or int8_mode w8"
                    ) from error
                if _NO_KERNEL in str(error):
                    tried = self.compiled.attention
                    usable = "efficient or math"
                    if self.params.attention != "auto":
                        usable = f"auto, {usable}"
                    raise AttentionError(
                        f"attention={tried} cannot run the attention of workload "
                        f"{self.workload.name!r} on {self.device.type} (masks, head sizes and "
                        f"dtypes differ by backend): use attention={usable}"
                    ) from None
                raise
        return self._ready

    def _get_ready(self, timer: Timer) -> Ready:
        kind = self.device.type
        on_device = sum(t.nbytes for t in tensors_of(self.inputs) if t.device.type == kind)
        if self.feed is not None:
            self.feed.open()
            on_device = self.feed.nbytes
        _settle(self.device)
        other_bytes = allocated_bytes(self.device) - self._weight_bytes - on_device
        output = self.run()
        tokens = int(self.workload.tokens(output)) if self.workload.tokens else None
        tensors = list(tensors_of(output))
        if not tensors:
            raise WorkloadError(f"workload {self.workload.name!r}: the model returned no tensor")
        outputs = _describe(output)
        finite = all(bool(t.isfinite().all()) for t in tensors if t.is_floating_point())
        del output, tensors
        # The first call's peak holds what autotuning allocated; with CUDA graphs, the second
        # call records the graph and with it allocates what each replay uses.
        skips = graphs_skipped()
        with peak_memory(self.device) as peak:
            warm = warm_up(self.run, timer, max_s=self.params.benchmark_interval_s)
            peak_bytes = peak()
        again = _describe(self.run())
        if again != outputs:
            raise WorkloadError(
                f"workload {self.workload.name!r}: the same inputs gave {_listed(outputs)} at the "
                f"first call and {_listed(again)} at a later one"
            )
        return Ready(
            compile_s=self.compiled.first_call_s,
            warm_up=warm,
            peak_memory_bytes=None if peak_bytes is None else peak_bytes - other_bytes,
            tokens=tokens,
            outputs=outputs,
            finite=finite,
            compile_cache=self.compiled.compile_cache,
            cuda_graphs_skipped=self.compiled.cuda_graphs_skipped or graphs_skipped() > skips,
            regions=self.compiled.regions,
            regions_refused=self.compiled.regions_refused,
        )


def _on_device(inputs: Any, device: torch.device) -> Any:
    """Return inputs that may be on the host, with ``feed=host``, on the device."""
    return map_tensors(lambda t: t.to(device, non_blocking=True), inputs)


def _describe(output: Any) -> Outputs:
    return tuple((tuple(tensor.shape), tensor.dtype) for tensor in tensors_of(output))


def _listed(outputs: Outputs) -> str:
    return ", ".join(f"{list(shape)} {dtype}" for shape, dtype in outputs) or "no tensor"


#: Parts of a workload that a baseline has nothing to do with.
_QUANTIZATION_PARTS = (
    "filter_fn",
    "quant_config",
    "calibration",
    "smoothquant_alpha",
)


class Key(NamedTuple):
    """What the models of two tests have in common if they are the same."""

    workload: tuple[Any, ...]
    quantization: tuple[Any, ...]
    params: RunParams

    def twin(self) -> Key:
        """Return the key of the baseline."""
        return Key(self.workload, (), self.params.baseline())


class ModelPool:
    """Holds one baseline and one candidate at a time, each built and compiled once.

    Args:
        weights: ``random``, ``hub`` or the path of a file.
        cache_dir: folder to keep compiled code in, as in ``compile_for_a100``.
    """

    def __init__(self, *, weights: str = RANDOM, cache_dir: Path | None = None) -> None:
        self.weights = weights
        self._cache_dir = cache_dir
        self._chosen: dict[Key, str] = {}
        self._models: dict[str, Model] = {}
        self._keys: dict[str, Key] = {}
        self._inputs: tuple[Key, Any] | None = None
        # Keys hold ids of what workloads refer to; kept alive, an id is not used again.
        self._seen: list[Workload] = []
        self._built: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def get(self, workload: Workload, params: RunParams) -> Model:
        """Return the model of ``params``: a candidate if ``int8_enabled``, else a baseline.

        Raises:
            DeviceError: if ``params`` asks for CUDA and there is none.
            torch.OutOfMemoryError: or another error that ``measure.oom_of`` knows.
        """
        role = _role(params)
        key = self.key(workload, params)
        if self._keys.get(role) != key:
            for held, kept in list(self._keys.items()):
                if held == role or kept.twin() != key.twin():
                    self.evict(held)
            try:
                inputs = self.batch(workload, params)
                self._models[role] = self._build(workload, params, inputs)
            except Exception as error:
                if oom_of(error):
                    free_memory()
                raise
            self._keys[role] = key
        return self._models[role]

    def holds(self, workload: Workload, params: RunParams) -> bool:
        """Say whether :meth:`get` has the model of ``params`` at hand."""
        return self._keys.get(_role(params)) == self.key(workload, params)

    def batch(self, workload: Workload, params: RunParams) -> Any:
        """Return the inputs of ``params``, shared by baseline and candidate."""
        key = self.key(workload, params.baseline())
        if self._inputs is None or self._inputs[0] != key:
            self._inputs = None
            self._inputs = (key, make_inputs(workload, params, find_device(params)))
        return self._inputs[1]

    def evict(self, role: str) -> None:
        """Drop the ``baseline`` or the ``candidate`` and free its memory."""
        self._drop(role)
        free_memory()

    def clear(self) -> None:
        """Drop everything."""
        self._inputs = None
        for role in list(self._models):
            self._drop(role)
        free_memory()

    def _drop(self, role: str) -> None:
        """Drop a model, and end what fed it alone."""
        self._keys.pop(role, None)
        dropped = self._models.pop(role, None)
        feed = None if dropped is None else dropped.feed
        if feed is not None and all(model.feed is not feed for model in self._models.values()):
            feed.close()

    def evict_other_candidate(self, workload: Workload, params: RunParams) -> None:
        """Drop the candidate unless it is that of ``params``: it would only be in the way."""
        if "candidate" in self._keys and self._keys["candidate"] != self.key(workload, params):
            self.evict("candidate")

    def key(self, workload: Workload, params: RunParams) -> Key:
        """Return what the models of two tests have in common if they are the same."""
        if not any(workload is seen for seen in self._seen):
            self._seen.append(workload)
        parts = {
            spec.name: part_key(getattr(workload, spec.name))
            for spec in dataclasses.fields(workload)
            if spec.name != "evaluation"
        }
        quantization = tuple(parts.pop(name) for name in _QUANTIZATION_PARTS)
        return Key(
            (workload.name, *parts.values()),
            quantization if params.int8_enabled else (),
            params.identity(),
        )

    def variant(self, workload: Workload, params: RunParams) -> Model:
        """Build the candidate of ``params`` from its baseline, to be run eagerly, and do not keep
        it: for a look at one of many ways to quantize."""
        baseline = self.get(workload, params.baseline())
        model = self._build(workload, params.replace(compile_mode="off"), baseline.inputs)
        model.params = params  # whose evaluations and baseline are the point's
        return model

    def _build(self, workload: Workload, params: RunParams, inputs: Any) -> Model:
        device = find_device(params)
        _settle(device)  # what earlier tests left, or its end would count against these weights
        before = allocated_bytes(device)
        baseline = self._models.get("baseline")
        if params.int8_enabled and baseline is not None and not workload.prequantized:
            # The very weights of the baseline, also where build does not repeat itself.
            eager = copy.deepcopy(baseline.eager)
        else:
            eager = build_eager(workload, params, device, weights=self.weights, built=self._built)
        attention = params.attention
        if attention == "auto":
            held = allocated_bytes(device)
            attention = self._fastest_attention(workload, params, eager, inputs, device)
            before += allocated_bytes(device) - held  # workspaces of the products, which stay
        if params.int8_enabled and workload.prequantized:
            if not any(map(is_quantized, eager.modules())):
                raise QuantizationError(
                    f"workload {workload.name!r} is prequantized, but build returned a model "
                    f"without a layer that torchao quantized at {params.run_name}"
                )
        elif params.int8_enabled:
            calibration = None
            if params.int8_smoothquant:
                calibration = calibration_inputs(workload, params, inputs, device)
            apply_int8_quant(
                eager,
                mode=params.int8_mode,
                filter_fn=workload.filter_fn,
                smoothquant=params.int8_smoothquant,
                calibration=calibration,
                alpha=workload.smoothquant_alpha,
                quant_config=workload.quant_config,
                backend=params.int8_backend,
            )
        _settle(device)  # the weights that were quantized
        weight_bytes = allocated_bytes(device) - before
        return Model(
            workload,
            params,
            eager,
            inputs,
            device=device,
            weight_bytes=weight_bytes,
            attention=attention,
            cache_dir=self._cache_dir,
            feed=self._feed(params, inputs, device),
        )

    def _feed(self, params: RunParams, inputs: Any, device: torch.device) -> HostFeed | None:
        """Return what feeds a model from the host: one feed for baseline and candidate, so that
        both get the same batches from the same processes."""
        if params.feed != "host":
            return None
        for model in self._models.values():
            if model.feed is not None and model.inputs is inputs:
                return model.feed
        return HostFeed(inputs, device, samples=params.batch_size)

    def _fastest_attention(
        self,
        workload: Workload,
        params: RunParams,
        eager: nn.Module,
        inputs: Any,
        device: torch.device,
    ) -> str:
        """Return the fastest attention backend, chosen once for a baseline and its candidates, or
        ``auto`` itself if none could be chosen."""
        how_it_runs = {"compile_mode": "off", "compile_fullgraph": True, "feed": "device"}
        key = self.key(workload, params.baseline().replace(**how_it_runs))
        if key not in self._chosen:
            model = compile_for_a100(eager, mode="off", attention="auto")
            try:
                calls = recorded_calls(lambda: call(model, _on_device(inputs, device)))
            except Exception:  # out of memory, where compiled it may fit, or told when it compiles
                calls = Counter()
            self._chosen[key] = fastest_backend(calls) or "auto"
        return self._chosen[key]


def _role(params: RunParams) -> str:
    return "candidate" if params.int8_enabled else "baseline"


def part_key(part: Any) -> Any:
    """Return what two parts of a workload have in common if they do the same.

    A function-scoped fixture makes its lambdas and mappings anew for each test: they are
    compared by what they hold, a function by its code and what it refers to.
    """
    if isinstance(part, types.FunctionType):
        values = [cell.cell_contents for cell in part.__closure__ or ()]
        values += [*(part.__defaults__ or ()), *(part.__kwdefaults__ or {}).values()]
        # Code compares equal across files; the globals say which file it is in.
        return (part.__code__, id(part.__globals__), tuple(map(_value_key, values)))
    if isinstance(part, Mapping):
        return tuple((key, part_key(value)) for key, value in part.items())
    if isinstance(part, list | tuple):
        return (type(part), *map(part_key, part))
    if dataclasses.is_dataclass(part) and not isinstance(part, type):
        values = [getattr(part, spec.name) for spec in dataclasses.fields(part)]
        return (type(part), *map(part_key, values))
    return _value_key(part)


def _value_key(value: Any) -> Any:
    if value is None or isinstance(value, str | bytes | int | float):
        return (type(value), value)
    return id(value)


def _settle(device: torch.device) -> None:
    """Free what nothing refers to, where allocated bytes are read: it takes a while."""
    if device.type == "cuda":
        free_memory()


def free_memory() -> None:
    """Give back memory of models that nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        with suppress(torch.AcceleratorError):  # a device that failed frees nothing
            torch.cuda.empty_cache()
