"""The fingerprint of machine and software, and the state of the GPU."""

from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from pytest_int8bench import environment
from pytest_int8bench.environment import describe, fingerprint, gpu_state, throttled


def git(folder: Path, *args: str) -> str:
    name = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    done = subprocess.run(
        ["git", "-C", str(folder), *name, *args], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


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


def test_the_fingerprint_holds_the_commit(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "first")
    found = fingerprint(tmp_path)
    assert (found["commit"], found["dirty"]) == (git(tmp_path, "rev-parse", "HEAD"), False)
    (tmp_path / "file").touch()
    assert fingerprint(tmp_path)["dirty"] is True


@pytest.mark.parametrize("variable", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_the_allocator_is_as_the_user_set_it(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    assert fingerprint(tmp_path)["allocator"] is None
    monkeypatch.setenv(variable, "expandable_segments:True")
    assert fingerprint(tmp_path)["allocator"] == "expandable_segments:True"


# -- the GPU, simulated -----------------------------------------------------------------------


class NVMLError(Exception):
    pass


class FakeNvml(types.ModuleType):
    """NVML that answers, but for what is in ``refuses``."""

    NVMLError = NVMLError
    NVML_CLOCK_SM = 1
    NVML_TEMPERATURE_GPU = 0

    def __init__(self, reasons: int = 0, refuses: tuple[str, ...] = ()) -> None:
        super().__init__("pynvml")
        self.reasons = reasons
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
        return "handle"

    def nvmlSystemGetDriverVersion(self) -> bytes:
        return b"580.1"

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: str) -> int:
        return int(self.answer("reasons", self.reasons))

    def nvmlDeviceGetPowerManagementLimit(self, handle: str) -> int:
        return int(self.answer("limit", 700_000))

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        return int(self.answer("usage", 294_590))

    def nvmlDeviceGetMigMode(self, handle: str) -> list[int]:
        return list(self.answer("mig", [0, 0]))

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


def test_the_state_of_the_gpu_has_units(gpu: pytest.MonkeyPatch) -> None:
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
        "compute_capability": "8.0",
        "sm_count": 108,
        "memory_bytes": 80 << 30,
        "driver": "580.1",
        "power_limit_w": 700.0,
        "mig": False,
    }


@pytest.mark.parametrize(
    ("reasons", "named"),
    [
        (0x1 | 0x2 | 0x4, []),  # idle, application clocks, power cap: normal at full load
        (0x8, ["hardware slowdown"]),
        (0x20 | 0x40, ["thermal (software)", "thermal (hardware)"]),
        (0x80, ["power brake"]),
    ],
)
def test_only_what_slows_a_measurement_down_counts(
    gpu: pytest.MonkeyPatch, reasons: int, named: list[str]
) -> None:
    use(gpu, FakeNvml(reasons))
    assert throttled(gpu_state()) == named


def test_what_nvml_does_not_say_is_none(gpu: pytest.MonkeyPatch) -> None:
    use(gpu, FakeNvml(refuses=("reasons", "usage", "clock", "temperature", "limit", "mig")))
    assert gpu_state() == {
        "sm_clock_mhz": None,
        "temperature_c": None,
        "power_w": None,
        "throttle_reasons": [],
    }


def test_without_nvml_there_is_no_state(gpu: pytest.MonkeyPatch) -> None:
    use(gpu, FakeNvml(refuses=("init",)))
    assert gpu_state() is None
    assert throttled(None) == []


def test_the_machine_is_one_line(gpu: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use(gpu, FakeNvml())
    gpu.setattr(environment, "_version", {"torch": "2.13.0", "torchao": "0.18.0"}.get)
    gpu.setattr(torch.version, "cuda", "13.0")
    assert describe(fingerprint(tmp_path)) == "Fake A100, CUDA 13.0, torch 2.13.0, torchao 0.18.0"
