"""Building a workload's models, compiling them once, and keeping few of them on the device."""

from __future__ import annotations

import copy
import dataclasses
import gc
import re
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pytest_int8bench.clock import synchronized_perf_counter
from pytest_int8bench.compilation import CompiledModel, compile_for_a100
from pytest_int8bench.measure import (
    Timer,
    WarmUp,
    allocated_bytes,
    oom_of,
    peak_memory,
    warm_up,
)
from pytest_int8bench.params import RunParams
from pytest_int8bench.quantize import QuantizationError, apply_int8_quant, call

if TYPE_CHECKING:
    from pytest_int8bench.workloads import FilterFn, Workload

WEIGHT_SEED = 0
_TOO_FEW_ROWS = re.compile(r"self\.size\(0\) needs to be greater than 16, but got (\d+)")


class DeviceError(RuntimeError):
    """The device asked for is not there."""


@dataclass(frozen=True)
class Ready:
    """What getting a model ready took, and what its output looks like."""

    compile_s: float | None
    warm_up: WarmUp
    peak_memory_bytes: int | None
    tokens: int | None
    outputs: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    """Shape and dtype of each output tensor."""
    finite: bool
    """No output holds NaN or infinity."""


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
        other_bytes: int,
    ) -> None:
        self.workload = workload
        self.params = params
        self.eager = eager
        self.inputs = inputs
        self.device = device
        self._other_bytes = other_bytes
        self.compiled: CompiledModel = compile_for_a100(
            eager,
            fullgraph=params.compile_fullgraph,
            mode=params.compile_mode,
            attention=params.attention,
        )
        self._ready: Ready | None = None

    def run(self) -> Any:
        """Submit one batch and return the output. With ``feed=host`` the inputs are copied to
        the device first."""
        inputs = self.inputs
        if self.params.feed == "host":
            inputs = map_tensors(lambda t: t.to(self.device, non_blocking=True), inputs)
        return call(self.compiled, inputs)

    def ready(self, timer: Timer = synchronized_perf_counter) -> Ready:
        """Compile and warm up, once.

        Raises:
            QuantizationError: if the INT8 product cannot take the shapes.
            torch.OutOfMemoryError: or another error that ``measure.oom_of`` knows.
        """
        if self._ready is None:
            try:
                self._ready = self._get_ready(timer)
            except Exception as error:
                if match := _TOO_FEW_ROWS.search(str(error)):
                    raise QuantizationError(
                        f"W8A8 on CUDA takes more than 16 rows in a product, got {match[1]}: "
                        "use a larger batch, or int8_mode w8"
                    ) from error
                raise
        return self._ready

    def _get_ready(self, timer: Timer) -> Ready:
        start = timer()
        output = self.run()
        first_call_s = timer() - start
        tokens = self.workload.tokens(output) if self.workload.tokens else None
        tensors = list(tensors_of(output))
        if not tensors:
            raise ValueError(f"workload {self.workload.name!r}: the model returned no tensor")
        outputs = tuple((tuple(t.shape), t.dtype) for t in tensors)
        finite = all(bool(t.isfinite().all()) for t in tensors if t.is_floating_point())
        del output, tensors
        # The first call's peak holds what autotuning allocated; with CUDA graphs, the second
        # call records the graph and with it allocates what each replay uses.
        with peak_memory(self.device) as peak:
            warm = warm_up(self.run, timer, max_s=self.params.benchmark_interval_s)
            peak_bytes = peak()
        return Ready(
            compile_s=None if self.params.compile_mode == "off" else first_call_s,
            warm_up=warm,
            peak_memory_bytes=None if peak_bytes is None else peak_bytes - self._other_bytes,
            tokens=tokens,
            outputs=outputs,
            finite=finite,
        )


class ModelPool:
    """Holds one baseline and one candidate at a time, each built and compiled once.

    Args:
        filter_fn: which layers to quantize, before the workload's own filter.
    """

    def __init__(self, filter_fn: FilterFn | None = None) -> None:
        self._filter_fn = filter_fn
        self._models: dict[str, Model] = {}
        self._keys: dict[str, tuple[Any, RunParams]] = {}
        self._inputs: tuple[tuple[Any, RunParams], Any] | None = None
        # Keys hold ids of what workloads refer to; kept alive, an id is not used again.
        self._seen: list[Workload] = []

    def get(self, workload: Workload, params: RunParams) -> Model:
        """Return the model of ``params``: a candidate if ``int8_enabled``, else a baseline.

        Raises:
            DeviceError: if ``params`` asks for CUDA and there is none.
            torch.OutOfMemoryError: or another error that ``measure.oom_of`` knows.
        """
        role = "candidate" if params.int8_enabled else "baseline"
        key = self.key(workload, params)
        if self._keys.get(role) != key:
            twin = self.key(workload, params.baseline())
            for held, (kept_workload, kept) in list(self._keys.items()):
                if held == role or (kept_workload, kept.baseline()) != twin:
                    self.evict(held)
            try:
                self._models[role] = self._build(workload, params)
            except Exception as error:
                if oom_of(error):
                    free_memory()
                raise
            self._keys[role] = key
        return self._models[role]

    def batch(self, workload: Workload, params: RunParams) -> Any:
        """Return the inputs of ``params``, shared by baseline and candidate."""
        key = self.key(workload, params.baseline())
        if self._inputs is None or self._inputs[0] != key:
            self._inputs = None
            self._inputs = (key, _make_inputs(workload, params, find_device(params)))
        return self._inputs[1]

    def evict(self, role: str) -> None:
        """Drop the ``baseline`` or the ``candidate`` and free its memory."""
        self._models.pop(role, None)
        self._keys.pop(role, None)
        free_memory()

    def clear(self) -> None:
        """Drop everything."""
        self._inputs = None
        self._models.clear()
        self._keys.clear()
        free_memory()

    def evict_other_candidate(self, workload: Workload, params: RunParams) -> None:
        """Drop the candidate unless it is that of ``params``: it would only be in the way."""
        if "candidate" in self._keys and self._keys["candidate"] != self.key(workload, params):
            self.evict("candidate")

    def key(self, workload: Workload, params: RunParams) -> tuple[Any, RunParams]:
        """Return what the models of two tests have in common if they are the same."""
        if not any(workload is seen for seen in self._seen):
            self._seen.append(workload)
        parts = (getattr(workload, spec.name) for spec in dataclasses.fields(workload))
        return (workload.name, *map(_part_key, parts)), params.identity()

    def _build(self, workload: Workload, params: RunParams) -> Model:
        device = find_device(params)
        inputs = self.batch(workload, params)
        on_device = sum(t.nbytes for t in tensors_of(inputs) if t.device.type == device.type)
        other_bytes = allocated_bytes(device) - (on_device if device.type == "cuda" else 0)
        baseline = self._models.get("baseline")
        seen = workload.with_axes(params)
        if params.int8_enabled and baseline is not None:
            # The very weights of the baseline, also where build does not repeat itself.
            eager = copy.deepcopy(baseline.eager)
        else:
            eager = build_eager(workload, params, device)
        if params.int8_enabled:
            calibration = None
            if params.int8_smoothquant:
                calibration = (
                    workload.calibration(seen, device)
                    if workload.calibration
                    else [map_tensors(lambda t: t.to(device), inputs)]
                )
            apply_int8_quant(
                eager,
                mode=params.int8_mode,
                filter_fn=self._filter_fn or workload.filter_fn,
                smoothquant=params.int8_smoothquant,
                calibration=calibration,
                quant_config=workload.quant_config,
            )
        return Model(workload, params, eager, inputs, device=device, other_bytes=other_bytes)


def _part_key(part: Any) -> Any:
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
        return tuple((key, _part_key(value)) for key, value in part.items())
    if dataclasses.is_dataclass(part) and not isinstance(part, type):
        values = [getattr(part, spec.name) for spec in dataclasses.fields(part)]
        return (type(part), *map(_part_key, values))
    return _value_key(part)


def _value_key(value: Any) -> Any:
    if value is None or isinstance(value, str | bytes | int | float):
        return (type(value), value)
    return id(value)


def find_device(params: RunParams) -> torch.device:
    """Return the device of ``params``.

    Raises:
        DeviceError: one line, if it is not there.
    """
    if params.gpu_type == "cuda" and not torch.cuda.is_available():
        raise DeviceError(
            "gpu_type=cuda, but torch sees no CUDA device; "
            "use --int8-preset=smoke or --int8-set gpu_type=cpu"
        )
    return torch.device(params.gpu_type)


def build_eager(workload: Workload, params: RunParams, device: torch.device) -> nn.Module:
    """Build the model of a workload: seeded, in ``eval`` mode, on the device, in the dtype of
    ``params``.

    With ``bf16`` every floating weight and buffer is BF16 but those of modules that
    ``workload.keep_fp32`` names.

    Raises:
        ValueError: if ``workload.build`` returns something else than a module.
    """
    with torch.random.fork_rng():
        torch.manual_seed(WEIGHT_SEED)
        model = workload.build(workload.with_axes(params))
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"workload {workload.name!r}: build must return a torch.nn.Module, got {model!r}"
        )
    model.eval().requires_grad_(False)
    if params.bf16:
        kept = {
            id(part)
            for name, module in model.named_modules()
            if workload.keep_fp32 and workload.keep_fp32(module, name)
            for part in module.modules()
        }
        for module in model.modules():
            if id(module) not in kept:
                _cast(module, torch.bfloat16)
    return model.to(device)


def _cast(module: nn.Module, dtype: torch.dtype) -> None:
    for parameter in module.parameters(recurse=False):
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    for name, buffer in list(module.named_buffers(recurse=False)):
        if buffer.is_floating_point():
            module._buffers[name] = buffer.to(dtype)


def _make_inputs(workload: Workload, params: RunParams, device: torch.device) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(WEIGHT_SEED)
        inputs = workload.inputs(workload.with_axes(params), device)
    if not isinstance(inputs, tuple | list | Mapping) or not list(tensors_of(inputs)):
        raise ValueError(
            f"workload {workload.name!r}: inputs must return a tuple or a mapping with tensors, "
            f"got {type(inputs).__name__}"
        )
    dtype = torch.bfloat16 if params.bf16 else torch.float32

    def place(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.to(dtype) if tensor.is_floating_point() else tensor
        if params.feed == "device":
            return tensor.to(device)
        host = tensor.cpu()
        return host.pin_memory() if device.type == "cuda" else host

    return map_tensors(place, inputs)


def free_memory() -> None:
    """Give back memory of models that nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def tensors_of(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in a tensor, sequence, mapping or dataclass, in order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_of(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_of(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for spec in dataclasses.fields(value):
            yield from tensors_of(getattr(value, spec.name))


def map_tensors(change: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """Return ``value`` with ``change`` applied to each tensor that :func:`tensors_of` finds."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: map_tensors(change, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        changed = [map_tensors(change, item) for item in value]
        return type(value)(*changed) if hasattr(value, "_fields") else type(value)(changed)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
        return dataclasses.replace(value, **map_tensors(change, fields))
    return value
