"""Simulated machines: NVML, package metadata, and torch's report on its devices."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_int8bench.cli.checks import torch_probe
from pytest_int8bench.cli.checks.torch_probe import Device, TorchReport

_metadata = importlib.metadata

UUID = "1111-2222"
EVERY_KERNEL = ("specialized", "tma", "pointers", "quantize_rows", "dequantize")
H200 = Device("NVIDIA H200", UUID, kernels=EVERY_KERNEL)
NEEDS = {"specialized": "needs sm90, this is sm80", "tma": "needs sm90 or later, this is sm80"}
A100 = Device("NVIDIA A100-SXM4-80GB", UUID, kernels=EVERY_KERNEL[2:], unmet=NEEDS)
HEALTHY = TorchReport(
    version="2.11.0+cu130",
    cuda="13.0",
    compiler="true",  # the command of that name, which compiles all there is
    inductor_folder="inductor",
    triton_folder="triton",
    devices=(H200,),
)
#: Package -> version.
PACKAGES: dict[str, str | None] = {"triton": "3.6.0", "torchao": "0.18.0"}


class Nvml:
    """NVML of one GPU; defaults are those of a healthy H200."""

    NVML_CLOCK_SM = NVML_TEMPERATURE_GPU = 1

    def __init__(self, **values: Any) -> None:
        self.values = {
            "Name": "NVIDIA H200",
            "UUID": f"GPU-{UUID}",
            "CudaComputeCapability": (9, 0),
            "MemoryInfo": SimpleNamespace(total=139 << 30),
            "MigMode": (0, 0),
            "PowerManagementLimit": 700_000,
            "PowerManagementDefaultLimit": 700_000,
            "CurrentClocksEventReasons": 0x1,  # idle
            "PowerUsage": 75_000,
            "ClockInfo": 345,
            "MaxClockInfo": 1980,
            "Temperature": 31,
            "ComputeRunningProcesses": [],
            "MaxMigDeviceCount": 0,
            "Count": 1,
            "HandleByIndex": "handle",
            "DriverVersion": "580.159",
            "CudaDriverVersion": 13000,
            **values,
        }

    def nvmlInit(self) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        key = name.removeprefix("nvmlDeviceGet").removeprefix("nvmlSystemGet")
        if self.__dict__["values"].get(key) is None:
            raise AttributeError(name)
        return lambda *_: self.values[key]


def put(
    monkeypatch: pytest.MonkeyPatch,
    *,
    nvml: Nvml | None = None,
    torch: TorchReport = HEALTHY,
    plugins: tuple[str, ...] = (),
    torch_version: str | None = "2.11.0+cu130",
    asks: str = "triton==3.6.0",
    **packages: str | None,
) -> None:
    """Replace this machine by a simulated one; without ``nvml``, NVML does not answer.

    Args:
        monkeypatch: undoes the changes.
        nvml: the GPU.
        torch: the report of torch.
        plugins: distributions with plugins for pytest, besides those that are needed.
        torch_version: version of the installed torch.
        asks: what it asks for.
        **packages: versions that differ from :data:`PACKAGES`; None for what is not installed.
    """
    versions = {**PACKAGES, "torch": torch_version, **packages}
    find, needs = _metadata.version, _metadata.requires
    of_torch = [f'{asks}; platform_system == "{platform.system()}"', 'optree; extra == "optree"']

    def version(name: str) -> str:
        if name in versions and versions[name] is None:
            raise _metadata.PackageNotFoundError(name)
        return versions.get(name) or find(name)

    names = ("pytest-int8bench", "pytest-benchmark", *plugins)
    entries = [SimpleNamespace(dist=SimpleNamespace(metadata={"Name": name})) for name in names]
    monkeypatch.setattr(_metadata, "version", version)
    monkeypatch.setattr(
        _metadata, "requires", lambda name: of_torch if name == "torch" else needs(name)
    )
    monkeypatch.setattr(_metadata, "entry_points", lambda **_: entries)
    monkeypatch.setattr(torch_probe, "ask", lambda: torch)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
