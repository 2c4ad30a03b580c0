"""Test the fingerprint of machine and software, and the state of the GPU."""

from __future__ import annotations

import copy
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from pytest_int8bench import environment
from pytest_int8bench.environment import (
    FINGERPRINT_NAMES,
    MAY_DIFFER,
    compiled_for,
    describe,
    differences,
    fingerprint,
    gpu_state,
)
from pytest_int8bench.nvml import throttled
from toys.repositories import git, isolate


def test_the_fingerprint_names_software_and_machine(tmp_path: Path) -> None:
    found = fingerprint(tmp_path)
    assert found["packages"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert found["packages"]["torchao"]
    assert found["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}.")
    assert found["cpu"]
    assert found["cpu_threads"] == torch.get_num_threads()
    assert (found["gpu"] is None) == (not torch.cuda.is_available())
    assert (found["commit"], found["dirty"]) == (None, None)
    assert f"torch {found['packages']['torch']}" in describe(found)


def test_fingerprint_includes_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    isolate(monkeypatch, tmp_path)
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "first")
    found = fingerprint(tmp_path)
    assert (found["commit"], found["dirty"]) == (git(tmp_path, "rev-parse", "HEAD"), False)
    (tmp_path / "file").touch()
    assert fingerprint(tmp_path)["dirty"] is True


@pytest.mark.parametrize("variable", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_fingerprint_includes_the_allocator_setting(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    assert fingerprint(tmp_path)["allocator"] is None
    monkeypatch.setenv(variable, "expandable_segments:True")
    assert fingerprint(tmp_path)["allocator"] == "expandable_segments:True"


# -- differences ------------------------------------------------------------------------------

GPU = {"compute_capability": "8.0", "sm_count": 108, "memory_bytes": 80 << 30}
MACHINE: dict[str, Any] = {
    "gpu": {
        "name": "A100",
        **GPU,
        "driver": "580.1",
        "power_limit_w": 400.0,
        "mig": "off",
    },
    "gpu_count": 1,
    "cuda": "13.0",
    "cudnn": 91000,
    "allocator": None,
    "python": "3.11.9",
    "system": "Linux x86_64",
    "cpu": "EPYC",
    "cpu_threads": 8,
    "tracers": None,
    "packages": {
        "torch": "2.11.0",
        "triton": "3.6.0",
        "torchao": "0.18.0",
        "pytest-int8bench": "0.1.0",
        "pytest-benchmark": "5.1.0",
    },
    "commit": "abc",
    "dirty": False,
}


def test_every_fingerprint_value_has_a_name(tmp_path: Path) -> None:
    found = fingerprint(tmp_path)
    assert set(found) == set(MACHINE)
    assert set(found["packages"]) == set(MACHINE["packages"])
    values = {**MACHINE, **MACHINE["gpu"], **MACHINE["packages"], "gpu": MACHINE["gpu"]["name"]}
    del values["packages"], values["name"]
    assert set(FINGERPRINT_NAMES) == set(values)
    assert len(FINGERPRINT_NAMES) == len(values)
    assert MAY_DIFFER == ("commit", "dirty")


def test_active_tracers_make_runs_differ(tmp_path: Path) -> None:
    plain, traced = fingerprint(tmp_path), fingerprint(tmp_path, ["tracemalloc", "torch.profiler"])
    assert plain["tracers"] is None
    assert differences(plain, traced) == {"tracers": (None, "tracemalloc, torch.profiler")}
    assert "tracers" not in compiled_for()


def test_triton_matters_only_with_a_gpu() -> None:
    other = {**MACHINE, "packages": {**MACHINE["packages"], "triton": None}}
    assert differences(MACHINE, other) == {"triton": ("3.6.0", None)}
    cpu, other_cpu = ({**machine, "gpu": None} for machine in (MACHINE, other))
    assert differences(cpu, other_cpu) == {}
    assert differences(cpu, other)["triton"] == ("3.6.0", None)


@pytest.mark.parametrize("name", FINGERPRINT_NAMES)
def test_differences_are_named(name: str) -> None:
    changed = copy.deepcopy(MACHINE)
    part = next((p for p in (changed["gpu"], changed["packages"]) if name in p), changed)
    if name == "gpu":
        part, key = changed["gpu"], "name"
    else:
        key = name
    before, part[key] = part[key], "another"
    expected = {} if name in MAY_DIFFER else {name: (before, "another")}
    assert differences(MACHINE, changed) == expected
    assert differences(changed, MACHINE) == {n: (b, a) for n, (a, b) in expected.items()}


def test_missing_values_differ_from_present_ones() -> None:
    assert differences(MACHINE, copy.deepcopy(MACHINE)) == differences({}, {"gpu": None}) == {}
    without = {**MACHINE, "gpu": None}
    assert differences(MACHINE, without) == {
        name: (MACHINE["gpu"]["name" if name == "gpu" else name], None)
        for name in FINGERPRINT_NAMES[:7]
    }
    assert set(differences({}, MACHINE)) == {*FINGERPRINT_NAMES} - {
        *MAY_DIFFER,
        *("allocator", "tracers"),
    }


# -- the GPU, simulated -----------------------------------------------------------------------


class NVMLError(Exception):
    pass


class FakeNvml(types.ModuleType):
    """NVML that answers, except for the functions in ``refuses``."""

    NVMLError = NVMLError
    NVML_CLOCK_SM = 1
    NVML_TEMPERATURE_GPU = 0

    def __init__(
        self,
        reasons: int = 0,
        refuses: tuple[str, ...] = (),
        mig: int = 0,
        instance: str | bytes | None = None,
    ) -> None:
        super().__init__("pynvml")
        self.reasons = reasons
        self.mig = mig
        self.instance = instance
        self.refuses = refuses
        self.asked: list[str] = []

    def answer(self, name: str, value: Any) -> Any:
        if name in self.refuses:
            raise NVMLError(name)
        return value

    def nvmlInit(self) -> None:
        self.answer("init", None)

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        self.asked.append(uuid)
        if self.instance is not None and not uuid.startswith("MIG"):
            raise NVMLError(uuid)
        return "handle" if self.instance is None else "instance"

    def nvmlDeviceIsMigDeviceHandle(self, handle: str) -> bool:
        return bool(self.answer("is mig", handle == "instance"))

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, handle: str) -> str:
        assert handle == "instance"
        return "handle"

    def nvmlDeviceGetName(self, handle: str) -> str | bytes:
        assert handle == "instance"
        assert self.instance is not None
        return self.answer("name", self.instance)

    def nvmlSystemGetDriverVersion(self) -> bytes:
        return b"580.1"

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: str) -> int:
        return int(self.answer("reasons", self.reasons))

    def nvmlDeviceGetPowerManagementLimit(self, handle: str) -> int:
        assert handle == "handle"  # the whole GPU's limit; an instance has none
        return int(self.answer("limit", 700_000))

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        return int(self.answer("usage", 294_590))

    def nvmlDeviceGetMigMode(self, handle: str) -> list[int]:
        assert handle == "handle"
        return list(self.answer("mig", [self.mig, 0]))

    def nvmlDeviceGetClockInfo(self, handle: str, kind: int) -> int:
        return int(self.answer("clock", 1980))

    def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:
        return int(self.answer("temperature", 41))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A CUDA device without torch's knowledge of one."""
    properties = types.SimpleNamespace(
        name="Fake A100", major=8, minor=0, multi_processor_count=108, total_memory=80 << 30
    )
    properties.uuid = "1-2-3"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return monkeypatch


def use(gpu: pytest.MonkeyPatch, nvml: FakeNvml) -> FakeNvml:
    gpu.setitem(sys.modules, "pynvml", nvml)
    return nvml


def test_gpu_state_has_units(gpu: pytest.MonkeyPatch) -> None:
    nvml = use(gpu, FakeNvml())
    assert gpu_state() == {
        "sm_clock_mhz": 1980,
        "temperature_c": 41,
        "power_w": 294.59,
        "throttle_reasons": [],
    }
    assert nvml.asked == ["GPU-1-2-3"]


def test_the_fingerprint_describes_the_gpu(gpu: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use(gpu, FakeNvml())
    assert fingerprint(tmp_path)["gpu"] == {
        "name": "Fake A100",
        **GPU,
        "driver": "580.1",
        "power_limit_w": 700.0,
        "mig": "off",
    }


@pytest.mark.parametrize(
    ("nvml", "mig"),
    [
        (FakeNvml(), "off"),
        (FakeNvml(mig=1), "on"),
        (FakeNvml(refuses=("mig",)), None),
        (FakeNvml(refuses=("is mig",)), "off"),  # an old driver
        (FakeNvml(mig=1, instance="NVIDIA A100-SXM4-80GB MIG 1g.10gb"), "1g.10gb"),
        (FakeNvml(mig=1, instance=b"NVIDIA H200 MIG 3g.71gb+me"), "3g.71gb+me"),
        (FakeNvml(mig=1, instance="NVIDIA A100"), "on"),
        (FakeNvml(mig=1, instance="NVIDIA A100 MIG 1g.10gb", refuses=("name",)), "on"),
    ],
)
def test_the_profile_of_a_mig_instance_is_part_of_the_fingerprint(
    gpu: pytest.MonkeyPatch, tmp_path: Path, nvml: FakeNvml, mig: str | None
) -> None:
    use(gpu, nvml)
    found = fingerprint(tmp_path)["gpu"]
    assert (found["mig"], found["driver"], found["power_limit_w"]) == (mig, "580.1", 700.0)
    # torch omits the prefix that tells GPUs from MIG instances.
    assert nvml.asked == ["GPU-1-2-3", "MIG-1-2-3"][: 1 if nvml.instance is None else 2]


def test_passes_prefixed_uuid_unchanged(gpu: pytest.MonkeyPatch, tmp_path: Path) -> None:
    properties = torch.cuda.get_device_properties(0)
    gpu.setattr(properties, "uuid", "MIG-7-8-9")
    nvml = use(gpu, FakeNvml(mig=1, instance="NVIDIA A100 MIG 2g.20gb"))
    assert fingerprint(tmp_path)["gpu"]["mig"] == "2g.20gb"
    assert nvml.asked == ["MIG-7-8-9"]


def test_unknown_gpu_keeps_other_values(gpu: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nvml = use(gpu, FakeNvml())
    gpu.setattr(nvml, "nvmlDeviceGetHandleByUUID", lambda uuid: nvml.answer("uuid", None))
    nvml.refuses = ("uuid",)
    assert fingerprint(tmp_path)["gpu"] == {"name": "Fake A100", **GPU}


@pytest.mark.parametrize(
    ("reasons", "named"),
    [
        (0x1 | 0x2 | 0x4, []),  # idle, application clocks, power cap: normal at full load
        (0x8, ["hardware slowdown"]),
        (0x20 | 0x40, ["thermal (software)", "thermal (hardware)"]),
        (0x80, ["power brake"]),
    ],
)
def test_throttle_reasons_counted(gpu: pytest.MonkeyPatch, reasons: int, named: list[str]) -> None:
    use(gpu, FakeNvml(reasons))
    assert throttled(gpu_state()) == named


def test_values_missing_from_nvml_are_none(gpu: pytest.MonkeyPatch) -> None:
    use(gpu, FakeNvml(refuses=("reasons", "usage", "clock", "temperature", "limit", "mig")))
    assert gpu_state() == {
        "sm_clock_mhz": None,
        "temperature_c": None,
        "power_w": None,
        "throttle_reasons": [],
    }


def test_no_gpu_state_without_nvml(gpu: pytest.MonkeyPatch) -> None:
    use(gpu, FakeNvml(refuses=("init",)))
    assert gpu_state() is None
    assert throttled(None) == []


def test_describes_the_machine_in_one_line(gpu: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use(gpu, FakeNvml())
    gpu.setattr(environment, "package_version", {"torch": "2.13.0", "torchao": "0.18.0"}.get)
    gpu.setattr(torch.version, "cuda", "13.0")
    assert describe(fingerprint(tmp_path)) == "Fake A100, CUDA 13.0, torch 2.13.0, torchao 0.18.0"


# -- unreadable values -------------------------------------------------------------------------


def test_file_name_that_is_not_utf8_counts_as_a_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    isolate(monkeypatch, tmp_path)
    git(tmp_path, "init", "-q")
    git(tmp_path, "config", "core.quotePath", "false")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "first")
    assert fingerprint(tmp_path)["dirty"] is False
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("x")
    assert fingerprint(tmp_path)["dirty"] is True
    assert len(fingerprint(tmp_path)["commit"]) == 40


@pytest.mark.parametrize(
    "name",
    [
        "torch.cuda.is_available",
        "torch.cuda.device_count",
        "torch.backends.cudnn.version",
        "torch.get_num_threads",
        "platform.python_version",
        "platform.system",
        "subprocess.run",
        "importlib.metadata.version",
        "pathlib.Path.read_text",
        "pytest_int8bench.environment.find_gpu",
        "pytest_int8bench.environment._cpu_model",
    ],
)
@pytest.mark.parametrize("error", [KeyError("bug"), UnicodeDecodeError("utf-8", b"", 0, 1, "bad")])
def test_fingerprint_survives_values_that_cannot_be_read(
    name: str, error: Exception, gpu: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    gpu.setattr(name, fail)
    found = fingerprint(tmp_path)
    assert set(found) == {"gpu", *MACHINE} - {"schema"}
    gpu_state()
