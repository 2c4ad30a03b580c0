"""Describe the machine and the software that a result was measured on."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pytest_int8bench.nvml import GpuState, find_gpu
from pytest_int8bench.words import plural

# torch's variable for allocator settings, and its older name.
_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
_PACKAGES = ("torch", "triton", "torchao", "pytest-int8bench", "pytest-benchmark")

# Parts of the fingerprint -> their meaning.
_GPU_PARTS = {
    "compute_capability": "compute capability of the GPU, such as 8.0 (in ``gpu``)",
    "sm_count": "multiprocessors of the GPU (in ``gpu``)",
    "memory_bytes": "memory of the GPU (in ``gpu``)",
    "driver": "version of the driver (in ``gpu``)",
    "power_limit_w": "power limit in watts (in ``gpu``)",
    "mig": "``off``, or the profile of a MIG instance, such as 1g.10gb (in ``gpu``)",
}
_OWN_PARTS = {
    "gpu_count": "GPUs that the process sees",
    "cuda": "version of CUDA that torch was built for",
    "cudnn": "version of cuDNN",
    "allocator": "settings of torch's allocator",
    "python": "version of Python",
    "system": "operating system and architecture",
    "cpu": "model of the CPU",
    "cpu_threads": "threads that torch uses",
    "tracers": "tracers and profilers that ran beside the clock",
}
_CODE_PARTS = {
    "commit": "git commit of the folder that pytest runs in",
    "dirty": "whether ``git status`` shows anything there",
}
#: Everything that identifies machine and software: name that users can allow to differ -> meaning.
#: The JSON stores the GPU's entries in the object ``gpu`` and versions in ``packages``.
FINGERPRINT = {
    "gpu": "name of the GPU (``name`` in ``gpu``)",
    **_GPU_PARTS,
    **_OWN_PARTS,
    **{name: f"version of {name} (in ``packages``)" for name in _PACKAGES},
    **_CODE_PARTS,
}
FINGERPRINT_NAMES = tuple(FINGERPRINT)
#: Entries that may differ between compared results.
MAY_DIFFER = tuple(_CODE_PARTS)


def fingerprint(root: Path, tracers: Sequence[str] = ()) -> dict[str, Any]:
    """Return what identifies machine and software; unreadable entries are None.

    Loads torch.

    Args:
        root: the folder whose git commit to read.
        tracers: the tools that slow down this process while clocks run.
    """
    git = _read(
        {
            "commit": lambda: _git(root, "rev-parse", "HEAD"),
            "status": lambda: _git(root, "status", "--porcelain"),
        }
    )
    is_known = git["commit"] is not None and git["status"] is not None
    dirty = bool(git["status"]) if is_known else None
    watched = ", ".join(tracers) or None
    return {**machine(), "tracers": watched, "commit": git["commit"], "dirty": dirty}


def machine() -> dict[str, Any]:
    """Return the fingerprint without tracers and without the git state of the measured code. Loads
    torch."""
    import torch

    return _read(
        {
            "gpu": _gpu,
            "gpu_count": torch.cuda.device_count,
            "cuda": lambda: torch.version.cuda,
            "cudnn": torch.backends.cudnn.version,
            "allocator": lambda: next(filter(None, map(os.environ.get, _ALLOCATOR)), None),
            "packages": lambda: {name: package_version(name) for name in _PACKAGES},
            "python": platform.python_version,
            "system": lambda: f"{platform.system()} {platform.machine()}",
            "cpu": _cpu_model,
            "cpu_threads": torch.get_num_threads,
        }
    )


def _gpu() -> dict[str, Any] | None:
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    gpu = _read({"gpu": lambda: find_gpu(str(properties.uuid))})["gpu"]
    parts: dict[str, Callable[[], Any]] = {
        "name": lambda: properties.name,
        "compute_capability": lambda: f"{properties.major}.{properties.minor}",
        "sm_count": lambda: properties.multi_processor_count,
        "memory_bytes": lambda: properties.total_memory,
    }
    if gpu is not None:
        parts |= {"driver": gpu.driver, "power_limit_w": gpu.power_limit_w, "mig": gpu.mig}
    return _read(parts)


def _read(parts: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
    """Read each part of a machine description; a part that cannot be read becomes None, because a
    measurement does not depend on it."""
    found: dict[str, Any] = dict.fromkeys(parts)
    for name, read in parts.items():
        with contextlib.suppress(Exception):
            found[name] = read()
    return found


def differences(base: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the forbidden differences between two fingerprints: name -> both values.

    Names come from :data:`FINGERPRINT_NAMES`. A missing entry is None, but if a fingerprint lists
    its known entries in ``only``, the others are not compared. Triton counts only with a GPU: on a
    CPU no Triton kernel is timed, and not every torch installation includes Triton.
    """
    before, after = flat(base), flat(new)
    left_out = MAY_DIFFER if base.get("gpu") or new.get("gpu") else (*MAY_DIFFER, "triton")
    return {
        name: (before[name], after[name])
        for name in FINGERPRINT_NAMES
        if name not in left_out
        and before[name] != after[name]
        and all(name in e.get("only", FINGERPRINT_NAMES) for e in (base, new))
    }


#: Entries that compiled code does not depend on.
_NOT_COMPILED_FOR = (
    "memory_bytes",
    "power_limit_w",
    "gpu_count",
    "allocator",
    "tracers",
    "pytest-benchmark",
)


def compiled_for() -> dict[str, Any]:
    """Return the part of the fingerprint that compiled code depends on: hardware, driver and
    compiler versions. Loads torch."""
    found = flat(machine())
    left_out = (*MAY_DIFFER, *_NOT_COMPILED_FOR)
    return {name: value for name, value in found.items() if name not in left_out}


def flat(environment: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten a fingerprint to :data:`FINGERPRINT_NAMES`; missing entries are None."""
    gpu, packages = environment.get("gpu") or {}, environment.get("packages") or {}
    return {
        "gpu": gpu.get("name"),
        **{name: gpu.get(name) for name in _GPU_PARTS},
        **{name: environment.get(name) for name in (*_OWN_PARTS, *MAY_DIFFER)},
        **{name: packages.get(name) for name in _PACKAGES},
    }


def describe(environment: dict[str, Any]) -> str:
    """Describe the machine and the versions in one line."""
    packages = environment.get("packages") or {}
    if gpu := environment.get("gpu"):
        parts = [gpu.get("name"), f"CUDA {environment.get('cuda')}"]
    else:
        threads = environment.get("cpu_threads")
        parts = [environment.get("cpu"), plural(threads, "thread") if threads else None]
    parts += [f"{name} {packages.get(name)}" for name in ("torch", "triton", "torchao")]
    return ", ".join(part for part in parts if part and "None" not in part)


def gpu_state() -> GpuState | None:
    """Read clock, temperature, power and throttle reasons of the current GPU through NVML.

    Return None without CUDA or if NVML fails.
    """
    state: GpuState | None = _read({"state": _gpu_state})["state"]
    return state


def _gpu_state() -> GpuState | None:
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    gpu = find_gpu(str(properties.uuid))
    return None if gpu is None else gpu.state()


def package_version(package: str) -> str | None:
    """Return the version of an installed package, from its metadata."""
    with contextlib.suppress(Exception):  # not installed, or damaged metadata
        return importlib.metadata.version(package)
    return None


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git(root: Path, *arguments: str) -> str | None:
    """Return git's output, or None if git fails; file names may hold any bytes."""
    command = ["git", "-C", str(root), *arguments]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=10)
    return os.fsdecode(done.stdout).strip() if done.returncode == 0 else None
