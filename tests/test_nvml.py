"""Test GPUs through NVML: which ones a process may use, MIG, ``CUDA_VISIBLE_DEVICES``, energy."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_int8bench.nvml import described, find_gpu, pin, visible

A, B, C = "GPU-aaaa-1", "GPU-aabb-2", "GPU-cccc-3"
M1, M2 = "MIG-1111", "MIG-2222"


class NVMLError(Exception):
    pass


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Simulate a machine, given UUIDs of GPUs and lists of UUIDs of MIG instances."""

    def put(*devices: Any) -> None:
        def mig_mode(handle: int) -> tuple[int, int]:
            if devices[handle] == C:
                raise NVMLError("not supported")
            return (int(isinstance(devices[handle], list)),) * 2

        def instance(handle: int, i: int) -> str:
            if devices[handle][i] is None:
                raise NVMLError("not found")
            return str(devices[handle][i])

        fake = SimpleNamespace(
            NVMLError=NVMLError,
            nvmlInit=lambda: None,
            nvmlDeviceGetCount=lambda: len(devices),
            nvmlDeviceGetHandleByIndex=lambda i: i,
            nvmlDeviceGetMigMode=mig_mode,
            nvmlDeviceGetMaxMigDeviceCount=lambda handle: len(devices[handle]),
            nvmlDeviceGetMigDeviceHandleByIndex=instance,
            nvmlDeviceGetUUID=lambda h: h if isinstance(h, str) else devices[h].encode(),
        )
        monkeypatch.setitem(sys.modules, "pynvml", fake)

    return put


@pytest.fixture
def no_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise NVMLError("driver not loaded")

    monkeypatch.setitem(sys.modules, "pynvml", SimpleNamespace(nvmlInit=refuse))


def asked(value: str) -> list[str] | None:
    return visible({"CUDA_VISIBLE_DEVICES": value})


def test_lists_all_gpus_by_uuid(machine: Any) -> None:
    machine(A, B, C)
    assert visible({}) == [A, B, C]


def test_lists_mig_instances_in_place_of_their_gpu(machine: Any) -> None:
    machine([M1, None, M2], C)
    assert visible({}) == [M1, M2, C]


@pytest.mark.parametrize(
    ("value", "names"),
    [
        ("2,0", ["2", "0"]),
        (" 1 , 2 ", ["1", "2"]),
        (f"{C},{A}", [C, A]),
        ("GPU-cc,GPU-aab", ["GPU-cc", "GPU-aab"]),
        ("", []),
        ("-1,0", []),
        ("0,-1,1", ["0"]),
        ("0,7,1", ["0"]),
        ("0,GPU-cccc-3", ["0"]),
        (f"{A},GPU-dead,{B}", [A]),
        ("0,1,0", []),
        ("NoDevFiles", []),
    ],
)
def test_reads_cuda_visible_devices_like_cuda(machine: Any, value: str, names: list[str]) -> None:
    machine(A, B, C)
    assert asked(value) == names


def test_lists_mig_instances_named_by_the_variable(machine: Any) -> None:
    machine([M1, M2])
    assert asked(f"{M2},{M1}") == [M2, M1]
    assert asked(f"MIG-9999,{M1}") == []


def test_uses_only_the_variable_without_nvml(no_nvml: None) -> None:
    assert visible({}) is None
    assert asked("3,5") == ["3", "5"]
    assert asked(f"{M1},MIG-3333") == [M1, "MIG-3333"]


def test_each_process_is_pinned_to_one_device(machine: Any) -> None:
    machine(A, B, C)
    for given, names in (({}, [A, B, C]), ({"CUDA_VISIBLE_DEVICES": "2,0"}, ["2", "0"])):
        for number, name in enumerate(names):
            environ = dict(given)
            assert pin(number, environ) == name
            assert environ == {"CUDA_VISIBLE_DEVICES": name}
        environ = dict(given)
        assert pin(len(names), environ) is None
        assert environ == given


def test_without_nvml_gpus_go_by_number(no_nvml: None) -> None:
    environ: dict[str, str] = {}
    assert pin(3, environ) == "3"
    assert environ == {"CUDA_VISIBLE_DEVICES": "3"}


def test_describes_the_source_of_the_gpu_count() -> None:
    assert described([A], {}) == "this machine has 1 GPU"
    environ = {"CUDA_VISIBLE_DEVICES": "2,3"}
    assert described(["2", "3"], environ) == "CUDA_VISIBLE_DEVICES names 2 GPUs"


# -- one GPU ------------------------------------------------------------------------------------


class OneGpu:
    """NVML of one GPU, whole or with MIG, without the functions in ``missing``."""

    NVMLError = NVMLError

    def __init__(self, *, mig: bool = False, missing: tuple[str, ...] = ()) -> None:
        self.mig = mig
        self.missing = missing
        self.initialized = 0

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("nvml") or name not in self.missing:
            return super().__getattribute__(name)

        def refuse(*args: Any) -> None:
            raise NVMLError(f"{name}: not found")

        return refuse

    def nvmlInit(self) -> None:
        self.initialized += 1

    def nvmlDeviceGetCount(self) -> int:
        return 0

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid != ("MIG-1" if self.mig else "GPU-1"):
            raise NVMLError("not found")
        return "instance" if self.mig else "whole"

    def nvmlDeviceIsMigDeviceHandle(self, handle: str) -> bool:
        return handle == "instance"

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, handle: str) -> str:
        return "whole"

    def nvmlDeviceGetName(self, handle: str) -> str:
        return "NVIDIA H200 MIG 1g.18gb"

    def nvmlDeviceGetMigMode(self, handle: str) -> list[int]:
        return [int(self.mig)] * 2

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        assert handle == "whole"
        return 1_500


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Simulate NVML with one GPU."""

    def put(**kwargs: Any) -> OneGpu:
        nvml = OneGpu(**kwargs)
        monkeypatch.setitem(sys.modules, "pynvml", nvml)
        return nvml

    return put


def test_nvml_is_initialized_once(one_gpu: Any) -> None:
    nvml = one_gpu()
    assert visible({}) == []
    assert find_gpu("1") is not None
    assert find_gpu("GPU-1") is not None
    assert nvml.initialized == 1


def test_energy_is_in_joules(one_gpu: Any) -> None:
    one_gpu()
    gpu = find_gpu("1")
    assert gpu is not None
    assert (gpu.energy_j(), gpu.counts_own_energy()) == (1.5, True)


def test_gpu_without_energy_counter_has_no_energy(one_gpu: Any) -> None:
    one_gpu(missing=("nvmlDeviceGetTotalEnergyConsumption",))
    gpu = find_gpu("1")
    assert gpu is not None
    assert gpu.energy_j() is None


@pytest.mark.parametrize(
    "missing", [(), ("nvmlDeviceIsMigDeviceHandle", "nvmlDeviceGetMigMode")], ids=["new", "old"]
)
def test_mig_instance_has_no_energy(one_gpu: Any, missing: tuple[str, ...]) -> None:
    one_gpu(mig=True, missing=missing)
    gpu = find_gpu("1")
    assert gpu is not None
    assert not gpu.counts_own_energy()


def test_gpu_without_mig_support_has_energy(one_gpu: Any) -> None:
    one_gpu(missing=("nvmlDeviceGetMigMode",))
    gpu = find_gpu("1")
    assert gpu is not None
    assert gpu.counts_own_energy()


def test_unknown_uuid_finds_no_gpu(one_gpu: Any, no_nvml: None) -> None:
    assert find_gpu("1") is None
    one_gpu()
    assert find_gpu("2") is None


# -- an old driver, or an old pynvml -------------------------------------------------------------

FUNCTIONS = {
    "nvmlInit": lambda: None,
    "nvmlDeviceGetHandleByUUID": lambda uuid: 1,
    "nvmlDeviceIsMigDeviceHandle": lambda handle: 1,
    "nvmlDeviceGetDeviceHandleFromMigDeviceHandle": lambda handle: 2,
    "nvmlSystemGetDriverVersion": lambda: "580.1",
    "nvmlDeviceGetPowerManagementLimit": lambda handle: 700_000,
    "nvmlDeviceGetMigMode": lambda handle: (1, 1),
    "nvmlDeviceGetName": lambda handle: "NVIDIA A100 MIG 1g.10gb",
    "nvmlDeviceGetCurrentClocksEventReasons": lambda handle: 0,
    "nvmlDeviceGetPowerUsage": lambda handle: 100_000,
    "nvmlDeviceGetClockInfo": lambda handle, kind: 1980,
    "nvmlDeviceGetTemperature": lambda handle, sensor: 41,
    "nvmlDeviceGetTotalEnergyConsumption": lambda handle: 1000,
    "nvmlDeviceGetCount": lambda: 1,
    "nvmlDeviceGetHandleByIndex": lambda i: i,
    "nvmlDeviceGetUUID": lambda handle: "GPU-1",
    "nvmlDeviceGetMaxMigDeviceCount": lambda handle: 1,
    "nvmlDeviceGetMigDeviceHandleByIndex": lambda handle, i: 7,
}
CONSTANTS = {"NVML_CLOCK_SM": 1, "NVML_TEMPERATURE_GPU": 0, "NVMLError": NVMLError}


def everything() -> list[Any]:
    gpu = find_gpu("1")
    if gpu is None:
        return [visible({})]
    return [
        visible({}),
        gpu.driver(),
        gpu.power_limit_w(),
        gpu.mig(),
        gpu.state(),
        gpu.counts_own_energy(),
        gpu.energy_j(),
    ]


@pytest.mark.parametrize("how", ["missing", "raises"])
@pytest.mark.parametrize("name", [*FUNCTIONS, *CONSTANTS])
def test_values_missing_from_pynvml_are_none(
    name: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError("the library of another version")

    members: dict[str, Any] = {**FUNCTIONS, **CONSTANTS}
    if how == "missing":
        del members[name]
    else:
        members[name] = fail
    monkeypatch.setitem(sys.modules, "pynvml", SimpleNamespace(**members))
    everything()


def test_reads_throttle_reasons_by_their_older_name(monkeypatch: pytest.MonkeyPatch) -> None:
    members: dict[str, Any] = {**FUNCTIONS, **CONSTANTS}
    del members["nvmlDeviceGetCurrentClocksEventReasons"]
    members["nvmlDeviceGetCurrentClocksThrottleReasons"] = lambda handle: 0x8
    monkeypatch.setitem(sys.modules, "pynvml", SimpleNamespace(**members))
    gpu = find_gpu("1")
    assert gpu is not None
    assert gpu.state()["throttle_reasons"] == ["hardware slowdown"]
