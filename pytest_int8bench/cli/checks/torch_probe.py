"""Ask torch about this machine in a child process.

A torch that is broken can end its process, or never return from it. ``python -m`` runs this module
in the child, which prints a line of JSON before and after each stage, so that the parent knows how
far it came.
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
#: Begins a line of ours: libraries print too.
_MARK = "int8bench-doctor "


@dataclass(frozen=True)
class Device:
    """A device as torch sees it, and the kernels on it."""

    name: str
    uuid: str = ""
    problem: str | None = None
    """Why it does not compute."""
    fused_problem: str | None = None
    """Why none of the fused kernels run."""
    kernels: tuple[str, ...] = ()
    """Those that run."""
    unmet: dict[str, str] = field(default_factory=dict)
    """Kernels for other devices -> what they need."""
    failed: dict[str, str] = field(default_factory=dict)
    """Kernels for this device -> why they do not run."""


@dataclass(frozen=True)
class TorchReport:
    """What torch says. A stage of the child that failed has left its name and its error in
    ``problems``, and the fields that it fills as they are."""

    problems: dict[str, str] = field(default_factory=dict)
    version: str | None = None
    cuda: str | None = None
    hip: str | None = None
    compiler: str | None = None
    inductor_folder: str | None = None
    triton_folder: str | None = None
    devices: tuple[Device, ...] = ()
    """The GPUs, or the CPU."""
    cuda_problem: str | None = None
    """Why there is no GPU."""

    @property
    def has_cuda(self) -> bool:
        """Return whether torch computes on a GPU."""
        return any(device.uuid and device.problem is None for device in self.devices)


def ask() -> TorchReport:
    """Load torch in a child process and return what it says."""
    # -P: the folder that the command is called in does not become importable.
    command = [sys.executable, "-P", "-m", __name__]
    paths = [os.path.abspath(path) for path in sys.path if path]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    try:
        done = subprocess.run(
            command,
            cwd=os.sep,  # where it is called may be gone, and torch would not load
            env=environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired as error:
        return read(error.stdout or b"", f"no answer in {_TIMEOUT_S} s")
    except OSError as error:
        return read(b"", f"no process can be started: {error.strerror}")
    said = done.stderr.decode(errors="replace").strip().splitlines()
    how = ending(done.returncode) if done.returncode < 0 else (said or ["no answer"])[-1]
    return read(done.stdout, how)


def read(output: bytes, how: str) -> TorchReport:
    """Return what a child printed; ``how`` says why there is no more of it."""
    values: dict[str, Any] = {}
    problems: dict[str, str] = {}
    stage: str | None = "torch"  # what is begun and not ended
    for line in output.decode(errors="replace").splitlines():
        if not line.startswith(_MARK):
            continue
        with contextlib.suppress(ValueError):  # half a line, of a process that was killed
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
    import pytest_int8bench.quantization.api  # noqa: F401  # and all that it needs of torchao

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
            torch.cuda.init()  # says why there is no device, where is_available() does not
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
        (torch.ones(1, device=device) + 1).item()  # a kernel that this build may lack
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


#: In the order in which one that crashes costs least.
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
    """Print what torch says."""
    warnings.simplefilter("ignore")
    for name, stage in _STAGES.items():
        _say(begins=name)
        try:
            _say(values=stage())
        except Exception as error:
            _say(problems={name: _text(error)})
            if name == "torch":
                return  # the others need it


def _text(error: Exception) -> str:
    line = first_line(error)
    return line if isinstance(error, ClearError) else f"{type(error).__name__}: {line}"


def _say(**entry: Any) -> None:
    print(f"\n{_MARK}{json.dumps(entry)}", flush=True)


if __name__ == "__main__":
    main()
