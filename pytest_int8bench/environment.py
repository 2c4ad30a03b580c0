"""The machine and the software that a result was measured on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

# torch's name for its settings of the allocator, and the older one.
_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
_PACKAGES = ("torch", "triton", "torchao", "pytest-int8bench", "pytest-benchmark")


def fingerprint(root: Path) -> dict[str, Any]:
    """Return what identifies machine and software; None where something cannot be read.

    Loads torch. ``root`` is the folder whose git commit is read.
    """
    import torch

    gpu: dict[str, Any] | None = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        gpu = {
            "name": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "sm_count": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            **{k: v for k, v in _nvml(str(properties.uuid)).items() if k != "state"},
        }
    commit, dirty = _git(root)
    return {
        "gpu": gpu,
        "gpu_count": torch.cuda.device_count(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "allocator": next(filter(None, map(os.environ.get, _ALLOCATOR)), None),
        "packages": {name: _version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cpu_threads": torch.get_num_threads(),
        "commit": commit,
        "dirty": dirty,
    }


def describe(environment: dict[str, Any]) -> str:
    """Return the machine and the versions as one line."""
    packages = environment.get("packages") or {}
    if gpu := environment.get("gpu"):
        parts = [gpu.get("name"), f"CUDA {environment.get('cuda')}"]
    else:
        parts = [environment.get("cpu"), f"{environment.get('cpu_threads')} threads"]
    parts += [f"{name} {packages.get(name)}" for name in ("torch", "triton", "torchao")]
    return ", ".join(part for part in parts if part and "None" not in part)


def gpu_state() -> dict[str, Any] | None:
    """Read clock, temperature, power and throttle reasons of the current GPU through NVML.

    Returns None without CUDA or where NVML does not answer.
    """
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return _nvml(str(properties.uuid)).get("state")


# Reasons of clocks that are held down by heat or power. Power capping by software (0x4) is
# left out: a GPU at full load touches it in normal operation.
_THROTTLED = {0x8: "hardware slowdown", 0x20: "thermal (software)", 0x40: "thermal (hardware)"}
_THROTTLED |= {0x80: "power brake"}


def throttled(state: dict[str, Any] | None) -> list[str]:
    """Return the reasons in ``state`` for which the GPU runs slower than it could."""
    return list(state["throttle_reasons"]) if state else []


def _nvml(uuid: str) -> dict[str, Any]:
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # NVML is missing, or refuses (containers, WSL): nothing to read
        return {}
    try:
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU") else f"GPU-{uuid}")
    except pynvml.NVMLError:
        return {}

    def read(function: Any, *args: Any) -> Any:
        try:
            value = function(handle, *args)
        except pynvml.NVMLError:
            return None
        return value.decode() if isinstance(value, bytes) else value

    reasons = read(pynvml.nvmlDeviceGetCurrentClocksEventReasons)
    milliwatts = read(pynvml.nvmlDeviceGetPowerManagementLimit)
    usage = read(pynvml.nvmlDeviceGetPowerUsage)
    mig = read(pynvml.nvmlDeviceGetMigMode)
    try:
        driver = pynvml.nvmlSystemGetDriverVersion()
    except pynvml.NVMLError:
        driver = None
    return {
        "driver": driver.decode() if isinstance(driver, bytes) else driver,
        "power_limit_w": None if milliwatts is None else milliwatts / 1000,
        "mig": None if mig is None else bool(mig[0]),
        "state": {
            "sm_clock_mhz": read(pynvml.nvmlDeviceGetClockInfo, pynvml.NVML_CLOCK_SM),
            "temperature_c": read(pynvml.nvmlDeviceGetTemperature, pynvml.NVML_TEMPERATURE_GPU),
            "power_w": None if usage is None else usage / 1000,
            "throttle_reasons": [
                name for bit, name in _THROTTLED.items() if reasons is not None and reasons & bit
            ],
        },
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _git(root: Path) -> tuple[str | None, bool | None]:
    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(root), *args], capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    status = git("status", "--porcelain") if commit else None
    return commit, None if status is None else bool(status)
