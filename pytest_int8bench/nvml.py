"""Which GPUs a process may use, and giving it one of them. Nothing here starts CUDA."""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from contextlib import suppress
from typing import Any

VISIBLE = "CUDA_VISIBLE_DEVICES"
_UUIDS = ("GPU-", "MIG-")


def visible(environ: Mapping[str, str] | None = None) -> list[str] | None:
    """Return the GPUs that a process may use, each as ``CUDA_VISIBLE_DEVICES`` would name it.

    Where that variable is set, what it names, read as CUDA reads it: up to the first entry that is
    no device, and nothing if one is named twice. Else the UUID of each GPU or, of a GPU with MIG
    on, of each of its instances: CUDA alone would show a process the first one only.

    Returns:
        The names, or None where only CUDA itself knows: NVML does not answer, and the variable is
        not set.
    """
    environ = os.environ if environ is None else environ
    there = _uuids()
    asked = environ.get(VISIBLE)
    if asked is None:
        return None if there is None else [uuid for part in there for uuid in part]
    names: list[str] = []
    for entry in map(str.strip, asked.split(",")):
        is_same_kind = not names or _kind(entry) == _kind(names[0])
        if not is_same_kind or not _is_device(entry, there):
            break
        if entry in names:
            return []
        names.append(entry)
    return names


def described(names: list[str], environ: Mapping[str, str] | None = None) -> str:
    """Say how many GPUs there are, and where that comes from."""
    environ = os.environ if environ is None else environ
    where = f"{VISIBLE} names" if VISIBLE in environ else "this machine has"
    return f"{where} {len(names)} GPU{'s' * (len(names) != 1)}"


def pin(number: int, environ: MutableMapping[str, str] | None = None) -> str | None:
    """Leave a process one GPU of those it may use, before it starts CUDA.

    Args:
        number: which one, from 0.
        environ: where to say so; ``os.environ`` by default.

    Returns:
        Its name in ``CUDA_VISIBLE_DEVICES``, or None, with nothing changed, if there are fewer.
    """
    environ = os.environ if environ is None else environ
    names = visible(environ)
    if names is not None and number >= len(names):
        return None
    name = str(number) if names is None else names[number]
    environ[VISIBLE] = name
    return name


def seen_by_cuda() -> int:
    """Return how many GPUs CUDA shows this process. Loads torch, and starts CUDA."""
    import torch

    if not torch.cuda.is_available():
        return 0
    # Not device_count(), which asks NVML and reads the variable anew: what was true when CUDA
    # was started holds.
    return int(torch._C._cuda_getDeviceCount())


def _kind(entry: str) -> str:
    return entry[:4] if entry.startswith(_UUIDS) else "index"


def _is_device(entry: str, there: list[list[str]] | None) -> bool:
    if entry.startswith(_UUIDS):  # the start of one is enough
        return there is None or any(uuid.startswith(entry) for part in there for uuid in part)
    return entry.isdecimal() and (there is None or int(entry) < len(there))


def _uuids() -> list[list[str]] | None:
    """Return the UUID of each GPU, or those of its MIG instances; None without NVML."""
    try:
        import pynvml

        pynvml.nvmlInit()
        count = pynvml.nvmlDeviceGetCount()
        return [_of_gpu(pynvml, pynvml.nvmlDeviceGetHandleByIndex(i)) for i in range(count)]
    except Exception:  # NVML is missing, or refuses (containers, WSL)
        return None


def _of_gpu(pynvml: Any, handle: Any) -> list[str]:
    try:
        is_split = bool(pynvml.nvmlDeviceGetMigMode(handle)[0])
    except pynvml.NVMLError:  # a GPU that cannot be split
        is_split = False
    if not is_split:
        return [_text(pynvml.nvmlDeviceGetUUID(handle))]
    found = []
    for i in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        try:
            instance = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, i)
        except pynvml.NVMLError:  # a place that no instance takes
            continue
        found.append(_text(pynvml.nvmlDeviceGetUUID(instance)))
    return found


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


# Reasons of clocks that are held down by heat or power. Power capping by software (0x4) is
# left out: a GPU at full load touches it in normal operation.
_THROTTLED = {0x8: "hardware slowdown", 0x20: "thermal (software)", 0x40: "thermal (hardware)"}
_THROTTLED |= {0x80: "power brake"}


def throttled(state: dict[str, Any] | None) -> list[str]:
    """Return the reasons in ``state`` for which the GPU runs slower than it could."""
    return list(state["throttle_reasons"]) if state else []


def nvml(uuid: str) -> dict[str, Any]:
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # NVML is missing, or refuses (containers, WSL): nothing to read
        return {}
    # torch leaves out which of the two a UUID is of.
    candidates = [uuid] if uuid.startswith(("GPU", "MIG")) else [f"GPU-{uuid}", f"MIG-{uuid}"]
    for candidate in candidates:
        try:
            handle = pynvml.nvmlDeviceGetHandleByUUID(candidate)
            break
        except pynvml.NVMLError:
            continue
    else:
        return {}
    instance = None
    with suppress(pynvml.NVMLError):
        if pynvml.nvmlDeviceIsMigDeviceHandle(handle):
            # Driver, clocks and power are those of the whole GPU.
            instance, handle = handle, pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle)

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
        "mig": (
            _MIG_STATES.get(mig and mig[0]) if instance is None else _mig_profile(pynvml, instance)
        ),
        "state": {
            "sm_clock_mhz": read(pynvml.nvmlDeviceGetClockInfo, pynvml.NVML_CLOCK_SM),
            "temperature_c": read(pynvml.nvmlDeviceGetTemperature, pynvml.NVML_TEMPERATURE_GPU),
            "power_w": None if usage is None else usage / 1000,
            "throttle_reasons": [
                name for bit, name in _THROTTLED.items() if reasons is not None and reasons & bit
            ],
        },
    }


#: By NVML's current mode: without an instance of its own a process sees the whole GPU, or none.
_MIG_STATES = {0: "off", 1: "on"}


def _mig_profile(pynvml: Any, instance: Any) -> str:
    """Return the profile of a MIG instance as nvidia-smi names it, such as ``1g.10gb``."""
    try:
        name = pynvml.nvmlDeviceGetName(instance)
    except pynvml.NVMLError:
        return "on"
    name = name.decode() if isinstance(name, bytes) else name
    return name.rpartition(" MIG ")[2] if " MIG " in name else "on"
