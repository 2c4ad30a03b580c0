"""Quantize and compile each model once, keeping only a few on the device."""

from __future__ import annotations

import contextlib
import dataclasses
import types
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from pytest_int8bench.attention import SHORT
from pytest_int8bench.compiler.api import compile_for_a100
from pytest_int8bench.errors import QuantizationError, WorkloadError
from pytest_int8bench.kernels.dispatch import attention_problem
from pytest_int8bench.measure.attention_auto import (
    AttentionError,
    AutoAttention,
    Timings,
    recorded_calls,
)
from pytest_int8bench.measure.batches import Batch, to_device
from pytest_int8bench.measure.building import (
    build_eager,
    calibration_inputs,
    check_dense,
    find_device,
    fingerprint,
    make_inputs,
    run_once,
)
from pytest_int8bench.measure.candidate import Origin, make_candidate
from pytest_int8bench.measure.host_feed import HostFeed
from pytest_int8bench.measure.memory import (
    allocated_bytes,
    collect_garbage,
    free_memory,
    oom_of,
)
from pytest_int8bench.measure.model import Model
from pytest_int8bench.measure.repeats import kept_buffers
from pytest_int8bench.params import RunParams
from pytest_int8bench.quantization.api import apply_int8_quant, is_quantized
from pytest_int8bench.quantization.weights import make_readable
from pytest_int8bench.tensors import call, map_tensors
from pytest_int8bench.workloads.weights import RANDOM

if TYPE_CHECKING:
    from pytest_int8bench.workloads.workload import Workload


#: Parts of a workload that do not affect a baseline.
_QUANTIZATION_PARTS = (
    "filter_fn",
    "quant_config",
    "calibration",
    "smoothquant_alpha",
)


class Key(NamedTuple):
    """Key that is equal for tests that can share a model."""

    workload: tuple[Any, ...]
    quantization: tuple[Any, ...]
    params: RunParams

    def baseline(self) -> Key:
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
        self._auto: dict[Key, AutoAttention] = {}
        self._timings: Timings = {}
        self._fingerprints: dict[Key, tuple[int, ...]] = {}
        self._models: dict[str, Model] = {}
        self._keys: dict[str, Key] = {}
        self._inputs: tuple[Key, Batch] | None = None
        # Keys hold ids of objects that workloads refer to. Keeping the objects alive prevents reuse
        # of their ids.
        self._seen: list[Workload] = []
        self._built: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def get(self, workload: Workload, params: RunParams) -> Model:
        """Return the model of ``params``: a candidate if ``int8_enabled``, else a baseline.

        Raises:
            DeviceError: if ``params`` asks for CUDA and there is none.
            torch.OutOfMemoryError: or another error that ``memory.oom_of`` knows.
        """
        role = _role(params)
        key = self.key(workload, params)
        if self._keys.get(role) != key:
            for held, kept in list(self._keys.items()):
                if held == role or kept.baseline() != key.baseline():
                    self.evict(held)
            try:
                batch = self._batch(workload, params)
                self._models[role] = self._build(workload, params, batch)
            except Exception as error:
                if oom_of(error):
                    free_memory()
                raise
            self._keys[role] = key
        return self._models[role]

    def holds(self, workload: Workload, params: RunParams) -> bool:
        """Return whether :meth:`get` already holds the model of ``params``."""
        return self._keys.get(_role(params)) == self.key(workload, params)

    def batch(self, workload: Workload, params: RunParams) -> Any:
        """Return the inputs of ``params``, shared by baseline and candidate."""
        return self._batch(workload, params).inputs

    def fresh_batch(self, workload: Workload, params: RunParams) -> Any:
        """Return a copy of the inputs of ``params`` on the device."""
        return to_device(self._batch(workload, params).fresh(), find_device(params))

    def _batch(self, workload: Workload, params: RunParams) -> Batch:
        key = self.key(workload, params.baseline())
        if self._inputs is None or self._inputs[0] != key:
            self._inputs = None
            self._inputs = (key, Batch(make_inputs(workload, params, find_device(params))))
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
        """Drop a model and close its feed if no other model uses it."""
        self._keys.pop(role, None)
        dropped = self._models.pop(role, None)
        feed = None if dropped is None else dropped.feed
        if feed is not None and all(model.feed is not feed for model in self._models.values()):
            feed.close()

    def evict_other_candidate(self, workload: Workload, params: RunParams) -> None:
        """Drop the candidate, to free its memory, unless it belongs to ``params``."""
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

    def variant(self, workload: Workload, params: RunParams, *, quantize: bool = True) -> Model:
        """Build an eager candidate of ``params`` from its baseline without keeping it, to try one
        of many quantizations or an unquantized copy."""
        baseline = self.get(workload, params.baseline())
        baseline.find_changing_buffers()  # variants must differ from it in quantization only
        point = params.replace(compile_mode="off")
        model = self._build(workload, point, baseline.batch, copy_first=True, quantize=quantize)
        model.params = params  # whose evaluations and baseline are the point's
        return model

    def _build(
        self,
        workload: Workload,
        params: RunParams,
        batch: Batch,
        *,
        copy_first: bool = False,
        quantize: bool = True,
    ) -> Model:
        device = find_device(params)
        # Freeing leftovers of earlier tests later would distort the size of these weights.
        collect_garbage(device)
        if params.int8_attention and (why := attention_problem(device)):
            raise QuantizationError(f"int8_attention=True: {why}")
        if params.attention == SHORT and (why := attention_problem(device)):
            raise AttentionError(f"attention={SHORT}: {why}")
        before = allocated_bytes(device)
        baseline = self._models.get("baseline")
        if params.int8_enabled and baseline is not None and not workload.prequantized:
            baseline.restore()
            eager, workspaces = self._like(baseline, workload, copy_first=copy_first)
            before += workspaces
        else:
            eager = self._build_eager(workload, params, batch.inputs)
            if not workload.prequantized:
                self._check_weights(workload, params, eager)
        auto = None
        if params.attention == "auto":
            held = allocated_bytes(device)
            auto = self._auto_attention(workload, params, eager, batch, device)
            before += allocated_bytes(device) - held  # matmul workspaces, which stay
        if params.int8_enabled and workload.prequantized:
            if not any(map(is_quantized, eager.modules())):
                raise QuantizationError(
                    f"workload {workload.name!r} is prequantized, but build returned a model "
                    f"without layers quantized by torchao at {params.run_name}"
                )
            make_readable(eager)
        elif params.int8_enabled and quantize:
            # If there is a baseline, both have already run once for the comparison.
            run = None if baseline is not None else _runner(eager, batch, device)
            _quantize(eager, workload, params, batch, device, run)
        collect_garbage(device)  # the weights that were quantized
        weight_bytes = allocated_bytes(device) - before
        return Model(
            workload,
            params,
            eager,
            batch,
            device=device,
            weight_bytes=weight_bytes,
            auto=auto,
            cache_dir=self._cache_dir,
            feed=self._feed(params, batch, device),
            baseline=baseline if params.int8_enabled and not workload.prequantized else None,
        )

    def _check_weights(self, workload: Workload, params: RunParams, eager: nn.Module) -> None:
        """Raise ``WorkloadError`` if weights differ between a baseline and a candidate built
        separately, or between two builds of a baseline."""
        found = fingerprint(eager)
        if self._fingerprints.setdefault(self.key(workload, params).baseline(), found) != found:
            raise WorkloadError(
                f"workload {workload.name!r}: build must return the same weights each time, "
                "because baseline and candidate may be built separately, got different weights at "
                f"{params.run_name}; draw them from torch's, numpy's or Python's own generator"
            )

    def _build_eager(self, workload: Workload, params: RunParams, inputs: Any) -> nn.Module:
        device = find_device(params)
        return build_eager(
            workload, params, device, weights=self.weights, built=self._built, inputs=inputs
        )

    def _like(
        self, baseline: Model, workload: Workload, *, copy_first: bool
    ) -> tuple[nn.Module, int]:
        """Return a model with exactly the baseline's weights, even if ``build`` is not repeatable,
        and the bytes that running models left allocated, such as matmul workspaces."""
        device, left = baseline.device, 0

        def run(model: nn.Module) -> Any:
            nonlocal left
            held = allocated_bytes(device)
            with baseline.compiled.eager_settings():
                output = run_once(model, baseline.inputs, device)  # copies them
            check_dense(workload, "outputs", output)
            output = map_tensors(lambda t: t.cpu(), output)
            left += allocated_bytes(device) - held
            return output

        origin = Origin(
            workload=workload.name,
            baseline=baseline.eager,
            build=lambda: self._build_eager(workload, baseline.params, baseline.inputs),
            run=run,
            built=self._built,
        )
        model = make_candidate(origin, copy_first=copy_first)
        self._built.add(model)
        return model, left

    def _feed(self, params: RunParams, batch: Batch, device: torch.device) -> HostFeed | None:
        """Return the host feed of a model. Baseline and candidate share one, so that both get the
        same batches from the same processes."""
        if params.feed != "host":
            return None
        for model in self._models.values():
            if model.feed is not None and model.batch is batch:
                return model.feed
        return HostFeed(batch.inputs, device, samples=params.batch_size)

    def _auto_attention(
        self,
        workload: Workload,
        params: RunParams,
        eager: nn.Module,
        batch: Batch,
        device: torch.device,
    ) -> AutoAttention:
        """Return the attention backend choice shared by a baseline and its candidates. It is made
        here for eager models, else once the graph is known."""
        key = self.key(workload, params.baseline().replace(feed="device"))
        if key in self._auto:
            return self._auto[key]
        auto = self._auto[key] = AutoAttention(self._timings)
        if params.compile_mode == "off":
            model = compile_for_a100(eager, mode="off", attention="auto")
            with contextlib.suppress(Exception):  # e.g. out of memory, reported when it runs
                with kept_buffers(eager, _runner(eager, batch, device)):
                    calls = recorded_calls(lambda: call(model, to_device(batch.fresh(), device)))
                auto.choose(calls)
            auto.is_final = True
        return auto


def _runner(eager: nn.Module, batch: Batch, device: torch.device) -> Callable[[], object]:
    """Return a function that runs one eager forward."""

    def run() -> object:
        with torch.no_grad():
            return run_once(eager, batch.inputs, device)  # copies them

    return run


def _quantize(
    eager: nn.Module,
    workload: Workload,
    params: RunParams,
    batch: Batch,
    device: torch.device,
    run: Callable[[], object] | None,
) -> None:
    """Quantize a model in place; ``run`` runs a forward if none has run yet."""
    calibration = None
    if params.int8_smoothquant:
        calibration = calibration_inputs(workload, params, batch.inputs, device)
    with contextlib.nullcontext() if calibration is None else kept_buffers(eager, run):
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


def _role(params: RunParams) -> str:
    return "candidate" if params.int8_enabled else "baseline"


def part_key(part: Any) -> Any:
    """Return a key that is equal for parts of a workload that behave the same.

    A function-scoped fixture creates new lambdas and mappings for each test, so they are compared
    by content: a function by its code and the objects that it refers to.
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
