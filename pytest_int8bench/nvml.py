"""Query NVML for the GPUs that a process may use, their state and their energy counter.

This is the only module that imports pynvml. Only :func:`seen_by_cuda` initializes CUDA.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, TypedDict

VISIBLE = "CUDA_VISIBLE_DEVICES"
_UUIDS = ("GPU-", "MIG-")


def visible(environ: Mapping[str, str] | None = None) -> list[str] | None:
    """Return the GPUs that a process may use, each as ``CUDA_VISIBLE_DEVICES`` would name it.

    If that variable is set, its entries are read as CUDA reads them: up to the first entry that is
    not a device, and none at all if one occurs twice. Otherwise every GPU is listed by UUID, or by
    the UUIDs of its instances if MIG is on, although CUDA alone would show only the first instance.

    Returns:
        The names, or None if only CUDA knows, because the variable is not set and NVML does not
        answer.
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
    """Describe how many GPUs there are and who says so, such as ``this machine has 2 GPUs``."""
    environ = os.environ if environ is None else environ
    where = f"{VISIBLE} names" if VISIBLE in environ else "this machine has"
    return f"{where} {len(names)} GPU{'s' * (len(names) != 1)}"


def pin(number: int, environ: MutableMapping[str, str] | None = None) -> str | None:
    """Restrict a process that has not initialized CUDA to one of the GPUs that it may use.

    Args:
        number: index of the GPU, from 0.
        environ: the environment to change; ``os.environ`` by default.

    Returns:
        The GPU's name in ``CUDA_VISIBLE_DEVICES``, or None, with nothing changed, if there are
        fewer GPUs.
    """
    environ = os.environ if environ is None else environ
    names = visible(environ)
    if names is not None and number >= len(names):
        return None
    name = str(number) if names is None else names[number]
    environ[VISIBLE] = name
    return name


def seen_by_cuda() -> int:
    """Return how many GPUs this process sees. Imports torch and initializes CUDA."""
    import torch

    if not torch.cuda.is_available():
        return 0
    # device_count() would ask NVML and read the variable again, but only its value at the time when
    # CUDA was initialized counts.
    return int(torch._C._cuda_getDeviceCount())


_initialized: Any = None


def _library() -> Any | None:
    """Return pynvml, initializing NVML on the first call, or None if NVML is missing or fails
    (containers, WSL)."""
    global _initialized
    try:
        import pynvml

        if pynvml is not _initialized:
            pynvml.nvmlInit()
            _initialized = pynvml
    except Exception:
        return None
    return pynvml


def _call(pynvml: Any, function: str, *arguments: Any) -> Any:
    """Call an NVML function by name.

    Arguments that are strings starting with ``NVML_`` are replaced by the constants they name.
    Return None if the call fails, or if this driver or pynvml lacks the function or constant.
    """
    try:
        values = [
            getattr(pynvml, argument)
            if isinstance(argument, str) and argument.startswith("NVML_")
            else argument
            for argument in arguments
        ]
        return getattr(pynvml, function)(*values)
    except Exception:
        return None


def _kind(entry: str) -> str:
    return entry[:4] if entry.startswith(_UUIDS) else "index"


def _is_device(entry: str, there: list[list[str]] | None) -> bool:
    if entry.startswith(_UUIDS):  # CUDA accepts a prefix of a UUID
        return there is None or any(uuid.startswith(entry) for part in there for uuid in part)
    return entry.isdecimal() and (there is None or int(entry) < len(there))


def _uuids() -> list[list[str]] | None:
    """Return a list per GPU, with its UUID or the UUIDs of its MIG instances; None without NVML."""
    if (pynvml := _library()) is None:
        return None
    try:
        count = pynvml.nvmlDeviceGetCount()
        return [_uuids_of(pynvml, pynvml.nvmlDeviceGetHandleByIndex(i)) for i in range(count)]
    except Exception:  # NVML fails (containers, WSL)
        return None


def _uuids_of(pynvml: Any, handle: Any) -> list[str]:
    mode = _call(pynvml, "nvmlDeviceGetMigMode", handle)  # None for a GPU that cannot be split
    if not (mode and mode[0]):
        return [_text(pynvml.nvmlDeviceGetUUID(handle))]
    places = range(pynvml.nvmlDeviceGetMaxMigDeviceCount(handle))
    instances = [_call(pynvml, "nvmlDeviceGetMigDeviceHandleByIndex", handle, i) for i in places]
    return [_text(pynvml.nvmlDeviceGetUUID(found)) for found in instances if found is not None]


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


# Clocks reduced by heat or power. Software power capping (0x4) is left out, because a GPU at full
# load reaches it in normal operation.
_THROTTLED = {0x8: "hardware slowdown", 0x20: "thermal (software)", 0x40: "thermal (hardware)"}
_THROTTLED |= {0x80: "power brake"}


class GpuState(TypedDict):
    """Clock, temperature, power and throttling of a GPU at one time; a value is None if NVML does
    not answer."""

    sm_clock_mhz: int | None
    temperature_c: int | None
    power_w: float | None
    throttle_reasons: list[str]


def throttled(state: GpuState | None) -> list[str]:
    """Return the reasons in ``state`` why the GPU is throttled."""
    return list(state["throttle_reasons"]) if state else []


@dataclass(frozen=True)
class Gpu:
    """A GPU as NVML reports it. Methods return None if NVML does not answer."""

    pynvml: Any
    handle: Any
    """The whole GPU, even for a MIG instance, because driver, clocks and power belong to it."""
    instance: Any | None
    """The MIG instance, if the process has one."""
    is_instance: bool
    """Whether the UUID names a MIG instance. Old drivers do not give the handle of its GPU."""

    def driver(self) -> str | None:
        """Return the driver version."""
        version = _call(self.pynvml, "nvmlSystemGetDriverVersion")
        return None if version is None else _text(version)

    def name(self) -> str | None:
        """Return the name of the whole GPU."""
        name = self._read("nvmlDeviceGetName")
        return None if name is None else _text(name)

    def uuid(self) -> str | None:
        """Return the UUID of the whole GPU."""
        uuid = self._read("nvmlDeviceGetUUID")
        return None if uuid is None else _text(uuid)

    def capability(self) -> tuple[int, int] | None:
        """Return the compute capability."""
        found = self._read("nvmlDeviceGetCudaComputeCapability")
        return None if found is None else (int(found[0]), int(found[1]))

    def memory_bytes(self) -> int | None:
        """Return the memory of the whole GPU in bytes."""
        memory = self._read("nvmlDeviceGetMemoryInfo")
        return None if memory is None else int(memory.total)

    def power_limit_w(self) -> float | None:
        """Return the power limit in watts."""
        milliwatts = self._read("nvmlDeviceGetPowerManagementLimit")
        return None if milliwatts is None else milliwatts / 1000

    def default_power_limit_w(self) -> float | None:
        """Return the GPU's default power limit in watts."""
        milliwatts = self._read("nvmlDeviceGetPowerManagementDefaultLimit")
        return None if milliwatts is None else milliwatts / 1000

    def max_sm_clock_mhz(self) -> int | None:
        """Return the maximum SM clock in MHz."""
        clock: int | None = self._read("nvmlDeviceGetMaxClockInfo", "NVML_CLOCK_SM")
        return clock

    def processes(self) -> list[int] | None:
        """Return the ids of the processes that compute on any part of the GPU."""
        found = self._read("nvmlDeviceGetComputeRunningProcesses")
        return None if found is None else [int(process.pid) for process in found]

    def mig(self) -> str | None:
        """Return ``off``, ``on``, or the profile of the MIG instance."""
        if self.instance is not None:
            return _mig_profile(self.pynvml, self.instance)
        mode = self._read("nvmlDeviceGetMigMode")
        return _MIG_STATES.get(mode and mode[0])

    def state(self) -> GpuState:
        """Return the current clock, temperature, power and throttle reasons."""
        usage = self._read("nvmlDeviceGetPowerUsage")
        return {
            "sm_clock_mhz": self._read("nvmlDeviceGetClockInfo", "NVML_CLOCK_SM"),
            "temperature_c": self._read("nvmlDeviceGetTemperature", "NVML_TEMPERATURE_GPU"),
            "power_w": None if usage is None else usage / 1000,
            "throttle_reasons": self.throttle_reasons() or [],
        }

    def throttle_reasons(self) -> list[str] | None:
        """Return why the GPU is throttled, as an empty list if it is not."""
        reasons = self._read("nvmlDeviceGetCurrentClocksEventReasons")
        if reasons is None:  # the function's older name
            reasons = self._read("nvmlDeviceGetCurrentClocksThrottleReasons")
        if reasons is None:
            return None
        return [name for bit, name in _THROTTLED.items() if reasons & bit]

    def counts_own_energy(self) -> bool:
        """Return whether :meth:`energy_j` counts only this GPU's use; with MIG, all instances share
        one counter."""
        return not self.is_instance and self.mig() != "on"

    def energy_j(self) -> float | None:
        """Return the energy in joules used since the driver was loaded (Volta and later)."""
        millijoules = self._read("nvmlDeviceGetTotalEnergyConsumption")
        return None if millijoules is None else float(millijoules) / 1000

    def _read(self, function: str, *arguments: str) -> Any:
        return _call(self.pynvml, function, self.handle, *arguments)


def whole_gpus() -> list[tuple[Gpu, list[str]]] | None:
    """Return the GPUs of this machine, each with its UUID, or with the UUIDs of its instances if
    MIG is on; None without NVML."""
    pynvml, uuids = _library(), _uuids()
    if pynvml is None or uuids is None:
        return None
    handles = [_call(pynvml, "nvmlDeviceGetHandleByIndex", i) for i in range(len(uuids))]
    return [
        (Gpu(pynvml, handle, None, False), part)
        for handle, part in zip(handles, uuids, strict=True)
    ]


def driver_cuda() -> tuple[int, int] | None:
    """Return the newest CUDA version that the driver supports; None without NVML."""
    if (pynvml := _library()) is None:
        return None
    version = _call(pynvml, "nvmlSystemGetCudaDriverVersion")
    return None if version is None else (version // 1000, version % 1000 // 10)


def find_gpu(uuid: str) -> Gpu | None:
    """Return the GPU or MIG instance with the UUID that torch gives; None if NVML does not find
    it."""
    if (pynvml := _library()) is None:
        return None
    # torch omits the prefix, so the UUID may be a GPU's or a MIG instance's.
    candidates = [uuid] if uuid.startswith(("GPU", "MIG")) else [f"GPU-{uuid}", f"MIG-{uuid}"]
    for candidate in candidates:
        if (handle := _call(pynvml, "nvmlDeviceGetHandleByUUID", candidate)) is not None:
            break
    else:
        return None
    instance = None
    if _call(pynvml, "nvmlDeviceIsMigDeviceHandle", handle):
        whole = _call(pynvml, "nvmlDeviceGetDeviceHandleFromMigDeviceHandle", handle)
        if whole is not None:
            instance, handle = handle, whole
    return Gpu(pynvml, handle, instance, candidate.startswith("MIG") or instance is not None)


#: NVML's current MIG mode -> state, for a process without a MIG instance.
_MIG_STATES = {0: "off", 1: "on"}


def _mig_profile(pynvml: Any, instance: Any) -> str:
    """Return the profile of a MIG instance as nvidia-smi names it, such as ``1g.10gb``, or ``on``
    if it is unknown."""
    name = _text(_call(pynvml, "nvmlDeviceGetName", instance) or "")
    return name.rpartition(" MIG ")[2] if " MIG " in name else "on"
