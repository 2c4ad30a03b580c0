"""Ask torch about this machine in a child process.

A broken torch can crash or hang the process that imports it. ``python -m`` runs this module in the
child, which prints a line of JSON before and after each stage, so that the parent knows how far it
got.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pytest_int8bench.errors import ClearError, first_line
from pytest_int8bench.processes.running import ending

_TIMEOUT_S = 180
#: Start of our lines, which distinguishes them from what libraries print to stdout.
_MARK = "int8bench-doctor "


@dataclass(frozen=True)
class Device:
    """A device as torch sees it, and the status of our kernels on it."""

    name: str
    uuid: str = ""
    problem: str | None = None
    """Why it cannot run any kernels."""
    fused_problem: str | None = None
    """Why it cannot run any of the fused kernels."""
    kernels: tuple[str, ...] = ()
    """Kernels that run."""
    unmet: dict[str, str] = field(default_factory=dict)
    """Kernel for other devices -> its requirements."""
    failed: dict[str, str] = field(default_factory=dict)
    """Kernel for this device -> why it does not run."""


@dataclass(frozen=True)
class TorchReport:
    """Facts reported by torch. If a stage of the child fails, its name and error are in
    ``problems``, and its fields have their defaults."""

    problems: dict[str, str] = field(default_factory=dict)
    version: str | None = None
    cuda: str | None = None
    hip: str | None = None
    compiler: str | None = None
    inductor_folder: str | None = None
    triton_folder: str | None = None
    devices: tuple[Device, ...] = ()
    """The GPUs, or the CPU if torch sees none."""
    cuda_problem: str | None = None
    """Why torch sees no GPU."""

    @property
    def has_cuda(self) -> bool:
        """Whether torch can run kernels on a GPU."""
        return any(device.uuid and device.problem is None for device in self.devices)


def ask() -> TorchReport:
    """Import torch in a child process and return its report."""
    # -P keeps the current folder off sys.path.
    command = [sys.executable, "-P", "-m", __name__]
    paths = [os.path.abspath(path) for path in sys.path if path]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    try:
        done = subprocess.run(
            command,
            cwd=os.sep,  # torch cannot be imported if the current folder no longer exists
            env=environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired as error:
        return read(error.stdout or b"", f"no answer within {_TIMEOUT_S} s")
    except OSError as error:
        return read(b"", f"cannot start a process: {error.strerror}")
    said = done.stderr.decode(errors="replace").strip().splitlines()
    how = ending(done.returncode) if done.returncode < 0 else (said or ["no answer"])[-1]
    return read(done.stdout, how)


def read(output: bytes, how: str) -> TorchReport:
    """Parse a child's output; ``how`` says how the child ended, if a stage is incomplete."""
    values: dict[str, Any] = {}
    problems: dict[str, str] = {}
    stage: str | None = "torch"  # the stage that has begun but not ended
    for line in output.decode(errors="replace").splitlines():
        if not line.startswith(_MARK):
            continue
        with contextlib.suppress(ValueError):  # incomplete line of a killed process
            entry = json.loads(line.removeprefix(_MARK))
            stage = entry.get("begins")
            values |= entry.get("values", {})
            problems |= entry.get("problems", {})
    if stage is not None:
        problems[stage] = how
    devices = tuple(Device(**device) for device in values.pop("devices", ()))
    return TorchReport(problems=problems, devices=devices, **values)


# -- in the child ---------------------------------------------------------------------------------


def _torch() -> dict[str, Any]:
    import torch

    versions = torch.version
    return {"version": torch.__version__, "cuda": versions.cuda, "hip": versions.hip}


def _torchao() -> dict[str, Any]:
    import pytest_int8bench.quantization.api  # noqa: F401  # imports the parts of torchao we use

    return {}


def _temporary_folder() -> dict[str, Any]:
    from pytest_int8bench.compiler.cache import check_temporary_folder

    check_temporary_folder("cpu")
    return {}


def _inductor_folder() -> dict[str, Any]:
    from pytest_int8bench.compiler.cache import default_folder

    return {"inductor_folder": str(default_folder())}


def _compiler() -> dict[str, Any]:
    from pytest_int8bench.compiler.torch_workarounds.inductor import cpp_compiler

    return {"compiler": cpp_compiler()}


def _devices() -> dict[str, Any]:
    import torch

    problem = None
    try:
        if torch.version.cuda is not None or torch.version.hip is not None:
            torch.cuda.init()  # unlike is_available(), says why there is no device
    except Exception as error:
        problem = _text(error)
    count = 0 if problem else torch.cuda.device_count()
    found = [torch.device("cuda", index) for index in range(count)] or [torch.device("cpu")]
    devices = [dataclasses.asdict(_device(device)) for device in found]
    return {"devices": devices, "cuda_problem": problem}


def _device(device: Any) -> Device:
    import torch

    from pytest_int8bench.kernels import dispatch, table

    fused_problem = dispatch.fused_problem(device)
    if device.type != "cuda":
        return Device(device.type, fused_problem=fused_problem)
    properties = torch.cuda.get_device_properties(device)
    named = functools.partial(
        Device, properties.name, str(properties.uuid), fused_problem=fused_problem
    )
    try:
        (torch.ones(1, device=device) + 1).item()  # fails if this build lacks kernels for the GPU
    except Exception as error:
        return named(problem=_text(error))
    if fused_problem is not None:
        return named()
    here = [kernel for kernel in table.KERNELS if kernel.runs_on(device)]
    others = [kernel for kernel in table.KERNELS if kernel not in here]
    tried = {kernel.name: dispatch.selftest_failure(kernel, device) for kernel in here}
    return named(
        kernels=tuple(name for name, failure in tried.items() if failure is None),
        unmet={kernel.name: kernel.unmet(device) for kernel in others},
        failed={name: failure for name, failure in tried.items() if failure is not None},
    )


def _triton() -> dict[str, Any]:
    import torch

    if not torch.cuda.is_available():
        return {}
    from triton import knobs

    return {"triton_folder": knobs.cache.dir}


#: Stages most likely to crash come last, where they lose the least.
_STAGES: dict[str, Callable[[], dict[str, Any]]] = {
    "torch": _torch,
    "torchao": _torchao,
    "inductor folder": _inductor_folder,
    "temporary folder": _temporary_folder,
    "compiler": _compiler,
    "triton": _triton,
    "devices": _devices,
}


def main() -> None:
    """Print torch's report, stage by stage."""
    warnings.simplefilter("ignore")
    for name, stage in _STAGES.items():
        _emit(begins=name)
        try:
            _emit(values=stage())
        except Exception as error:
            _emit(problems={name: _text(error)})
            if name == "torch":
                return  # all other stages need torch


def _text(error: Exception) -> str:
    line = first_line(error)
    return line if isinstance(error, ClearError) else f"{type(error).__name__}: {line}"


def _emit(**entry: Any) -> None:
    print(f"\n{_MARK}{json.dumps(entry)}", flush=True)


if __name__ == "__main__":
    main()
