"""GPUs through NVML: which ones a process may use, their state and their energy counter.

The only module that knows pynvml. Only :func:`seen_by_cuda` starts CUDA.
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


_initialized: Any = None


def _library() -> Any | None:
    """Return pynvml, initializing NVML on the first call; None if NVML is missing or refuses
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


def _ask(pynvml: Any, function: str, *arguments: Any) -> Any:
    """Call a function of NVML by its name; a string among ``arguments`` that begins with ``NVML_``
    stands for a constant. Return None where it refuses, and where this driver or pynvml has no such
    function or constant."""
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
    if entry.startswith(_UUIDS):  # the start of one is enough
        return there is None or any(uuid.startswith(entry) for part in there for uuid in part)
    return entry.isdecimal() and (there is None or int(entry) < len(there))


def _uuids() -> list[list[str]] | None:
    """Return the UUID of each GPU, or those of its MIG instances; None without NVML."""
    if (pynvml := _library()) is None:
        return None
    try:
        count = pynvml.nvmlDeviceGetCount()
        return [_of_gpu(pynvml, pynvml.nvmlDeviceGetHandleByIndex(i)) for i in range(count)]
    except Exception:  # NVML refuses (containers, WSL)
        return None


def _of_gpu(pynvml: Any, handle: Any) -> list[str]:
    mode = _ask(pynvml, "nvmlDeviceGetMigMode", handle)  # None for a GPU that cannot be split
    if not (mode and mode[0]):
        return [_text(pynvml.nvmlDeviceGetUUID(handle))]
    places = range(pynvml.nvmlDeviceGetMaxMigDeviceCount(handle))
    instances = [_ask(pynvml, "nvmlDeviceGetMigDeviceHandleByIndex", handle, i) for i in places]
    return [_text(pynvml.nvmlDeviceGetUUID(found)) for found in instances if found is not None]


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


# Clocks held down by heat or power. Power capping by software (0x4) is left out: a GPU at full load
# touches it in normal operation.
_THROTTLED = {0x8: "hardware slowdown", 0x20: "thermal (software)", 0x40: "thermal (hardware)"}
_THROTTLED |= {0x80: "power brake"}


class GpuState(TypedDict):
    """Clock, temperature, power and throttling of a GPU at one time; None where NVML does not
    answer."""

    sm_clock_mhz: int | None
    temperature_c: int | None
    power_w: float | None
    throttle_reasons: list[str]


def throttled(state: GpuState | None) -> list[str]:
    """Return the reasons in ``state`` for which the GPU runs slower than it could."""
    return list(state["throttle_reasons"]) if state else []


@dataclass(frozen=True)
class Gpu:
    """A GPU as NVML knows it. Each method returns None where NVML does not answer."""

    pynvml: Any
    handle: Any
    """The whole GPU, also for a MIG instance: driver, clocks and power are the whole GPU's."""
    instance: Any | None
    """The MIG instance, where the process has one."""
    is_instance: bool
    """The UUID names a MIG instance; an old driver gives no handle of the whole GPU for one."""

    def driver(self) -> str | None:
        """Return the version of the driver."""
        version = _ask(self.pynvml, "nvmlSystemGetDriverVersion")
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
        """Return the memory of the whole GPU."""
        memory = self._read("nvmlDeviceGetMemoryInfo")
        return None if memory is None else int(memory.total)

    def power_limit_w(self) -> float | None:
        """Return the power limit in watts."""
        milliwatts = self._read("nvmlDeviceGetPowerManagementLimit")
        return None if milliwatts is None else milliwatts / 1000

    def default_power_limit_w(self) -> float | None:
        """Return the power limit in watts that the GPU comes with."""
        milliwatts = self._read("nvmlDeviceGetPowerManagementDefaultLimit")
        return None if milliwatts is None else milliwatts / 1000

    def max_sm_clock_mhz(self) -> int | None:
        """Return the clock of the multiprocessors that the GPU can reach."""
        clock: int | None = self._read("nvmlDeviceGetMaxClockInfo", "NVML_CLOCK_SM")
        return clock

    def processes(self) -> list[int] | None:
        """Return the ids of the processes that compute on the whole GPU."""
        found = self._read("nvmlDeviceGetComputeRunningProcesses")
        return None if found is None else [int(process.pid) for process in found]

    def mig(self) -> str | None:
        """Return ``off``, ``on``, or the profile of the MIG instance."""
        if self.instance is not None:
            return _mig_profile(self.pynvml, self.instance)
        mode = self._read("nvmlDeviceGetMigMode")
        return _MIG_STATES.get(mode and mode[0])

    def state(self) -> GpuState:
        """Return clock, temperature, power and throttle reasons."""
        usage = self._read("nvmlDeviceGetPowerUsage")
        return {
            "sm_clock_mhz": self._read("nvmlDeviceGetClockInfo", "NVML_CLOCK_SM"),
            "temperature_c": self._read("nvmlDeviceGetTemperature", "NVML_TEMPERATURE_GPU"),
            "power_w": None if usage is None else usage / 1000,
            "throttle_reasons": self.throttle_reasons() or [],
        }

    def throttle_reasons(self) -> list[str] | None:
        """Return why the GPU runs slower than it could."""
        reasons = self._read("nvmlDeviceGetCurrentClocksEventReasons")
        if reasons is None:  # the older name
            reasons = self._read("nvmlDeviceGetCurrentClocksThrottleReasons")
        if reasons is None:
            return None
        return [name for bit, name in _THROTTLED.items() if reasons & bit]

    def counts_own_energy(self) -> bool:
        """Return whether :meth:`energy_j` counts what this process uses: not with MIG, where the
        counter is that of the whole GPU and all its instances."""
        return not self.is_instance and self.mig() != "on"

    def energy_j(self) -> float | None:
        """Return the energy in joules since the driver was loaded (Volta and later)."""
        millijoules = self._read("nvmlDeviceGetTotalEnergyConsumption")
        return None if millijoules is None else float(millijoules) / 1000

    def _read(self, function: str, *arguments: str) -> Any:
        return _ask(self.pynvml, function, self.handle, *arguments)


def whole_gpus() -> list[tuple[Gpu, list[str]]] | None:
    """Return the GPUs of this machine, each with its UUID or, with MIG on, with those of its
    instances; None without NVML."""
    pynvml, uuids = _library(), _uuids()
    if pynvml is None or uuids is None:
        return None
    handles = [_ask(pynvml, "nvmlDeviceGetHandleByIndex", i) for i in range(len(uuids))]
    return [
        (Gpu(pynvml, handle, None, False), part)
        for handle, part in zip(handles, uuids, strict=True)
    ]


def driver_cuda() -> tuple[int, int] | None:
    """Return the newest CUDA that the driver knows, None without NVML."""
    if (pynvml := _library()) is None:
        return None
    version = _ask(pynvml, "nvmlSystemGetCudaDriverVersion")
    return None if version is None else (version // 1000, version % 1000 // 10)


def find_gpu(uuid: str) -> Gpu | None:
    """Return the GPU or MIG instance with the UUID that torch gives, or None without NVML."""
    if (pynvml := _library()) is None:
        return None
    # torch leaves out which of the two a UUID is of.
    candidates = [uuid] if uuid.startswith(("GPU", "MIG")) else [f"GPU-{uuid}", f"MIG-{uuid}"]
    for candidate in candidates:
        if (handle := _ask(pynvml, "nvmlDeviceGetHandleByUUID", candidate)) is not None:
            break
    else:
        return None
    instance = None
    if _ask(pynvml, "nvmlDeviceIsMigDeviceHandle", handle):
        whole = _ask(pynvml, "nvmlDeviceGetDeviceHandleFromMigDeviceHandle", handle)
        if whole is not None:
            instance, handle = handle, whole
    return Gpu(pynvml, handle, instance, candidate.startswith("MIG") or instance is not None)


#: By NVML's current mode: without an instance of its own a process sees the whole GPU, or none.
_MIG_STATES = {0: "off", 1: "on"}


def _mig_profile(pynvml: Any, instance: Any) -> str:
    """Return the profile of a MIG instance as nvidia-smi names it, such as ``1g.10gb``."""
    name = _text(_ask(pynvml, "nvmlDeviceGetName", instance) or "")
    return name.rpartition(" MIG ")[2] if " MIG " in name else "on"
