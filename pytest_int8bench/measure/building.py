"""Build a workload's model and inputs at a point, before quantization."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from pytest_int8bench.compiler.torch_workarounds.dynamo import without_compilation
from pytest_int8bench.compiler.torch_workarounds.names import OpOverload
from pytest_int8bench.errors import ClearError, WorkloadError
from pytest_int8bench.measure.casting import (
    cast_module,
    kept_by_library,
    replace_inference_tensors,
)
from pytest_int8bench.measure.generators import kept_generators, seed_generators
from pytest_int8bench.params import RunParams
from pytest_int8bench.quantization.api import is_quantized
from pytest_int8bench.quantization.modes import MODES
from pytest_int8bench.tensors import call, cast, deep_copy, map_tensors, tensors_of
from pytest_int8bench.workloads.weights import (
    HUB,
    RANDOM,
    WeightsError,
    load_state_dict,
    read_state_dict,
)

if TYPE_CHECKING:
    from pytest_int8bench.workloads.workload import Workload


#: Seed of weights and inputs.
SEED = 0
_PLAIN = (torch.Tensor, nn.Parameter)


class DeviceError(ClearError, RuntimeError):
    """The requested device is not available."""


def find_device(params: RunParams) -> torch.device:
    """Return the device of ``params``.

    Raises:
        DeviceError: one line, if it is not available.
    """
    if params.gpu_type == "cuda" and not torch.cuda.is_available():
        raise DeviceError(
            "gpu_type=cuda, but torch sees no CUDA device; "
            "use --int8-preset=smoke or --int8-set gpu_type=cpu"
        )
    return torch.device(params.gpu_type)


def mode_problem(params: RunParams) -> str | None:
    """Return why the mode of ``params`` does not run on this machine, or None if it does."""
    if not params.int8_enabled:
        return None
    return MODES[params.int8_mode].device_problem(torch.device(params.gpu_type))


def build_eager(
    workload: Workload,
    params: RunParams,
    device: torch.device,
    *,
    weights: str = RANDOM,
    built: weakref.WeakSet[nn.Module] | None = None,
    inputs: Any = None,
) -> nn.Module:
    """Build the seeded, uncompiled model of a workload in ``eval`` mode, on the device and in the
    dtype of ``params``.

    Floating weights and buffers are cast to BF16, or to FP32 without ``bf16``. Modules that
    ``workload.keep_fp32`` selects, and tensors that transformers keeps in FP32 when it loads a
    model in BF16, are always FP32. ``build`` receives the baseline's point unless the workload is
    prequantized, so both sides of a comparison are built the same way.

    Args:
        workload: the workload to build.
        params: the point to build it for.
        device: device to move the model to.
        weights: ``random``, ``hub`` or the path of a file.
        built: modules built earlier; the new one is added.
        inputs: inputs of one batch, from which lazy modules infer their sizes.

    Raises:
        ValueError: if ``workload.build`` does not return a module, or returns an earlier one or one
            that cannot be quantized or compiled.
    """
    seen = params if workload.prequantized else params.baseline()
    with _seeded(device), _naming_callable("build", workload, params):
        model = build_with_weights(workload, workload.with_axes(seen), weights)
    if built is not None:
        if model in built:
            # By now it has been cast, moved and perhaps quantized.
            raise WorkloadError(
                f"workload {workload.name!r}: build must return a new module each time, got one "
                "that it returned before; return copy.deepcopy(model)"
            )
        built.add(model)
    replace_inference_tensors(model)
    model.eval()  # may be the model's own and return nothing
    if inputs is not None and any(map(is_lazy, _tensors(model))):
        _cast_all(model, workload, params)
        model = _moved(model, device=device)
        with torch.no_grad():
            run_once(model, inputs, device)
    model.requires_grad_(False)
    _cast_all(model, workload, params)
    if workload.channels_last:
        model = _moved(model, memory_format=torch.channels_last)
    return _moved(model, device=device)


def run_once(model: nn.Module, inputs: Any, device: torch.device) -> Any:
    """Run one repeatable eager forward, on a copy of ``inputs`` and with seeded generators."""
    with _seeded(device), torch.compiler.set_stance("force_eager"):
        return call(model, deep_copy(inputs, device_of=lambda tensor: device))


def fingerprint(model: nn.Module) -> tuple[int, ...]:
    """Return a hash of each tensor's bits, to tell weights apart."""
    return tuple(map(_sum_of_bits, _tensors(model)))


def _sum_of_bits(tensor: torch.Tensor) -> int:
    plain = type(tensor) in _PLAIN and tensor.layout == torch.strided
    if not plain or tensor.is_complex() or tensor.is_quantized:
        return 0
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return int(tensor.detach().view(integers[tensor.element_size()]).sum(dtype=torch.int64))


def _moved(model: nn.Module, **where: Any) -> nn.Module:
    moved = model.to(**where)
    return moved if isinstance(moved, nn.Module) else model


def _tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    return itertools.chain(model.parameters(), model.buffers())


@contextmanager
def _seeded(device: torch.device) -> Iterator[None]:
    """Seed the generators of torch, numpy and Python, and restore them on exit."""
    with kept_generators():
        seed_generators(SEED, device)
        yield


@contextmanager
def _naming_callable(what: str, workload: Workload, params: RunParams) -> Iterator[None]:
    """Add the callable and the point to errors that a workload's callable raises."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, ClearError):
            error.add_note(f"raised by {what} of workload {workload.name!r} at {params.run_name}")
        raise


def _cast_all(model: nn.Module, workload: Workload, params: RunParams) -> None:
    """Cast the model, except quantized modules and tensors that must stay in FP32."""
    kept = {
        id(part)
        for name, module in model.named_modules()
        if workload.keep_fp32 and workload.keep_fp32(module, name)
        for part in module.modules()
    }
    quantized = {
        id(part) for module in model.modules() if is_quantized(module) for part in module.modules()
    }
    kept_names = kept_by_library(model) if params.bf16 else frozenset()
    for name, module in model.named_modules():
        low = params.bf16 and id(module) not in kept
        if id(module) not in quantized:
            cast_module(module, torch.bfloat16 if low else torch.float32, name, kept_names)


def make_inputs(workload: Workload, params: RunParams, device: torch.device) -> Any:
    """Return a workload's seeded inputs in the model's dtype, on the device, or on the host with
    ``feed=host``.

    Raises:
        WorkloadError: if they are not a tuple, list or mapping with dense tensors that hold data.
    """
    with _seeded(device), _naming_callable("inputs", workload, params):
        inputs = workload.inputs(workload.with_axes(params), device)
    if not isinstance(inputs, tuple | list | Mapping) or not list(tensors_of(inputs)):
        raise WorkloadError(
            f"workload {workload.name!r}: inputs must return a tuple or a mapping with tensors, "
            f"got {type(inputs).__name__}"
        )
    if any(tensor.device.type == "meta" for tensor in tensors_of(inputs)):
        raise WorkloadError(
            f"workload {workload.name!r}: inputs must hold data, got a tensor on the device meta"
        )
    check_dense(workload, "inputs", inputs)
    if params.feed == "device":
        return _placed(inputs, workload, params, device)
    # Clone into dense tensors like those that arrive on the device, because other strides would
    # cause a recompilation.
    return map_tensors(torch.clone, _placed(inputs, workload, params, torch.device("cpu")))


def check_dense(workload: Workload, what: str, value: Any) -> None:
    """Refuse sparse and nested tensors, whose values and shapes cannot be compared or cut.

    Raises:
        WorkloadError: one line, for the first one in ``value``.
    """
    for tensor in tensors_of(value):
        if tensor.is_nested or tensor.layout != torch.strided:
            kind = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
            raise WorkloadError(
                f"workload {workload.name!r}: {what} must be dense tensors, got a {kind} one; "
                "convert it inside the model"
            )


def calibration_inputs(
    workload: Workload, params: RunParams, inputs: Any, device: torch.device
) -> list[Any]:
    """Return the batches for SmoothQuant's calibration: the workload's own, or ``inputs``."""
    if workload.calibration is None:
        return [_placed(inputs, workload, params, device)]
    with _seeded(device), _naming_callable("calibration", workload, params):
        batches = list(workload.calibration(workload.with_axes(params), device))
        for batch in batches:
            check_dense(workload, "calibration", batch)
        return [_placed(batch, workload, params, device) for batch in batches]


def _placed(inputs: Any, workload: Workload, params: RunParams, device: torch.device) -> Any:
    """Return ``inputs`` on ``device``, floating tensors in the model's dtype and layout."""
    dtype = torch.bfloat16 if params.bf16 else torch.float32

    def place(tensor: torch.Tensor) -> torch.Tensor:
        placed = (cast(tensor, dtype) if tensor.is_floating_point() else tensor).to(device)
        if workload.channels_last and placed.dim() == 4:
            placed = placed.contiguous(memory_format=torch.channels_last)
        return placed

    return map_tensors(place, inputs)


def build_with_weights(workload: Workload, params: RunParams, weights: str) -> torch.nn.Module:
    """Build the model of ``workload`` at ``params``.

    Args:
        workload: the workload to build.
        params: the point, with the workload's axes.
        weights: ``random`` for the weights that ``build`` returns, ``hub``, or the path of a file.

    Raises:
        WeightsError: one line, if the weights cannot be loaded or do not match the model.
    """
    if weights == RANDOM:
        return _checked_module(workload.build(params), workload)
    if workload.load is not None:
        return _checked_module(workload.load(params, weights), workload)
    if weights == HUB:
        raise WeightsError(
            f"--int8-weights=hub: workload {workload.name!r} has no weights on a hub; "
            "give the path of a file, or load them in build"
        )
    model = _checked_module(workload.build(params), workload)
    load_state_dict(model, read_state_dict(Path(weights)), source=weights)
    return model


def _checked_module(returned: Any, workload: Workload) -> nn.Module:
    """Return the module that ``build`` returned, without any compilation of its own.

    Raises:
        WorkloadError: if it is not a module that can be quantized and compiled.
    """
    must = f"workload {workload.name!r}: build must return a torch.nn.Module"
    if not isinstance(returned, nn.Module):
        raise WorkloadError(f"{must}, got {_short(returned)}")
    try:
        model = without_compilation(returned)
    except ValueError as error:
        raise WorkloadError(f"{must} that is not compiled, got one in which {error}") from None
    for name, module in model.named_modules():
        where = f" ({name})" if name else ""
        if isinstance(module, torch.jit.ScriptModule):
            raise WorkloadError(
                f"{must} in Python, got a scripted or traced one{where}: its layers cannot be "
                "quantized; return the module that it was made from"
            )
        if _is_exported(module):
            raise WorkloadError(
                f"{must} in Python, got an exported one{where}: it has no layers to quantize; "
                "return the module that it was made from"
            )
    return model


def _is_exported(module: nn.Module) -> bool:
    """Return whether ``torch.export`` created ``module``, which then runs operators, not layers."""
    graph = getattr(module, "graph", None)
    return isinstance(graph, torch.fx.Graph) and any(
        isinstance(node.target, OpOverload) for node in graph.nodes
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 and "\n" not in text else f"an object of {type(value)!r}"
