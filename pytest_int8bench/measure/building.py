"""Building a workload's model and its inputs at a point, before anything is quantized."""

from __future__ import annotations

import random
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from pytest_int8bench.errors import ClearError, WorkloadError
from pytest_int8bench.measure.casting import cast_module, kept_by_library
from pytest_int8bench.params import RunParams
from pytest_int8bench.quantization.api import is_quantized
from pytest_int8bench.quantization.modes import MODES
from pytest_int8bench.tensors import cast, map_tensors, tensors_of
from pytest_int8bench.workloads.weights import (
    HUB,
    RANDOM,
    WeightsError,
    load_state_dict,
    read_state_dict,
)

if TYPE_CHECKING:
    from pytest_int8bench.workloads.workload import Workload


#: Of weights and inputs.
SEED = 0


class DeviceError(ClearError, RuntimeError):
    """The device asked for is not there."""


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


def mode_problem(params: RunParams) -> str | None:
    """Say why the mode of ``params`` does not run on this machine, or return None."""
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
) -> nn.Module:
    """Build the model of a workload: seeded, in ``eval`` mode, on the device, in the dtype of
    ``params``.

    Every floating weight and buffer is cast to BF16, or to FP32 without ``bf16``. FP32 in both
    cases are modules that ``workload.keep_fp32`` names, and what transformers keeps in FP32 when it
    loads a model in BF16.

    Args:
        workload: what to build.
        params: the point to build it for.
        device: where it is moved to.
        weights: ``random``, ``hub`` or the path of a file.
        built: modules that were built before; the new one is added.

    Raises:
        ValueError: if ``workload.build`` returns no module, or one that it returned before.
    """
    with _seeded(device), _told("build", workload, params):
        model = build_with_weights(workload, workload.with_axes(params), weights)
    if not isinstance(model, nn.Module):
        raise WorkloadError(
            f"workload {workload.name!r}: build must return a torch.nn.Module, got {model!r}"
        )
    if built is not None:
        if model in built:
            # It is cast, moved and perhaps quantized by now.
            raise WorkloadError(
                f"workload {workload.name!r}: build must return a new module each time, got one "
                "that it returned before; return copy.deepcopy(model)"
            )
        built.add(model)
    model.eval().requires_grad_(False)
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
    if workload.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model.to(device)


@contextmanager
def _seeded(device: torch.device) -> Iterator[None]:
    """Seed the random number generators of torch, numpy and Python, and put them back
    afterwards."""
    devices = [torch.cuda.current_device()] if device.type == "cuda" else []
    python, arrays = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(SEED)
        random.seed(SEED)
        np.random.seed(SEED)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(arrays)


@contextmanager
def _told(what: str, workload: Workload, params: RunParams) -> Iterator[None]:
    """Add to an error of a workload's callable which one it was, and where."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, ClearError):
            error.add_note(f"raised by {what} of workload {workload.name!r} at {params.run_name}")
        raise


def make_inputs(workload: Workload, params: RunParams, device: torch.device) -> Any:
    """Return the inputs of a workload: seeded, on the device and in the dtype of the model; with
    ``feed=host`` on the host.

    Raises:
        WorkloadError: if they are no tuple or mapping with tensors that hold data.
    """
    with _seeded(device), _told("inputs", workload, params):
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
    if params.feed == "device":
        return _placed(inputs, workload, params, device)
    # Dense, as what arrives on the device: other strides would compile anew.
    return map_tensors(torch.clone, _placed(inputs, workload, params, torch.device("cpu")))


def calibration_inputs(
    workload: Workload, params: RunParams, inputs: Any, device: torch.device
) -> list[Any]:
    """Return the batches that SmoothQuant is calibrated on: the workload's own, or ``inputs``."""
    if workload.calibration is None:
        return [_placed(inputs, workload, params, device)]
    with _seeded(device), _told("calibration", workload, params):
        batches = workload.calibration(workload.with_axes(params), device)
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
        workload: what to build.
        params: the point, with the workload's axes.
        weights: ``random`` for what ``build`` returns, ``hub``, or the path of a file.

    Raises:
        WeightsError: one line, if the weights cannot be had or do not fit.
    """
    if weights == RANDOM:
        return workload.build(params)
    if workload.load is not None:
        return workload.load(params, weights)
    if weights == HUB:
        raise WeightsError(
            f"--int8-weights=hub: workload {workload.name!r} has no weights on a hub; "
            "give the path of a file, or load them in build"
        )
    model = workload.build(params)
    load_state_dict(model, read_state_dict(Path(weights)), source=weights)
    return model
